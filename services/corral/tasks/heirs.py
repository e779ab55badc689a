"""Another shim for a container whose own was killed, while its processes go on.

It is handed what the dead one was told and made: the log, the cgroups, each process by pid and start time, and copies
of their streams, as far as this service has them (Process.streams). Without those it opens the FIFOs by name; a
terminal's master, or the writing end of a stdin, is to be had from nowhere else.
"""

import asyncio
import errno
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import structlog

from corral.kernel.process import has_executed, pidfd_info
from corral.oci.reaper import has_begun
from corral.rpc.blocking import run_blocking
from corral.rpc.errors import CorralError, Unavailable
from corral.shim.records import BY_ZYGOTE
from corral.shim.requests import PIDFD
from corral.shim.wire import Message
from corral.store import Database
from corral.tasks import store
from corral.tasks.ends import Ends
from corral.tasks.identity import Identity
from corral.tasks.keeper import Kept, fetch
from corral.tasks.live import Process, Task
from corral.tasks.model import INIT, Exit, Status, TaskKey
from corral.tasks.shim import Shim
from corral.tasks.spawning import Spawner

log = structlog.get_logger()

ATTEMPTS = 3
KILL_S = 10.0
KEPT_S = 2.0
REAPED_S = 1.0
UNSTARTED_CODE = 1
"""Of an init whose shim has gone away before it told it to become its program."""
# An init that was about to execute its program when its shim was killed either does so within this or ends.
EXECUTE_S = 5.0
LOOK_S = 0.005
# Of the heirs of one container within LATELY_S, each beyond ATTEMPTS waits longer by PAUSE_S.
LATELY_S = 30.0
PAUSE_S, PAUSE_MAX_S = 0.1, 2.0
# So many are for a container that has ended: what one has taken before it dies the next one logs, and takes more. And
# for an exec.
LAST_ATTEMPTS = 10
EXEC_LOST = "its shim was killed, and it with that, or before it was started; exit code unknown"


class Attempt(NamedTuple):
    """When an heir was made, and whether the container had ended by then."""

    at: float
    of_ended: bool


