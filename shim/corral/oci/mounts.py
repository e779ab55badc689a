"""The mounts of a container, as steps."""

import contextlib
import errno
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass

from corral.kernel import mount, overlay, paths
from corral.kernel.mount import (
    MOUNT_ATTR__ATIME,
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_NOEXEC,
    MOUNT_ATTR_NOSUID,
    MOUNT_ATTR_RDONLY,
    MS_PRIVATE,
)
from corral.kernel.syscalls import (
    AT_FDCWD,
    CGROUP2_SUPER_MAGIC,
    PROC_SUPER_MAGIC,
    SYSFS_MAGIC,
    filesystem_magic,
)
from corral.oci import procfs
from corral.oci.errors import SETUP, ExecFailed
from corral.oci.mount_options import Attributes, MountOptions
from corral.oci.stage import Stage, Step, normal

# What lxcfs and its like put over single files of procfs. Everything else in there is the kernel's own voice.
_MAY_COVER_IN_PROC = frozenset(
    "/proc/" + name
    for name in (
        *("cpuinfo", "diskstats", "meminfo", "stat", "swaps", "uptime", "loadavg", "slabinfo", "net/dev"),
        *("sys/kernel/ns_last_pid", "sys/crypto/fips_enabled"),
    )
)
_KERNEL_MAGIC = {"proc": PROC_SUPER_MAGIC, "sysfs": SYSFS_MAGIC}


@dataclass(frozen=True, slots=True)
class RootFilesystem(Step):
    """The root itself: a new file system (overlay), or with options.bind a tree of the host.

    It is put over the bundle directory, in init's own mount namespace, for pivot_root wants a mounted one.
    """

    fstype: str
    source: str
    options: MountOptions

    def describe(self) -> str:
        return f"root: {self.fstype} from {self.source}"

    def prepare(self, stage: Stage) -> None:
        if self.options.bind:
            stage.trees[id(self)] = _clone(self.source, "/", recursive=self.options.bind_recursive)

    def apply(self, stage: Stage) -> None:
        attributes = self.options.attributes
        if self.options.bind:
            tree = stage.trees.pop(id(self))
            mount.set_attributes(tree, propagation=MS_PRIVATE, recursive=True)
            # Read-only comes last of all: mount points are still to be made.
            _dress(tree, Attributes(attributes.set & ~MOUNT_ATTR_RDONLY, attributes.clear, attributes.atime))
        else:
            flags = (attributes.set | (attributes.atime or 0)) & ~MOUNT_ATTR_RDONLY
            tree = _new(self.fstype, self.source, self.options.data, flags, stage)
        mount.move_mount(tree, AT_FDCWD, stage.bundle, follow=True, what=self.source, where=stage.bundle)
        stage.root = tree


@dataclass(frozen=True, slots=True)
class ReadonlyRoot(Step):
    """Make the root mount read-only; mounts below it stay as they are."""

    def describe(self) -> str:
        return "root: read-only"

    def apply(self, stage: Stage) -> None:
        mount.set_attributes(stage.root, attr_set=MOUNT_ATTR_RDONLY, where="/")


@dataclass(frozen=True, slots=True)
class ReadonlyTmpfs(Step):
    """Make read-only what was asked to be, but had to hold mount points and device nodes first."""

    def describe(self) -> str:
        return "tmpfs mounts: read-only where asked"

    def apply(self, stage: Stage) -> None:
        for tree in stage.read_only_last:
            mount.set_attributes(tree, attr_set=MOUNT_ATTR_RDONLY)
            os.close(tree)


@dataclass(frozen=True, slots=True)
class WorkingDirectory(Step):
    """Make the directory the process begins in, where the image lacks it (as runc does).

    Where it can't be made nothing is said here: entering it will.
    """

    cwd: str

    def describe(self) -> str:
        return f"{self.cwd}: working directory"

    def apply(self, stage: Stage) -> None:
        with contextlib.suppress(OSError):
            os.close(paths.make_directory_in_root(stage.root, self.cwd))


