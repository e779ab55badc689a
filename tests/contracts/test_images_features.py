"""What real images hold is unpacked as it was, whatever wrote it, and in memory that does not grow with it."""

import io
import os
import shutil
import socket
import stat
import struct
import subprocess
import tempfile
import zlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from support.amounts import amount
from support.fingerprint import fingerprint
from support.images import Entry, layer, symlink
from support.requirements import needs
from support.tars import END, header, member

from corral.images.layers.apply import Limits
from corral.images.layers.packing import packed
from corral.images.layers.worker import Blob, unpack
from corral.images.workers import Workers

pytestmark = needs("root")

# cap_net_raw+ep, VFS_CAP_REVISION_2. Source: linux/capability.h.
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)
OLD_NS = 1_234_567_890_123_456_789
MANY = amount(100_000, in_ci=30_000)
LARGE_BYTES = amount(1 << 30, in_ci=1 << 28)
MOST_BYTES = 60_000_000 + 900 * MANY


@pytest.fixture(autouse=True)
def no_umask() -> Iterator[None]:
    old = os.umask(0)
    yield
    os.umask(old)


def unpacked(data: bytes, tmp_path: Path) -> Path:
    """The tree of a layer with nothing below it."""
    blob, tree = tmp_path / "layer.tar", tmp_path / "tree"
    blob.write_bytes(data)
    tree.mkdir()
    unpack(Blob(str(blob)), tree, bottom=True, diff_id="", limits=Limits(), report=io.StringIO())
    return tree


