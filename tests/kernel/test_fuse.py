"""File systems that a program serves: the program answers, or what it said is told and nothing of it is left."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.requirements import needs

from corral.kernel import fuse

pytestmark = [needs("root", "fuse-overlayfs"), pytest.mark.timeout(60, method="signal")]

PROGRAM = "/usr/bin/fuse-overlayfs"
MANY = 40_000


def children() -> set[int]:
    return {int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@contextlib.contextmanager
def served(*options: str) -> Iterator[tuple[Path, int]]:
    """A directory by which the mount is reached, and the pid of what serves it; it ends with the mount."""
    before = children()
    tree = fuse.mount_served(PROGRAM, options, subtype="fuse-overlayfs")
    (server,) = children() - before
    try:
        yield Path(f"/proc/self/fd/{tree}"), server
    finally:
        os.close(tree)
        os.waitpid(server, 0)


@pytest.fixture
def lower(tmp_path: Path) -> Path:
    directory = tmp_path / "lower"
    directory.mkdir()
    (directory / "file").write_text("x")
    return directory


def test_why_a_program_does_not_serve_is_told_in_its_own_words_and_nothing_is_left() -> None:
    before = children(), open_fds()
    with pytest.raises(OSError, match=r"fuse-overlayfs: cannot read lower dirs: No such file or directory.*/usr/bin"):
        fuse.mount_served(PROGRAM, ["lowerdir=/nowhere"], subtype="fuse-overlayfs")
    assert (children(), open_fds()) == before


def test_a_program_that_says_much_is_told_of_as_far_as_there_is_room(tmp_path: Path) -> None:
    program = tmp_path / "talker"
    program.write_text("#!/bin/sh\nseq 100000 >&2\n")
    program.chmod(0o755)
    with pytest.raises(OSError, match="1; 2; 3; ") as caught:
        fuse.mount_served(str(program), [], subtype="none")
    assert len(str(caught.value)) < 8192


def test_a_program_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse, "START_S", 0.2)
    program = tmp_path / "sleeper"
    program.write_text("#!/bin/sh\necho patience >&2\nexec sleep 1000\n")
    program.chmod(0o755)
    before, begun = children(), time.monotonic()
    with pytest.raises(OSError, match=r"has not answered within 0\.2 s: patience"):
        fuse.mount_served(str(program), [], subtype="none")
    assert time.monotonic() - begun < 5
    assert children() == before


def test_a_program_that_is_not_there_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="/nowhere/fuse"):
        fuse.mount_served("/nowhere/fuse", [], subtype="none")


def test_what_serves_has_a_limit_of_memory(lower: Path) -> None:
    with served(f"lowerdir={lower}") as (tree, server):
        assert (tree / "file").read_text() == "x"
        limits = Path(f"/proc/{server}/limits").read_text().splitlines()
        (data,) = (line.split()[3:5] for line in limits if line.startswith("Max data size"))
        assert data == [str(fuse.MEMORY_BYTES)] * 2


def test_beyond_its_memory_files_can_not_be_looked_at_and_the_host_has_its_own(
    lower: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuse, "MEMORY_BYTES", 16 << 20)
    (lower / "many").mkdir()
    for i in range(MANY):
        (lower / "many" / f"{i:0200}").touch()
    with served(f"lowerdir={lower}") as (tree, server):
        with pytest.raises(OSError):  # noqa: PT011 - ENOMEM, or ENOTCONN from a program that does not bear it
            list((tree / "many").iterdir())
        with contextlib.suppress(FileNotFoundError, StopIteration):
            status = Path(f"/proc/{server}/status").read_text().splitlines()
            used_kb = next(int(line.split()[1]) for line in status if line.startswith("VmData"))
            assert used_kb <= 16 << 10