@dataclass(frozen=True, slots=True)
class BindMount(Step):
    """A file or directory of the host."""

    destination: str
    source: str
    options: MountOptions

    def describe(self) -> str:
        return f"{self.destination}: bind of {self.source}"

    def prepare(self, stage: Stage) -> None:
        stage.trees[id(self)] = _clone(self.source, self.destination, recursive=self.options.bind_recursive)

    def apply(self, stage: Stage) -> None:
        tree, options = stage.trees.pop(id(self)), self.options
        if options.data:
            raise ExecFailed(SETUP, f"mount {self.destination}: a bind mount has no option {options.data[0]!r}")
        mount.set_attributes(
            tree,
            propagation=options.propagation or MS_PRIVATE,
            recursive=options.propagation_recursive or not options.propagation,
            where=self.destination,
        )
        _dress(tree, options.attributes)
        _dress(tree, options.recursive, recursive=True)
        with paths.opened(_place(stage, self.destination, directory=stat.S_ISDIR(os.fstat(tree).st_mode))) as target:
            _check_place(target, self.destination, filesystem_magic(tree))
            mount.move_mount(tree, target, what=self.source, where=self.destination)
        if normal(self.destination) == "/dev":
            stage.dev, stage.dev_is_the_hosts = None, True


@dataclass(frozen=True, slots=True)
class NewFilesystem(Step):
    """A file system of the container's own."""

    destination: str
    fstype: str
    source: str
    options: MountOptions

    def describe(self) -> str:
        return f"{self.destination}: new {self.fstype} ({','.join(self.options.data)})"

    def new(self) -> int:
        """The file system, detached, as it is before it has a place."""
        attributes = self.options.attributes
        flags = attributes.set | (attributes.atime or 0)
        return mount.new_mount(self.fstype, self.source, self.options.data, attributes=flags)

    def prepare(self, stage: Stage) -> None:
        if self.fstype == "proc" and stage.pids is not None:
            attributes = self.options.attributes
            tree = procfs.new_procfs(stage.pids, self.source, self.options.data)
            _dress(tree, attributes)
            stage.ready[self] = tree

    def apply(self, stage: Stage) -> None:
        attributes, data = self.options.attributes, self.options.data
        ready = self in stage.ready
        flags = attributes.set | (attributes.atime or 0)
        late = flags & MOUNT_ATTR_RDONLY and self.fstype == "tmpfs"
        if late:
            flags &= ~MOUNT_ATTR_RDONLY
        if name := stage.make_in_dev(self.destination):
            # An empty directory of a tmpfs that nobody else has seen: nothing has to be asked about it, and a link that
            # was put there all the same would not be followed.
            assert stage.dev is not None
            tree = self._ready_or_new(stage, data, flags)
            mount.move_mount(tree, stage.dev, name, what=self.fstype, where=self.destination)
        else:
            tree = self._mount_in_root(stage, data, flags)
        _dress(tree, self.options.recursive, recursive=True)
        if self.options.propagation:
            mount.set_attributes(
                tree, propagation=self.options.propagation, recursive=self.options.propagation_recursive
            )
        if late:
            stage.read_only_last.append(os.dup(tree))
        self._record(stage, tree, ready=ready)

    def _ready_or_new(self, stage: Stage, data: tuple[str, ...], flags: int) -> int:
        tree = stage.ready.pop(self, None)
        return _new(self.fstype, self.source, data, flags, stage) if tree is None else tree

    def _mount_in_root(self, stage: Stage, data: tuple[str, ...], flags: int) -> int:
        kernel_magic = _KERNEL_MAGIC.get(self.fstype)
        if self.fstype == "tmpfs" and not any(option.startswith("mode=") for option in data):
            data += _mode_of_covered(stage.root, self.destination)
        with paths.opened(_place(stage, self.destination, directory=True, follow=kernel_magic is None)) as target:
            _check_place(target, self.destination, kernel_magic)
            tree = self._ready_or_new(stage, data, flags)
            mount.move_mount(tree, target, what=self.fstype, where=self.destination)
        return tree

    def _record(self, stage: Stage, tree: int, *, ready: bool) -> None:
        match self.fstype, normal(self.destination):
            case "tmpfs", "/dev":
                stage.take_dev(tree, ready=ready)
            case "devpts", "/dev/pts":
                stage.devpts = tree
            case "proc", "/proc":
                stage.proc = tree
            case "sysfs", "/sys":
                stage.sys = tree
            case _:
                os.close(tree)


