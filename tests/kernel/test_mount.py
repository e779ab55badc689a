"""The mount calls, by what /proc/self/mountinfo and the files then say."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.requirements import needs

from corral.kernel import mount, overlay
from corral.kernel.syscalls import AT_FDCWD, TMPFS_MAGIC, filesystem_magic
from corral.oci import trees

pytestmark = needs("root")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A directory to mount on; what is mounted there is dropped afterwards."""
    place = tmp_path / "place"
    place.mkdir()
    yield place
    with contextlib.suppress(OSError):  # EINVAL: nothing is mounted there any more
        while True:
            mount.umount(place, mount.MNT_DETACH)


def attach(tree: int, place: Path) -> None:
    fd = os.open(place, os.O_PATH)
    mount.move_mount(tree, fd)
    os.close(fd)
    os.close(tree)


def info(place: Path) -> list[str]:
    """The fields of the mount's line in mountinfo: options, optional fields, …"""
    lines = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return next(fields for fields in reversed(lines) if fields[4] == str(place))


def test_a_new_mount_is_nowhere_until_it_is_moved(place):
    tree = mount.new_mount("tmpfs", "scratch", ("size=1m", "mode=700"), attributes=mount.MOUNT_ATTR_NOSUID)
    assert filesystem_magic(tree) == TMPFS_MAGIC
    assert not os.path.ismount(place)
    attach(tree, place)
    fields = info(place)
    assert "nosuid" in fields[5].split(",")
    assert fields[-2] == "scratch"
    assert place.stat().st_mode & 0o777 == 0o700


def test_a_link_where_a_mount_is_to_go_is_not_followed(place, tmp_path):
    """Unless that is asked for: so somebody else's directory is not covered by who makes him a link to it."""
    (place / "link").symlink_to(tmp_path)
    fd, tree = os.open(place, os.O_PATH), mount.new_mount("tmpfs", "scratch")
    before = Path("/proc/self/mountinfo").read_text()
    with pytest.raises(OSError, match="move_mount"):
        mount.move_mount(tree, fd, "link")
    assert Path("/proc/self/mountinfo").read_text() == before
    for each in (fd, tree):
        os.close(each)


def test_a_part_of_a_tree_can_be_had_where_only_what_has_a_place_can_be_copied(place):
    """As before Linux 6.15: it has one for a moment."""
    tree = mount.new_mount("tmpfs", "scratch")
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=tree))
    before, tried = Path("/proc/self/mountinfo").read_text(), []

    def copy() -> int:
        tried.append(os.path.ismount(place))
        if not tried[-1]:
            raise OSError(errno.EINVAL, "open_tree")
        return mount.clone_tree(tree, "file")

    part = trees.part_of(tree, copy, str(place), what="a file")
    assert (tried, Path("/proc/self/mountinfo").read_text()) == ([False, True], before)
    os.close(tree)
    (place / "target").touch()
    fd = os.open(place / "target", os.O_PATH)
    mount.move_mount(part, fd)
    for each in (fd, part):
        os.close(each)
    there = os.path.ismount(place / "target")
    mount.umount(place / "target", mount.MNT_DETACH)
    assert there


def test_an_unknown_file_system_is_named():
    with pytest.raises(OSError, match="fsopen: No such device: 'nonsense'"):
        mount.new_mount("nonsense")


def test_the_kernels_reason_is_told():
    with pytest.raises(OSError, match="fsconfig size=many"):
        mount.new_mount("tmpfs", "tmpfs", ("size=many",))


def test_a_value_that_is_too_long_is_refused():
    with pytest.raises(OSError, match="File name too long"):
        mount.new_mount("tmpfs", "tmpfs", ("huge=" + "x" * 300,))


def test_a_clone_is_dressed_apart_from_its_source(place, tmp_path):
    (tmp_path / "source").mkdir()
    tree = mount.clone_tree(AT_FDCWD, tmp_path / "source")
    mount.set_attributes(tree, attr_set=mount.MOUNT_ATTR_RDONLY | mount.MOUNT_ATTR_NOEXEC)
    attach(tree, place)
    with pytest.raises(OSError, match="Read-only"):
        (place / "x").touch()
    (tmp_path / "source/x").touch()
    assert (place / "x").exists()


