"""A logging program when the container has ended: it may take its time, and then it is ended."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.requirements import needs

from corral.engine.seccomp import kernel_version
from corral.shim import log_program
from corral.shim.log_program import Program

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


type Start = Callable[[str], Program]


@pytest.fixture
def start(bundle: int, tmp_path: Path) -> Iterator[Start]:
    """Starts a shell as a logging program."""
    before = children()
    (tmp_path / "on").touch()
    started: list[Program] = []

    def start(script: str) -> Program:
        program = log_program.start(["/bin/sh", "-c", f"{READY}; {script}"], {"PATH": "/bin"}, bundle)
        started.append(program)
        return program

    yield start
    (tmp_path / "on").unlink()
    for program in started:
        end(program)
    for pid in set(children()) - set(before):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def end(program: Program) -> None:
    """As its container's shim does; harmless when repeated."""
    for pipe in program.pipes.values():
        pipe.close()
    assert isinstance(program.attendance, dict)
    while program.attendance:
        os.close(program.attendance.popitem()[1])


def await_children_to_end(seconds: float) -> float:
    """How long it took until the program and who attends to it had ended."""
    begun = time.monotonic()
    while left := [pid for pid in children() if os.waitpid(pid, os.WNOHANG) == (0, 0)]:
        assert time.monotonic() < begun + seconds, left
        time.sleep(0.01)
    return time.monotonic() - begun


def await_death(pid: int) -> None:
    """Of a process that another one reaps, or nobody."""
    until = time.monotonic() + 5
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < until, "it lives on"
            time.sleep(0.01)


@pytest.mark.usefixtures("short")
def test_one_that_does_not_end_is_ended_and_that_is_told(start: Start, tmp_path: Path) -> None:
    program = start(
        f"trap '' TERM; (while [ -e {tmp_path}/on ]; do sleep 0.05; done) & echo $! > {tmp_path}/its-child; {DEAF}"
    )
    time.sleep(1.0)
    assert len(children()) == 2  # as long as its container lives nobody minds
    ended_at = time.monotonic()
    end(program)
    await_children_to_end(10)
    assert time.monotonic() - ended_at > 0.7
    told = (tmp_path / "shim.log").read_text().splitlines()
    assert [line.partition(" the logging ")[2] for line in told] == [
        "program /bin/sh does not end: SIGTERM",
        "program /bin/sh does not end: SIGKILL",
    ]
    if kernel_version(os.uname().release) >= (6, 9):  # before that only a process can be signalled by its pidfd
        await_death(int((tmp_path / "its-child").read_text()))


@pytest.mark.usefixtures("short")
def test_one_that_only_waits_to_be_asked_is_asked_kindly(start: Start, tmp_path: Path) -> None:
    end(start(f"trap 'echo bye > {tmp_path}/said; exit' TERM; {DEAF}"))
    await_children_to_end(10)
    assert (tmp_path / "said").read_text() == "bye\n"
    assert "SIGKILL" not in (tmp_path / "shim.log").read_text()


def test_one_that_ends_by_itself_is_left_alone(start: Start, tmp_path: Path) -> None:
    asked, said = tmp_path / "asked", tmp_path / "said"
    program = start(f"trap 'echo asked > {asked}' TERM; cat <&3; cat <&4; sleep 0.3; echo done > {said}")
    end(program)
    assert await_children_to_end(10) < log_program.END_S
    assert said.read_text() == "done\n"
    assert not (tmp_path / "shim.log").exists()
    assert not asked.exists()


def test_one_that_ends_early_leaves_nobody_to_attend_to_it(start: Start) -> None:
    start("sleep 0.3")
    await_children_to_end(5)


def test_one_that_closes_what_it_was_to_read_is_heard_of_while_it_lives(start: Start, tmp_path: Path) -> None:
    program = start(f"exec 3<&- 4<&-; touch {tmp_path}/closed; {DEAF}")
    while not (tmp_path / "closed").exists():
        time.sleep(0.01)
    for pipe in program.pipes.values():
        with pytest.raises(BrokenPipeError):
            pipe.send(b"x")
    assert len(children()) == 2


@pytest.mark.usefixtures("short")
def test_an_attendant_that_was_killed_has_a_successor_once_there_is_an_heir(
    start: Start, bundle: int, tmp_path: Path
) -> None:
    program = start(f"trap '' TERM; {DEAF}")
    fds = dict(program.attendance)
    own, attendant = sorted(children())
    log_program.resumed(fds, "/bin/sh", bundle)
    assert sorted(children()) == [own, attendant], "it has one already"
    os.kill(attendant, signal.SIGKILL)
    os.waitpid(attendant, 0)
    copy = os.dup(fds["life"])  # the daemon's
    log_program.resumed(fds, "/bin/sh", bundle)
    assert len(children()) == 2
    end(program)
    time.sleep(1.0)
    assert len(children()) == 2, "who has a copy may hand it to the next heir"
    os.close(copy)
    await_children_to_end(10)
    assert "/bin/sh does not end: SIGKILL" in (tmp_path / "shim.log").read_text()
