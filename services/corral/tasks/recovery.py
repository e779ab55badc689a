"""Finding the truth about a task without having watched: when the service starts, and when a shim hangs up.

shim answers            adopt it: its state, and every move that it saw and we did not
init runs               another shim takes it over (heirs)
exit.json               that is how it ended
it was never started    forget it: whoever wants to start it makes it again
neither                 kill what is left (named by pid and start time); the task is lost, with the reason

bundle without row      a creation that was cut short: end its shim, remove it
row without bundle      lost, with the reason
"""

import asyncio
import time
from dataclasses import replace
from functools import partial

import structlog

from corral.kernel.failpoint import failpoint
from corral.rpc.blocking import run_blocking
from corral.rpc.errors import CorralError, Unavailable
from corral.shim.records import BY_ZYGOTE, UNSTARTED
from corral.store import Database
from corral.tasks import store
from corral.tasks.bundle import Bundles
from corral.tasks.ends import Ends
from corral.tasks.heirs import Heirs, written
from corral.tasks.identity import Identity
from corral.tasks.live import Process, Task
from corral.tasks.model import Exit, Status, TaskKey
from corral.tasks.processes import members
from corral.tasks.registry import Registry
from corral.tasks.shim import ProcessReport, Shim, StateReport
from corral.tasks.spawning import UNDO_S, Spawner, end_unused, undo

log = structlog.get_logger()

KILL_S = 10.0
# How long nobody is served because of what is found out at a start about containers that ran.
START_S = 5.0
# After a failure of the disk.
RETRY_S = 1.0
# The zygote inherits the processes of a shim that was killed, and writes the exit in its place within this.
HEIR_S = 1.0
LOOK_S = 0.005
SHIM_KILLED = "the shim was killed; exit code unknown"
BUNDLE_GONE = "the bundle is gone (the machine was restarted, or its run state removed); exit code unknown"
NOT_SEEN = "the container ended before this exec's exit was seen; exit code unknown"
NOT_EXECUTED = "its program could not be executed"
NEVER_RAN = "its shim was killed before it was started"
NO_HEIR = f"{BY_ZYGOTE}, and none took over: what it wrote last may be missing"
MAY_HAVE_RUN = "the shim was killed while it started the container; exit code unknown"


