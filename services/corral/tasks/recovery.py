"""Finding the truth about a task without having watched: when the service starts, and when a shim hangs up.

shim answers            adopt it: state, and every move that it saw and we did not
exit.json               that is how it ended
neither                 kill init if it lives (named by pid and start time); the task is lost, with the reason

bundle without row      a create that was cut short: end its shim, remove it
row without bundle      lost, with the reason
"""

import time
from dataclasses import dataclass

import structlog

from corral.kernel.failpoint import failpoint
from corral.rpc.blocking import run_blocking
from corral.rpc.errors import CorralError
from corral.store import Database
from corral.tasks.identity import Identity
from corral.tasks.live import Process, Task
from corral.tasks.model import Exit, Status
from corral.tasks.processes import members
from corral.tasks.shim import ProcessReport, Shim, StateReport

log = structlog.get_logger()

KILL_S = 10.0
SHIM_KILLED = "the shim was killed; exit code unknown"
BUNDLE_GONE = "the bundle is gone (the machine was restarted, or its run state removed); exit code unknown"
NOT_SEEN = "the container ended before this exec's exit was seen; exit code unknown"


@dataclass(frozen=True, slots=True)
class Recovery:
    """Brings tasks in line with the world."""

    database: Database
    timeout_s: float

    async def adopt(self, task: Task) -> Shim | None:
        """Connect to the task's shim and catch up with it; None if there is none or it is not this task's."""
        try:
            sock = task.bundle.connect()
        except (ConnectionRefusedError, FileNotFoundError):
            return None
        shim = Shim(sock, timeout_s=self.timeout_s)
        try:
            report = await shim.state()
            failpoint("tasks.adopt.after_state")
            if not _is_of(report, task):
                log.error("task.foreign_shim", container_id=task.row.key.id, shim_pid=report.shim_pid)
                shim.close()
                return None
            await self._catch_up(task, shim, report)
        except CorralError as e:
            log.warning("task.not_adopted", container_id=task.row.key.id, error=str(e))
            shim.close()
            return None
        except BaseException:
            shim.close()
            raise
        return shim

    async def _catch_up(self, task: Task, shim: Shim, report: StateReport) -> None:
        started_at_ns = (await run_blocking(task.bundle.record)).started_at_ns
        for exec_id, process in task.processes.items():
            known = report.processes.get(exec_id)
            if known is None:
                await self._settle_exec(task, process)
            else:
                await self._follow(process, known, started_at_ns or time.time_ns())
        for exec_id in report.processes.keys() - task.processes.keys():
            await _forget_exec(shim, exec_id, report.processes[exec_id])

    async def _follow(self, process: Process, known: ProcessReport, started_at_ns: int) -> None:
        if known.exit is not None:
            await process.mark_ended(self.database, known.exit)
        elif known.state == "running" and known.identity is not None:
            async with process.lock:
                await process.mark_started(self.database, known.identity, started_at_ns)
        elif known.state == "stopped":
            how = Exit.unknown("its program could not be executed", exited_at_ns=time.time_ns())
            await process.mark_ended(self.database, how)

    async def settle(self, task: Task) -> None:
        """The task has no shim: whatever of it has not ended ends now, one way or the other."""
        if not await run_blocking(task.bundle.exists):
            await self._end(task, BUNDLE_GONE)
            return
        how = await run_blocking(task.bundle.exit)
        if how is None:
            # It is killed before it is called dead: a shim that only hung up would still write its exit.
            await self._end_processes(task)
            how = await run_blocking(task.bundle.exit)
        if how is None:
            await self._end(task, SHIM_KILLED)
            return
        for process in task.processes.values():
            if not process.row.is_init:
                await self._settle_exec(task, process)
        await task.init.mark_ended(self.database, how)

    async def _end(self, task: Task, reason: str) -> None:
        if task.init.row.status is Status.STOPPED:
            return
        await self._end_processes(task)
        log.warning("task.lost", container_id=task.row.key.id, reason=reason)
        for process in task.processes.values():
            if not process.row.is_init:
                await self._settle_exec(task, process)
        await task.init.mark_ended(self.database, Exit.unknown(reason, exited_at_ns=time.time_ns()))

    async def _settle_exec(self, task: Task, process: Process) -> None:
        if process.row.status is Status.STOPPED:
            return
        how = await run_blocking(task.bundle.exec_exit, process.row.exec_id)
        await process.mark_ended(self.database, how or Exit.unknown(NOT_SEEN, exited_at_ns=time.time_ns()))

    async def _end_processes(self, task: Task) -> None:
        """Kill the shim, init, and every process in the task's cgroups."""
        failpoint("tasks.settle.before_kill")
        await _kill(task.shim_identity)
        if task.init.identity is not None:
            await _kill(task.init.identity)
        for identity in await run_blocking(members, task.row.cgroup_paths):
            await _kill(identity)
        failpoint("tasks.settle.after_kill")


async def _kill(identity: Identity) -> None:
    if not await identity.kill(within_s=KILL_S):
        log.error("process.unkillable", pid=identity.pid)


async def _forget_exec(shim: Shim, exec_id: str, report: ProcessReport) -> None:
    """An exec that no row describes: its creation was cut short."""
    if report.state == "running" and report.identity is not None:
        await _kill(report.identity)
    await shim.delete_exec(exec_id)


def _is_of(report: StateReport, task: Task) -> bool:
    """Whether the shim holds the very process that the row names, not another with the same pid."""
    return report.init is not None and report.init.identity == task.init.identity
