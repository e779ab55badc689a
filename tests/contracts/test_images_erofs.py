"""What a layer's tar becomes as an EROFS image: to the kernel, to fsck.erofs, and beside the same in a directory."""

import io
import os
import random
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.fingerprint import Fingerprint, fingerprint
from support.images import Entry, directory, layer, symlink
from support.requirements import needs
from support.tars import archive, member, pax

from corral.images.layers.apply import Limits
from corral.images.layers.errors import BadLayer
from corral.images.layers.imaging import IMAGE
from corral.images.layers.worker import Blob, unpack
from corral.kernel import mount
from corral.kernel.loop import mount_file

pytestmark = needs("root", "erofs")


def unpacked(data: bytes, where: Path, form: str, *, bottom: bool = True, limits: Limits | None = None) -> Path:
    """The directory, or the image, that a layer becomes."""
    where.mkdir()
    where.chmod(0o755)
    (where.parent / "blob").write_bytes(data)
    blob = Blob(str(where.parent / "blob"))
    limits = limits or Limits()
    umask = os.umask(0)
    try:
        unpack(blob, where, bottom=bottom, diff_id="", limits=limits, report=io.StringIO(), form=form)
    finally:
        os.umask(umask)
    return where / IMAGE if form == "image" else where


@contextmanager
def mounted(image: Path, *, device: bool = False) -> Iterator[Path]:
    """By its fd alone: nothing is to be seen on the host."""
    fd = mount_file("erofs", str(image), attributes=mount.MOUNT_ATTR_RDONLY, device=device)
    try:
        yield Path(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


def image_of(*entries: Entry, at: Path) -> Path:
    return unpacked(layer([directory("./"), *entries]), at / "i", "image")


@pytest.mark.parametrize("device", [False, True], ids=["file", "loop"])
def test_what_is_in_it_is_read_back(tmp_path: Path, device: bool) -> None:
    sizes = {f"f{size}": os.urandom(size) for size in (0, 1, 4095, 4096, 4097, 1_000_000)}
    image = image_of(*(Entry(name, data) for name, data in sizes.items()), symlink("l", "t" * 4095), at=tmp_path)
    with mounted(image, device=device) as root:
        assert {name: (root / name).read_bytes() for name in sizes} == sizes
        assert str((root / "l").readlink()) == "t" * 4095
        assert sorted(path.name for path in root.iterdir()) == sorted([*sizes, "l"])


def test_a_large_directory_finds_every_name_in_it(tmp_path: Path) -> None:
    names = [f"{'x' * (i % 200)}{i}" for i in range(20_000)]
    image = image_of(directory("d"), *(Entry(f"d/{name}", b"%d" % i) for i, name in enumerate(names)), at=tmp_path)
    with mounted(image) as root:
        assert {path.name for path in (root / "d").iterdir()} == set(names)
        assert all((root / "d" / name).read_bytes() == b"%d" % i for i, name in enumerate(names) if i % 7 == 0)
        assert not (root / "d/absent").exists()


def test_names_are_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    """Some come before "." and some are no text at all."""
    names = ["!", "-", ".a", "..b", "A", "a", "é", "\udcff\udcfe", " ", "\x01"]
    image = image_of(*(Entry(name, b"x", pax={}) for name in names), at=tmp_path)
    with mounted(image) as root:
        assert all((root / name).read_bytes() == b"x" for name in names)


def test_many_attributes(tmp_path: Path) -> None:
    wanted = {f"SCHILY.xattr.user.k{i}": "v" * (i * 37) for i in range(60)}
    image = image_of(Entry("f", b"x", pax=wanted), directory("d"), Entry("d/g", b"y", pax=wanted), at=tmp_path)
    with mounted(image) as root:
        for name in ("f", "d/g"):
            assert len(os.listxattr(root / name)) == 60
            assert os.getxattr(root / name, "user.k59") == b"v" * 59 * 37


def test_holes_of_any_size(tmp_path: Path) -> None:
    size = 1 << 41
    tar = archive(
        member(b"./", kind=b"5", mode=b"0000755\0"),
        pax({b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0", b"GNU.sparse.realsize": b"%d" % size}),
        member(b"sparse", b"2\n5000\n3\n%d\n2\n".replace(b"%d", b"%d" % (size - 2)).ljust(512, b"\0") + b"abcde"),
        member(b"after", b"after"),
    )
    image = unpacked(tar, tmp_path / "i", "image")
    assert image.stat().st_blocks * 512 < 32 << 20
    with mounted(image) as root, (root / "sparse").open("rb") as file:
        assert os.pread(file.fileno(), 5, 4999) == b"\0abc\0"
        assert os.pread(file.fileno(), 10, size - 2) == b"de"
        assert os.pread(file.fileno(), 4, size // 2) == bytes(4)
        assert os.lseek(file.fileno(), 1 << 30, os.SEEK_DATA) > size // 2
        assert (root / "after").read_bytes() == b"after"


@needs("fsck.erofs")
def test_fsck_has_no_complaints(tmp_path: Path) -> None:
    entries = [Entry(f"d{i % 30}/f{i}", os.urandom(i * 13)) for i in range(500)]
    image = image_of(*entries, Entry("c", kind=tarfile.CHRTYPE, device=(300, 70_000)), symlink("s", "x"), at=tmp_path)
    subprocess.run(["fsck.erofs", "-d1", image], check=True)
    (tmp_path / "out").mkdir()
    subprocess.run(["fsck.erofs", "-d1", f"--extract={tmp_path / 'out' / 'x'}", "--preserve", image], check=True)
    assert (tmp_path / "out/x/d7/f127").read_bytes() == entries[127].data


MALFORMED = {
    "acl": {"SCHILY.xattr.system.posix_acl_access": "nonsense"},
    "capability": {"SCHILY.xattr.security.capability": "x"},
}


@pytest.mark.parametrize("attribute", MALFORMED)
def test_attributes_that_no_file_system_takes_are_refused(tmp_path: Path, attribute: str) -> None:
    for form in ("directory", "image"):
        with pytest.raises(BadLayer, match="cannot be set"):
            unpacked(layer([Entry("f", pax=MALFORMED[attribute])]), tmp_path / form, form)


def test_limits_stop_a_bomb(tmp_path: Path) -> None:
    with pytest.raises(BadLayer, match="more than 1000 bytes"):
        unpacked(layer([Entry("f", bytes(2000))]), tmp_path / "a", "image", limits=Limits(bytes=1000))
    with pytest.raises(BadLayer, match="more than 3 entries"):
        unpacked(layer([Entry(f"f{i}") for i in range(9)]), tmp_path / "b", "image", limits=Limits(entries=3))


# Whatever a tar says


NAMES = ("a", "b", "a/a", "a/b", "b/a", "a/a/b", "b/b/b", "c/a", "../c", "./b/", "c")


def some_entry(dice: random.Random) -> Entry:
    name, other = dice.choice(NAMES), dice.choice(NAMES)
    match dice.randrange(9):
        case 0 | 1:
            return Entry(name, b"%d" % dice.randrange(99), dice.choice([0o644, 0o4755]), uid=dice.randrange(3))
        case 2 | 3:
            return directory(name.rstrip("/"), dice.choice([0o755, 0o1777, 0o700]), uid=dice.randrange(3))
        case 4:
            return symlink(name.rstrip("/"), dice.choice([other, f"/{other}", f"../{other}", "nowhere", "."]))
        case 5:
            return Entry(name.rstrip("/"), kind=tarfile.LNKTYPE, link=other)
        case 6:
            head, _, tail = name.rstrip("/").rpartition("/")
            return Entry(f"{head}/.wh.{tail}" if head else f".wh.{tail}")
        case 7:
            return Entry(f"{name.rstrip('/')}/.wh..wh..opq")
        case _:
            return Entry(name.rstrip("/"), kind=tarfile.CHRTYPE, device=(1, dice.randrange(3)))


def outcome(data: bytes, where: Path, form: str, *, bottom: bool) -> Fingerprint | str:
    try:
        made = unpacked(data, where, form, bottom=bottom)
    except BadLayer as e:
        return f"refused: {type(e).__name__}"
    if form == "directory":
        return fingerprint(made, marks=True)
    if not (where / "tree.json").exists():
        with mounted(made) as root:
            return fingerprint(root, marks=True)
    return "waits"


@pytest.mark.parametrize("bottom", [True, False])
def test_it_is_the_same_in_an_image_as_in_a_directory(tmp_path: Path, bottom: bool) -> None:
    compared = 0
    for seed in range(150):
        dice = random.Random(seed)
        entries = [directory("./", 0o711), directory("a"), directory("b"), directory("c")]
        dice.shuffle(entries)
        entries += [some_entry(dice) for _ in range(dice.randrange(1, 9))]
        data = layer(entries)
        there = outcome(data, tmp_path / f"d{seed}", "directory", bottom=bottom)
        here = outcome(data, tmp_path / f"i{seed}", "image", bottom=bottom)
        if here == "waits":
            assert not isinstance(there, str)
            continue
        assert here == there, (seed, entries)
        compared += not isinstance(here, str)
    assert compared > 20
