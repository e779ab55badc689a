"""What a layer's tar becomes on disk, and what it never does."""

import gc
import io
import os
import stat
import struct
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from support.images import Entry, directory, layer, symlink
from support.overlay import mounted
from support.requirements import needs
from support.tars import archive, member, packed, pax

from corral.images.layers.apply import Limits
from corral.images.layers.below import complete
from corral.images.layers.errors import BadLayer
from corral.images.layers.worker import Blob, unpack
from corral.images.snapshotter import Mount

pytestmark = needs("root")

# cap_net_raw+ep, VFS_CAP_REVISION_2. Source: linux/capability.h.
PING_CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)


class Layers:
    """Layers unpacked below a temporary directory, as a worker does it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.trees: list[Path] = []
        self.size_bytes = 0

    def add(self, *entries: Entry) -> Path:
        return self.add_tar(layer(entries))

    def add_tar(self, data: bytes, *, limits: Limits | None = None) -> Path:
        """Apply the tar on top of those before; returns its own tree."""
        number = len(self.trees)
        blob, tree = self.directory / f"{number}.tar", self.directory / str(number)
        blob.write_bytes(data)
        tree.mkdir()
        tree.chmod(0o755)
        answer = unpack(
            Blob(str(blob)), tree, bottom=not self.trees, diff_id="", limits=limits or Limits(), report=io.StringIO()
        )
        implicit, links = answer["implicit"], answer["links"]
        assert isinstance(implicit, list)
        assert isinstance(links, list)
        complete(tree, self.trees[::-1], implicit, links)
        self.trees.append(tree)
        return tree

    def merged(self) -> Sequence[Mount]:
        lower = ":".join(str(tree) for tree in reversed(self.trees))
        return [Mount("overlay", "overlay", ("ro", f"lowerdir={lower}"))]


@pytest.fixture
def layers(tmp_path: Path) -> Iterator[Layers]:
    old = os.umask(0)
    yield Layers(tmp_path)
    os.umask(old)


def listing(path: Path) -> set[str]:
    return {str(found.relative_to(path)) for found in path.rglob("*")}


# What honest layers hold


def test_files_keep_content_owner_mode_and_time(layers: Layers) -> None:
    tree = layers.add(
        directory("d", 0o2750, uid=5),
        Entry("d/f", b"content", 0o640, uid=1000, gid=50, pax={"mtime": "1234567890.987654321"}),
        Entry("d/suid", b"", 0o4755, uid=7),
    )
    status = (tree / "d/f").stat()
    assert (tree / "d/f").read_bytes() == b"content"
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (1000, 50, 0o640)
    assert status.st_mtime_ns == 1234567890987654321
    assert stat.S_IMODE((tree / "d/suid").stat().st_mode) == 0o4755
    assert (tree / "d/suid").stat().st_gid == 0, "the group is the entry's, not inherited from the directory"
    assert stat.S_IMODE((tree / "d").stat().st_mode) == 0o2750


def test_a_directory_keeps_its_time_though_files_are_made_in_it_later(layers: Layers) -> None:
    old = {"mtime": "1000000000"}
    tree = layers.add(
        Entry("d", mode=0o755, kind=b"5", pax=old), Entry("d/e", mode=0o700, kind=b"5", pax=old), Entry("d/e/f", b"x")
    )
    assert (tree / "d").stat().st_mtime == 1000000000
    assert (tree / "d/e").stat().st_mtime == 1000000000


def test_the_root_directory_takes_its_entry(layers: Layers) -> None:
    tree = layers.add(Entry("./", mode=0o711, kind=b"5", uid=3, gid=4, pax={"mtime": "5"}), Entry("./f", b"x"))
    status = tree.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_mtime) == (0o711, 3, 4, 5)


def test_symbolic_links_are_kept_as_they_are(layers: Layers) -> None:
    tree = layers.add(
        symlink("a", "../../../etc/passwd"), symlink("b", "/" + "x" * 200), Entry("c", kind=b"2", link="d", uid=9)
    )
    assert (tree / "a").readlink() == Path("../../../etc/passwd")
    assert str((tree / "b").readlink()) == "/" + "x" * 200
    assert (tree / "c").lstat().st_uid == 9


def test_hard_links_share_their_file(layers: Layers) -> None:
    tree = layers.add(
        Entry("x/one", b"data", uid=4),
        Entry("y/two", kind=b"1", link="x/one"),
        Entry("three", kind=b"1", link="/y/two"),
    )
    assert (tree / "x/one").stat().st_nlink == 3
    assert (tree / "three").read_bytes() == b"data"
    assert (tree / "three").stat().st_uid == 4


def test_a_hard_link_to_a_symbolic_link_is_a_second_name_of_the_link(layers: Layers) -> None:
    tree = layers.add(symlink("l", "/etc/passwd"), Entry("m", kind=b"1", link="l"))
    assert (tree / "m").is_symlink()


def test_attributes_and_capabilities(layers: Layers) -> None:
    tree = layers.add_tar(
        archive(
            pax({b"SCHILY.xattr.security.capability": PING_CAPABILITY, b"SCHILY.xattr.user.note": b"hi"}),
            member(b"ping", b"\x7fELF", uid=b"0000007\0"),
            pax({b"SCHILY.xattr.user.note": b"dir"}),
            member(b"d/", kind=b"5"),
        )
    )
    assert os.getxattr(tree / "ping", "security.capability") == PING_CAPABILITY
    assert os.getxattr(tree / "ping", "user.note") == b"hi"
    assert os.getxattr(tree / "d", "user.note") == b"dir"


def test_attributes_that_would_steer_the_host_are_left_out(layers: Layers) -> None:
    evil = {
        b"SCHILY.xattr.trusted.overlay.redirect": b"/etc",
        b"SCHILY.xattr.trusted.overlay.opaque": b"y",
        b"SCHILY.xattr.user.overlay.metacopy": b"",
        b"SCHILY.xattr.security.selinux": b"system_u:object_r:init_t",
        b"SCHILY.xattr.trusted.x": b"y",
    }
    tree = layers.add_tar(archive(pax(evil), member(b"d/", kind=b"5"), pax(evil), member(b"f")))
    assert os.listxattr(tree / "d") == []
    assert os.listxattr(tree / "f") == []


def test_devices_and_fifos(layers: Layers) -> None:
    tree = layers.add(
        Entry("null", mode=0o666, kind=b"3", device=(1, 3)), Entry("sda", mode=0o660, kind=b"4", device=(8, 0), gid=6),
        Entry("pipe", mode=0o622, kind=b"6"),
    )  # fmt: skip
    assert stat.S_ISCHR((tree / "null").stat().st_mode)
    assert (tree / "null").stat().st_rdev == os.makedev(1, 3)
    assert stat.S_IMODE((tree / "null").stat().st_mode) == 0o666
    assert (stat.S_ISBLK((tree / "sda").stat().st_mode), (tree / "sda").stat().st_gid) == (True, 6)
    assert stat.S_ISFIFO((tree / "pipe").stat().st_mode)


def test_long_and_strange_names(layers: Layers) -> None:
    names = ["d" * 200 + "/" + "e" * 255, "a b\tc\nd", "ünï/çødé", "-rf", "*", "a\\b", ".wh", ".whx", "…/..."]
    tree = layers.add_tar(packed(dict.fromkeys(names, b"x")))
    for name in names:
        assert (tree / name).read_bytes() == b"x"


def test_names_that_are_not_utf8(layers: Layers) -> None:
    tree = layers.add_tar(archive(member(b"caf\xe9/\xff", b"x")))
    assert [os.fsencode(path.name) for path in (tree / "caf\udce9").iterdir()] == [b"\xff"]


def test_holes_stay_holes(layers: Layers, tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.write(b"head")
        file.seek(50 << 20)
        file.write(b"tail")
    command = ["tar", "-S", "--format=posix", "-C", tmp_path, "-cO", "sparse"]
    tree = layers.add_tar(subprocess.run(command, check=True, capture_output=True).stdout)
    assert (tree / "sparse").stat().st_size == (50 << 20) + 4
    assert (tree / "sparse").stat().st_blocks * 512 < 1 << 20
    assert (tree / "sparse").read_bytes() == (tmp_path / "sparse").read_bytes()


def test_the_last_of_several_entries_of_one_name_counts(layers: Layers) -> None:
    tree = layers.add(
        Entry("f", b"old"), Entry("f", b"new"),
        directory("dir-to-file"), Entry("dir-to-file/x", b"x"), Entry("dir-to-file", b"file"),
        Entry("file-to-dir", b"x"), directory("file-to-dir"), Entry("file-to-dir/y", b"y"),
        symlink("link-to-file", "f"), Entry("link-to-file", b"own"),
        directory("d", 0o700), Entry("d/kept", b"k"), directory("d", 0o711),
    )  # fmt: skip
    assert (tree / "f").read_bytes() == b"new"
    assert (tree / "dir-to-file").read_bytes() == b"file"
    assert (tree / "file-to-dir/y").read_bytes() == b"y"
    assert (tree / "link-to-file").read_bytes() == b"own"
    assert (tree / "d/kept").read_bytes() == b"k"
    assert stat.S_IMODE((tree / "d").stat().st_mode) == 0o711


def test_a_hard_link_may_replace_what_is_there(layers: Layers) -> None:
    tree = layers.add(Entry("a", b"a"), directory("b"), Entry("b/c", b"c"), Entry("b", kind=b"1", link="a"),
                      Entry("a", kind=b"1", link="a"))  # fmt: skip
    assert (tree / "b").read_bytes() == b"a"


def test_a_link_in_the_way_is_followed_inside_the_root(layers: Layers) -> None:
    tree = layers.add(
        symlink("lib", "usr/lib"),
        directory("usr/lib"),
        Entry("lib/x", b"x"),
        symlink("abs", "/usr"),
        Entry("abs/y", b"y"),
    )
    assert (tree / "usr/lib/x").read_bytes() == b"x"
    assert (tree / "usr/y").read_bytes() == b"y"


def test_a_dangling_link_in_the_way_is_followed_and_filled(layers: Layers) -> None:
    tree = layers.add(symlink("var/run", "/run"), Entry("var/run/x/pid", b"1"))
    assert (tree / "run/x/pid").read_bytes() == b"1"


def open_fds() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_many_directories_and_their_replacement_close_every_descriptor(layers: Layers) -> None:
    gc.collect()  # what earlier tests forgot must not be closed just now
    before = open_fds()
    entries = [Entry(f"d{i}/e{j}/f", b"x") for i in range(30) for j in range(5)]
    entries += [Entry(f"d{i}", b"now a file") for i in range(0, 30, 2)]
    entries += [Entry(f"h{i}", kind=b"1", link=f"d{i}/e1/f") for i in range(1, 30, 2)]
    tree = layers.add(*entries)
    assert open_fds() <= before
    assert (tree / "d2").is_file()
    assert (tree / "h3").read_bytes() == b"x"


# Whiteouts


@needs("overlayfs")
def test_whiteouts_hide_what_is_below(layers: Layers, tmp_path: Path) -> None:
    layers.add(
        Entry("a/gone", b"1"),
        Entry("a/kept", b"2"),
        Entry("gone-dir/x", b"3"),
        Entry("o/old", b"4"),
        Entry("o/d/old", b"5"),
    )
    layers.add(Entry("a/.wh.gone"), Entry(".wh.gone-dir"), Entry("o/.wh..wh..opq"), Entry("o/new", b"6"))
    with mounted(layers.merged(), tmp_path / "m") as root:
        assert listing(root) == {"a", "a/kept", "o", "o/new"}


@needs("overlayfs")
@pytest.mark.parametrize("turn", [1, -1], ids=["whiteout-first", "whiteout-last"])
def test_a_layer_never_hides_what_it_brings_itself(layers: Layers, tmp_path: Path, turn: int) -> None:
    """Source: OCI image-spec layer.md, "Whiteouts": only whiteouts of later layers can hide it."""
    layers.add(Entry("d/old", b"1"), Entry("f", b"1"), Entry("o/old", b"1"))
    entries = [Entry(".wh.d"), directory("d"), Entry("d/new", b"2")], [Entry(".wh.f"), Entry("f", b"2")], [
        Entry("o/.wh..wh..opq"), directory("o"), Entry("o/new", b"2")]  # fmt: skip
    layers.add(*[entry for group in entries for entry in group[::turn]])
    with mounted(layers.merged(), tmp_path / "m") as root:
        assert listing(root) == {"d", "d/new", "f", "o", "o/new"}
        assert (root / "f").read_bytes() == b"2"


def test_the_bottom_layer_has_nothing_to_hide(layers: Layers) -> None:
    tree = layers.add(Entry(".wh.x"), Entry("d/.wh..wh..opq"), Entry("d/f", b""))
    assert listing(tree) == {"d", "d/f"}
    assert os.listxattr(tree / "d") == []


@needs("overlayfs")
def test_a_whiteout_inside_an_opaque_directory_does_not_show(layers: Layers, tmp_path: Path) -> None:
    layers.add(Entry("o/x", b"1"))
    layers.add(Entry("o/.wh.x"), Entry("o/.wh..wh..opq"), Entry("o/y", b"2"))
    with mounted(layers.merged(), tmp_path / "m") as root:
        assert listing(root / "o") == {"y"}


def test_aufs_bookkeeping_is_passed_over(layers: Layers) -> None:
    layers.add(Entry("f", b""))
    assert listing(layers.add(Entry(".wh..wh.aufs"), Entry(".wh..wh.plnk/1.2", b"x"), Entry("g", b""))) == {"g"}


# What a layer takes from those below


def test_a_directory_without_an_entry_is_as_it_is_below(layers: Layers) -> None:
    layers.add(Entry("tmp", mode=0o1777, kind=b"5", uid=3, gid=4, pax={"mtime": "77"}))
    tree = layers.add(Entry("tmp/f", b"x"))
    status = (tree / "tmp").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_mtime) == (0o1777, 3, 4, 77)


def test_the_root_directory_without_an_entry_is_as_it_is_below(layers: Layers) -> None:
    layers.add(Entry("./", mode=0o711, kind=b"5", uid=3, gid=4, pax={"mtime": "77"}))
    layers.add(Entry("f", b"x"))
    status = layers.add(Entry("g", b"x")).stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_mtime) == (0o711, 3, 4, 77)


def test_a_hidden_directory_gives_nothing_to_the_one_above(layers: Layers) -> None:
    layers.add(directory("d", 0o700, uid=9))
    layers.add(Entry(".wh.d"))
    tree = layers.add(Entry("d/f", b"x"))
    assert (tree / "d").stat().st_uid == 0


@needs("overlayfs")
def test_a_hard_link_to_a_file_below_copies_it_up(layers: Layers, tmp_path: Path) -> None:
    layers.add(Entry("lib/a", b"data", 0o4750, uid=5))
    tree = layers.add(Entry("bin/b", kind=b"1", link="lib/a"))
    assert (tree / "bin/b").stat().st_ino == (tree / "lib/a").stat().st_ino
    with mounted(layers.merged(), tmp_path / "m") as root:
        status = (root / "bin/b").stat()
        assert (root / "bin/b").read_bytes() == b"data"
        assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (5, 0o4750)


def test_a_hard_link_to_nothing_is_refused(layers: Layers) -> None:
    layers.add(Entry("a", b""))
    layers.add(Entry(".wh.a"))
    with pytest.raises(BadLayer, match="which no layer has"):
        layers.add(Entry("b", kind=b"1", link="a"))
    layers.trees.clear()
    layers.directory = layers.directory / "again"
    layers.directory.mkdir()
    with pytest.raises(BadLayer, match="which the layer does not have"):
        layers.add(Entry("b", kind=b"1", link="a"))


# What hostile layers try


@pytest.mark.parametrize("target", ["/", "..", "../../../../../..", "/proc/self/root", "/tmp"])
def test_a_link_cannot_lead_out_of_the_root(layers: Layers, tmp_path: Path, target: str) -> None:
    """Also not with what follows it: the directory's owner, a whiteout, a hard link, a removal."""
    layers.add(Entry("base", b""))
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_bytes(b"p")
    before = (outside.stat().st_mode, outside.stat().st_mtime_ns)
    path = "esc" + str(outside) if target != "/tmp" else "esc/outside"
    layers.add_tar(
        layer([symlink("esc", target), Entry(f"{path}/planted", b"x"), directory(f"{path}", 0o777),
               Entry(f"{path}/.wh.precious"), Entry("hard", kind=b"1", link=f"{path}/planted")])
    )  # fmt: skip
    assert listing(outside) == {"precious"}
    assert (outside.stat().st_mode, outside.stat().st_mtime_ns) == before


