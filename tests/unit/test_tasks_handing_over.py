"""What a shim's heir is told of an exec, and when; the shim is a peer that speaks the shim's own wire."""

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from corral.shim.wire import Channel, Message, encode
from corral.tasks.bundle import Bundles
from corral.tasks.heirs import Heirs
from corral.tasks.live import Process, Task
from corral.tasks.model import INIT, LogRow, ProcessRow, TaskKey, TaskRow
from corral.tasks.shim import Shim

KEY = TaskKey("default", "c")
ASKED: Message = {"process": {"args": ["true"]}}


class Heir:
    """Answers whatever it is asked, and keeps that."""

    def __init__(self) -> None:
        ours, self._sock = socket.socketpair()
        self._sock.settimeout(10)
        self.shim = Shim(ours, timeout_s=10)
        self._channel = Channel(self._sock)
        self._sock.setblocking(False)
        self.asked: list[str] = []

    def answer(self) -> None:
        """All that it was asked until now."""
        try:
            for message in self._channel.receive():
                if "id" in message:
                    self.asked.append(str(message["op"]))
                    self._sock.sendall(encode({"id": message["id"], "ok": {}}))
        except (BlockingIOError, EOFError, BrokenPipeError):
            return

    def hang_up(self) -> None:
        """As a shim that was killed does."""
        self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.shim.close()
        self._sock.close()


@pytest.fixture
async def heir() -> AsyncIterator[Heir]:
    made = Heir()
    yield made
    made.close()


@pytest.fixture
def task(tmp_path: Path) -> Task:
    """Of a container with an exec that was created."""
    row = TaskRow(KEY, 1, 1, 1, "{}", LogRow("none", "", 0, 0), (), {})
    init, exec_ = ProcessRow(KEY, INIT), ProcessRow(KEY, "e")
    made = Task(row, Bundles(tmp_path, tmp_path).of(KEY), [Process(init), Process(exec_)])
    made.process("e").asked = ASKED
    return made


async def begun(heir: Heir, task: Task, process: Process) -> "asyncio.Task[None]":
    """A handing over, which has had the time to ask the heir."""
    heirs = Heirs(None, None, None)  # type: ignore[arg-type] # nothing is written here, and no shim made
    going = asyncio.ensure_future(heirs.hand_over_exec(heir.shim, task, process))
    await settle(heir)
    return going


async def settle(heir: Heir) -> None:
    await asyncio.sleep(0.05)
    heir.answer()


async def test_an_exec_goes_to_the_heir_once_nobody_else_is_changing_it(heir: Heir, task: Task) -> None:
    process = task.process("e")
    async with process.lock:
        going = await begun(heir, task, process)
        assert "exec" not in heir.asked
    await settle(heir)
    assert heir.asked.count("exec") == 1
    await going


async def test_an_exec_that_was_deleted_meanwhile_goes_to_no_heir(heir: Heir, task: Task) -> None:
    process = task.process("e")
    async with process.lock:
        going = await begun(heir, task, process)
        del task.processes["e"]
    await settle(heir)
    await going
    assert "exec" not in heir.asked


@pytest.mark.parametrize("hears", [True, False])
async def test_an_exec_may_be_started_by_another_shim_unless_one_has_been_told_to(
    heir: Heir, task: Task, hears: bool
) -> None:
    process = task.process("e")
    if not hears:
        heir.hang_up()
    starting = asyncio.ensure_future(heir.shim.start("e", on_sent=process.let_go_of_asked))
    await settle(heir)
    assert process.asked is (None if hears else ASKED)
    await asyncio.gather(starting, return_exceptions=True)
