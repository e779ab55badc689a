"""Talking to the engine of a corrald over gRPC: an asyncio client that remembers what it made."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from corral.api.engine.v1 import engine_pb2 as pb
from corral.api.engine.v1 import engine_pb2_grpc
from corral.api.images.v1 import images_pb2, images_pb2_grpc
from corral.api.tasks.v1 import tasks_pb2
from corral.api.types.v1 import types_pb2
from corral.rpc.channel import open_channel
from corral.rpc.context import in_namespace
from corral.rpc.errors import NotFound
from support.corrald import PATIENCE, Corrald

if TYPE_CHECKING:
    import grpc.aio

CHUNK = 1 << 20


@dataclass
class EngineClient:
    """Calls of the engine, shortened. Containers are made on `busybox` without a network unless told otherwise."""

    daemon: Corrald
    channel: "grpc.aio.Channel"
    made: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.containers = engine_pb2_grpc.ContainersStub(self.channel)
        self.volumes = engine_pb2_grpc.VolumesStub(self.channel)
        self.system = engine_pb2_grpc.SystemStub(self.channel)

    async def create(self, *args: str, name: str = "", id_: str = "", network: str = "none", **config: object) -> str:
        """A created container; returns its id."""
        wanted = pb.ContainerConfig(**{"image": "busybox", "args": args} | config)  # type: ignore[arg-type]
        if not wanted.HasField("network"):
            wanted.network.mode = network
        made = await self.containers.Create(pb.CreateContainerRequest(name=name, id=id_, config=wanted))
        self.made.append(made.id)
        return made.id

    async def run(self, *args: str, **options: object) -> str:
        """A started container; returns its id."""
        id_ = await self.create(*args, **options)  # type: ignore[arg-type]
        await self.start(id_)
        return id_

    async def run_script(self, script: str, **options: object) -> str:
        """A shell that has come to its `echo ready`, with its traps set say; returns the container's id."""
        id_ = await self.run("sh", "-c", script, **options)

        async def is_ready() -> bool:
            return b"ready\n" in await self.output(id_)

        await eventually(is_ready)
        return id_

    async def start(self, container: str) -> pb.Container:
        return await self.containers.Start(pb.StartContainerRequest(container=container))

    async def stop(self, container: str, *, timeout_s: float | None = None, signal: str = "") -> pb.Container:
        request = pb.StopContainerRequest(container=container, signal=signal)
        if timeout_s is not None:
            request.timeout.FromNanoseconds(int(timeout_s * 1e9))
        return await self.containers.Stop(request)

    async def kill(self, container: str, signal: str = "") -> None:
        await self.containers.Kill(pb.KillContainerRequest(container=container, signal=signal))

    async def wait(
        self,
        container: str,
        condition: "pb.WaitContainerRequest.Condition.ValueType" = 0,  # type: ignore[assignment]
    ) -> types_pb2.ExitStatus:
        request = pb.WaitContainerRequest(container=container, condition=condition)
        return (await self.containers.Wait(request)).exit

    async def get(self, container: str) -> pb.Container:
        return await self.containers.Get(pb.GetContainerRequest(container=container))

    async def delete(self, container: str, *, force: bool = False, volumes: bool = False) -> pb.DeleteContainerResponse:
        request = pb.DeleteContainerRequest(container=container, force=force, volumes=volumes)
        return await self.containers.Delete(request)

    async def listed(self, *, everything: bool = True, **filters: str) -> "list[pb.Container]":
        values = {key: pb.FilterValues(values=[value]) for key, value in filters.items()}
        response = await self.containers.List(pb.ListContainersRequest(all=everything, filters=values))
        return list(response.containers)

    async def output(self, container: str) -> bytes:
        """All that its log holds now."""
        lines = []
        async for response in self.containers.Logs(tasks_pb2.LogsRequest(id=container)):
            lines += [entry.line for entry in response.entries]
        return b"".join(lines)

    async def says(self, *args: str, **options: object) -> tuple[int, bytes]:
        """Run to the end; returns exit code and output."""
        id_ = await self.run(*args, **options)
        status = await self.wait(id_)
        return status.code, await self.output(id_)

    async def exec(self, container: str, *args: str, **options: object) -> tuple[int, bytes]:
        """Run one more process to its end; returns exit code and output."""
        request = pb.ExecContainerRequest(container=container, args=args, **options)  # type: ignore[arg-type]
        made = await self.containers.Exec(request)
        async with self.attached(made.id, exec_id=made.exec_id) as call:
            start = pb.ExecStartRequest(container=made.id, exec_id=made.exec_id)
            await self.containers.ExecStart(start)
            output = await everything(call)
        wait = pb.ExecWaitRequest(container=made.id, exec_id=made.exec_id, remove=True)
        return (await self.containers.ExecWait(wait)).exit.code, output

    @asynccontextmanager
    async def attached(self, container: str, **header: object) -> AsyncIterator["grpc.aio.StreamStreamCall"]:
        """An attached stream, after its first answer. `stdin` is given as an async iterator of requests, if at all."""
        wanted = {"stdout": True, "stderr": True, "lossless": True} | header
        call = self.containers.Attach()
        first = tasks_pb2.AttachRequest(header=tasks_pb2.AttachHeader(id=container, **wanted))  # type: ignore[arg-type]
        await call.write(first)
        answer = await call.read()
        assert answer.HasField("attached")
        try:
            yield call
        finally:
            call.cancel()

    async def events(self, after: int = 0, topics: Sequence[str] = ()) -> list[types_pb2.Event]:
        """What the merged journal holds after a sequence number."""
        request = types_pb2.EventsRequest(after=after, no_follow=True, topics=topics)
        return [event async for response in self.system.Events(request) for event in response.events]

    async def topics_of(self, container: str, *, prefix: str = "container.") -> list[str]:
        """Of one container, in order."""
        return [e.topic for e in await self.events() if e.subject == container and e.topic.startswith(prefix)]

    async def last_seq(self) -> int:
        events = await self.events()
        return events[-1].seq if events else 0

    async def delete_all(self) -> None:
        """All that were made and are still there."""
        for id_ in self.made:
            with suppress(NotFound):
                await self.delete(id_, force=True, volumes=True)