def make_everything(root: Path) -> None:
    """A tree with one of each kind that can be in an image."""
    long = "long-name-" * 15
    for directory in (root, root / "d", root / "d/sub", root / long, root / long / long):
        directory.mkdir()
    (root / "d/file").write_bytes(b"content")
    (root / "d/empty").touch()
    (root / long / long / "file").write_bytes(b"deep")
    (root / "ünï çødé\n\t*").write_bytes(b"odd")
    os.link(root / "d/file", root / long / "other name")
    (root / "d/link").symlink_to("file")
    (root / "d/far").symlink_to("/" + "x" * 300)
    os.link(root / "d/link", root / "second-name-of-a-link", follow_symlinks=False)
    os.mkfifo(root / "fifo", 0o622)
    os.mknod(root / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    os.mknod(root / "disk", 0o660 | stat.S_IFBLK, os.makedev(259, 0x12345))
    for name, owner in (("owned", (1000, 50)), ("far-owned", (2**31 + 5, 2**32 - 2))):
        (root / name).write_bytes(name.encode())
        os.chown(root / name, *owner)
    os.chown(root / "d/link", 7, 8, follow_symlinks=False)
    for mode in (0o4755, 0o2755, 0o1644, 0o000):
        (root / f"mode-{mode:o}").touch()
        (root / f"mode-{mode:o}").chmod(mode)
    (root / "d/sub").chmod(0o3777)
    with (root / "sparse").open("wb") as file:
        for number in range(30):
            file.seek(number << 20)
            file.write(b"data")
        file.truncate(40 << 20)
    for at, below, names in os.walk(root, topdown=False):
        for name in [*below, *names]:
            os.utime(Path(at, name), ns=(OLD_NS, OLD_NS), follow_symlinks=False)
    os.utime(root, ns=(OLD_NS, OLD_NS))


@needs("tar")
@pytest.mark.parametrize("form", ["gnu", "oldgnu", "posix"])
def test_everything_is_as_it_was_in_each_form_of_gnu_tar(tmp_path: Path, form: str) -> None:
    """Its forms differ in long names, large numbers, sparse files and times: only one has parts of a second."""
    source = tmp_path / "source"
    make_everything(source)
    command = ["tar", f"--format={form}", "--sparse", "-C", source, "-c", "."]
    tree = unpacked(subprocess.run(command, check=True, capture_output=True).stdout, tmp_path)
    wanted = fingerprint(source)
    if form != "posix":
        wanted = {path: (*fact[:3], OLD_NS // 10**9 * 10**9, *fact[4:]) for path, fact in wanted.items()}
    assert fingerprint(tree) == wanted
    assert (tree / "sparse").stat().st_blocks * 512 < 4 << 20


@needs("tar")
def test_a_socket_is_in_no_layer(tmp_path: Path) -> None:
    """A tar has no word for it: GNU tar leaves it out, and so does what we pack."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").touch()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(source / "socket"))
        fd = os.open(source, os.O_PATH)
        try:
            ours = b"".join(packed(fd))
        finally:
            os.close(fd)
    theirs = subprocess.run(["tar", "-C", source, "-c", "."], check=True, capture_output=True).stdout
    for number, data in enumerate((ours, theirs)):
        (tmp_path / str(number)).mkdir()
        assert [path.name for path in unpacked(data, tmp_path / str(number)).iterdir()] == ["file"]


def test_times_are_kept_to_the_nanosecond_of_everything_that_has_one(tmp_path: Path) -> None:
    time = {"mtime": "1234567890.123456789"}
    tree = unpacked(
        layer([
            Entry("d", mode=0o755, kind=b"5", pax=time), Entry("d/f", b"x", pax=time),
            Entry("fifo", kind=b"6", pax=time), Entry("null", kind=b"3", device=(1, 3), pax=time),
            Entry("link", kind=b"2", link="d", pax=time), Entry("./", mode=0o755, kind=b"5", pax=time),
        ]),
        tmp_path,
    )  # fmt: skip
    assert {path.lstat().st_mtime_ns for path in (tree, *tree.rglob("*"))} == {OLD_NS}


def test_a_capability_outlives_the_owner_that_its_file_gets(tmp_path: Path) -> None:
    """chown() takes capabilities and set-uid bits away."""
    attributes = {"SCHILY.xattr.security.capability": CAPABILITY.decode("latin-1")}
    tree = unpacked(layer([Entry("ping", b"x", 0o4755, uid=5, gid=6, pax=attributes)]), tmp_path)
    assert os.getxattr(tree / "ping", "security.capability") == CAPABILITY
    assert stat.S_IMODE((tree / "ping").stat().st_mode) == 0o4755
    assert ((tree / "ping").stat().st_uid, (tree / "ping").stat().st_gid) == (5, 6)


def test_a_hard_link_and_its_file_may_be_far_apart_and_reached_through_links(tmp_path: Path) -> None:
    entries = [symlink("lib", "usr/lib"), Entry("usr/lib/a", b"data", uid=4)]
    entries += [Entry(f"filler/{number}", b"x") for number in range(500)]
    entries += [Entry("bin/b", kind=b"1", link="lib/a"), Entry("bin/c", kind=b"1", link="./bin/b")]
    tree = unpacked(layer(entries), tmp_path)
    assert (tree / "usr/lib/a").stat().st_nlink == 3
    assert (tree / "bin/c").read_bytes() == b"data"


# In bounded memory


@pytest.fixture
def roomy() -> Iterator[Path]:
    """In memory if there is a file system for that: making and removing so many files takes a disk a minute."""
    at = "/dev/shm" if os.path.ismount("/dev/shm") else None
    path = Path(tempfile.mkdtemp(prefix="corral-test-", dir=at))
    yield path
    shutil.rmtree(path)


@pytest.fixture
async def workers() -> AsyncIterator[Workers]:
    made = Workers(1, idle_s=60, max_entries=10 * MANY, max_bytes=1 << 40)
    yield made
    await made.stop()


async def applied(workers: Workers, directory: Path, form: str) -> dict[str, object]:
    """The answer for the layer that was written there."""
    (directory / "tree").mkdir()
    job = {"op": "apply", "blob": f"{directory}/layer", "target": f"{directory}/tree", "form": form, "bottom": True}
    answer: dict[str, object] = await workers.run({**job, "diff_id": ""}, lambda _done: None)
    return answer


def peak_bytes(workers: Workers) -> int:
    """The most memory that the process which did the work has ever had."""
    [(process, _)] = workers._idle
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


@pytest.mark.parametrize("form", ["directory", "image"])
async def test_a_layer_of_many_files_takes_little_memory(workers: Workers, roomy: Path, form: str) -> None:
    with (roomy / "layer").open("wb") as file:
        for number in range(MANY):
            file.write(member(b"usr/share/d%d/file-%d" % (number // 250, number), b"x"))
        file.write(END)
    answer = await applied(workers, roomy, form)
    assert answer["inodes"] == MANY + MANY // 250 + 2
    if form == "directory":
        assert sum(len(names) for _, _, names in os.walk(roomy / "tree")) == MANY
    assert peak_bytes(workers) < MOST_BYTES


@pytest.mark.parametrize("form", ["directory", "image"])
async def test_a_large_file_takes_little_memory(workers: Workers, tmp_path: Path, form: str) -> None:
    encoder = zlib.compressobj(1, wbits=31)
    with (tmp_path / "layer").open("wb") as file:
        file.write(encoder.compress(header(b"file", size=LARGE_BYTES)))
        for _ in range(LARGE_BYTES >> 20):
            file.write(encoder.compress(bytes(1 << 20)))
        file.write(encoder.compress(END) + encoder.flush())
    assert (await applied(workers, tmp_path, form))["size_bytes"] == LARGE_BYTES
    assert peak_bytes(workers) < MOST_BYTES
    shutil.rmtree(tmp_path / "tree")
