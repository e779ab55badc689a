"""Attach, ExecRun and Logs: passed on to tasks, byte for byte.

Only the first message is read and rewritten, to name the container by its id. All others go through as they came,
neither parsed nor copied into messages: a pipeline's speed is that of the transport.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import grpc
import grpc.aio

from corral.api.engine.v1 import engine_pb2
from corral.api.tasks.v1 import tasks_pb2
from corral.api.types.v1.types_pb2 import ExitStatus
from corral.engine.absence import Absences
from corral.engine.core import Core
from corral.engine.execs import Execs
from corral.engine.lifecycle import Lifecycle
from corral.engine.records import ContainerRecord, Status
from corral.engine.requests import log_of
from corral.rpc.context import only_follows
from corral.rpc.errors import UNSERVED, CorralError, InvalidArgument, NotFound, Unavailable

ATTACH = "/corral.tasks.v1.Tasks/Attach"
LOGS = "/corral.tasks.v1.Tasks/Logs"

EXITED = tasks_pb2.AttachResponse(exited=ExitStatus()).SerializeToString()[:1]
"""What the message begins with that tells of the end."""
END_OF_STDIN = tasks_pb2.AttachRequest(end_of_stdin=tasks_pb2.EndOfStdin()).SerializeToString()

type _Context = grpc.aio.ServicerContext[bytes, bytes]


class Streams:
    """See the module. The methods take and give serialized messages."""

    def __init__(self, core: Core, execs: Execs, lifecycle: Lifecycle) -> None:
        self._core = core
        self._execs = execs
        self._lifecycle = lifecycle
        self._absences = Absences(core.attached)
        self._attach: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = core.leaves.tasks_channel.stream_stream(ATTACH)
        self._logs: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = core.leaves.tasks_channel.unary_stream(LOGS)

    def close(self) -> None:
        """Who was sent away is left to the program that may follow."""
        self._absences.close()

    async def attach(self, requests: AsyncIterator[bytes], context: _Context) -> None:
        """As corral.tasks.v1.Tasks.Attach. Raises CorralError."""
        first = await anext(aiter(requests), None)
        message = tasks_pb2.AttachRequest.FromString(first or b"")
        if message.WhichOneof("part") != "header":
            raise InvalidArgument("the first message of Attach must be the header", reason="NO_HEADER")
        record = self._core.resolve(message.header.id)
        message.header.id = record.id
        try:
            await self._converse(record, message, requests, context)
        except NotFound as e:
            now = self._core.get(record.namespace, record.id)
            if e.reason != "NO_TASK" or now.status is not Status.CREATED:
                raise
            # It was created, and has lost its task with its shim, or by a reboot; a start would make that again, too.
            await self._lifecycle.make_again(record.id)
            await self._converse(record, message, requests, context)

    async def exec_run(self, requests: AsyncIterator[bytes], context: _Context) -> None:
        """As corral.engine.v1.Containers.ExecRun. Raises CorralError."""
        first = await anext(aiter(requests), None)
        message = engine_pb2.ExecRunRequest.FromString(first or b"")
        if message.WhichOneof("part") != "header":
            raise InvalidArgument("the first message of ExecRun must be the header", reason="NO_HEADER")
        asked = message.header
        record, planned = await self._execs.planned(asked.process)
        header = tasks_pb2.AttachHeader(
            id=record.id,
            exec_id=planned.exec_id,
            stdin=asked.process.stdin,
            stdout=asked.stdout,
            stderr=asked.stderr,
            lossless=asked.lossless,
            start=True,
            forget=True,
            exec=planned,
        )
        try:
            await self._converse(record, tasks_pb2.AttachRequest(header=header), requests, context)
        except BaseException:
            # Tasks forgets what was started. Of a start, or an attachment, it may not even have heard.
            self._execs.forget_soon(record, planned.exec_id)
            raise

    async def _converse(
        self,
        record: ContainerRecord,
        message: tasks_pb2.AttachRequest,
        requests: AsyncIterator[bytes],
        context: _Context,
    ) -> None:
        call = self._attach()
        readers = self._core.attached.setdefault((record.namespace, record.id), set())
        task = asyncio.current_task()
        assert task is not None
        readers.add(task)
        if message.header.resume:
            self._absences.end((record.namespace, record.id))
        attached, parking = asyncio.Event(), asyncio.Event()

        def park() -> None:
            self._core.is_stopping = True
            parking.set()

        message.header.client = secrets.token_hex(16) if message.header.resumable else ""
        begins = message.header.resumable and message.header.start
        if message.header.resumable and not begins:
            only_follows(park)
        sending = asyncio.ensure_future(_send(call, message.SerializeToString(), requests, attached))
        helping = [sending]
        if message.header.resumable:
            helping.append(asyncio.ensure_future(self._park(message.header, attached, parking)))
        try:
            # Not "async for": gRPC does not allow it beside write().
            while isinstance(response := await call.read(), bytes):
                if begins:  # whoever is cut off before that can't ask for it again
                    begins = False
                    only_follows(park)
                attached.set()
                if response.startswith(EXITED) and not message.header.exec_id:
                    await self._lifecycle.record_end(record)
                await context.write(response)
        except Unavailable as e:
            if message.header.resumable and e.reason == UNSERVED:
                self._absences.begin((record.namespace, record.id))
            raise
        finally:
            for each in helping:
                each.cancel()
            call.cancel()
            if parking.is_set():
                self._absences.begin((record.namespace, record.id))
            readers.discard(task)
            if not readers:
                self._core.attached.pop((record.namespace, record.id), None)
        if parking.is_set():
            raise asyncio.CancelledError

    async def _park(self, header: tasks_pb2.AttachHeader, attached: asyncio.Event, parking: asyncio.Event) -> None:
        """Once that is wanted, and can be. Not a message among the client's: a process may not read those before."""
        await parking.wait()
        await attached.wait()
        request = tasks_pb2.ParkRequest(id=header.id, exec_id=header.exec_id, client=header.client)
        with suppress(CorralError):  # it has just ended
            await self._core.leaves.tasks.Park(request)

    async def logs(self, request: bytes, context: _Context) -> None:
        """As corral.tasks.v1.Tasks.Logs. Raises CorralError."""
        message = tasks_pb2.LogsRequest.FromString(request)
        only_follows()
        record = self._core.resolve(message.id)
        message.id = record.id
        if message.follow:
            try:
                await self._pass_on(message, context)
            except NotFound as e:
                if e.reason != "NO_TASK":
                    raise
            else:
                return
            async with self._core.locks.of((record.namespace, record.id)):  # it may be about to run again
                record = self._core.get(record.namespace, record.id)
        message.log.CopyFrom(log_of(record, record.log_path))
        await self._pass_on(message, context)

    async def _pass_on(self, message: tasks_pb2.LogsRequest, context: _Context) -> None:
        call = self._logs(message.SerializeToString())
        try:
            async for response in call:
                await context.write(response)
        finally:
            call.cancel()


