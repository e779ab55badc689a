"""The cgroups of a container, mounted in it, as a step."""

import os
from collections.abc import Iterable
from dataclasses import dataclass

from corral.kernel import mount, paths
from corral.kernel.mount import MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC, MOUNT_ATTR_NOSUID, MOUNT_ATTR_RDONLY, MS_PRIVATE
from corral.kernel.syscalls import CGROUP2_SUPER_MAGIC, filesystem_magic
from corral.oci import trees
from corral.oci.errors import SETUP, ExecFailed
from corral.oci.mount_options import MountOptions
from corral.oci.mounts import place
from corral.oci.stage import Stage, Step


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
            stage.trees[cgroup] = trees.clone(cgroup, self.destination, recursive=False)
        if stage.own is not None and stage.unified and not self.cgroups:
            stage.trees[_CGROUP_ROOT] = trees.clone(_CGROUP_ROOT, self.destination, recursive=True)

    def apply(self, stage: Stage) -> None:
        target = place(stage, self.destination, None, directory=True)
        if stage.unified:
            self._mount_unified(stage, target)
        else:
            self._mount_hierarchies(stage, target)

    def _mount_unified(self, stage: Stage, target: int) -> None:
        tree = stage.trees.pop(self.cgroups[0]) if self.cgroups else self._own_or_all(stage)
        self._dress(tree)
        mount.move_mount(tree, target, what="cgroup2", where=self.destination)

    @staticmethod
    def _own_or_all(stage: Stage) -> int:
        """The cgroup of its own cgroup namespace; or, to look at only, all of them."""
        try:
            return mount.new_mount("cgroup2", "cgroup2")
        except PermissionError:
            if _CGROUP_ROOT not in stage.trees:
                raise
        tree = stage.trees.pop(_CGROUP_ROOT)
        mount.set_attributes(tree, attr_set=MOUNT_ATTR_RDONLY, recursive=True)
        return tree

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
        if not names and self.options.attributes.set & MOUNT_ATTR_RDONLY:  # one of the host's may be wanted there
            mount.set_attributes(base, attr_clr=MOUNT_ATTR_RDONLY)
            stage.read_only_last.append(base)

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
