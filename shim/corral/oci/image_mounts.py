"""Trees of other images in a container: each made as a root is, and mounted where it was asked for, whole or in part.
So are volumes of which a part is wanted.

What is in such a tree is as hostile as the root: a part of it is looked up inside it.
"""

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from corral.kernel import mount, paths
from corral.kernel.mount import MOUNT_ATTR_NODEV, MOUNT_ATTR_NOSUID, MOUNT_ATTR_RDONLY, MS_PRIVATE
from corral.oci import mount_options, trees
from corral.oci.errors import SETUP, ExecFailed
from corral.oci.mounts import NewFilesystem, place
from corral.oci.spec import Mount
from corral.oci.stage import Stage, Step, normal

_ATTRIBUTES = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV


@dataclass(frozen=True, slots=True)
class ImageMount(Step):
    """tree: a new file system; or, if `bound`, its source is a directory of the host. It is nosuid and nodev unless its
    options say otherwise."""

    destination: str
    tree: NewFilesystem
    bound: bool
    subpath: str = ""
    writable: bool = False

    @classmethod
    def of(cls, destination: str, tree: Mount, *, subpath: str, writable: bool) -> Self:
        """As it is told of. Raises ValueError naming an option of the tree."""
        options = mount_options.parse(tree.options)
        return cls(
            destination, NewFilesystem(destination, tree.type, tree.source, options), options.bind, subpath, writable
        )

    def describe(self) -> str:
        return f"{self.destination}: {f'{self.subpath} of ' if self.subpath else ''}an image"

    def prepare(self, stage: Stage) -> None:
        if self.bound:
            stage.trees[id(self)] = trees.clone(self.tree.source, self.destination, recursive=False)
        else:
            stage.overlays.append(self.tree)

    def apply(self, stage: Stage) -> None:
        tree = stage.trees.pop(id(self)) if self.bound else stage.ready.pop(self.tree)
        with paths.opened(tree):
            mount.set_attributes(tree, propagation=MS_PRIVATE, where=self.destination)
            part = self._part(tree, stage.bundle) if self.subpath else os.dup(tree)
        with paths.opened(part):
            attributes = _ATTRIBUTES & ~self.tree.options.attributes.clear
            attributes |= 0 if self.writable else MOUNT_ATTR_RDONLY
            mount.set_attributes(part, attr_set=attributes, where=self.destination)
            is_directory = stat.S_ISDIR(os.fstat(part).st_mode)
            with paths.opened(place(stage, self.destination, None, directory=is_directory)) as target:
                mount.move_mount(part, target, what="an image", where=self.destination)

    def _part(self, tree: int, scratch: str) -> int:
        try:
            found = paths.open_in_root(tree, self.subpath)
        except OSError as e:
            what = "volume" if self.tree.options.attributes.clear else "image"
            reason = f"mount {self.destination}: the {what} has no {self.subpath}: {e.strerror}"
            raise ExecFailed(SETUP, reason) from e
        with paths.opened(found):
            return trees.part_of(tree, lambda: mount.clone_tree(found), scratch, what="an image")


def laid_in(steps: Sequence[tuple[str, Step]], images: Sequence[ImageMount]) -> list[Step]:
    """Steps of mounts, by destination, with those of images among them: each before the first that lies below it."""
    every = list(steps)
    for image in images:
        below = f"{normal(image.destination)}/"
        at = next((n for n, (destination, _) in enumerate(every) if normal(destination).startswith(below)), len(every))
        every.insert(at, (image.destination, image))
    return [step for _, step in every]