class Heirs:
    """Finds a new shim for a task."""

    def __init__(self, database: Database, ends: Ends, spawner: Spawner) -> None:
        self._database = database
        self._ends = ends
        self._spawner = spawner
        self._lately: dict[TaskKey, tuple[Attempt, ...]] = {}

    async def find(self, task: Task) -> Shim | None:
        """A shim that has taken over, and tells of what happens from now on; None if there is nothing to take over.

        A container that has ended is taken over too, if it may have left output that is in no log yet. Raises OSError
        if one that runs can't be now: it is left alone, whatever befalls its shims, for as long as it runs.
        """
        if not await self._is_wanted(task):
            return None
        if not await self._may_try(task):
            log.error("task.not_inherited", container_id=task.row.key.id, error="its shims keep dying")
            return None
        await task.shim_identity.kill(within_s=KILL_S)  # it may only be stuck
        may_yet = False
        for _ in range(ATTEMPTS):
            try:
                return await self._replace(task)
            except (CorralError, OSError) as e:
                log.warning("task.not_inherited", container_id=task.row.key.id, error=str(e))
                may_yet = isinstance(e, Unavailable | OSError)
        init = task.init
        if may_yet and init.row.status is Status.RUNNING and init.identity is not None and init.identity.runs:
            raise OSError(errno.EAGAIN, "its shims keep dying")
        return None

    async def note(self, task: Task, shim: Identity) -> None:
        """Write down whose shim the task has now, if it is another one than before."""
        if shim == task.shim_identity:
            return
        row = task.row = replace(task.row, shim_pid=shim.pid, shim_start_time=shim.start_time)
        with written(task):
            await self._database.write(lambda transaction: store.adopted(transaction, row))

    async def _may_try(self, task: Task) -> bool:
        """Wait before one heir after the other; False if too many died over a container that has ended."""
        runs = task.init.identity is not None and task.init.identity.runs
        now = Attempt(time.monotonic(), of_ended=not runs)
        lately = self._lately.pop(task.row.key, ())
        lately = (*(each for each in lately if now.at - each.at < LATELY_S), now)
        self._lately = {key: tries for key, tries in self._lately.items() if now.at - tries[-1].at < LATELY_S}
        self._lately[task.row.key] = lately
        if len(lately) > ATTEMPTS:
            await asyncio.sleep(min(PAUSE_S * (len(lately) - ATTEMPTS), PAUSE_MAX_S))
        return runs or sum(each.of_ended for each in lately) <= LAST_ATTEMPTS

    async def _is_wanted(self, task: Task) -> bool:
        init = task.init
        if init.ended.is_set() or init.identity is None or not await run_blocking(task.bundle.exists):
            return False
        written = await run_blocking(task.bundle.exit)
        if written is not None and not written.reason:
            return False  # by its shim, which had all output by then
        if not init.identity.runs and not init.streams and written is None:
            return False
        if init.row.status is Status.RUNNING:
            return True
        if not await run_blocking(task.bundle.may_have_run):
            return False
        if await _executes(init):
            return True
        # A short life between the last words of its shim and now.
        written = await run_blocking(task.bundle.exit)
        return written is not None and written.reason == BY_ZYGOTE

    async def _replace(self, task: Task) -> Shim:
        kept = await self._take_from_zygote(task)
        shim, identity = await self._spawner.spawn_heir(task.bundle)
        try:
            started_at_ns = task.init.row.started_at_ns or time.time_ns()
            await self._hand_over(shim, task, task.init, started_at_ns)
        except BaseException:
            # Nothing that it is told: it may have taken over, and would end the container.
            shim.close()
            await identity.kill(within_s=KILL_S)
            raise
        await self.note(task, identity)
        if task.init.row.status is Status.CREATED:
            assert task.init.identity is not None
            async with task.init.lock:
                with written(task):
                    await task.init.mark_started(self._database, task.init.identity, started_at_ns)
        try:
            for process in tuple(task.processes.values()):
                if not process.row.is_init and not process.ended.is_set():
                    await self.hand_over_exec(shim, task, process, kept.get(process.row.exec_id))
        except Unavailable as e:  # seen to be gone, it has an heir of its own
            log.warning("task.not_inherited", container_id=task.row.key.id, error=str(e))
            await identity.kill(within_s=KILL_S)
        log.warning("task.inherited", container_id=task.row.key.id, shim_pid=identity.pid)
        return shim

    async def _take_from_zygote(self, task: Task) -> Mapping[str, Kept]:
        """What this service has not seen its shim to have, the zygote may have kept."""
        task.was_attended = task.init.is_attended  # by whom it was before its shim died: so nothing is lost
        await _is_reaped(task.shim_identity)
        kept = await run_blocking(partial(fetch, task.bundle.path, timeout_s=KEPT_S)) or {}
        for exec_id, found in kept.items():
            process = task.processes.get(exec_id)
            known = process.streams if process is not None and not process.ended.is_set() else dict(found.streams)
            for name, fd in found.streams.items():
                if name in known:
                    os.close(fd)
                else:
                    known[name] = fd
        task.was_attended |= INIT in kept and bool(kept[INIT].streams)
        return kept

    async def hand_over_exec(self, shim: Shim, task: Task, process: Process, kept: Kept | None = None) -> None:
        """Have a shim that has taken over the container take over an exec too; one that it does not take is lost.

        kept: what the zygote knew of it, which tells of one whose shim was killed before it could say that it runs.
        One that is lost does not run on. Raises Unavailable if the shim is gone, or stuck: the next one may take it.
        """
        named = kept.identity if kept is not None and process.row.status is Status.CREATED else None
        async with process.lock:  # it may be about to be started, or deleted
            if task.processes.get(process.row.exec_id) is not process or process.ended.is_set():
                return
            try:
                if kept is not None and named is not None and await _begins(named, has_executed):
                    with written(task):
                        await process.mark_started(self._database, named, kept.started_at_ns)
                if process.row.status is Status.RUNNING:
                    await self._hand_over(shim, task, process, process.row.started_at_ns or time.time_ns())
                    return
                if process.asked is not None:
                    await shim.exec(process.row.exec_id, process.asked)
                    return
            except (CorralError, OSError) as e:
                if isinstance(e, Unavailable) and len(self._lately.get(task.row.key, ())) <= LAST_ATTEMPTS:
                    raise
                log.warning("exec.not_inherited", **process.facts, error=str(e))
        if (identity := process.identity or named) is not None:
            await identity.kill(within_s=KILL_S)
        how = await run_blocking(task.bundle.exec_exit, process.row.exec_id)
        await process.mark_ended(self._ends.write, how or Exit.unknown(EXEC_LOST, exited_at_ns=time.time_ns()))

    async def _hand_over(self, shim: Shim, task: Task, process: Process, started_at_ns: int) -> None:
        created = json.loads(task.row.create)
        row = process.row
        fields: Message = {
            "log": created.get("log"),
            "cgroup": created.get("cgroup"),
            "timeout_ns": created.get("timeout_ns"),
            "pid": row.pid,
            "start_time": row.start_time,
            "created_at_ns": task.row.created_at_ns,
            "started_at_ns": started_at_ns,
            "terminal": row.terminal,
            "stdin": row.stdin,
            "streams": list(process.streams),
            "unattended": not task.was_attended,
        }
        await shim.adopt(row.exec_id, fields, [os.dup(fd) for fd in process.streams.values()])


async def _is_reaped(shim: Identity) -> None:
    """Wait for its zygote, which reaps a shim that was killed once what it keeps of that is to be had. Not for long:
    another parent may not reap at all."""
    for _ in range(int(REAPED_S / LOOK_S)):
        if not shim.lives:
            return
        await asyncio.sleep(LOOK_S)


@contextmanager
def written(task: Task) -> Iterator[None]:
    """A row that cannot be written is no reason to give up a shim: the next start finds what it would have told."""
    try:
        yield
    except Exception as e:  # noqa: BLE001 - whatever a database raises
        log.error("task.not_written", container_id=task.row.key.id, error=str(e))


async def _executes(init: Process) -> bool:
    """Whether a container that was about to be started has become its program."""
    assert init.identity is not None
    begun = await _begins(init.identity, has_begun)
    return _ended_by_its_program(init) if begun is None else begun


async def _begins(identity: Identity, has: Callable[[int, int], bool | None]) -> bool | None:
    """Whether a process that was about to has become its program; None if it is reaped."""
    for _ in range(int(EXECUTE_S / LOOK_S)):
        runs = identity.runs  # first: it may execute its program and end between the two
        begun = has(identity.pid, identity.start_time)
        if begun is None or begun or not runs:
            return begun
        await asyncio.sleep(LOOK_S)
    return False


def _ended_by_its_program(init: Process) -> bool:
    """Of one that is reaped, as far as its exit code alone tells."""
    with suppress(KeyError, OSError):
        status = pidfd_info(init.streams[PIDFD]).exit_status
        return status is not None and status != UNSTARTED_CODE << 8
    return False
