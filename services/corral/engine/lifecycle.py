"""What happens to a container between its making and its removal: start, stop, kill, pause, resume, restart, wait."""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress

import structlog

from corral.api.cgroups.v1.cgroups_pb2 import FreezeRequest, ThawRequest
from corral.api.engine.v1.engine_pb2 import RestartPolicy, WaitContainerRequest
from corral.api.images.v1.images_pb2 import SnapshotRequest
from corral.api.network.v1.network_pb2 import Endpoint
from corral.api.tasks.v1 import tasks_pb2
from corral.api.types.v1.types_pb2 import ExitStatus
from corral.engine import pauses, requests, store
from corral.engine.core import Core, require_alive
from corral.engine.leaves import persistently
from corral.engine.records import ALIVE, ContainerRecord, Status
from corral.engine.removal import SIGKILL
from corral.engine.signals import parse_signal
from corral.engine.stops import Stops, refuse_unless_certain
from corral.engine.task_making import TaskMaking
from corral.rpc.errors import AlreadyExists, CorralError, FailedPrecondition, Internal, NotFound, Unavailable
from corral.store import Transaction, failpoint

log = structlog.get_logger()

DEFAULT_STOP_SIGNAL = "SIGTERM"
# After SIGKILL. A process that does not end then sits in the kernel, in uninterruptible sleep.
KILL_TIMEOUT_S = 10.0
WAIT_RETRY_S = 0.2
PORTS_WITHIN_S = 2.0
MADE_AGAIN = 3
"""So often a task is made again in one start, each having been lost with its shim."""
# Exit codes of a container whose program never ran, as a shell and docker have them.
_NOT_STARTED = {"EXEC_NOT_FOUND": 127, "EXEC_DENIED": 126}
_NOT_STARTED_OTHERWISE = 128


