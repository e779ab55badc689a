"""The mounts of a container, as steps."""

import contextlib
import errno
import os
import stat
from dataclasses import dataclass

from corral.kernel import mount, paths
from corral.kernel.mount import MOUNT_ATTR_RDONLY, MS_PRIVATE
from corral.kernel.namespaces import Kind
from corral.kernel.syscalls import (
    AT_FDCWD,
    PROC_SUPER_MAGIC,
    SYSFS_MAGIC,
    filesystem_magic,
)
from corral.oci import procfs, trees
from corral.oci.errors import SETUP, ExecFailed
from corral.oci.mount_options import Attributes, MountOptions
from corral.oci.stage import IdMap, Stage, Step, normal

# What lxcfs and its like put over single files of procfs. Everything else in there is the kernel's own voice.
_MAY_COVER_IN_PROC = frozenset(
    "/proc/" + name
    for name in (
        *("cpuinfo", "diskstats", "meminfo", "stat", "swaps", "uptime", "loadavg", "slabinfo", "net/dev"),
        *("sys/kernel/ns_last_pid", "sys/crypto/fips_enabled"),
    )
)
_KERNEL_MAGIC = {"proc": PROC_SUPER_MAGIC, "sysfs": SYSFS_MAGIC}
# What shows a namespace can be mounted anew only by who owns that: whose it shows, and where the host has it.
_LENT = {"proc": (Kind.PID, "/proc"), "sysfs": (Kind.NETWORK, "/sys"), "mqueue": (Kind.IPC, "/dev/mqueue")}