async def _send(call: Any, first: bytes, requests: AsyncIterator[bytes], attached: asyncio.Event) -> None:
    """Pass the client's messages on; the end of its stream is passed on too.

    Only once it is attached: until then another call may have to be made, and what this one has taken would be lost.
    """
    with suppress(CorralError, asyncio.InvalidStateError):  # the call has ended, and whoever reads it says why
        await call.write(first)
        await attached.wait()
        async for request in requests:
            await call.write(request)
        # Not the end of the stream: nothing could be said after it.
        await call.write(END_OF_STDIN)


SERVICE = "corral.engine.v1.Containers"


def register(streams: Callable[[], Streams], server: grpc.aio.Server) -> None:
    """Serve them without (de)serializers; call it before the servicer is added, the first handler counts.

    `streams` is asked at each call.
    """

    async def attach(requests: AsyncIterator[bytes], context: _Context) -> None:
        await streams().attach(requests, context)

    async def exec_run(requests: AsyncIterator[bytes], context: _Context) -> None:
        await streams().exec_run(requests, context)

    async def logs(request: bytes, context: _Context) -> None:
        await streams().logs(request, context)

    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Attach": grpc.stream_stream_rpc_method_handler(attach),
        "ExecRun": grpc.stream_stream_rpc_method_handler(exec_run),
        "Logs": grpc.unary_stream_rpc_method_handler(logs),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
