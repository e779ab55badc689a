"""Layers in aufs' own form, made, read and packed: which no kernel has to know aufs for."""

import io
import os
import stat
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from support.images import Entry, directory, layer
from support.requirements import needs
from support.snapshotters import work_here

from corral.images.drivers.aufs import Aufs, max_branches
from corral.images.layers.aufs import MAX_NAME_BYTES, clean, convert
from corral.images.layers.below import visible
from corral.images.layers.comparing import changes
from corral.images.layers.errors import BadLayer
from corral.images.layers.hiding import Marks
from corral.images.layers.packing import packed
from corral.images.layers.removal import remove_tree
from corral.images.snapshotter import Missing, TreeId
from corral.kernel.aufs import join_branches, split_branches
from corral.oci.parts import located_options

pytestmark = needs("root")

OLD = {"mtime": "1000000000"}
BELOW = [
    directory("d"),
    Entry("d/f", b"1"),
    directory("o"),
    Entry("o/f", b"1"),
    directory("kept", 0o701),
    Entry("kept/f", b"1"),
    Entry("kept/target", b"below"),
]
ABOVE = [
    Entry(".wh.d"),
    directory("o"),
    Entry("o/.wh..wh..opq"),
    Entry("o/g", b"2"),
    Entry("kept/.wh.f"),
    Entry("kept/a", b"3"),
]


class Layers:
    """Built by the driver, as a pull would have them."""

    def __init__(self, root: Path) -> None:
        self.driver = Aufs(root, work_here)
        self.driver.open()
        self.root = root
        self.chain: tuple[TreeId, ...] = ()

    def add(self, *entries: Entry) -> Path:
        tree = TreeId(len(self.chain) + 1)
        target = self.driver.stage(tree)
        blob = self.root / "blob"
        blob.write_bytes(layer(entries))
        job = {"op": "apply", "blob": str(blob), "target": str(target), "bottom": not self.chain, "diff_id": ""}
        applied = work_here(job)
        links = [(name, at) for name, at in applied["links"]]
        self.driver.build(tree, self.chain, Missing(applied["implicit"], links))
        self.driver.commit([tree])
        self.chain = (tree, *self.chain)
        return self.root / "l" / str(tree)

    def paths(self) -> list[Path]:
        return [self.root / "l" / str(tree) for tree in self.chain]


@pytest.fixture
def layers(tmp_path: Path) -> Layers:
    return Layers(tmp_path / "aufs")