def test_replacing_a_link_removes_the_link_and_not_what_it_names(layers: Layers, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_bytes(b"p")
    layers.add(symlink("l", str(outside)), directory("l"), symlink("m", f"{outside}/precious"), Entry("m", b"new"))
    assert (outside / "precious").read_bytes() == b"p"


def test_a_directory_that_became_a_circle_of_links_is_no_directory_any_more(layers: Layers) -> None:
    tree = layers.add(directory("a"), directory("a/b", 0o700), symlink("a", "a"))
    assert str((tree / "a").readlink()) == "a"


def test_a_hard_link_to_itself_by_another_path_changes_nothing(layers: Layers) -> None:
    tree = layers.add(Entry("a", b"x"), symlink("here", "."), Entry("a", kind=tarfile.LNKTYPE, link="here/a"))
    assert (tree / "a").read_text() == "x"


def test_a_swapped_link_is_resolved_anew(layers: Layers) -> None:
    tree = layers.add(
        directory("a"), directory("b"), symlink("l", "a"), Entry("l/one", b"1"), symlink("l", "b"),
        Entry("l/two", b"2"),
        Entry("d/x", b"x"), symlink("d", "a"), Entry("d/y", b"y"),
    )  # fmt: skip
    assert listing(tree) == {"a", "a/one", "a/y", "b", "b/two", "l", "d"}


def test_as_deep_as_a_path_may_be_is_unpacked_and_removed(layers: Layers) -> None:
    from corral.images.layers.removal import remove_tree

    tree = layers.add_tar(archive(pax({b"path": b"d/" * 2000 + b"f"}), member(b"x", b"1")))
    remove_tree(tree)
    assert not tree.exists()


def test_limits_stop_a_bomb(layers: Layers) -> None:
    with pytest.raises(BadLayer, match="more than 10 entries"):
        layers.add_tar(packed({str(i): b"" for i in range(11)}), limits=Limits(entries=10))
    layers.trees.append(layers.directory / "0")
    with pytest.raises(BadLayer, match="unpacks to more than 100 bytes"):
        layers.add_tar(packed({"x": bytes(101)}), limits=Limits(bytes=100))
