"""Making and opening paths inside a root that somebody else wrote."""

import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.races import ROUNDS, stealing

from corral.kernel import paths

RACE_S = 2.0


@pytest.fixture
def root(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """A root directory as fd and path, with something outside of it."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "root").mkdir()
    fd = os.open(tmp_path / "root", os.O_PATH)
    yield fd, tmp_path / "root"
    os.close(fd)


def same(fd: int, path: Path) -> bool:
    with paths.opened(fd):
        return os.path.samestat(os.fstat(fd), path.lstat())


@pytest.mark.parametrize("path", ["a", "/a", "a/b/c", "//a/./b", "a/../b"])
def test_directories_are_made(root, path):
    fd, place = root
    made = paths.make_directory_in_root(fd, path)
    assert same(made, Path(os.path.normpath(f"{place}/{path}")))


def test_what_is_there_is_kept(root):
    fd, place = root
    (place / "a").mkdir(mode=0o700)
    assert same(paths.make_directory_in_root(fd, "a"), place / "a")
    assert (place / "a").stat().st_mode & 0o777 == 0o700


def test_files_are_made_empty(root):
    fd, place = root
    assert same(paths.make_file_in_root(fd, "etc/hosts"), place / "etc/hosts")
    assert (place / "etc/hosts").read_bytes() == b""


@pytest.mark.parametrize("target", ["../outside", "/outside", "../../outside", "/../outside/x"])
def test_links_do_not_lead_out(root, target):
    fd, place = root
    (place / "link").symlink_to(target)
    os.close(paths.make_directory_in_root(fd, "link/deep"))
    assert list((place.parent / "outside").iterdir()) == []
    assert (place / "outside").is_dir()


def test_a_dangling_link_is_followed_inside(root):
    fd, place = root
    (place / "var").mkdir()
    (place / "var/run").symlink_to("../run")
    os.close(paths.make_file_in_root(fd, "/var/run/docker.sock"))
    assert (place / "run/docker.sock").is_file()


@pytest.mark.parametrize("way", ["{}/made", "../outside/made", "../../../../../../../..{}/made"])
def test_cve_2024_45310_a_dangling_link_that_is_the_file_itself(root, way):
    """What is missing is made: not where a link leads to on the host."""
    fd, place = root
    outside = place.parent / "outside"
    (place / "link").symlink_to(way.format(outside))
    with paths.opened(paths.make_file_in_root(fd, "/link")) as made:
        assert stat.S_ISREG(os.fstat(made).st_mode)
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize(
    ("make", "is_right"),
    [(paths.make_directory_in_root, stat.S_ISDIR), (paths.make_file_in_root, stat.S_ISREG)],
    ids=["directory", "file"],
)
def test_cve_2021_30465_what_was_just_made_is_exchanged_before_it_is_opened(
    root, make: Callable[[int, str], int], is_right: Callable[[int], bool]
):
    fd, place = root
    bait = place.parent / "outside"
    if is_right is stat.S_ISREG:
        bait /= "file"
        bait.touch()
    with stealing(place, bait):
        give_up_at, caught = time.monotonic() + RACE_S, 0
        for number in range(ROUNDS):
            if caught > 5 or time.monotonic() > give_up_at:
                break
            try:
                made = make(fd, f"made{number}")
            except OSError:
                caught += 1
                continue
            with paths.opened(made):
                status = os.fstat(made)
                assert is_right(status.st_mode)
                assert not os.path.samestat(status, bait.stat())


def test_links_that_lead_nowhere_end(root):
    fd, place = root
    (place / "a").symlink_to("b")
    (place / "b").symlink_to("a")
    with pytest.raises(OSError, match="symbolic links"):
        paths.make_directory_in_root(fd, "a/x")


def test_ever_longer_dangling_links_end(root):
    fd, place = root
    for i in range(60):
        (place / f"l{i}").symlink_to(f"l{i + 1}/x")
    with pytest.raises(OSError):  # noqa: PT011 - ELOOP by the kernel or by us
        paths.make_directory_in_root(fd, "l0")


def test_a_file_in_the_way_is_told(root):
    fd, place = root
    (place / "file").touch()
    with pytest.raises(NotADirectoryError):
        paths.make_directory_in_root(fd, "file/below")
    with pytest.raises(NotADirectoryError):
        paths.make_directory_in_root(fd, "file")
    (place / "directory").mkdir()
    with pytest.raises(IsADirectoryError):
        paths.make_file_in_root(fd, "directory")


def test_magic_links_are_refused():
    fd = os.open("/", os.O_PATH)
    with paths.opened(fd), pytest.raises(OSError, match="symbolic links"):
        paths.open_in_root(fd, "/proc/self/root")


def test_no_fd_is_left(root):
    fd, place = root
    (place / "link").symlink_to("/nowhere/at/all")
    before = len(list(Path("/proc/self/fd").iterdir()))
    os.close(paths.make_directory_in_root(fd, "link/a/b"))
    os.close(paths.make_file_in_root(fd, "link/a/c"))
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_opened_files_are_closed_on_exec(root):
    fd, _ = root
    with paths.opened(paths.make_directory_in_root(fd, "x")) as made:
        assert not os.get_inheritable(made)