@dataclass(frozen=True, slots=True)
class RootFilesystem(Step):
    """The root itself: a new file system (overlay), or with options.bind a tree of the host.

    It is put over the bundle directory, in init's own mount namespace, for pivot_root wants a mounted one.
    """

    fstype: str
    source: str
    options: MountOptions
    propagation: int = MS_PRIVATE
    """Of a tree of the host while it is put in place. MS_SLAVE: what the host mounts there later is seen inside."""
    idmap: IdMap | None = None

    def describe(self) -> str:
        return f"root: {self.fstype} from {self.source}"

    def prepare(self, stage: Stage) -> None:
        if self.options.bind and not stage.parts:
            self._clone(stage, self.source)

    def make(self, stage: Stage) -> None:
        """Make a new file system before apply(): by who may, in the caller's own mount namespace."""
        if stage.parts:
            self._put_together(stage)
        elif not self.options.bind:
            stage.trees[id(self)] = self._new(stage, self.options.data)

    def _clone(self, stage: Stage, source: str) -> None:
        tree = stage.trees[id(self)] = trees.clone(source, "/", recursive=self.options.bind_recursive)
        if self.idmap is not None:
            trees.map_ids(tree, self.idmap, stage, "/")

    def _new(self, stage: Stage, data: tuple[str, ...]) -> int:
        attributes = self.options.attributes
        flags = (attributes.set | (attributes.atime or 0)) & ~MOUNT_ATTR_RDONLY
        return trees.new(self.fstype, self.source, data + self.options.superblock, flags, stage.bundle)

    def _put_together(self, stage: Stage) -> None:
        from corral.oci.parts import attach, located, located_options  # loaded before, by who made the parts

        attach(stage.parts, stage.bundle)
        if self.options.bind:
            self._clone(stage, located(self.source, stage.parts))
        else:
            stage.trees[id(self)] = self._new(stage, located_options(self.options.data, stage.parts))
        stage.parts = ()

    def apply(self, stage: Stage) -> None:
        for step in stage.overlays:
            stage.ready[step] = step.new(stage.bundle)
        if stage.parts:
            self._put_together(stage)
        attributes = self.options.attributes
        if self.options.bind:
            tree = stage.trees.pop(id(self))
            mount.set_attributes(tree, propagation=self.propagation, recursive=True)
            # Read-only comes last of all: mount points are still to be made.
            trees.dress(tree, Attributes(attributes.set & ~MOUNT_ATTR_RDONLY, attributes.clear, attributes.atime))
        else:
            made = stage.trees.pop(id(self), None)
            tree = self._new(stage, self.options.data) if made is None else made
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
    """A file or directory of the host. What options say to a file system is ignored, as mount(2) does with MS_BIND."""

    destination: str
    source: str
    options: MountOptions
    idmap: IdMap | None = None

    def describe(self) -> str:
        return f"{self.destination}: bind of {self.source}"

    def prepare(self, stage: Stage) -> None:
        # A copy that keeps the host's peers, or another's ids, is made while it can be.
        may_wait = self.idmap is None and self.options.propagation in (0, MS_PRIVATE)
        if may_wait and stage.hold(self, self.source):
            return
        tree = trees.clone(self.source, self.destination, recursive=self.options.bind_recursive)
        stage.trees[id(self)] = tree
        if self.idmap is not None:
            trees.map_ids(tree, self.idmap, stage, self.destination)

    def apply(self, stage: Stage) -> None:
        tree, options = self._tree(stage), self.options
        if options.fill:
            self._fill(stage, tree)
        mount.set_attributes(
            tree,
            propagation=options.propagation or MS_PRIVATE,
            recursive=options.propagation_recursive or not options.propagation,
            where=self.destination,
        )
        trees.dress(tree, options.attributes)
        trees.dress(tree, options.recursive, recursive=True)
        with paths.opened(self._place(stage, tree, directory=stat.S_ISDIR(os.fstat(tree).st_mode))) as target:
            mount.move_mount(tree, target, what=self.source, where=self.destination)
        if normal(self.destination) == "/dev":
            stage.dev, stage.dev_is_the_hosts = None, True

    def _tree(self, stage: Stage) -> int:
        """The tree, as young as can be: mountinfo goes by age, and is expected to go by the order in config.json."""
        if (copy := stage.copy_of(self)) is not None:
            return copy
        tree = stage.trees.pop(id(self))
        with contextlib.suppress(OSError):  # a detached tree can be copied since Linux 6.15
            return mount.clone_tree(tree, recursive=True)
        return tree

    def _fill(self, stage: Stage, tree: int) -> None:
        """Copy what the root has there into a directory of the host that is empty."""
        from corral.oci.copy_up import fill  # loaded before, by who asked for it

        if stat.S_ISDIR(os.fstat(tree).st_mode):
            with paths.opened(self._place(stage, tree, directory=True)) as covered:
                fill(tree, covered)

    def _place(self, stage: Stage, tree: int, *, directory: bool) -> int:
        return place(stage, self.destination, filesystem_magic(tree), directory=directory)