@dataclass(frozen=True, slots=True)
class CgroupMount(Step):
    """The container's own cgroup as /sys/fs/cgroup: one cgroup2, or on v1 and hybrid hosts a directory per hierarchy.

    The directories of the host are bound, not mounted anew: the result is the same as a mount inside the cgroup
    namespace, without the kernel's global lock that a new mount takes.
    """

    destination: str
    cgroups: tuple[str, ...]
    options: MountOptions

    def describe(self) -> str:
        return f"{self.destination}: cgroup {', '.join(self.cgroups)}"

    def prepare(self, stage: Stage) -> None:
        stage.unified = _unified_only(self.cgroups)
        for cgroup in self.cgroups:
            stage.trees[cgroup] = _clone(cgroup, self.destination, recursive=False)

    def apply(self, stage: Stage) -> None:
        target = _place(stage, self.destination, directory=True)
        if stage.unified:
            self._mount_unified(stage, target)
        else:
            self._mount_hierarchies(stage, target)

    def _mount_unified(self, stage: Stage, target: int) -> None:
        tree = stage.trees.pop(self.cgroups[0]) if self.cgroups else mount.new_mount("cgroup2", "cgroup2")
        self._dress(tree)
        mount.move_mount(tree, target, what="cgroup2", where=self.destination)

    def _mount_hierarchies(self, stage: Stage, target: int) -> None:
        names = [hierarchy_name(cgroup) for cgroup in self.cgroups]
        ready = stage.ready.pop(hierarchies_key(names), None)
        base = new_hierarchies(names) if ready is None else ready
        mount.move_mount(base, target, what="tmpfs", where=self.destination)
        for name, cgroup in zip(names, self.cgroups, strict=True):
            # By name: this tmpfs is new, and holds nothing but these directories.
            mount.move_mount(stage.trees.pop(cgroup), base, name, what=cgroup, where=f"{self.destination}/{name}")
        # Once for all of them. Until here nothing can have been mounted below one to be passed on to its peers outside.
        self._dress(base)

    def _dress(self, tree: int) -> None:
        attr_set = self.options.attributes.set | _NO_SURPRISES
        mount.set_attributes(tree, attr_set=attr_set, propagation=MS_PRIVATE, recursive=True, where=self.destination)


def hierarchies_key(names: Iterable[str]) -> str:
    """What new_hierarchies() makes of these, in a larder."""
    return f"cgroups: {' '.join(sorted(names))}"


def new_hierarchies(names: Iterable[str]) -> int:
    """A detached tmpfs with a directory per hierarchy, and a link per controller to one that holds several."""
    base = mount.new_mount("tmpfs", "tmpfs", ("mode=755", "size=64k"))
    for name in names:
        os.mkdir(name, 0o755, dir_fd=base)
        if "," in name:
            for controller in name.split(","):
                os.symlink(name, controller, dir_fd=base)
    return base


_NO_SURPRISES = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC
_CGROUP_ROOT = "/sys/fs/cgroup"


def hierarchy_name(cgroup: str) -> str:
    """`memory` for /sys/fs/cgroup/memory/…: what the hierarchy is called inside too."""
    head, _, rest = cgroup.partition(_CGROUP_ROOT + "/")
    if head or not rest:
        raise ExecFailed(SETUP, f"the cgroup {cgroup} does not lie below {_CGROUP_ROOT}")
    return rest.partition("/")[0]