class Recovery:
    """Keeps tasks in line with the world."""

    def __init__(
        self,
        registry: Registry,
        database: Database,
        ends: Ends,
        bundles: Bundles,
        spawner: Spawner,
        *,
        timeout_s: float,
    ) -> None:
        self._registry = registry
        self._database = database
        self._ends = ends
        self._bundles = bundles
        self._timeout_s = timeout_s
        self._heirs = Heirs(database, ends, spawner)

    async def recover_all(self) -> None:
        """Take over what an earlier process left. What takes long, as where a shim does not answer, goes on afterwards:
        who wants that very task waits for it. Only of what ran: whether a created task was started after all is known
        before anybody is told of it."""
        for stored in self._database.read_sync(store.load):
            bundle = self._bundles.of(stored.task.key)
            self._registry.add(Task(stored.task, bundle, [Process(row) for row in stored.processes]))
        tasks = list(self._registry.of(None))
        strays = await run_blocking(self._bundles.found) - {task.row.key for task in tasks}
        for task in tasks:
            task.unsettle()
        begin = self._registry.until_stopped
        works = {begin(self._recover(task)): task.init.row.status for task in tasks}
        works |= dict.fromkeys((begin(self._remove_stray(key)) for key in strays), Status.STOPPED)
        if works:
            await asyncio.wait(works, timeout=START_S)
        await asyncio.gather(*(work for work, status in works.items() if work.done() or status is Status.CREATED))
        late = sum(not work.done() for work in works)
        await run_blocking(self._bundles.empty_trash)
        log.info("tasks.recovered", tasks=len(tasks), removed=len(strays), late=late)

    async def _remove_stray(self, key: TaskKey) -> None:
        """A creation that was cut short, or a deletion that has only its files left to remove."""
        try:
            async with self._registry.alone(key):
                if key not in self._registry:
                    await undo(self._bundles.of(key), timeout_s=UNDO_S)
        except (CorralError, OSError) as e:
            log.error("bundle.not_removed", namespace=key.namespace, container_id=key.id, error=str(e))

    async def settle_again(self, task: Task) -> None:
        """For a task that has no shim though nothing says that it has ended."""
        while not task.settled.is_set():
            await task.settled.wait()
        if task.shim is None and self._registry.find(task.row.key) is task:
            task.unsettle()
            await self._recover(task)

    def follow(self, task: Task) -> None:
        """Write down every end that the task's shim reports, and find out the truth should it hang up."""
        shim = task.shim
        assert shim is not None

        def exited(exec_id: str, how: Exit) -> None:
            process = task.processes.get(exec_id)
            if process is not None:
                self._registry.in_background(process.mark_ended(self._ends.write, how))

        def closed() -> None:
            if not self._registry.is_stopping:
                task.shim = None
                task.unsettle()
                self._registry.in_background(self._recover(task, heir_s=HEIR_S))

        def out_of_memory(kills: int) -> None:
            log.warning("task.oom", namespace=task.row.key.namespace, container_id=task.row.key.id, kills=kills)
            record = partial(store.out_of_memory, key=task.row.key, kills=kills, at_ns=time.time_ns())
            self._registry.in_background(self._database.write(record))

        def stdin_closed(exec_id: str) -> None:
            process = task.processes.get(exec_id)
            if process is not None:
                process.stdin_closed()

        shim.follow(exited, closed, out_of_memory, stdin_closed)

    async def _recover(self, task: Task, *, heir_s: float = 0.0) -> None:
        try:
            await self._find_truth(task, heir_s)
        except OSError as e:  # a full disk, say
            log.error("task.not_settled", container_id=task.row.key.id, error=str(e), next_s=RETRY_S)
            self._registry.until_stopped(self._settle_later(task))
        finally:
            task.settle()

    async def _settle_later(self, task: Task) -> None:
        await asyncio.sleep(RETRY_S)
        await self.settle_again(task)

    async def _find_truth(self, task: Task, heir_s: float) -> None:
        for process in tuple(task.processes.values()):
            async with process.lock:  # what was reported is being written
                process.hold()
        if all(process.ended.is_set() for process in task.processes.values()):
            return
        shim = await self._adopt(task) or await self._heirs.find(task)
        if shim is None:
            await self._settle(task, heir_s)
            return
        task.shim = shim
        self.follow(task)
        for exec_id, process in task.processes.items():
            if not process.ended.is_set():
                task.keep_streams(exec_id)

    # There is a shim

    async def _adopt(self, task: Task) -> Shim | None:
        """Connect to the task's shim and catch up with it; None if there is none or it is not this task's."""
        try:
            sock = task.bundle.connect()
        except (ConnectionRefusedError, FileNotFoundError):
            return None
        shim = Shim(sock, timeout_s=self._timeout_s)
        try:
            report = await shim.state()
            failpoint("tasks.adopt.after_state")
            if report.init is None:  # an heir that this service did not live to see
                await end_unused(shim)
                return None
            if _is_of(report, task):
                await self._catch_up(task, shim, report)
                return shim
            log.error("task.foreign_shim", container_id=task.row.key.id, shim_pid=report.shim_pid)
        except CorralError as e:
            log.warning("task.not_adopted", container_id=task.row.key.id, error=str(e))
        except BaseException:
            shim.close()
            raise
        shim.close()
        return None

    async def _catch_up(self, task: Task, shim: Shim, report: StateReport) -> None:
        record = await run_blocking(task.bundle.record)
        started_at_ns = record.started_at_ns
        if record.shim is not None and record.shim.pid == report.shim_pid:
            await self._heirs.note(task, record.shim)
        for exec_id, process in tuple(task.processes.items()):
            known = report.processes.get(exec_id)
            if known is None and process.streams:
                # This service was killed after an heir had taken over the container, and before its execs.
                await self._heirs.hand_over_exec(shim, task, process)
            elif known is None:
                await self._settle_exec(task, process)
            else:
                await self._catch_up_process(task, process, known, started_at_ns or time.time_ns())
        for exec_id in report.processes.keys() - task.processes.keys():
            await _forget_exec(shim, exec_id, report.processes[exec_id])

    async def _catch_up_process(self, task: Task, process: Process, known: ProcessReport, started_at_ns: int) -> None:
        if known.exit is not None:
            await process.mark_ended(self._ends.write, known.exit)
        elif known.state == "running" and known.identity is not None:
            async with process.lock:
                with written(task):
                    await process.mark_started(self._database, known.identity, started_at_ns)
        elif known.state == "stopped":
            await process.mark_ended(self._ends.write, Exit.unknown(NOT_EXECUTED, exited_at_ns=time.time_ns()))

    # There is none

    async def _settle(self, task: Task, heir_s: float) -> None:
        """Whatever of the task has not ended ends now, one way or the other."""
        if await self._never_ran(task):
            await self._forget(task)
            return
        how, reason = await self._find_exit(task, heir_s)
        if how is not None and how.reason == UNSTARTED and task.init.row.status is Status.CREATED:
            await self._forget(task)
            return
        if how is not None and how.reason == BY_ZYGOTE and how.started_at_ns is None:
            how = replace(how, started_at_ns=how.exited_at_ns)  # it did start, and nobody has written down when
        if how is not None and how.reason == BY_ZYGOTE:
            how = replace(how, reason=NO_HEIR)
        if how is None and not task.init.ended.is_set():
            log.warning("task.lost", container_id=task.row.key.id, reason=reason)
        for process in tuple(task.processes.values()):
            if not process.row.is_init:
                await self._settle_exec(task, process)
        await task.init.mark_ended(self._ends.write, how or Exit.unknown(reason, exited_at_ns=time.time_ns()))

    async def _never_ran(self, task: Task) -> bool:
        """Whether its shim went away before it told init to become the container's program."""
        if task.init.row.status is not Status.CREATED or task.init.ended.is_set():
            return False
        how = await run_blocking(task.bundle.exit)
        was_seen = how is not None and not how.reason  # init was ended, say, and its shim lived to see that
        return not was_seen and not await run_blocking(task.bundle.may_have_run)

    async def _forget(self, task: Task) -> None:
        key = task.row.key
        await self._end_processes(task)
        if self._registry.find(key) is not task:  # it was deleted meanwhile
            return
        log.warning("task.forgotten", container_id=key.id, reason=NEVER_RAN)
        await self._database.write(lambda transaction: store.delete_task(transaction, key))
        task.bundle.discard()
        if self._registry.find(key) is task:
            self._registry.remove(task)
        for process in task.processes.values():
            process.forget(Unavailable(f"container {key.id} has no task any more: {NEVER_RAN}", reason="NEVER_RAN"))

    async def _find_exit(self, task: Task, heir_s: float) -> tuple[Exit | None, str]:
        """How init ended, or why nobody knows. Afterwards nothing of it lives."""
        if task.init.ended.is_set():
            return task.init.row.exit, ""
        reason = MAY_HAVE_RUN if task.init.row.status is Status.CREATED else SHIM_KILLED
        if not await run_blocking(task.bundle.exists):
            reason = BUNDLE_GONE
        how = await run_blocking(task.bundle.exit)
        if how is not None and not how.reason:
            return how, ""
        # Killed before it is called dead: a shim that only hung up may be writing its exit just now.
        identity = task.init.identity
        was_running = identity is not None and identity.runs
        if identity is not None and identity.lives:  # else who reaped it had written it down before
            heir_s = HEIR_S
        await self._end_processes(task)
        how = await self._written_exit(task, heir_s)
        if was_running and how is not None and how.reason == BY_ZYGOTE:  # it saw only our own kill
            how = None
        return how, reason

    async def _written_exit(self, task: Task, within_s: float) -> Exit | None:
        for _ in range(int(within_s / LOOK_S)):
            how = await run_blocking(task.bundle.exit)
            if how is not None:
                return how
            await asyncio.sleep(LOOK_S)
        return await run_blocking(task.bundle.exit)

    async def _settle_exec(self, task: Task, process: Process) -> None:
        if process.ended.is_set():
            return
        how = await run_blocking(task.bundle.exec_exit, process.row.exec_id)
        await process.mark_ended(self._ends.write, how or Exit.unknown(NOT_SEEN, exited_at_ns=time.time_ns()))

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