def listing(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def content(roots: Sequence[Path], path: str) -> str | None:
    """What aufs would show there, "" if it is a directory, None if nothing."""
    fds = [os.open(root, os.O_PATH | os.O_DIRECTORY) for root in roots]
    try:
        with visible(fds, path, Marks.AUFS) as fd:
            if fd is None:
                return None
            return "" if stat.S_ISDIR(os.fstat(fd).st_mode) else Path(f"/proc/self/fd/{fd}").read_text()
    finally:
        for fd in fds:
            os.close(fd)


def told(root: Path, below: Sequence[Path]) -> set[str]:
    fds = [os.open(path, os.O_RDONLY | os.O_DIRECTORY) for path in (root, *below)]
    try:
        return {f"{kind} {path}" for kind, path in changes(fds[0], fds[1:], Marks.AUFS)}
    finally:
        for fd in fds:
            os.close(fd)


def tar_of(root: Path, marks: Marks) -> bytes:
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return b"".join(packed(fd, marks))
    finally:
        os.close(fd)


def names(tar: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        return archive.getnames()


def test_what_is_hidden_is_told_as_aufs_tells_it(layers: Layers) -> None:
    assert listing(layers.add(*BELOW)) == {"d", "d/f", "o", "o/f", "kept", "kept/f", "kept/target"}
    top = layers.add(*ABOVE)
    assert listing(top) == {".wh.d", "o", "o/.wh..wh..opq", "o/g", "kept", "kept/.wh.f", "kept/a"}
    for mark in (".wh.d", "o/.wh..wh..opq", "kept/.wh.f"):
        status = (top / mark).lstat()
        assert (stat.filemode(status.st_mode), status.st_size) == ("-r--r--r--", 0)
    assert "trusted.overlay.opaque" not in os.listxattr(top / "o")
    assert stat.S_IMODE((top / "kept").stat().st_mode) == 0o701  # as it is below


def test_a_directory_stays_as_old_as_it_was(layers: Layers) -> None:
    layers.add(*BELOW)
    top = layers.add(Entry("kept", kind=tarfile.DIRTYPE, mode=0o755, pax=OLD), Entry("kept/.wh.f"))
    assert (top / "kept").stat().st_mtime_ns == 10**18


def test_the_bottom_layer_hides_nothing(layers: Layers) -> None:
    bottom = layers.add(directory("d"), Entry("d/.wh.f"), Entry("d/.wh..wh..opq"), Entry("d/g", b"x"))
    assert listing(bottom) == {"d", "d/g"}


def test_lookups_stop_at_what_hides(layers: Layers) -> None:
    layers.add(*BELOW)
    layers.add(*ABOVE)
    layers.add(Entry("more", b"4"))
    shown = {path: content(layers.paths(), path) for path in ("d", "d/f", "o/f", "o/g", "kept/f", "kept/a", "more")}
    assert shown == {"d": None, "d/f": None, "o/f": None, "o/g": "2", "kept/f": None, "kept/a": "3", "more": "4"}
    assert content(layers.paths(), "kept/target") == "below"


def test_a_hard_link_leads_to_what_is_shown_below_and_to_nothing_hidden(layers: Layers) -> None:
    layers.add(*BELOW)
    layers.add(*ABOVE)
    link = Entry("kept/link", kind=tarfile.LNKTYPE, link="kept/target")
    assert (layers.add(link) / "kept/link").read_text() == "below"
    with pytest.raises(BadLayer, match="which no layer has"):
        layers.add(Entry("kept/link", kind=tarfile.LNKTYPE, link="kept/f"))


@pytest.mark.parametrize("length", [MAX_NAME_BYTES, MAX_NAME_BYTES + 1])
def test_a_name_that_aufs_has_no_room_for_is_refused(layers: Layers, length: int) -> None:
    name = "n" * length
    if length == MAX_NAME_BYTES:
        assert listing(layers.add(Entry(name, b"x"))) == {name}
        return
    with pytest.raises(BadLayer, match=f"'nnn.*… has more than the {MAX_NAME_BYTES} bytes that aufs takes"):
        layers.add(Entry(name, b"x"))


def test_a_name_that_aufs_keeps_for_itself_is_refused(layers: Layers) -> None:
    with pytest.raises(BadLayer, match=r"the name '\.wh\.d' is one that aufs keeps for itself"):
        layers.add(Entry(".wh.d/f", b"x"))


def test_a_deep_layer_is_converted_to_its_end(tmp_path: Path) -> None:
    """Longer than any path, and than there are descriptors."""
    made = tmp_path / "deep"
    made.mkdir()
    here = os.open(".", os.O_PATH)
    try:
        os.chdir(made)
        for _ in range(1500):
            Path("dddd").mkdir()
            os.chdir("dddd")
        os.mknod("gone", stat.S_IFCHR, os.makedev(0, 0))
        bottom = os.open(".", os.O_PATH)
    finally:
        os.fchdir(here)
        os.close(here)
    try:
        convert(made, bottom=False)
        assert [path.name for path in Path(f"/proc/self/fd/{bottom}").iterdir()] == [".wh.gone"]
    finally:
        os.close(bottom)
        remove_tree(made)


@pytest.fixture
def upper(tmp_path: Path) -> Iterator[Path]:
    """As aufs leaves one: with what it keeps for itself."""
    made = tmp_path / "upper"
    (made / "new/inner").mkdir(parents=True)
    (made / ".wh..wh.aufs").touch()
    for name in ("d/.wh.f", ".wh.b", "new/.wh..wh..opq"):
        (made / name).parent.mkdir(exist_ok=True)
        (made / name).hardlink_to(made / ".wh..wh.aufs")
    (made / ".wh..wh.orph/dead").mkdir(parents=True)
    (made / ".wh..wh.plnk").mkdir()
    (made / ".wh..wh.old.0001").mkdir()
    for name in ("a", "c"):
        (made / name).write_text(name)
    return made


def test_a_tar_is_the_same_whichever_form_tells_what_is_hidden(upper: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "new/inner").mkdir(parents=True)
    (other / "d").mkdir()
    for name in ("a", "c"):
        (other / name).write_text(name)
        os.utime(other / name, ns=(0, (upper / name).stat().st_mtime_ns))
    for name in ("b", "d/f"):
        os.mknod(other / name, stat.S_IFCHR, os.makedev(0, 0))
    os.setxattr(other / "new", "trusted.overlay.opaque", b"y")
    for name in ("d", "new", "new/inner"):
        os.utime(other / name, ns=(0, (upper / name).stat().st_mtime_ns))
    tar = tar_of(upper, Marks.AUFS)
    assert names(tar) == ["a", ".wh.b", "c", "d", "d/.wh.f", "new", "new/.wh..wh..opq", "new/inner"]
    assert tar == tar_of(other, Marks.OVERLAY)


def test_changes_are_told_without_what_aufs_keeps_for_itself(upper: Path, tmp_path: Path) -> None:
    below = tmp_path / "below"
    (below / "d").mkdir(parents=True)
    for name in ("a", "b", "d/f"):
        (below / name).touch()
    assert told(upper, [below]) == {"C a", "D b", "A c", "C d", "D d/f", "A new", "A new/inner"}


def test_what_aufs_keeps_for_itself_goes_when_a_tree_becomes_a_layer(upper: Path) -> None:
    clean(upper)
    assert {path.name for path in upper.iterdir()} == {"a", "c", "d", "new", ".wh.b"}
    assert (upper / ".wh.b").stat().st_nlink == 3


def test_a_tree_is_mounted_of_branches_the_uppermost_first(tmp_path: Path) -> None:
    driver = Aufs(Path("/v/aufs"), work_here)
    [mount] = driver.mounts(TreeId(3), (TreeId(2), TreeId(1)), writable=True)
    assert (mount.type, mount.source) == ("aufs", "aufs")
    branches = "br=/v/aufs/s/3/u=rw:/v/aufs/l/2=ro+wh:/v/aufs/l/1=ro+wh"
    assert mount.options == (branches, "rw", "dirperm1", "noplink")
    [mount] = driver.mounts(TreeId(3), (TreeId(2), TreeId(1)), writable=False)
    assert mount.options[:2] == ("br=/v/aufs/l/2=ro+wh:/v/aufs/l/1=ro+wh", "ro")
    [mount] = driver.mounts(TreeId(3), (), writable=True)
    assert mount.options == ("br=/v/aufs/s/3/u=rw", "rw", "dirperm1", "noplink")
    [mount] = driver.mounts(TreeId(3), (TreeId(1),), writable=False)
    assert (mount.type, mount.source) == ("bind", "/v/aufs/l/1")


def test_branches_are_read_as_they_are_written() -> None:
    branches = [("/a=b/u", "rw"), ("/l/1", "ro+wh")]
    assert split_branches(join_branches(branches)) == branches


def test_a_branch_may_lie_in_a_part_of_the_root() -> None:
    found = located_options(("br=@0/u=rw:/l/1=ro+wh", "noplink"), (7,))
    assert found == ("br=/proc/self/fd/7/u=rw:/l/1=ro+wh", "noplink")


@pytest.mark.parametrize(("told", "count"), [("", 127), ("x\nCONFIG_AUFS_BRANCH_MAX_1023=y\n", 1023)])
def test_there_are_as_many_branches_as_aufs_was_built_for(told: str, count: int) -> None:
    assert max_branches(told) == count