@dataclass(frozen=True, slots=True)
class NewFilesystem(Step):
    """A file system of the container's own."""

    destination: str
    fstype: str
    source: str
    options: MountOptions

    def describe(self) -> str:
        return f"{self.destination}: new {self.fstype} ({','.join(self.options.data)})"

    def new(self, scratch: str = "") -> int:
        """The file system, detached, as it is before it has a place."""
        attributes = self.options.attributes
        flags = attributes.set | (attributes.atime or 0)
        return trees.new(self.fstype, self.source, self.options.data + self.options.superblock, flags, scratch)

    def prepare(self, stage: Stage) -> None:
        if self.fstype == "proc" and stage.pids is not None:
            attributes = self.options.attributes
            tree = procfs.new_procfs(stage.pids, self.source, self.options.data)
            trees.dress(tree, attributes)
            stage.ready[self] = tree
        elif self.fstype == "overlay":
            stage.overlays.append(self)
        elif stage.own is not None and (lent := _LENT.get(self.fstype)) and lent[0] not in stage.own:
            with contextlib.suppress(FileNotFoundError):
                stage.trees[id(self)] = mount.clone_tree(AT_FDCWD, lent[1], recursive=True)

    def apply(self, stage: Stage) -> None:
        attributes, data = self.options.attributes, self.options.data + self.options.superblock
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
        trees.dress(tree, self.options.recursive, recursive=True)
        if self.options.propagation:
            mount.set_attributes(
                tree, propagation=self.options.propagation, recursive=self.options.propagation_recursive
            )
        if late:
            stage.read_only_last.append(os.dup(tree))
        self._record(stage, tree, ready=ready)

    def _ready_or_new(self, stage: Stage, data: tuple[str, ...], flags: int) -> int:
        tree = stage.ready.pop(self, None)
        if tree is not None:
            return tree
        try:
            return trees.new(self.fstype, self.source, data, flags, stage.bundle)
        except PermissionError:
            if id(self) not in stage.trees:
                raise
        return self._borrow(stage, flags)

    def _borrow(self, stage: Stage, flags: int) -> int:
        """The host's own, where the namespace that a new one would show belongs to another user namespace."""
        if self.options.data:  # hidepid, say: the host's can't be made to honour that
            kind = _LENT[self.fstype][0].value
            raise ExecFailed(
                SETUP,
                f"mount {self.destination}: with {self.options.data[0]!r} it would have to be new, "
                f"which takes a {kind} namespace of the container's own",
            )
        tree = stage.trees.pop(id(self))
        mount.set_attributes(tree, attr_set=flags, propagation=MS_PRIVATE, recursive=True, where=self.destination)
        return tree

    def _mount_in_root(self, stage: Stage, data: tuple[str, ...], flags: int) -> int:
        kernel_magic = _KERNEL_MAGIC.get(self.fstype)
        if self.fstype == "tmpfs" and not any(option.startswith("mode=") for option in data):
            data += _mode_of_covered(stage.root, self.destination)
        follow = kernel_magic is None
        with paths.opened(place(stage, self.destination, kernel_magic, directory=True, follow=follow)) as target:
            tree = self._ready_or_new(stage, data, flags)
            if self.options.copy_up:
                from corral.oci.copy_up import copy_directory  # loaded before, by who asked for it

                copy_directory(target, tree)
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
class Remount(Step):
    """Change the attributes of what is mounted there already."""

    destination: str
    options: MountOptions

    def describe(self) -> str:
        return f"{self.destination}: changed"

    def apply(self, stage: Stage) -> None:
        options = self.options
        if options.data or options.superblock:
            name = (*options.data, *options.superblock)[0]
            raise ExecFailed(SETUP, f"mount {self.destination}: {name!r} can't be changed by a remount")
        try:
            with paths.opened(paths.open_in_root(stage.root, self.destination)) as mounted:
                trees.dress(mounted, options.attributes)
                trees.dress(mounted, options.recursive, recursive=True)
        except OSError as e:
            reason = "nothing is mounted there" if e.errno == errno.EINVAL else (e.strerror or str(e)).lower()
            raise ExecFailed(SETUP, f"remount {self.destination}: {reason}") from e


def _mode_of_covered(root: int, destination: str) -> tuple[str, ...]:
    """A tmpfs over a directory of the image looks like that directory, unless a mode was asked for."""
    try:
        fd = paths.open_in_root(root, destination)
    except OSError:
        return ()
    with paths.opened(fd):
        return (f"mode={stat.S_IMODE(os.fstat(fd).st_mode):o}",)


def place(stage: Stage, destination: str, magic: int | None, *, directory: bool, follow: bool = True) -> int:
    """An fd of the mount point inside the root, made where it is missing.

    magic: that of the file system which is to be mounted there, None for one that is not the kernel's own voice.
    Raises ExecFailed where nothing may be mounted, whatever links of the image led there.
    """
    try:
        if not follow:
            target = _directory_without_links(stage.root, destination)
        elif directory:
            target = paths.make_directory_in_root(stage.root, destination)
        else:
            target = paths.make_file_in_root(stage.root, destination)
    except OSError as e:
        raise ExecFailed(SETUP, f"mount {destination}: {_sentence(e)}") from e
    try:
        if stage.is_root(target):
            # Whoever joins the mount namespace later would land in the mount, and not in the root.
            raise ExecFailed(SETUP, f"mount {destination}: it is the root itself in the image")
        _check_place(target, destination, magic)
    except BaseException:
        os.close(target)
        raise
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
            return "must be mounted on ordinary directory: a symbolic link stands in the way in the image"
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
