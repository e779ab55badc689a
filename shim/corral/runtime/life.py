"""Where a container is in its life, what may be done with it there, and its cgroup: what the kernel knows."""

import os

from corral.kernel import process
from corral.kernel.cgroup import Cgroup, Driver, detect
from corral.oci import gate
from corral.runtime.errors import CommandError
from corral.runtime.state import Place, Record, Status


def init_lives(record: Record) -> bool:
    """Whether the container's init has not ended. One that nobody reaped yet has."""
    if not record.pid:
        return False
    try:
        fd = os.open(f"/proc/{record.pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        try:
            stat = os.read(fd, 4096)
        finally:
            os.close(fd)
    except (FileNotFoundError, ProcessLookupError):
        return False
    fields = stat[stat.rindex(b")") + 2 :].split()
    return int(fields[19]) == record.start_time and fields[0] not in (b"Z", b"X")


_NOT_RUNNING, _NOT_PAUSED = "container not running: it is {status}", "container not paused: it is {status}"
_NOT_STOPPED = "cannot delete container {id} that is not stopped: {status}"
REFUSED: dict[str, dict[Status, str]] = {
    "start": {
        Status.RUNNING: "cannot start an already running container",
        Status.PAUSED: "cannot start an already paused container",
        Status.STOPPED: "cannot start a container that has stopped",
    },
    "exec": {
        Status.PAUSED: "cannot exec in a paused container (use --ignore-paused to override)",
        Status.STOPPED: "cannot exec in a stopped container",
    },
    "pause": dict.fromkeys((Status.CREATED, Status.PAUSED, Status.STOPPED), _NOT_RUNNING),
    "resume": {Status.CREATED: _NOT_PAUSED, Status.RUNNING: _NOT_PAUSED, Status.STOPPED: _NOT_RUNNING},
    "update": {Status.STOPPED: _NOT_RUNNING},
    "delete": dict.fromkeys((Status.RUNNING, Status.PAUSED), _NOT_STOPPED),
}
"""What a command that locks the container may not do, and what it says then, as clients look for it. All else is legal.

None of them sees one that is being created: see Place.lock(). A forced delete may do what it likes.
"""


def check(command: str, place: Place, record: Record) -> None:
    """Raise CommandError if a command is not legal now."""
    status = status_of(place, record)
    if (said := REFUSED[command].get(status)) is not None:
        raise CommandError(said.format(id=record.id, status=status.value))


def status_of(place: Place, record: Record) -> Status:
    """The container's status now."""
    if not record.pid and place.is_locked_by_another():
        return Status.CREATING
    if not init_lives(record):
        return Status.STOPPED
    if gate.is_attended(place.gate):
        return Status.CREATED
    if (group := cgroup_of(record)) is not None and group.is_frozen():
        return Status.PAUSED
    return Status.RUNNING


def cgroup_of(record: Record) -> Cgroup | None:
    """Its cgroup, if it has one; what a create that was killed only meant to have may be another container's."""
    return Driver(detect()).open(record.cgroup) if record.cgroup and record.cgroup_is_own else None


def needed_cgroup(record: Record) -> Cgroup:
    """Its cgroup, for what can't be done without."""
    group = cgroup_of(record)
    if group is None:
        raise CommandError(f"container {record.id!r} has no cgroup of its own")
    return group


def open_init(record: Record) -> int:
    """A pidfd of a living init; the caller closes it. Raises CommandError if it has ended."""
    gone = CommandError("container not running")
    if not init_lives(record):
        raise gone
    try:
        pidfd = process.pidfd_open(record.pid)
    except ProcessLookupError:
        raise gone from None
    if not init_lives(record):
        os.close(pidfd)
        raise gone
    return pidfd