async def everything(call: "grpc.aio.StreamStreamCall") -> bytes:
    """All output of an attached stream, to its end."""
    output = b""
    while isinstance(response := await call.read(), tasks_pb2.AttachResponse):
        output += response.stdout or response.stderr
    return output


async def import_image(daemon: Corrald, archive: Path) -> None:
    """Make the image of an archive known to a daemon."""

    async def parts() -> AsyncIterator[images_pb2.ImportRequest]:
        yield images_pb2.ImportRequest(header=images_pb2.ImportHeader())
        with archive.open("rb") as file:
            while data := file.read(CHUNK):
                yield images_pb2.ImportRequest(data=data)

    async with open_channel(daemon.address_of("images")) as channel:
        async for _ in images_pb2_grpc.ImagesStub(channel).Import(parts()):
            pass


@asynccontextmanager
async def engine_of(daemon: Corrald, *, namespace: str = "default") -> AsyncIterator[EngineClient]:
    """A client; what was made with it is deleted in the end."""
    async with open_channel(daemon.address_of("engine")) as channel:
        with in_namespace(namespace):
            client = EngineClient(daemon, channel)
            try:
                yield client
            finally:
                await client.delete_all()


async def eventually(check: "object", *, timeout_s: float = 20.0) -> None:
    """Until `check()` (a coroutine function) is true. Raises AssertionError when the time is over."""
    deadline = asyncio.get_running_loop().time() + timeout_s * PATIENCE
    while not await check():  # type: ignore[operator]
        assert asyncio.get_running_loop().time() < deadline, "it did not come true in time"
        await asyncio.sleep(0.02)


__all__ = ["EngineClient", "engine_of", "eventually", "everything", "import_image", "json", "os"]
