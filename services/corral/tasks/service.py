"""corral.tasks.v1.Tasks: translates RPCs, nothing else."""
# ruff: noqa: N802 (methods are named as the RPCs are)

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, aclosing, suppress
from functools import partial

import grpc.aio
import structlog

from corral.api.tasks.v1 import tasks_pb2 as pb
from corral.api.tasks.v1 import tasks_pb2_grpc
from corral.api.types.v1 import types_pb2 as types_pb
from corral.kernel.rlimits import raise_soft
from corral.rpc.blocking import run_blocking
from corral.rpc.checking import check
from corral.rpc.context import check_id, current_namespace, only_follows
from corral.rpc.errors import CorralError, InvalidArgument, NotFound
from corral.rpc.events import stream_events
from corral.store import Database
from corral.tasks import log_drivers, translate
from corral.tasks.attach import Attachment, Stream
from corral.tasks.bundle import Bundles
from corral.tasks.checking import Checker
from corral.tasks.config import TasksConfig
from corral.tasks.ends import Ends
from corral.tasks.execs import Execs
from corral.tasks.lifecycle import Tasks
from corral.tasks.live import Process, Task
from corral.tasks.logs import stream_log
from corral.tasks.model import TaskKey, mapping
from corral.tasks.parking import Parked, Parking
from corral.tasks.probes import Probes
from corral.tasks.processes import pids
from corral.tasks.recovery import Recovery
from corral.tasks.registry import Registry
from corral.tasks.runs import Runs
from corral.tasks.spawning import Spawner
from corral.tasks.standby import Standby
from corral.tasks.store import MIGRATIONS
from corral.tasks.watch import DirectoryWatch
from corral.tasks.zygote import Zygote

log = structlog.get_logger()

type Context[Request, Response] = grpc.aio.ServicerContext[Request, Response]

CREATES_PER_CPU = 4


class TasksService:
    """Hosts the leaf; see corral.rpc.service.Service."""

    name = "tasks"

    def __init__(self, config: TasksConfig) -> None:
        self._config = config
        self._servicer = TasksServicer(config)
        self._database: Database | None = None
        self._zygote: Zygote | None = None
        self._bundles: Bundles | None = None
        self._standby: Standby | None = None
        self._registry = Registry()

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        tasks_pb2_grpc.add_TasksServicer_to_server(self._servicer, server)
        return [pb.DESCRIPTOR.services_by_name["Tasks"].full_name]

    async def start(self) -> None:
        config = self._config
        await run_blocking(config.root.mkdir, mode=0o700, parents=True, exist_ok=True)
        raise_soft("RLIMIT_NOFILE")  # each task costs a connection, each client of one some pipes
        database = self._database = Database(config.root / "tasks.db", MIGRATIONS, durable=False, on_loop=True)
        zygote = self._zygote = Zygote(config.root / "zygote.log")
        zygote.start()
        bundles = self._bundles = Bundles(config.state, config.root)
        parallel = config.parallel_creates or CREATES_PER_CPU * (os.cpu_count() or 1)
        standby = self._standby = Standby(zygote, timeout_s=config.shim_timeout_s)
        spawner = Spawner(zygote, standby, parallel=parallel, timeout_s=config.shim_timeout_s)
        ends = Ends(self._registry, database)
        recovery = Recovery(self._registry, database, ends, bundles, spawner, timeout_s=config.shim_timeout_s)
        await recovery.recover_all()
        tasks = Tasks(self._registry, database, ends, bundles, spawner, recovery)
        checker = Checker(self._registry, bundles, recovery, config.state)
        self._servicer.serve(tasks, Execs(self._registry, database), checker, database)
        standby.begin()

    async def stop(self) -> None:
        self._servicer.close()
        await self._registry.stop()
        if self._standby is not None:
            await self._standby.close()
        if self._bundles is not None:
            await self._bundles.close()
        if self._zygote is not None:
            tasks = self._registry.of(None)
            runs = any(not task.init.ended.is_set() for task in tasks)
            await self._zygote.stop(has_shims=runs or (None if tasks else False))
        if self._database is not None:
            self._database.close()


