"""What is known of a container from one command to the next.

    ROOT/ID/              locked (flock) by each command that changes something, but for kill
    ROOT/ID/state.json    the record below; replaced as a whole
    ROOT/ID/config.json   the specification that the container was made from, whatever becomes of the bundle's
    ROOT/ID/gate          there until start: where init waits

The lock is let go of before a hook is run, for the hook may be a client of the container. Only those of its creation
are run under the lock: until it is created, no command but state, list and a forced delete has to do with it.

A record names init by pid and start time, so one that was left by a container that ended, or before a reboot, is seen
to be stale. The directory lies where a reboot empties it: nothing needs to be synced to a disk.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from enum import Enum
from typing import TYPE_CHECKING

from corral.oci import OCI_VERSION
from corral.oci.json_text import dumps, loads
from corral.runtime.errors import CommandError, not_there

if TYPE_CHECKING:  # which takes long to load
    from corral.oci.spec import Spec

STATE, CONFIG, GATE = "state.json", "config.json", "gate"
_ID_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_+-.")
_ID_LONGEST = 200
_LOOK_S = 0.02
PROBE_S = 0.1
"""Longer than anybody takes to look whether a container is locked."""


class Unreadable(CommandError):
    """There is a record, but not one of ours: nobody can tell what is to be done about its container."""


class Status(Enum):
    """Where a container is in its life. What is legal where is in corral.runtime.life.

        creating --> created --> running <--> paused
            |           |           |           |
            '-----------'-----------'-----------'--> stopped --> gone

    Source: OCI runtime-spec runtime.md "State", and paused, which every runtime adds.
    """

    CREATING = "creating"
    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"


class Record:
    """state.json: the state of the specification, less what changes by itself, and what we need."""

    __slots__ = (
        "annotations",
        "bundle",
        "cgroup",
        "cgroup_is_own",
        "created",
        "id",
        "own_pids",
        "owner",
        "pid",
        "poststop",
        "rootfs",
        "start_time",
        "unit",
        "user_manager",
    )

    def __init__(
        self,
        *,
        id: str,  # noqa: A002 - its name in the specification
        bundle: str,
        rootfs: str,
        created: str,
        owner: int,
        annotations: dict[str, str],
        cgroup: str = "",
        cgroup_is_own: bool = False,
        own_pids: bool = True,
        poststop: bool = False,
        pid: int = 0,
        start_time: int = 0,
        unit: str = "",
        user_manager: bool = False,
    ) -> None:
        self.id, self.bundle, self.rootfs, self.created, self.owner = id, bundle, rootfs, created, owner
        self.annotations = annotations
        self.cgroup = cgroup
        """Path of its cgroup in every hierarchy; "" for none."""
        self.cgroup_is_own = cgroup_is_own
        """It was made or taken over; before that, who is in there may be another container."""
        self.own_pids = own_pids
        """Its processes end with init, for it has a PID namespace of its own."""
        self.poststop = poststop
        """It has hooks to be run once it is deleted."""
        self.pid, self.start_time = pid, start_time
        """0 until init exists."""
        self.unit, self.user_manager = unit, user_manager
        """The systemd unit that its cgroup is of, "" for none; and whether it is a unit of the user's own systemd."""

    def to_json(self) -> dict[str, object]:
        """The object that the file holds."""
        return {name: getattr(self, name) for name in self.__slots__}

    def state(self, status: Status) -> dict[str, object]:
        """The object that `state` prints. Source: OCI runtime-spec runtime.md "State"; rootfs, created: as runc."""
        state: dict[str, object] = {
            "ociVersion": OCI_VERSION,
            "id": self.id,
            "pid": 0 if status is Status.STOPPED else self.pid,
            "status": status.value,
            "bundle": self.bundle,
            "rootfs": self.rootfs,
            "created": self.created,
        }
        if self.annotations:
            state["annotations"] = self.annotations
        return state | {"owner": ""}


def check_id(container_id: str) -> None:
    """An id is the name of a directory, so it must be nothing else."""
    if not container_id or container_id in (".", "..") or not _ID_CHARACTERS.issuperset(container_id):
        raise CommandError(f"invalid container id {container_id!r}: letters, digits and _ + - . make one")
    if len(container_id) > _ID_LONGEST:
        raise CommandError(f"invalid container id: it is longer than {_ID_LONGEST} characters")