@pytest.mark.parametrize(
    ("attr", "word"), [(mount.MOUNT_ATTR_NOATIME, "noatime"), (mount.MOUNT_ATTR_RELATIME, "relatime")]
)
def test_the_mode_of_access_times_is_one_field(place, attr, word):
    tree = mount.new_mount("tmpfs", attributes=mount.MOUNT_ATTR_STRICTATIME)
    mount.set_attributes(tree, attr_set=attr, attr_clr=mount.MOUNT_ATTR__ATIME)
    attach(tree, place)
    assert word in info(place)[5].split(",")


def test_propagation(place):
    attach(mount.new_mount("tmpfs"), place)
    for kind, word in ((mount.MS_SHARED, "shared:"), (mount.MS_PRIVATE, "")):
        mount.set_propagation(place, kind, recursive=False)
        assert ("shared:" in " ".join(info(place)[6:])) is bool(word)


def test_a_mounted_file_system_takes_more_options(place):
    tree = mount.new_mount("tmpfs", options=("size=1m",))
    try:
        mount.reconfigure(tree, "tmpfs", ("size=2m",))
        room = os.statvfs(tree)
        assert room.f_blocks * room.f_frsize == 2 << 20
        with pytest.raises(OSError, match=r"fsconfig size=much: .*tmpfs"):
            mount.reconfigure(tree, "tmpfs", ("size=much",))
    finally:
        os.close(tree)


def test_errors_name_call_and_paths(tmp_path):
    with pytest.raises(OSError, match=f"umount2: Invalid argument: '{tmp_path}'"):
        mount.umount(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"open_tree: .*/gone"):
        mount.clone_tree(AT_FDCWD, tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"mount: .*/gone' -> '"):
        mount.bind(tmp_path / "gone", tmp_path)


@needs("root", "overlayfs")
class TestOverlay:
    @pytest.fixture
    def layers(self, tmp_path: Path) -> tuple[str, ...]:
        for name in ("lower:1", "lower2", "upper", "work"):
            (tmp_path / name).mkdir()
        (tmp_path / "lower:1/a").touch()
        (tmp_path / "lower2/b").touch()
        lower = f"{tmp_path}/lower\\:1:{tmp_path}/lower2"
        return f"lowerdir={lower}", f"upperdir={tmp_path}/upper", f"workdir={tmp_path}/work"

    def test_shows_all_layers(self, place, layers, tmp_path):
        attach(overlay.new_overlay(layers, scratch=str(tmp_path)), place)
        assert {entry.name for entry in place.iterdir()} == {"a", "b"}

    def test_shows_them_on_an_older_kernel_too(self, place, layers, tmp_path):
        """Before Linux 6.8 all layers are one string."""
        (tmp_path / "scratch").mkdir()
        tree = overlay._by_old_call(layers, mount.MOUNT_ATTR_NODEV, str(tmp_path / "scratch"))
        assert not os.path.ismount(tmp_path / "scratch")
        attach(tree, place)
        assert {entry.name for entry in place.iterdir()} == {"a", "b"}
        assert "nodev" in info(place)[5].split(",")
        (place / "c").touch()
        assert (tmp_path / "upper/c").exists()

    @pytest.mark.parametrize("by", [overlay.new_overlay, overlay._by_old_call], ids=["one-by-one", "one-string"])
    def test_as_many_as_the_kernel_stacks_wherever_they_lie(self, place, tmp_path, by):
        layers, scratch = tmp_path / ("long" * 30) / ("path" * 30), tmp_path / "scratch"
        for i in range(100_000, 100_500):
            (layers / str(i)).mkdir(parents=True)
            (layers / str(i) / f"f{i}").touch()
        scratch.mkdir()
        before = Path.cwd()
        lower = f"lowerdir={':'.join(map(str, layers.iterdir()))}"
        options = {"scratch": str(scratch), "attributes": 0}
        attach(by(options=(lower,), **options), place)
        assert len(list(place.iterdir())) == 500
        assert Path.cwd() == before
        assert not os.path.ismount(scratch)

    def test_a_missing_layer_is_named(self, layers, tmp_path):
        with pytest.raises(OSError, match="nowhere"):
            overlay.new_overlay((f"{layers[0]}:/nowhere", *layers[1:]), scratch=str(tmp_path))
