"""What every snapshot driver promises.

Vocabulary

    tree         one directory tree, known by a number that is never used twice
    layer        a tree that was committed: nobody writes to it any more, and others may lie on top of it
    active tree  a writable tree on top of layers
    view         a read-only look at layers; needs no tree of its own on top of one
    chain        the layers below a tree, the uppermost first

A driver owns directories and nothing else: names, kinds, parents and who may remove what are rows of the leaf's
database. So its methods are few, blocking and idempotent where a crash could repeat them, and it mounts nothing:
`mounts` says what to mount, whoever wants the tree does it in his own mount namespace. A layer is staged and unpacked
without a look at those below it, in the form that overlayfs reads; what a driver makes of that is its own affair.

Life of a layer: stage -> (unpacked by a worker) -> build -> commit -> remove; or just remove, if something fails.
Life of an active tree: prepare -> (mounted and used) -> remove; or adopt, which makes it a layer.

Example: an image of two layers, a container on it, and its changes kept.

    driver.stage(1)                     # a directory to unpack the first layer into
    driver.stage(2)                     # the second, at the same time
    driver.build(2, (1,), Missing())    # from the bottom upwards
    driver.commit([1, 2])
    driver.prepare(3, (2, 1))           # the container's own tree
    driver.mounts(3, (2, 1), writable=True)
    # [Mount("overlay", "overlay", options=("lowerdir=…/2:…/1", "upperdir=…/3/u", "workdir=…/3/w"))]
    driver.adopt(3)                     # its changes are now layer 3, on (2, 1)
    driver.remove(3)

A tests/contracts suite runs on every driver, and again over gRPC.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NewType, Protocol

from corral.images.layers.removal import GoOn, always

type Form = Literal["directory", "image"]

TreeId = NewType("TreeId", int)

# Does a job of corral.images.layers.worker in another process: what takes the interpreter for long. Raises OSError.
type Work = Callable[[Mapping[str, object]], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount(2), as data; `options` in fstab form."""

    type: str
    source: str
    options: tuple[str, ...] = ()
    target: str = ""
    parts: tuple["Mount", ...] = ()
    """What it is put together from, seen nowhere else: "@0" at the beginning of a path is the first of them."""


@dataclass(frozen=True, slots=True)
class Missing:
    """What an unpacked layer takes from those below it.

    implicit: directories that no entry describes, "" being the root. links: (name, target) of hard links to what is
    below.
    """

    implicit: Sequence[str] = ()
    links: Sequence[tuple[str, str]] = ()

    def __bool__(self) -> bool:
        return bool(self.implicit or self.links)


NOTHING_MISSING = Missing()


@dataclass(frozen=True, slots=True)
class Apart:
    """Where the changes of an active tree are: in the directory `source`, an upper one of overlayfs.

    marks: if "aufs", what hides something in it and in the layers is told in that form.
    file: that lies in this ext4 image. since_ns: it is the whole tree instead, which was as it is `below` at that time.
    below: roots of the layers, the uppermost first.
    """

    source: str
    below: Sequence[str] = ()
    file: str = ""
    since_ns: int = 0
    marks: str = ""


@dataclass(frozen=True, slots=True)
class Usage:
    """What one tree alone takes on disk; inodes are 0 where nobody counts them."""

    size_bytes: int
    inodes: int


class Snapshotter(Protocol):
    """One driver, with its own directory. Methods block, and raise OSError."""

    @property
    def name(self) -> str: ...

    @property
    def form(self) -> Form:
        """What a worker makes of a layer in the directory that is staged."""
        ...

    @property
    def max_layers(self) -> int:
        """How many layers may lie on each other."""
        ...

    def check(self) -> str:
        """Why this driver cannot run on this host and in this directory; empty if it can."""
        ...

    def open(self) -> None:
        """Make what it needs below its directory."""
        ...

    def close(self) -> None:
        """Let go of what the kernel holds for it and nobody uses: devices, say. It may be used again."""
        ...

    def stage(self, tree: TreeId) -> Path:
        """An empty directory to unpack a layer into. Not a layer yet: a crash leaves nothing but this directory."""
        ...

    def build(self, tree: TreeId, chain: Sequence[TreeId], missing: Missing) -> int:
        """Finish a staged and unpacked tree that goes on `chain`, which may be staged too, but is finished.

        Returns the bytes added. Raises BadLayer if a hard link leads nowhere.
        """
        ...

    def is_layer(self, tree: TreeId) -> bool:
        """Whether the tree is on disk as a layer."""
        ...

    def commit(self, trees: Sequence[TreeId]) -> None:
        """Make staged trees, whose content the caller has synced, layers, durably."""
        ...

    def make_ready(self, tree: TreeId) -> None:
        """Do ahead what prepare() of this tree will need, whatever it is put on."""
        ...

    def check_quota(self) -> str:
        """Why writable trees cannot be bounded here; empty if they can."""
        ...

    def is_quick(self, chain: Sequence[TreeId], *, writable: bool) -> bool:
        """Whether prepare(), of a tree that was made ready if it is to be writable, waits neither for a disk nor for a
        job of others."""
        ...

    def prepare(self, tree: TreeId, chain: Sequence[TreeId], *, writable: bool, quota_bytes: int = 0) -> None:
        """Make an active tree, or a view, on top of `chain`. An active one may be bounded; it is not quick then."""
        ...

    def mounts(self, tree: TreeId, chain: Sequence[TreeId], *, writable: bool, quota_bytes: int = 0) -> list[Mount]:
        """How to mount it, given what it was prepared with. Waits for nothing."""
        ...

    def apart(self, tree: TreeId, chain: Sequence[TreeId]) -> Apart:
        """Where the changes of an active tree are, for whoever tells or packs them."""
        ...

    def adopt(self, tree: TreeId) -> None:
        """Turn an active tree, which nobody uses any more, into a layer, durably."""
        ...

    def usage(self, tree: TreeId) -> Usage:
        """What an active tree, or a view, has beyond what is below it; walks it."""
        ...

    def remove(self, tree: TreeId, *, go_on: GoOn = always) -> None:
        """Remove whatever there is of the tree: staged, layer, ready or active. Nothing there is no error.

        May take long; ends early, with a part of it done, when `go_on` says no.
        """
        ...

    def trees(self) -> Iterator[TreeId]:
        """Every tree of which there is something on disk."""
        ...