class Lifecycle:
    """See the module. References are names, ids, or prefixes of ids; all raise CorralError."""

    def __init__(self, core: Core, task_making: TaskMaking) -> None:
        self._core = core
        self._tasks = task_making
        self._stops = Stops(core)

    # Start

    async def start(self, reference: str) -> ContainerRecord:
        """Run a created or ended container; nothing happens to one that runs."""
        return await self._core.background.to_the_end(self._start(self._core.resolve(reference)))

    async def _start(self, named: ContainerRecord) -> ContainerRecord:
        async with self._core.locks.of((named.namespace, named.id)):
            record = self._core.get(named.namespace, named.id)
            if record.status in ALIVE:
                record = await self._true_state(record, no_start_is_on_its_way=True)
                if record.status in ALIVE:
                    return record
            store.check_move(record, Status.RUNNING)
            self._core.forget_backoff((named.namespace, named.id))
            if record.status is Status.EXITED:
                record = await self._make_again(record)
            return self._started(await self._run(record._replace(restart_count=0), by_user=True))

    async def make_again(self, reference: str) -> ContainerRecord:
        """Make an ended container again, as Create leaves it, and one that was created and has lost its task; nothing
        happens to any other."""
        return await self._core.background.to_the_end(self._made_again(self._core.resolve(reference)))

    async def _made_again(self, named: ContainerRecord) -> ContainerRecord:
        async with self._core.locks.of((named.namespace, named.id)):
            record = self._core.get(named.namespace, named.id)
            if record.status in ALIVE:
                record = await self._true_state(record)
            if record.status is not Status.EXITED and not await self._lacks_task(record):
                return record
            self._core.forget_backoff((named.namespace, named.id))
            made = (await self._make_again(record))._replace(status=Status.CREATED, restart_count=0)
            return await self._core.database.write(lambda tx: store.save_made_again(tx, made))

    async def _lacks_task(self, record: ContainerRecord) -> bool:
        """Whether it was created, and its task is lost, as after a reboot or when its shim was killed."""
        if record.status is not Status.CREATED:
            return False
        try:
            await self._core.leaves.tasks.Get(tasks_pb2.GetTaskRequest(id=record.id))
        except NotFound:
            return True
        return False

    async def start_again(self, ended: ContainerRecord, is_wanted: Callable[[ContainerRecord], bool]) -> None:
        """Start a container that ended as `ended` says, or was made again then and not started, if nothing has happened
        to it since and it is still wanted."""
        async with self._core.locks.of((ended.namespace, ended.id)):
            record = self._core.get(ended.namespace, ended.id)
            if record.finished_ns != ended.finished_ns or record.status in ALIVE:
                return
            if not is_wanted(record):
                self._core.on_stays_ended(record)
                return
            if record.status is Status.CREATED:  # somebody died in the middle of this
                self._started(await self._run(record, by_user=False))
                return
            begun = await self._core.database.write(lambda tx: store.begin_restart(tx, record))
            self._started(await self._run(await self._make_again_by_policy(begun), by_user=False))

    async def _make_again_by_policy(self, record: ContainerRecord) -> ContainerRecord:
        try:
            return await self._make_again(record)
        except CorralError:
            with suppress(OSError):  # a full disk: the next start of the daemon then grants it one try more
                await self._core.database.write(lambda tx: store.end_restart(tx, record))
            raise

    def _started(self, record: ContainerRecord) -> ContainerRecord:
        self._core.on_start(record)
        return record

    async def _true_state(self, record: ContainerRecord, *, no_start_is_on_its_way: bool = False) -> ContainerRecord:
        """The record, after asking tasks whether it still is as it says."""
        try:
            task = await self._core.leaves.tasks.Get(tasks_pb2.GetTaskRequest(id=record.id))
        except NotFound:
            return await self._core.record_lost(record, "its task is gone")
        if no_start_is_on_its_way and task.status == tasks_pb2.STATUS_CREATED and record.status is Status.RUNNING:
            # An engine died between the intent to start and the start, and recovery has not come to it yet.
            return await self._core.database.write(
                lambda tx: store.set_status(tx, record.namespace, record.id, Status.CREATED)
            )
        if task.status != tasks_pb2.STATUS_STOPPED:
            return record
        return await self._core.record_exit(record, task.exit)

    async def _make_again(self, record: ContainerRecord) -> ContainerRecord:
        """A new task on the tree that was kept. Network and cgroup are there still, or are made again."""
        try:
            return await self._make_task_again(record)
        except CorralError:
            self._core.on_stays_ended(record)
            raise

    async def _attach_again(self, record: ContainerRecord) -> Endpoint:
        """Its place in networks; where a port that was chosen for it is another's by now, another one."""
        hostname, attach = self._core.host.hostname, self._core.leaves.endpoints.Attach
        request = requests.network_again(record, host_hostname=hostname)
        try:
            return await persistently(lambda: attach(request))
        except AlreadyExists:
            other = requests.network_again(record, host_hostname=hostname, other_ports=True)
            if other == request:
                raise
            return await persistently(lambda: attach(other))

    async def _make_task_again(self, record: ContainerRecord) -> ContainerRecord:
        leaves, id_ = self._core.leaves, record.id
        await persistently(lambda: leaves.tasks.Delete(tasks_pb2.DeleteTaskRequest(id=id_, force=True)))
        failpoint("engine.start.after_old_task")
        async with self._tasks.cgroup_meanwhile(record) as cgroup:
            mounts, endpoint = await asyncio.gather(
                persistently(lambda: leaves.snapshots.Mounts(SnapshotRequest(key=id_))), self._attach_again(record)
            )
            record = await self._tasks.make(record._replace(endpoint=endpoint), mounts.mounts, cgroup)
        failpoint("engine.start.after_new_task")
        return record

    async def _run(self, record: ContainerRecord, *, by_user: bool, made_again: int = 0) -> ContainerRecord:
        """Start the task. The row says RUNNING first, so that an exit, however quick, finds it so."""
        running = record._replace(status=Status.RUNNING, started_ns=time.time_ns(), finished_ns=0, exit=None)
        begin = self._core.background.spawn
        saved, started = await asyncio.gather(
            begin(self._save_started(running, by_user=by_user)),
            begin(self._start_task(record)),
            return_exceptions=True,
        )
        failpoint("engine.start.after_task")
        if isinstance(saved, BaseException):  # a full disk, say
            with suppress(CorralError):  # nobody knows that it runs, so it must not
                await self._core.leaves.tasks.Kill(tasks_pb2.KillRequest(id=record.id, signal=SIGKILL))
            raise saved
        if isinstance(started, NotFound) and started.reason not in _NOT_STARTED and made_again < MADE_AGAIN:
            return await self._run_new_task(running, by_user=by_user, made_again=made_again + 1)
        if isinstance(started, FailedPrecondition) and started.reason == "ALREADY_STARTED":
            return running  # by an engine that died before it was told
        if isinstance(started, BaseException):
            return await self._not_started(running, started, by_user=by_user)
        if started.pid and started.pid != running.pid:
            log.warning("container.pid_changed", container=record.id, was=running.pid, now=started.pid)
        return running

    async def _save_started(self, running: ContainerRecord, *, by_user: bool) -> None:
        if by_user:
            self._core.unwritten_stops.discard((running.namespace, running.id))
        await self._core.database.write(lambda tx: store.save_started(tx, running, by_user=by_user))
        if by_user and running.config.restart.mode > RestartPolicy.MODE_NO:  # which acts after a power loss too
            await self._core.database.persist()

    async def _start_task(self, record: ContainerRecord) -> tasks_pb2.StartResponse:
        """Not without its limits: whoever created it may have died before they all held."""
        await self._tasks.settle(record)
        return await self._core.leaves.tasks.Start(tasks_pb2.StartRequest(id=record.id))

    async def _run_new_task(self, running: ContainerRecord, *, by_user: bool, made_again: int) -> ContainerRecord:
        """It was created, and its task is lost, as after a reboot: make that again."""
        try:
            record = await self._make_again(running)
        except CorralError as e:
            return await self._not_started(running, e, by_user=by_user)
        return await self._run(record, by_user=by_user, made_again=made_again)

    async def _not_started(self, running: ContainerRecord, error: BaseException, *, by_user: bool) -> ContainerRecord:
        """What a failed start leaves behind: an ended container with the code that a shell would give.

        A user is told, and no policy tries that again: it is for what ran once.
        """
        if not isinstance(error, CorralError):
            raise error
        if isinstance(error, Unavailable):
            return await self._after_outage(running, error)
        status = ExitStatus(
            code=_NOT_STARTED.get(error.reason, _NOT_STARTED_OTHERWISE), known=True, reason=error.message
        )
        status.exited_at.GetCurrentTime()
        if by_user:
            await self._core.database.write(lambda tx: store.set_stopped_by_user(tx, running))
        await self._core.record_exit(running, status, started=False)
        raise error

    async def _after_outage(self, running: ContainerRecord, error: Unavailable) -> ContainerRecord:
        """tasks went away during the call: ask what became of it."""
        get = tasks_pb2.GetTaskRequest(id=running.id)
        try:
            task = await persistently(lambda: self._core.leaves.tasks.Get(get))
        except NotFound:  # it was being made again, or was forgotten with its shim
            await self._core.record_lost(running, "its task is gone")
            raise error from None
        if task.status == tasks_pb2.STATUS_CREATED:
            await self._core.database.write(
                lambda tx: store.set_status(tx, running.namespace, running.id, Status.CREATED)
            )
            raise error
        return running

    # Stop

    async def stop(self, reference: str, *, signal: str, timeout_s: float | None) -> ContainerRecord:
        """The stop signal, then after the grace SIGKILL; returns when it has ended. Nothing happens to one that had."""
        record = self._core.resolve(reference)
        return await self._core.background.to_the_end(self._stop_for_user(record, signal=signal, timeout_s=timeout_s))

    async def _stop_for_user(self, record: ContainerRecord, *, signal: str, timeout_s: float | None) -> ContainerRecord:
        """Stop it so that it stays so, whatever its restart policy."""
        has_policy = record.config.restart.mode > RestartPolicy.MODE_NO
        self._core.forget_backoff((record.namespace, record.id))
        unwritten = await self._stops.note(record)
        if has_policy and record.status is Status.EXITED:
            async with self._core.locks.of((record.namespace, record.id)):  # a restart that had begun is over then
                record = self._core.get(record.namespace, record.id)
        if record.status in ALIVE:
            record = await self._stop(record, signal=signal, timeout_s=timeout_s)
        else:
            self._core.on_stays_ended(record)
        await self._ports_are_free(record)
        refuse_unless_certain(record, unwritten)
        return record

    async def _ports_are_free(self, record: ContainerRecord) -> None:
        """Of one that has ended. Not waited for long: network may be away."""
        if (freeing := self._core.freeing.get((record.namespace, record.id))) is not None:
            await asyncio.wait((freeing,), timeout=PORTS_WITHIN_S)

    async def _stop(self, record: ContainerRecord, *, signal: str, timeout_s: float | None) -> ContainerRecord:
        number = parse_signal(signal or record.config.stop_signal or DEFAULT_STOP_SIGNAL)
        waiting = asyncio.ensure_future(self._exit_of(record))
        try:
            await self._signal(record, number)
            status = await _within(waiting, self._grace_s(record, timeout_s))
            if status is None:
                await self._signal(record, SIGKILL, everything=record.config.pid_mode != "")
                status = await _within(waiting, KILL_TIMEOUT_S)
        finally:
            waiting.cancel()
        if status is None:
            raise Internal(
                f"container {record.name} does not end although it was killed: a process of it hangs in the kernel",
                reason="UNKILLABLE",
            )
        return await self._stops.ended(record, status)

    def _grace_s(self, record: ContainerRecord, timeout_s: float | None) -> float:
        if timeout_s is not None:
            return max(timeout_s, 0.0)
        if record.config.HasField("stop_timeout"):
            return record.config.stop_timeout.ToNanoseconds() / 1e9
        return self._core.config.stop_timeout_s

    async def _signal(self, record: ContainerRecord, number: int, *, everything: bool = False) -> None:
        """Send a signal; a paused container is thawed to take it. No error if it has ended."""
        tasks = self._core.leaves.tasks
        request = tasks_pb2.KillRequest(id=record.id, signal=number, all=everything)
        try:
            await persistently(lambda: tasks.Kill(request))
        except (FailedPrecondition, NotFound):
            return
        if self._core.get(record.namespace, record.id).status is Status.PAUSED:
            await self._thaw(record)

    async def restart(self, reference: str, *, signal: str, timeout_s: float | None) -> ContainerRecord:
        """Stop it if it runs, then start it."""
        record = self._core.resolve(reference)
        return await self._core.background.to_the_end(self._restart(record, signal=signal, timeout_s=timeout_s))

    async def _restart(self, record: ContainerRecord, *, signal: str, timeout_s: float | None) -> ContainerRecord:
        key = (record.namespace, record.id)
        self._core.restarting.add(key)
        try:
            if record.status in ALIVE:
                await self._stop(record, signal=signal, timeout_s=timeout_s)
        finally:
            self._core.restarting.discard(key)
        return await self._start(record)

    async def restart_run(self, run: ContainerRecord) -> None:
        """Restart it as nobody but the engine wants it: not if this run is over, nor if a user stops it meanwhile."""
        await self._core.background.to_the_end(self._restart_run(run))

    async def _restart_run(self, run: ContainerRecord) -> None:
        key = (run.namespace, run.id)
        if not await self.goes_on(run):
            return
        self._core.restarting.add(key)
        try:
            ended = await self._stop(self._core.get(*key), signal="", timeout_s=None)
        finally:
            self._core.restarting.discard(key)
        await self.start_again(ended, lambda now: now.stopped_by_user == run.stopped_by_user)
        now = self._core.get(*key)
        if now.finished_ns == ended.finished_ns:  # it stays so, which nobody has acted on yet
            self._core.on_exit(now)

    async def goes_on(self, run: ContainerRecord) -> bool:
        """Whether this run is not over, nor paused, nor has a user begun to stop it since `run` was read."""
        async with self._core.locks.of((run.namespace, run.id)):
            now = self._core.get(run.namespace, run.id)
            same = now.status is Status.RUNNING and now.started_ns == run.started_ns
            is_meant_to_end = (run.namespace, run.id) in self._core.unwritten_stops
            return same and now.stopped_by_user == run.stopped_by_user and not is_meant_to_end

    async def kill(self, reference: str, *, signal: str, everything: bool) -> None:
        """Send a signal, SIGKILL if none is named. SIGKILL also ends a paused container."""
        record = self._core.resolve(reference)
        number = parse_signal(signal) if signal else SIGKILL
        if self._core.is_restarting(record):  # nothing is there to be signalled, nor shall be
            await self._core.background.to_the_end(self._stop_for_user(record, signal="", timeout_s=0.0))
            return
        key = (record.namespace, record.id)
        if key in self._core.rerunning and number != SIGKILL:  # what comes before its program would take the signal
            async with self._core.locks.of(key):
                record = self._core.get(*key)
        require_alive(record, "signalled")
        if number in (SIGKILL, parse_signal(record.config.stop_signal or DEFAULT_STOP_SIGNAL)):  # it is meant to end
            await self._stops.note(record)
        request = tasks_pb2.KillRequest(id=record.id, signal=number, all=everything)
        await self._core.leaves.tasks.Kill(request)
        if record.status is Status.PAUSED and number == SIGKILL:
            await self._thaw(record)

    # Pause

    async def pause(self, reference: str, *, passing: bool = False) -> ContainerRecord:
        """Freeze every process of it. passing: if we die meanwhile, the next start resumes it."""
        return await self._core.background.to_the_end(self._pause(self._core.resolve(reference), passing=passing))

    async def _pause(self, named: ContainerRecord, *, passing: bool) -> ContainerRecord:
        async with self._core.locks.of((named.namespace, named.id)):
            record = self._core.get(named.namespace, named.id)
            if record.status is Status.PAUSED:
                raise FailedPrecondition(f"container {record.name} is paused already", reason="PAUSED")
            require_alive(record, "paused")
            await self._core.leaves.cgroups.Freeze(FreezeRequest(id=record.id))
            failpoint("engine.pause.after_freeze")
            paused = await self._set_paused(record, Status.PAUSED, passing=passing)
            self._core.on_pause((record.namespace, record.id))
            return paused

    async def resume(self, reference: str) -> ContainerRecord:
        """Let a paused container go on."""
        return await self._core.background.to_the_end(self._resume(self._core.resolve(reference)))

    async def _resume(self, named: ContainerRecord) -> ContainerRecord:
        async with self._core.locks.of((named.namespace, named.id)):
            record = self._core.get(named.namespace, named.id)
            if record.status is not Status.PAUSED:
                raise FailedPrecondition(
                    f"container {record.name} is not paused ({record.status.word})", reason="NOT_PAUSED"
                )
            return await self._thaw(record)

    async def _thaw(self, record: ContainerRecord) -> ContainerRecord:
        await persistently(lambda: self._core.leaves.cgroups.Thaw(ThawRequest(id=record.id)))
        failpoint("engine.resume.after_thaw")
        return await self._set_paused(record, Status.RUNNING)

    async def _set_paused(self, record: ContainerRecord, status: Status, *, passing: bool = False) -> ContainerRecord:
        """RUNNING <-> PAUSED, unless it has ended meanwhile."""

        def write(tx: Transaction) -> ContainerRecord:
            now = store.get(tx, record.namespace, record.id)
            if now.status not in ALIVE or now.status is status:
                return now
            topic = "container.paused" if status is Status.PAUSED else "container.unpaused"
            tx.journal(topic, record.id, {"name": now.name}, namespace=record.namespace)
            (pauses.note if passing else pauses.forget)(tx, record.namespace, record.id)
            return store.set_status(tx, record.namespace, record.id, status)

        return await self._core.database.write(write)

    # Wait

    async def wait(self, reference: str, condition: "WaitContainerRequest.Condition.ValueType") -> ExitStatus | None:
        """How it ended, once the condition holds; None if it never ran."""
        record = self._core.resolve(reference)
        key = (record.namespace, record.id)
        if condition == WaitContainerRequest.CONDITION_REMOVED:
            if record.config.auto_remove and record.status in ALIVE:
                self._core.background.spawn_endless(self._recorded_exit_of(record))
            return await self._core.watch.removal(key)
        if condition == WaitContainerRequest.CONDITION_NEXT_EXIT:
            return await self._next_exit(record)
        if record.status in ALIVE:
            return await self._recorded_exit_of(record)
        return record.exit

    async def _recorded_exit_of(self, record: ContainerRecord) -> ExitStatus:
        """Written down and acted on before anybody is told, not only when its event comes: who then asks for the
        container finds it ended."""
        status = await self._exit_of(record)
        await self._core.record_exit(record, status)
        await self._ports_are_free(record)
        return status

    async def record_end(self, named: ContainerRecord) -> None:
        """Write down that it ended, if it has, before those who were attached to it hear of that."""
        # It is gone, or the disk is full: its end comes as an event, too.
        with suppress(CorralError, OSError):
            record = self._core.get(named.namespace, named.id)
            if record.status in ALIVE:
                task = await self._core.leaves.tasks.Get(tasks_pb2.GetTaskRequest(id=record.id))
                if task.status == tasks_pb2.STATUS_STOPPED:
                    await self._core.record_exit(record, task.exit)
                    await self._ports_are_free(record)

    async def _next_exit(self, record: ContainerRecord) -> ExitStatus:
        """From our own record, or, quicker while there is a task, from tasks."""
        if record.status in ALIVE:  # an end that is not merged yet is no next one
            record = await self._true_state(record)
        told = self._core.watch.next_exit((record.namespace, record.id))
        if record.status not in ALIVE | {Status.CREATED}:
            return await told
        asked = asyncio.ensure_future(self._exit_of(record))
        try:
            await asyncio.wait((told, asked), return_when=asyncio.FIRST_COMPLETED)
            return (told if told.done() else asked).result()
        except asyncio.CancelledError:
            if told.cancelled():
                raise _gone(record) from None
            raise
        finally:
            asked.cancel()
            told.cancel()

    async def _exit_of(self, record: ContainerRecord) -> ExitStatus:
        """The end of the run that `record` describes, straight from tasks, over any outage of it."""
        request = tasks_pb2.WaitRequest(id=record.id)
        while True:
            try:
                return (await self._core.leaves.tasks.Wait(request)).exit
            except Unavailable:
                await asyncio.sleep(WAIT_RETRY_S)
            except NotFound:
                if (status := await self._exit_without_task(record)) is not None:
                    return status
                await asyncio.sleep(WAIT_RETRY_S)

    async def _exit_without_task(self, record: ContainerRecord) -> ExitStatus | None:
        """Of a container whose task is gone; None if it has one again, or gets one when it is started.

        Raises NotFound if it was removed.
        """
        async with self._core.locks.of((record.namespace, record.id)):  # a start may just make it again
            now = self._core.get(record.namespace, record.id)
            if now.exit is not None:
                return now.exit
            if now.status is Status.CREATED:
                return None
            if now.status not in ALIVE:
                raise _gone(now)
            try:
                await self._core.leaves.tasks.Get(tasks_pb2.GetTaskRequest(id=record.id))
            except NotFound:
                now = await self._core.record_lost(now, "its task is gone")
            except Unavailable:
                pass
            return now.exit


async def _within(waiting: "asyncio.Future[ExitStatus]", seconds: float) -> ExitStatus | None:
    """The result if it comes in time, else None; the waiting goes on."""
    done, _ = await asyncio.wait((waiting,), timeout=seconds)
    return waiting.result() if done else None


def _gone(record: ContainerRecord) -> NotFound:
    return NotFound(f"container {record.name} was removed", reason="NO_CONTAINER")
