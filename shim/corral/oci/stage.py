"""What the steps that build a container's root share, and the shape of a step.

Steps run inside init, in two rounds. `prepare` sees the host: sources are opened there, while the mounts still have
their peers, so propagation can be kept where it was asked for. `apply` sees the root that is being built, only by fd.
The fds of a stage are never closed one by one: init closes all of them at once when its set-up is done. Only where a
specification can ask for any number of things is an fd closed when it is no longer needed.
"""

import contextlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from corral.kernel import mount
from corral.kernel.namespaces import Kind

if TYPE_CHECKING:
    from corral.oci.mounts import NewFilesystem


@dataclass(frozen=True, slots=True)
class PidNamespace:
    """One that is joined, where a procfs must show its processes: its fd, and the path it was opened by."""

    fd: int
    path: str


@dataclass(frozen=True, slots=True)
class IdMap:
    """The ids of an id-mapped mount: ranges of (id in the file system, id in the mount, how many).

    path: those of a user namespace that has a file. where: the member of config.json that asks for it.
    """

    uids: tuple[tuple[int, int, int], ...]
    gids: tuple[tuple[int, int, int], ...]
    path: str
    recursive: bool
    where: str


@dataclass(slots=True)
class Stage:
    """The root being built."""

    bundle: str
    """The directory the root is put on; "" is the working directory."""
    root: int = -1
    """fd of the root of the container's root mount, once there is one."""
    dev: int | None = None
    """fd of the root of our own tmpfs on /dev; None where the user put something else there."""
    dev_is_the_hosts: bool = False
    """A directory of the host lies on /dev: nothing is made in it."""
    read_only_last: list[int] = field(default_factory=list)
    """fds of mounts that become read-only when all is in place: others may have mount points in them."""
    devpts: int | None = None
    """fd of the root of the container's own devpts on /dev/pts."""
    unified: bool = False
    """This host has cgroup v2 alone."""
    console_master: int | None = None
    console_slave: int | None = None
    proc: int | None = None
    """fd of the root of the container's own procfs on /proc."""
    sys: int | None = None
    """fd of the root of the container's own sysfs on /sys."""
    overlays: list["NewFilesystem"] = field(default_factory=list)
    """Those that are to be made before the root is put on the bundle, where their directories may lie."""
    trees: dict[int | str, int] = field(default_factory=dict)
    """What prepare() opened: fds of detached trees, by id() of the step, or by the path of a cgroup."""
    held: dict[int, int] = field(default_factory=dict)
    """Files of the host that prepare() opened, to be copied when it is time: fds, by id() of the step."""
    ready: dict["Step | str", int] = field(default_factory=dict)
    """Detached mounts that were made ahead, by the step that would make them (see corral.oci.larder)."""
    ready_places_in_dev: frozenset[str] = frozenset()
    """The directories that a ready /dev holds."""
    dev_is_ready: bool = False
    """dev is such a one: it has the default nodes and links."""
    places_in_dev: set[str] = field(default_factory=set)
    """Directories of dev that wait for their mount."""
    own: frozenset[Kind] | None = None
    """In a user namespace, be it the runtime's: the kinds of namespaces that were made, and so belong to it."""
    parts: tuple[int, ...] = ()
    """fds of detached mounts that the root is put together from."""
    idmaps: Mapping["IdMap", int] = field(default_factory=dict)
    """fds of user namespaces, for id-mapped mounts."""
    pids: PidNamespace | None = None
    """The PID namespace of the container, where this process is not in it."""
    _root_status: os.stat_result | None = None

    def hold(self, step: "Step", path: str) -> bool:
        """Open a file of the host, of whose mount copy_of() gives a copy later. False where that can't be: the caller
        has to copy it now.

        Each copy that is made too early, and closed after another one was made of it, has init wait for the kernel (a
        grace period of RCU, which on a busy machine is milliseconds).
        """
        if self.own is not None:  # the host's mounts are not this namespace's
            return False
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:  # copying it tells why
            return False
        if stat.S_ISDIR(os.fstat(fd).st_mode):  # the container's root may lie below it, by the time it is copied
            os.close(fd)
            return False
        self.held[id(step)] = fd
        return True

    def copy_of(self, step: "Step") -> int | None:
        """A detached copy of what hold() has opened for a step; None if that is nothing."""
        fd = self.held.pop(id(step), None)
        return None if fd is None else mount.clone_tree(fd)

    def take_dev(self, tree: int, *, ready: bool) -> None:
        """Our own tmpfs is on /dev now."""
        self.dev, self.dev_is_ready = tree, ready
        self.places_in_dev = set(self.ready_places_in_dev) if ready else set()

    def is_root(self, fd: int) -> bool:
        """Whether an fd refers to the directory that is the root."""
        if self._root_status is None:
            self._root_status = os.fstat(self.root)
        return os.path.samestat(os.fstat(fd), self._root_status)

    def make_in_dev(self, destination: str) -> str | None:
        """Have an empty directory right below our own tmpfs on /dev: its name there.

        None if destination lies elsewhere, or if something is there already.
        """
        directory, name = os.path.split(normal(destination))
        if self.dev is None or directory != "/dev":
            return None
        if name in self.places_in_dev:
            self.places_in_dev.remove(name)
            return name
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o755, dir_fd=self.dev)
            return name
        return None


class Step:
    """One step of the set-up."""

    __slots__ = ()

    def describe(self) -> str:
        """The step as one line for a person."""
        raise NotImplementedError

    def prepare(self, stage: Stage) -> None:
        """Open what the host gives, in the host's view."""

    def apply(self, stage: Stage) -> None:
        """Do it, in the root being built."""
        raise NotImplementedError


def normal(path: str) -> str:
    """An absolute path without `.`, `..` and doubled slashes, for comparing names; never used to open anything."""
    return os.path.normpath("/" + path.lstrip("/"))
