"""systemd, asked to start, change and stop the units of containers.

    caller                          systemd
    StartTransientUnit              -> job
                                    JobRemoved(job, result) once the unit is there, and the process in its cgroup

It is asked on its private socket, where there is no other between, and if that is not to be had by the message bus.
Source: org.freedesktop.systemd1(5).
"""

import errno
import os
import time
from collections.abc import Sequence
from typing import Any, Self

from corral.kernel.cgroup.systemd.names import SLICE
from corral.kernel.cgroup.systemd.properties import Property
from corral.kernel.dbus.connection import BUS, CallFailed, Connection, Target
from corral.kernel.dbus.marshalling import Variant

BOOTED = "/run/systemd/system"
"""There if systemd runs this host. Source: sd_booted(3)."""
PRIVATE = "/run/systemd/private"
_BUS = "unix:path=/run/dbus/system_bus_socket"

_SERVICE, _PATH = "org.freedesktop.systemd1", "/org/freedesktop/systemd1"
_INTERFACE = f"{_SERVICE}.Manager"
_MANAGER = Target(_SERVICE, _PATH, _INTERFACE)
_PROPERTIES = Target(_SERVICE, _PATH, "org.freedesktop.DBus.Properties")
_EXISTS, _NOT_THERE = f"{_SERVICE}.UnitExists", f"{_SERVICE}.NoSuchUnit"
_JOBS = f"type='signal',interface='{_INTERFACE}',member='JobRemoved'"
_ELSEWHERE = frozenset((errno.ENOENT, errno.ECONNREFUSED, errno.EACCES, errno.EPERM))


class Manager:
    """A connection to the systemd of the host, or of a user. Its methods raise OSError, naming the unit."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._version: int | None = None

    @classmethod
    def open(cls, *, user: bool, within_s: float = float("inf")) -> Self:
        """Connect. user: to the caller's own, not the host's. Raises OSError if that can't be reached.

        within_s: how long all that is asked may take; any single answer may take 30 s.
        """
        until = time.monotonic() + within_s
        runtime_dir = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}"
        try:
            return cls(Connection(f"{runtime_dir}/systemd/private" if user else PRIVATE, until=until))
        except OSError as e:
            if e.errno not in _ELSEWHERE:
                raise
        bus = os.environ.get("DBUS_SESSION_BUS_ADDRESS") or f"unix:path={runtime_dir}/bus"
        bus = bus if user else os.environ.get("DBUS_SYSTEM_BUS_ADDRESS") or _BUS
        connection = Connection.to_bus(bus, until=until)
        try:
            # Nobody is told of jobs who did not ask for it; on the private socket everybody is.
            connection.call(BUS, "AddMatch", "s", _JOBS)
            connection.call(_MANAGER, "Subscribe")
        except BaseException:
            connection.close()
            raise
        return cls(connection)

    def close(self) -> None:
        """End the connection."""
        self._connection.close()

    @property
    def version(self) -> int:
        """257 of "257.13-1~deb13u1"; 0 of what has no number."""
        if self._version is None:
            text = self._property("Version").lstrip("v")
            digits = text[: len(text) - len(text.lstrip("0123456789"))]
            self._version = int(digits or 0)
        return self._version

    @property
    def control_group(self) -> str:
        """The cgroup that all units are below, "" for the root."""
        return self._property("ControlGroup").rstrip("/")

    def _property(self, name: str) -> str:
        (value,) = self._connection.call(_PROPERTIES, "Get", "ss", _INTERFACE, name)
        return str(value.value)

    def start(self, unit: str, properties: Sequence[Property]) -> None:
        """Make a unit and see it started. One of the name that failed makes room for it."""
        try:
            self._start(unit, properties)
        except CallFailed as e:
            if e.name != _EXISTS:
                raise
            self.reset(unit)
            self._start(unit, properties)

    def _start(self, unit: str, properties: Sequence[Property]) -> None:
        method, signature = "StartTransientUnit", "ssa(sv)a(sa(sv))"
        (job,) = self._connection.call(_MANAGER, method, signature, unit, "replace", list(properties), [])
        self._check(unit, job)

    def _check(self, unit: str, job: str) -> None:
        if (result := self._result(job)) != "done":
            self.reset(unit)
            raise OSError(errno.EREMOTEIO, f"systemd did not start the unit: {result}", unit)

    def start_slice(self, unit: str, properties: Sequence[Property]) -> None:
        """See a slice started: as it is configured, or else with these properties, and then it goes when stopped."""
        try:
            self._start(unit, properties)
        except CallFailed as e:
            if e.name != _EXISTS:
                raise
            (job,) = self._connection.call(_MANAGER, "StartUnit", "ss", unit, "replace")
            self._check(unit, job)

    def start_scope(self, unit: str, slice_: str, pid: int, properties: Sequence[Property] = ()) -> None:
        """Make a scope around a process, which is moved into its cgroup; below that, everything is the caller's.

        The scope ends with the last process in it. properties: more of them, which may also change those here.
        """
        own = [
            ("Slice", Variant("s", slice_)),
            ("PIDs", Variant("au", [pid])),
            ("Delegate", Variant("b", True)),
            ("DefaultDependencies", Variant("b", False)),
        ]
        self.start(unit, [*own, *properties])

    def cgroup_of(self, unit: str) -> str | None:
        """Where the cgroup of a slice or scope is, "" if it has none any more; None if there is no such unit."""
        answer = self._ask(unit, "Get", "ss", "ControlGroup")
        return answer and str(answer.value)

    def properties_of(self, unit: str) -> dict[str, Variant]:
        """All that a slice or scope is set to; nothing if there is no such unit."""
        return dict(self._ask(unit, "GetAll", "s") or ())

    def _ask(self, unit: str, method: str, signature: str, *names: str) -> Any:
        """A call about properties of a slice or scope; None if there is no such unit."""
        try:
            (path,) = self._connection.call(_MANAGER, "GetUnit", "s", unit)
        except CallFailed as e:
            if e.name != _NOT_THERE:
                raise
            return None
        interface = f"{_SERVICE}.{'Slice' if unit.endswith(SLICE) else 'Scope'}"
        (found,) = self._connection.call(
            Target(_SERVICE, path, _PROPERTIES.interface), method, signature, interface, *names
        )
        return found

    def set_properties(self, unit: str, properties: Sequence[Property]) -> None:
        """Change a unit until the host is booted again."""
        self._connection.call(_MANAGER, "SetUnitProperties", "sba(sv)", unit, True, list(properties))

    def stop(self, unit: str) -> None:
        """Stop a unit, with what runs in it, and forget it; no error if there is none."""
        try:
            (job,) = self._connection.call(_MANAGER, "StopUnit", "ss", unit, "replace")
        except CallFailed as e:
            if e.name != _NOT_THERE:
                raise
            return
        self._result(job)
        self.reset(unit)

    def reset(self, unit: str) -> None:
        """Forget that a unit failed, and so the unit itself; no error if there is none."""
        try:
            self._connection.call(_MANAGER, "ResetFailedUnit", "s", unit)
        except CallFailed as e:
            if e.name != _NOT_THERE:
                raise

    def _result(self, job: str) -> str:
        """How a job ended, "done" if well."""
        body = self._connection.wait_for_signal(_INTERFACE, "JobRemoved", lambda body: body[1] == job)
        return str(body[3])