class Place:
    """The state directory of a container, held open."""

    def __init__(self, root: str, container_id: str, fd: int) -> None:
        self.id, self.path, self.fd = container_id, f"{root}/{container_id}", fd
        self._is_locked = False

    def close(self) -> None:
        """Release it, and with it the lock."""
        os.close(self.fd)

    def lock(self, how: int = fcntl.LOCK_EX, *, patience_s: float = 0.0) -> bool:
        """Lock it, if it is not yet; False if the container is no more, whatever is called so by now.

        One that is still being created is waited for for patience_s; then raises CommandError.
        """
        give_up_at = time.monotonic() + patience_s
        while not self._try_lock(how):
            if self._init():  # so whoever holds the lock runs no hooks
                fcntl.flock(self.fd, how)
                break
            if self._init() == 0 and time.monotonic() > give_up_at:
                raise CommandError(f"container {self.id!r} is still being created")
            time.sleep(_LOOK_S)
        self._is_locked = True
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self.fd))  # noqa: PTH116 - a string, as everything here
        except FileNotFoundError:
            return False

    def unlock(self) -> None:
        """Let others go on."""
        fcntl.flock(self.fd, fcntl.LOCK_UN)
        self._is_locked = False

    def is_locked_by_another(self) -> bool:
        """Whether a command is about to change something."""
        if self._is_locked:
            return False
        if not self._try_lock(fcntl.LOCK_SH):
            return True
        self.unlock()
        return False

    def _try_lock(self, how: int) -> bool:
        try:
            fcntl.flock(self.fd, how | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _init(self) -> int | None:
        """The pid of init, 0 until there is one; None if the record is just being made or removed."""
        try:
            return self.record().pid
        except CommandError:
            return None

    @property
    def gate(self) -> str:
        """The path of the gate, short enough for a socket however deep the root lies."""
        return f"/proc/self/fd/{self.fd}/{GATE}"

    def write(self, name: str, value: object) -> None:
        """Replace a file as a whole."""
        temporary = f".{name}.tmp"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600, dir_fd=self.fd)
        try:
            with open(fd, "w", encoding="utf-8") as file:
                file.write(dumps(value))
            os.rename(temporary, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        except BaseException:
            os.unlink(temporary, dir_fd=self.fd)
            raise

    def _read(self, name: str) -> object:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.fd)
        with open(fd, encoding="utf-8") as file:
            return loads(file.read())

    def record(self) -> Record:
        """The record; the container does not exist without one. What another version put there as well is left out."""
        try:
            value = self._read(STATE)
        except FileNotFoundError:
            raise not_there(self.id) from None
        except ValueError as e:
            raise Unreadable(f"the state of container {self.id!r} can't be read: {self.path}/{STATE}: {e}") from None
        try:
            return Record(**{name: value[name] for name in Record.__slots__ if name in value})  # type: ignore[index, operator]
        except TypeError:
            raise Unreadable(f"the state of container {self.id!r} can't be read: {self.path}/{STATE} is none") from None

    def spec(self) -> "Spec":
        """What the container was made from."""
        from corral.oci.spec import Spec

        return Spec.from_json(self._read(CONFIG))

    def let_go(self) -> None:
        """Note that it was started, and let others go on."""
        self.remove_gate()
        self.unlock()

    def remove_gate(self) -> None:
        """Note that it was started."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(GATE, dir_fd=self.fd)

    def remove(self) -> None:
        """The container is no more. What may lie in the directory are files."""
        for name in os.listdir(self.fd):  # noqa: PTH208 - by fd
            os.unlink(name, dir_fd=self.fd)
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(self.path)  # noqa: PTH106 - a string, as everything here


@contextlib.contextmanager
def opened(
    root: str, container_id: str, *, lock: int | None = fcntl.LOCK_EX, patience_s: float = PROBE_S
) -> Iterator[Place]:
    """The directory of a container that exists; locked meanwhile, unless lock is None. patience_s: see Place.lock()."""
    check_id(container_id)
    while True:
        try:
            fd = os.open(f"{root}/{container_id}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            raise not_there(container_id) from None
        place = Place(root, container_id, fd)
        try:
            if lock is None or place.lock(lock, patience_s=patience_s):
                yield place
                return
        finally:
            place.close()


@contextlib.contextmanager
def made(root: str, container_id: str) -> Iterator[Place]:
    """A new directory, locked meanwhile."""
    check_id(container_id)
    os.makedirs(root, 0o700, exist_ok=True)  # noqa: PTH103 - a string, as everything here
    while True:
        try:
            os.mkdir(f"{root}/{container_id}", 0o700)  # noqa: PTH102 - likewise
        except FileExistsError:
            raise CommandError(f"container with id {container_id!r} already exists") from None
        try:
            fd = os.open(f"{root}/{container_id}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        place = Place(root, container_id, fd)
        try:
            if place.lock():  # else a forced delete took it for a leftover
                yield place
                return
        finally:
            place.close()


def ids(root: str) -> list[str]:
    """Every container there."""
    try:
        entries = os.listdir(root)  # noqa: PTH208 - likewise
    except FileNotFoundError:
        return []
    return sorted(entries)
