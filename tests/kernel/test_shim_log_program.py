"""A logging program when the container has ended: it may take its time, and then it is ended."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.requirements import needs

from corral.engine.seccomp import kernel_version
from corral.shim import log_program

pytestmark = needs("root")

READY = "exec 5>&-"
DEAF = "while :; do sleep 0.05; done"


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_program, "END_S", 0.4)
    monkeypatch.setattr(log_program, "TERM_S", 0.4)


@pytest.fixture
def bundle(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


@pytest.fixture
def start(bundle: int, tmp_path: Path) -> Iterator[Callable[[str], Callable[[], None]]]:
    """Starts a shell as a logging program; what it returns is the end of its container."""
    before = children()
    (tmp_path / "on").touch()

    def start(script: str) -> Callable[[], None]:
        pipes = log_program.start(["/bin/sh", "-c", f"{READY}; {script}"], {"PATH": "/bin"}, bundle)
        return lambda: [pipe.close() for pipe in pipes.values()]  # type: ignore[func-returns-value]

    yield start
    (tmp_path / "on").unlink()
    for pid in set(children()) - set(before):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def await_children_to_end(seconds: float) -> float:
    """How long it took until the program and who attends to it had ended."""
    begun = time.monotonic()
    while left := [pid for pid in children() if os.waitpid(pid, os.WNOHANG) == (0, 0)]:
        assert time.monotonic() < begun + seconds, left
        time.sleep(0.01)
    return time.monotonic() - begun


@pytest.mark.usefixtures("short")
def test_one_that_does_not_end_is_ended_and_that_is_told(
    start: Callable[[str], Callable[[], None]], tmp_path: Path
) -> None:
    end = start(
        f"trap '' TERM; (while [ -e {tmp_path}/on ]; do sleep 0.05; done) & echo $! > {tmp_path}/its-child; {DEAF}"
    )
    time.sleep(1.0)
    assert len(children()) == 2  # as long as its container lives nobody minds
    end()
    assert await_children_to_end(10) > 0.7
    told = (tmp_path / "shim.log").read_text().splitlines()
    assert [line.partition(" the logging ")[2] for line in told] == [
        "program /bin/sh does not end: SIGTERM",
        "program /bin/sh does not end: SIGKILL",
    ]
    if kernel_version(os.uname().release) >= (6, 9):  # before that only a process can be signalled by its pidfd
        its_child = Path("/proc", (tmp_path / "its-child").read_text().strip(), "stat")
        assert not its_child.exists() or its_child.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.usefixtures("short")
def test_one_that_only_waits_to_be_asked_is_asked_kindly(
    start: Callable[[str], Callable[[], None]], tmp_path: Path
) -> None:
    start(f"trap 'echo bye > {tmp_path}/said; exit' TERM; {DEAF}")()
    await_children_to_end(10)
    assert (tmp_path / "said").read_text() == "bye\n"
    assert "SIGKILL" not in (tmp_path / "shim.log").read_text()


def test_one_that_ends_by_itself_is_left_alone(start: Callable[[str], Callable[[], None]], tmp_path: Path) -> None:
    end = start(f"trap 'echo asked > {tmp_path}/asked' TERM; cat <&3; cat <&4; sleep 0.3; echo done > {tmp_path}/said")
    end()
    assert await_children_to_end(10) < log_program.END_S
    assert (tmp_path / "said").read_text() == "done\n"
    assert not (tmp_path / "shim.log").exists()
    assert not (tmp_path / "asked").exists()


def test_one_that_ends_early_leaves_nobody_to_attend_to_it(start: Callable[[str], Callable[[], None]]) -> None:
    end = start("sleep 0.3")
    await_children_to_end(5)
    end()
