"""Sending a task's log: what is there, and what comes, until the task has ended and all of it was sent."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import ExitStack
from pathlib import Path

from corral.rpc.blocking import run_blocking
from corral.rpc.errors import FailedPrecondition
from corral.tasks.entries import PARSERS, Entry, Selection
from corral.tasks.log_drivers import SENDING
from corral.tasks.logfiles import LogFiles
from corral.tasks.model import LogRow, TaskKey
from corral.tasks.watch import DirectoryWatch

# A container that writes line by line is followed at this pace, not once for each line.
PACE_S = 0.01
# Without inotify (its watches are used up) files are looked at this often.
LOOK_S = 0.2
# Entries a message: a compromise between messages for each line and lines that wait.
BATCH_BYTES = 128 << 10


async def stream_log(
    key: TaskKey, log: LogRow, selection: Selection, watch: DirectoryWatch, ended: asyncio.Event | None
) -> AsyncGenerator[list[Entry]]:
    """Batches of selected entries, oldest first, to the last one there is. With `ended` further ones as they are
    written, until the task has or `until` has passed.

    Raises FailedPrecondition if the task keeps no log.
    """
    form = "json-file" if log.driver in SENDING and log.path else log.driver
    if form not in PARSERS:
        raise FailedPrecondition(
            f"container {key.id} keeps no log that can be read: it was created with log driver {log.driver!r}"
            + (" and cache-disabled" if log.driver in SENDING else ""),
            reason="NO_LOG",
        )
    with ExitStack() as stack:
        # Watched from before the first look, so no change is missed between a look and a wait.
        changed = _watched(stack, watch, Path(log.path).parent) if ended else None
        files = await run_blocking(LogFiles, log.path, log.max_files, PARSERS[form], selection)
        stack.callback(files.close)
        while True:
            last = ended is None or ended.is_set() or selection.is_over(time.time_ns())
            looked_at = asyncio.get_running_loop().time()
            if changed is not None:
                changed.clear()
            at_end = False
            while not at_end:
                entries, at_end = await run_blocking(files.read)
                for batch in _batches(entries):
                    yield batch
            if last or ended is None or files.is_past:
                return
            await _change(ended, changed, selection, not_before=looked_at + PACE_S)


def _watched(stack: ExitStack, watch: DirectoryWatch, directory: Path) -> asyncio.Event | None:
    try:
        return stack.enter_context(watch.changes(directory))
    except OSError:
        return None


async def _change(
    ended: asyncio.Event, changed: asyncio.Event | None, selection: Selection, *, not_before: float
) -> None:
    """Return when there may be more to read, or nothing more to come."""
    waiting = [asyncio.ensure_future(ended.wait())]
    if changed is not None:
        waiting.append(asyncio.ensure_future(changed.wait()))
    limits = [] if changed is not None else [LOOK_S]
    if selection.until_ns is not None:
        limits.append(max(0.0, (selection.until_ns - time.time_ns()) / 1e9 + PACE_S))
    try:
        await asyncio.wait(waiting, timeout=min(limits, default=None), return_when=asyncio.FIRST_COMPLETED)
    finally:
        for future in waiting:
            future.cancel()
    early_s = not_before - asyncio.get_running_loop().time()
    if early_s > 0 and not ended.is_set():
        await asyncio.sleep(early_s)


def _batches(entries: list[Entry]) -> list[list[Entry]]:
    batches: list[list[Entry]] = []
    size = BATCH_BYTES
    for entry in entries:
        if size >= BATCH_BYTES:
            batches.append([])
            size = 0
        batches[-1].append(entry)
        size += len(entry.line)
    return batches
