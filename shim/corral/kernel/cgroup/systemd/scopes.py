"""The scope of a container: what it is made with, and its limits, which the kernel is given and systemd is told.

    start    around a process that only holds it, as systemd makes none that is empty
             the limits are written to the files of its cgroup, all but that of processes: the holder would count
             init is born in it, and the holder ends
    change   the limits again, and systemd is told of them: it would undo them the next time that it writes the files

Source: runc docs/systemd.md "Resource limits".
"""

import errno
import os
import select
import signal
from collections.abc import Sequence
from dataclasses import replace

from corral.kernel import process
from corral.kernel.cgroup import steps
from corral.kernel.cgroup.group import Cgroup
from corral.kernel.cgroup.layout import Layout
from corral.kernel.cgroup.resources import Resources
from corral.kernel.cgroup.steps import Step
from corral.kernel.cgroup.systemd import properties
from corral.kernel.cgroup.systemd.manager import Manager
from corral.kernel.cgroup.systemd.properties import Property
from corral.kernel.dbus.marshalling import Variant

_ACCOUNTING = ("CPUAccounting", "MemoryAccounting", "TasksAccounting")


_KILLED_S = 5.0
"""For a holder to end."""


def end_holder(pidfd: int, where: str) -> None:
    """Kill and reap the process that holds a scope, and close its pidfd. Raises TimeoutError; then it is open still."""
    process.send_signal(pidfd, signal.SIGKILL)
    ended = select.poll()
    ended.register(pidfd, select.POLLIN)
    if not ended.poll(_KILLED_S * 1000):
        raise TimeoutError(errno.ETIMEDOUT, "the process that holds this scope does not end", where)
    os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    os.close(pidfd)


def accounting(layout: Layout) -> list[Property]:
    """What has systemd turn on the controllers."""
    io = layout.of("blkio")
    names = (*_ACCOUNTING, "BlockIOAccounting" if io is not None and io.version == 1 else "IOAccounting")
    return [(name, Variant("b", True)) for name in names]


def told_at_start(limits: Resources, layout: Layout, version: int) -> list[Property]:
    """Those limits that systemd takes, or keeps to, only if it is told when it makes a unit."""
    found = device_properties(limits, layout)
    if oom_group := limits.unified.get("memory.oom.group"):
        found += properties.oom_policy(oom_group, version)
    return found


def device_properties(limits: Resources, layout: Layout) -> list[Property]:
    """What systemd is told of devices: on v1 only. The program that rules them on v2 it does not touch."""
    if limits.devices is None or layout.of("devices") is None:
        return []
    return properties.device_properties(limits.devices)


def plan(group: Cgroup, limits: Resources) -> list[Step]:
    """The steps that set limits, as systemd will write them, too. Raises OSError."""
    return properties.in_whole_percents(group.plan(limits))


def counts_processes(step: Step) -> bool:
    """Whether it is a limit that the holder would count in."""
    return isinstance(step, steps.Write) and step.path.endswith("/pids.max")


def change(group: Cgroup, manager: Manager, unit: str, changes: Resources, layout: Layout) -> None:
    """Change limits of the unit whose cgroup this is: all or none, but for devices, which come last. Raises OSError."""
    devices = Resources(devices=changes.devices)
    group.plan(devices)  # can be
    planned = plan(group, replace(changes, devices=None))
    steps.run([*planned, Tell(manager, unit, planned, device_properties(changes, layout))])
    steps.run(group.plan(devices))


def settle(group: Cgroup, manager: Manager, unit: str, limits: Resources, layout: Layout) -> None:
    """Set all limits that a unit was made with, again. Raises OSError.

    systemd is told only what it does not know. On v1, whatever it is told, it sets a unit's devices anew, and for a
    moment allows none; so the rules that it has no words for come after it, and only then.
    """
    devices = Resources(devices=limits.devices)
    planned = plan(group, replace(limits, devices=None))
    steps.run(planned)
    contents, known = properties.contents_of(planned), manager.properties_of(unit)
    wanted = properties.properties_of(contents, manager.version)
    if news := [(name, value) for name, value in wanted if not _is_same(known.get(name), value)]:
        manager.set_properties(unit, news)
        if layout.of("devices") is not None:
            steps.run(group.plan(devices))


def _is_same(known: Variant | None, wanted: Variant) -> bool:
    if known is not None and wanted.signature == "ay":  # bits, of which systemd knows more that are 0
        return bytes(known.value).rstrip(b"\0") == bytes(wanted.value).rstrip(b"\0")
    return known is not None and bool(known.value == wanted.value)


class Tell:
    """The step that tells systemd of the others, which come before: nothing is changed, if it refuses."""

    def __init__(self, manager: Manager, unit: str, told: Sequence[Step], more: Sequence[Property] = ()) -> None:
        self._manager, self._unit, self._told, self._more = manager, unit, told, more

    def describe(self) -> str:
        """As a person would do it."""
        return f"systemctl set-property --runtime {self._unit} ..."

    def inverse(self) -> None:
        """None: it is the last one."""

    def apply(self) -> None:
        """Tell."""
        contents = properties.contents_of(self._told)
        if wanted := [*properties.properties_of(contents, self._manager.version), *self._more]:
            self._manager.set_properties(self._unit, wanted)
