"""When a process begins to execute itself anew, and what the next program makes of what it is left: no host."""

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from corral.daemon import roots
from corral.daemon.upgrade import Upgrading, check, command, execute
from corral.rpc.address import UnixAddress
from corral.rpc.handover import VARIABLE, Handover, Kept, close_unclaimed, inherited, readmit, take

ARGV = ("--version",)  # what is checked need not do more than load


def upgrading(stop: asyncio.Event) -> Upgrading:
    return Upgrading(ARGV, stop, 0, grace_s=1)


async def test_one_that_is_told_to_end_while_it_is_checked_is_not_upgraded() -> None:
    stop = asyncio.Event()
    one = upgrading(stop)
    one.set_ready()
    asked = one.ask()
    await asyncio.sleep(0.05)
    assert not asked.done()
    one.on_end(signal.SIGTERM)
    await asked
    assert (stop.is_set(), one.plan.wanted) == (True, False)


async def test_the_first_signal_to_end_after_an_upgrade_has_begun_asks_for_a_clean_stop() -> None:
    stop = asyncio.Event()
    one = upgrading(stop)
    one.set_ready()
    await one.ask()
    assert (stop.is_set(), one.plan.wanted) == (True, True)
    one.on_end(signal.SIGTERM)
    assert (stop.is_set(), one.plan.wanted) == (True, False)


async def test_one_that_still_starts_is_upgraded_when_it_is_there() -> None:
    stop = asyncio.Event()
    one = upgrading(stop)
    asked = one.ask()
    for _ in range(2):
        await check(command(ARGV))
    assert not asked.done()
    assert not stop.is_set()
    one.set_ready()
    await asked
    assert one.plan.wanted


def test_what_cannot_be_executed_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    try:
        failed = execute(ARGV, {}, {}, 1)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert failed.reason == "/nowhere/python cannot be executed: No such file or directory; this corrald goes on"
    assert failed.handover.generation == 0
    assert not [link for link in fds() if "corral-handover" in link]


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """As kept for an attached client. Its ends are closed by who reads what was kept, or not."""
    ends = os.pipe()
    inode = os.fstat(ends[0]).st_ino
    yield ends
    for end in ends:
        if is_open(end) and os.fstat(end).st_ino == inode:
            os.close(end)


def is_open(fd: int) -> bool:
    return Path(f"/proc/self/fd/{fd}").exists()


def test_what_is_kept_for_a_thousand_clients_reaches_the_next_program(
    monkeypatch: pytest.MonkeyPatch, pipe: tuple[int, int]
) -> None:
    kept = [("test", {"token": f"{n:032}", "id": f"{n:064}"}, {"stdin": pipe[0]}) for n in range(1000)]
    before = Handover({"/a": pipe[0]}, {"/b": pipe[1]}, kept, 7, 1.5)
    monkeypatch.setenv(VARIABLE, str(before.to_memory()))
    assert len(os.environ[VARIABLE]) < 10
    after = take()
    assert (after.locks, after.waiting, after.generation, after.began_s) == ({"/a": pipe[0]}, {"/b": pipe[1]}, 7, 1.5)
    found = inherited("test")
    assert [each.facts["token"] for each in found] == [f"{n:032}" for n in range(1000)]
    assert VARIABLE not in os.environ
    assert not [link for link in fds() if "corral-handover" in link]


def fds() -> list[str]:
    return [str(each.readlink()) for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]


# As earlier versions have put it into the variable itself, and with what a later one may say beside.
RECORDED = """{"locks": {"/var/lib/corral/tasks/lock": %(a)d}, "waiting": {}, "kept": [["tasks.attachment", {
 "token": "c0ffee", "namespace": "default", "id": "box", "exec_id": "", "stdin_bytes": 3, "stdin": 1, "stdout": 1,
 "stderr": 0, "lossless": 1, "replay": 0}, {"stdin": %(b)d}]], "generation": 2, "began_s": 12.25, "colour": "red"}"""


def test_a_handover_of_another_version_is_understood(monkeypatch: pytest.MonkeyPatch, pipe: tuple[int, int]) -> None:
    monkeypatch.setenv(VARIABLE, RECORDED % {"a": pipe[0], "b": pipe[1]})
    handover = take()
    assert (dict(handover.locks), handover.generation) == ({"/var/lib/corral/tasks/lock": pipe[0]}, 2)
    [kept] = inherited("tasks.attachment")
    assert (kept.facts["token"], kept.fds) == ("c0ffee", {"stdin": pipe[1]})


def test_a_handover_that_says_less_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, json.dumps({"generation": 1}))
    assert take() == Handover(generation=1)


def test_what_was_kept_and_cannot_be_read_is_closed_and_the_rest_is_read(
    monkeypatch: pytest.MonkeyPatch, pipe: tuple[int, int]
) -> None:
    kept = [("test", {}, {"stdin": pipe[0]}), ("test", {"token": "a"}, {"stdin": pipe[1]})]
    monkeypatch.setenv(VARIABLE, str(Handover(kept=kept).to_memory()))
    take()
    tokens = []

    def read(kept: Kept) -> None:
        tokens.append(kept.facts["token"])

    readmit("test", read)
    assert tokens == ["a"]
    assert [is_open(end) for end in pipe] == [False, True]


def test_what_nobody_asks_for_is_closed(monkeypatch: pytest.MonkeyPatch, pipe: tuple[int, int]) -> None:
    monkeypatch.setenv(VARIABLE, str(Handover(kept=[("gone", {}, {"stdin": pipe[0]})]).to_memory()))
    take()
    close_unclaimed()
    assert [is_open(end) for end in pipe] == [False, True]


def test_the_socket_at_an_address_that_the_settings_know_no_more_goes(tmp_path: Path, pipe: tuple[int, int]) -> None:
    stays, goes = tmp_path / "stays", tmp_path / "goes"
    for path in (stays, goes):
        path.touch()
    handover = Handover(waiting={str(stays): pipe[0], str(goes): pipe[1]})
    with roots.claimed({}, tmp_path, [UnixAddress(stays)], handover):
        assert (stays.exists(), goes.exists()) == (True, False)
