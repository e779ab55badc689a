"""The processes that unpack layers, as the daemon sees them. See corral.images.layers.worker for their side."""

import asyncio
import contextlib
import importlib.util
import json
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from corral.images.layers.errors import BadLayer
from corral.images.layers.tree import TOO_MUCH_IMPLICIT
from corral.rpc.errors import Internal

MAX_ANSWER_BYTES = 64 << 20
_MODULES = ("corral.kernel.paths", "corral.images.layers.worker", "zstandard", "isal")


class Workers:
    """At most `size` processes, each started when there is work for it and ended when there was none for `idle_s`."""

    def __init__(
        self, size: int, *, idle_s: float, max_entries: int, max_bytes: int, max_memory_bytes: int = 0
    ) -> None:
        self._free = asyncio.Semaphore(size)
        self._idle_s = idle_s
        self._arguments = (str(max_entries), str(max_bytes), str(max_memory_bytes))
        self._idle: list[tuple[Process, asyncio.TimerHandle]] = []
        self._ending: set[asyncio.Task[None]] = set()

    async def run(self, job: Mapping[str, object], on_progress: Callable[[int], None]) -> dict[str, Any]:
        """The answer to `job`. If the caller is cancelled, the process is killed and nothing writes any more.

        Raises BadLayer, OSError, Internal.
        """
        async with self._free:
            process = await self._take()
            try:
                answer = await _ask(process, job, on_progress)
            except BaseException:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
                raise
            self._put_back(process)
        return _outcome(answer)

    async def stop(self) -> None:
        """End the idle ones; none may be at work any more."""
        while self._idle:
            self._end(self._idle[0][0])
        if self._ending:
            await asyncio.wait(self._ending)

    async def _take(self) -> Process:
        while self._idle:
            process, timer = self._idle.pop()
            timer.cancel()
            if process.returncode is None:
                return process
        return await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", "-c", _program(), *self._arguments,
            stdin=PIPE, stdout=PIPE, stderr=DEVNULL, limit=MAX_ANSWER_BYTES,
        )  # fmt: skip

    def _put_back(self, process: Process) -> None:
        loop = asyncio.get_running_loop()
        self._idle.append((process, loop.call_later(self._idle_s, self._end, process)))

    def _end(self, process: Process) -> None:
        for idle in [idle for idle in self._idle if idle[0] is process]:
            idle[1].cancel()
            self._idle.remove(idle)
        task = asyncio.ensure_future(_close(process))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)


async def _close(process: Process) -> None:
    assert process.stdin is not None
    process.stdin.close()
    await process.wait()


async def _ask(process: Process, job: Mapping[str, object], on_progress: Callable[[int], None]) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(ConnectionError):  # it died; the empty answer below says so
        process.stdin.write(json.dumps(job).encode() + b"\n")
        await process.stdin.drain()
    while line := await _line(process.stdout):
        message: dict[str, Any] = json.loads(line)
        if "progress" not in message:
            return message
        on_progress(message["progress"])
    status = await process.wait()
    raise Internal(f"the process that unpacks layers ended ({_fate(status)}) before it was done; try again")


async def _line(source: asyncio.StreamReader) -> bytes:
    """Raises BadLayer if it would take too much of this process's memory: honest layers tell of a few directories."""
    try:
        return await source.readline()
    except ValueError as e:
        raise BadLayer(TOO_MUCH_IMPLICIT) from e


def _fate(status: int) -> str:
    return f"killed by signal {-status}" if status < 0 else f"with status {status}"


def _outcome(answer: dict[str, Any]) -> dict[str, Any]:
    if "ok" in answer:
        outcome: dict[str, Any] = answer["ok"]
        return outcome
    message = answer["message"]
    if answer["error"] == "bad":
        raise BadLayer(message)
    if answer["error"] == "os":
        raise OSError(answer["errno"], message)
    raise Internal(f"unpacking failed, which is a fault of corral: {message}")


def _program() -> str:
    """Started with neither site-packages nor environment: only what the worker imports is on its path."""
    roots: list[str] = []
    for name in _MODULES:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        root = str(Path(spec.origin).parents[name.count(".") + (spec.submodule_search_locations is not None)])
        if root not in roots:
            roots.append(root)
    return f"import sys; sys.path[:0] = {roots!r}; from corral.images.layers.worker import main; main()"