def _unified_only(cgroups: tuple[str, ...]) -> bool:
    if len(cgroups) > 1:
        return False
    with paths.opened(os.open(_CGROUP_ROOT, os.O_PATH | os.O_CLOEXEC)) as fd:
        return filesystem_magic(fd) == CGROUP2_SUPER_MAGIC


def _clone(source: str, destination: str, *, recursive: bool) -> int:
    try:
        return mount.clone_tree(AT_FDCWD, source, recursive=recursive)
    except OSError as e:
        if e.errno in (errno.ENOENT, errno.ENOTDIR):
            raise ExecFailed(SETUP, f"mount {destination}: the source {source} does not exist") from e
        raise


def _new(fstype: str, source: str, data: tuple[str, ...], attributes: int, stage: Stage) -> int:
    if fstype == "overlay":
        return overlay.new_overlay(data, attributes=attributes, scratch=stage.bundle)
    return mount.new_mount(fstype, source or fstype, data, attributes=attributes)


def _dress(tree: int, attributes: Attributes, *, recursive: bool = False) -> None:
    if attributes:
        atime = attributes.atime
        mount.set_attributes(
            tree,
            attr_set=attributes.set | (atime or 0),
            attr_clr=attributes.clear | (MOUNT_ATTR__ATIME if atime is not None else 0),
            recursive=recursive,
        )


def _mode_of_covered(root: int, destination: str) -> tuple[str, ...]:
    """A tmpfs over a directory of the image looks like that directory, unless a mode was asked for."""
    try:
        fd = paths.open_in_root(root, destination)
    except OSError:
        return ()
    with paths.opened(fd):
        return (f"mode={stat.S_IMODE(os.fstat(fd).st_mode):o}",)


def _place(stage: Stage, destination: str, *, directory: bool, follow: bool = True) -> int:
    """An fd of the mount point inside the root, made where it is missing."""
    try:
        if not follow:
            target = _directory_without_links(stage.root, destination)
        elif directory:
            target = paths.make_directory_in_root(stage.root, destination)
        else:
            target = paths.make_file_in_root(stage.root, destination)
    except OSError as e:
        raise ExecFailed(SETUP, f"mount {destination}: {_sentence(e)}") from e
    if stage.is_root(target):
        # Whoever joins the mount namespace later would land in the mount, and not in the root.
        raise ExecFailed(SETUP, f"mount {destination}: it is the root itself in the image")
    return target


def _directory_without_links(root: int, path: str) -> int:
    flags = os.O_PATH | os.O_DIRECTORY
    with contextlib.suppress(FileNotFoundError):
        return paths.open_in_root(root, path, flags, resolve=paths.RESOLVE_NO_SYMLINKS)
    os.close(paths.make_directory_in_root(root, path))
    return paths.open_in_root(root, path, flags, resolve=paths.RESOLVE_NO_SYMLINKS)


def _sentence(e: OSError) -> str:
    match e.errno:
        case errno.ELOOP:
            return "a symbolic link stands in the way in the image"
        case errno.ENOTDIR:
            return "it is no directory in the image"
        case errno.EISDIR:
            return "it is a directory in the image, but the source is not"
        case errno.EROFS:
            return "it does not exist in the image, which is read-only"
        case _:
            return f"the mount point can't be made: {e}"


def _check_place(target: int, destination: str, magic: int | None) -> None:
    """Nothing but procfs goes on /proc, and next to nothing goes inside it: what runs there trusts it.

    target is judged by what it is, not by its name, so a link into /proc does not help.
    """
    if normal(destination) == "/proc":
        if magic != PROC_SUPER_MAGIC:
            raise ExecFailed(SETUP, "mount /proc: only a procfs can be mounted there")
    elif filesystem_magic(target) == PROC_SUPER_MAGIC and normal(destination) not in _MAY_COVER_IN_PROC:
        raise ExecFailed(SETUP, f"mount {destination}: it lies inside /proc, where nothing can be mounted")