class TasksServicer(tasks_pb2_grpc.TasksServicer):
    """The RPCs. serve() gives it what to serve, before the first call is let in."""

    def __init__(self, config: TasksConfig) -> None:
        self._config = config
        self._watch = DirectoryWatch()
        self._parking: Parking | None = None
        self._attached: dict[str, Attachment] = {}  # by what their clients are called

    def close(self) -> None:
        """Release what the calls used."""
        self._watch.close()
        if self._parking is not None:
            self._parking.close()

    def serve(self, tasks: Tasks, execs: Execs, checker: Checker, database: Database) -> None:
        self._registry = tasks.registry
        self._tasks = tasks
        self._execs = execs
        self._probes = Probes(tasks, execs, database)
        self._runs = Runs(tasks, execs, database)
        self._parking = Parking(tasks.registry)
        execs.forget_unused()  # whoever is parked will be back
        self._checker = checker
        self._database = database

    async def Create(self, request: pb.CreateTaskRequest, context: Context[pb.CreateTaskRequest, pb.Task]) -> pb.Task:
        new = translate.new_task(current_namespace(), request, self._config)
        new.fields["log"] = await log_drivers.reached(mapping(new.fields, "log"))
        return translate.task_message(await self._tasks.create(new))

    async def Start(
        self, request: pb.StartRequest, context: Context[pb.StartRequest, pb.StartResponse]
    ) -> pb.StartResponse:
        process = await self._tasks.start(_key(request.id), request.exec_id)
        return pb.StartResponse(pid=process.row.pid)

    async def Exec(self, request: pb.ExecRequest, context: Context[pb.ExecRequest, pb.ExecResponse]) -> pb.ExecResponse:
        await self._execs.create(_key(request.id), translate.new_exec(request, request.exec_id))
        return pb.ExecResponse()

    async def Probe(
        self, request: pb.ProbeRequest, context: Context[pb.ProbeRequest, pb.ProbeResponse]
    ) -> pb.ProbeResponse:
        only_follows()
        ran = await self._probes.run(_key(request.id), translate.new_probe(request))
        return pb.ProbeResponse(exit=translate.exit_status(ran.exit), output=ran.output)

    async def Kill(self, request: pb.KillRequest, context: Context[pb.KillRequest, pb.KillResponse]) -> pb.KillResponse:
        await self._tasks.kill(_key(request.id), request.exec_id, request.signal, everything=request.all)
        return pb.KillResponse()

    async def Resize(
        self, request: pb.ResizeRequest, context: Context[pb.ResizeRequest, pb.ResizeResponse]
    ) -> pb.ResizeResponse:
        size = request.size
        await self._tasks.resize(_key(request.id), request.exec_id, size.width, size.height)
        return pb.ResizeResponse()

    async def CloseStdin(
        self, request: pb.CloseStdinRequest, context: Context[pb.CloseStdinRequest, pb.CloseStdinResponse]
    ) -> pb.CloseStdinResponse:
        await self._tasks.close_stdin(_key(request.id), request.exec_id)
        return pb.CloseStdinResponse()

    async def Wait(self, request: pb.WaitRequest, context: Context[pb.WaitRequest, pb.WaitResponse]) -> pb.WaitResponse:
        only_follows()
        how = await self._tasks.wait(_key(request.id), request.exec_id)
        return pb.WaitResponse(exit=translate.exit_status(how))

    async def Get(self, request: pb.GetTaskRequest, context: Context[pb.GetTaskRequest, pb.Task]) -> pb.Task:
        return translate.task_message(self._registry.get(_key(request.id)))

    async def List(
        self, request: pb.ListTasksRequest, context: Context[pb.ListTasksRequest, pb.ListTasksResponse]
    ) -> pb.ListTasksResponse:
        tasks = self._registry.of(None if request.all_namespaces else current_namespace())
        return pb.ListTasksResponse(tasks=[translate.task_message(task) for task in tasks])

    async def Delete(
        self, request: pb.DeleteTaskRequest, context: Context[pb.DeleteTaskRequest, pb.DeleteTaskResponse]
    ) -> pb.DeleteTaskResponse:
        how = await self._tasks.delete(_key(request.id), force=request.force, must_exist=request.must_exist)
        return pb.DeleteTaskResponse(exit=None if how is None else translate.exit_status(how))

    async def DeleteExec(
        self, request: pb.DeleteExecRequest, context: Context[pb.DeleteExecRequest, pb.DeleteExecResponse]
    ) -> pb.DeleteExecResponse:
        await self._execs.delete(_key(request.id), request.exec_id, force=request.force)
        return pb.DeleteExecResponse()

    async def ReopenLog(
        self, request: pb.ReopenLogRequest, context: Context[pb.ReopenLogRequest, pb.ReopenLogResponse]
    ) -> pb.ReopenLogResponse:
        await self._tasks.reopen_log(_key(request.id))
        return pb.ReopenLogResponse()

    async def Pids(self, request: pb.PidsRequest, context: Context[pb.PidsRequest, pb.PidsResponse]) -> pb.PidsResponse:
        task = self._registry.get(_key(request.id))
        return pb.PidsResponse(pids=await run_blocking(pids, task.row.cgroup_paths, task.init.row))

    async def Attach(  # type: ignore[override]
        self,
        request_iterator: AsyncIterator[pb.AttachRequest],
        context: Context[pb.AttachRequest, pb.AttachResponse],
    ) -> None:
        # Writes to the context instead of yielding: a generator is closed when it is collected, this one ends at once.
        header = await _header(request_iterator)
        wanted = translate.wanted(header)
        assert self._parking is not None
        if header.HasField("exec"):
            new = translate.new_exec(header.exec, header.exec_id)
            task, process, attachment = await self._runs.begin(_key(header.id), new, wanted)
        else:
            task = self._registry.get(_key(header.id))
            process = task.process(header.exec_id)
            if header.resume:
                attachment = self._parking.take(header.resume, task.row.key, header.exec_id)
            else:
                attachment = await self._opened(header, task, process)
        stopping = asyncio.Event()
        with ExitStack() as held:
            held.enter_context(attachment)
            if header.client:
                held.callback(self._attached.pop, header.client, None)
                self._attached[header.client] = attachment
            if header.resumable:
                only_follows(partial(_park, attachment, stopping))
            await context.write(pb.AttachResponse(attached=translate.attached(process.row)))
            feeding = asyncio.create_task(self._feed(request_iterator, attachment, header))
            how = None
            try:
                await _write_output(context, attachment)
                while await attachment.is_wanted():
                    streams = attachment.hand_over()
                    pipes = pb.Pipes(streams=streams or (), reached=streams is not None)
                    await context.write(pb.AttachResponse(pipes=pipes))
                    await _write_output(context, attachment)
                if not attachment.detached:
                    how = await process.wait()
            finally:
                feeding.cancel()
                (refused,) = await asyncio.gather(feeding, return_exceptions=True)
            if isinstance(refused, CorralError):
                raise refused
            if how is not None:
                await context.write(pb.AttachResponse(exited=translate.exit_status(how)))
            elif attachment.parked:
                self._attached.pop(header.client, None)
                held.pop_all()
                token = self._parking.park(Parked(task.row.key, header.exec_id, wanted, attachment))
                parked = pb.Parked(token=token, stdin_bytes=attachment.stdin_bytes)
                await context.write(pb.AttachResponse(parked=parked))
        if stopping.is_set():
            raise asyncio.CancelledError

    async def Park(self, request: pb.ParkRequest, context: Context[pb.ParkRequest, pb.ParkResponse]) -> pb.ParkResponse:
        attachment = self._attached.get(request.client)
        process = self._registry.get(_key(request.id)).process(request.exec_id)
        if attachment is None or attachment not in process.attached:
            raise NotFound(f"{process.what} has no such client", reason="NO_CLIENT")
        attachment.park()
        return pb.ParkResponse()

    async def _opened(self, header: pb.AttachHeader, task: Task, process: Process) -> Attachment:
        """Attached, and started if that is wanted; an exec that is not, and is to be forgotten, is so at once."""
        if header.forget and header.exec_id:
            self._execs.forget_once_unused(task, process)
        try:
            attachment = await Attachment.open(task, process, translate.wanted(header))
            try:
                if header.start:
                    await self._tasks.start(task.row.key, header.exec_id)
            except BaseException:
                attachment.close()
                raise
        except BaseException:
            if header.forget and header.start:  # one that runs by now is not deleted
                self._registry.in_background(self._execs.delete(task.row.key, header.exec_id, force=False))
            raise
        return attachment

    async def _feed(
        self, requests: AsyncIterator[pb.AttachRequest], attachment: Attachment, header: pb.AttachHeader
    ) -> None:
        """Pass on what the client sends until it ends its stream. Raises CorralError, detached, for what it may not."""
        try:
            await self._feed_all(requests, attachment, header)
        except CorralError:
            attachment.detach()
            raise

    async def _feed_all(
        self, requests: AsyncIterator[pb.AttachRequest], attachment: Attachment, header: pb.AttachHeader
    ) -> None:
        async for request in requests:
            match request.WhichOneof("part"):
                case "stdin":
                    await attachment.write_stdin(request.stdin)
                case "resize":
                    with suppress(CorralError):  # it may have no terminal, or not any more
                        size = request.resize
                        await self._tasks.resize(_key(header.id), header.exec_id, size.width, size.height)
                case "detach":
                    attachment.detach()
                    return
                case "park":
                    attachment.park()
                    return
                case "end_of_stdin":
                    attachment.close_stdin()
                case "take":
                    attachment.take(translate.taker(request.take))
        attachment.close_stdin()

    async def Logs(
        self, request: pb.LogsRequest, context: Context[pb.LogsRequest, pb.LogsResponse]
    ) -> AsyncIterator[pb.LogsResponse]:
        key = _key(request.id)
        task = self._registry.find(key) if request.HasField("log") else self._registry.get(key)
        only_follows()
        kept = task.row.log if task else translate.log_row(request.log, self._config, key)
        ended = task.init.ended if task else None
        selection = translate.selection(request)
        batches_of = stream_log(key, kept, selection, self._watch, ended if request.follow else None)
        async with aclosing(batches_of) as batches:
            async for batch in batches:
                yield pb.LogsResponse(entries=map(translate.log_entry, batch))

    async def Check(
        self, request: types_pb.CheckRequest, context: Context[types_pb.CheckRequest, types_pb.CheckResponse]
    ) -> types_pb.CheckResponse:
        return await check("tasks", self._checker.look, repair=request.repair)

    async def Events(
        self,
        request: types_pb.EventsRequest,
        context: Context[types_pb.EventsRequest, types_pb.EventsResponse],
    ) -> AsyncIterator[types_pb.EventsResponse]:
        async for event in stream_events(self._database.journal, request):
            yield event


async def _write_output(context: Context[pb.AttachRequest, pb.AttachResponse], attachment: Attachment) -> None:
    async with aclosing(attachment.output()) as output:
        async for stream, data in output:
            await context.write(_OUTPUT[stream](data))


def _park(attachment: Attachment, stopping: asyncio.Event) -> None:
    stopping.set()
    attachment.park()


_OUTPUT = {
    Stream.STDOUT: lambda data: pb.AttachResponse(stdout=data),
    Stream.STDERR: lambda data: pb.AttachResponse(stderr=data),
}


def _key(task_id: str) -> TaskKey:
    return TaskKey(current_namespace(), check_id(task_id, "container id"))


async def _header(requests: AsyncIterator[pb.AttachRequest]) -> pb.AttachHeader:
    async for request in requests:
        if request.HasField("header"):
            return request.header
        break
    raise InvalidArgument("the first message of Attach must be its header", reason="NO_HEADER")
