"""Talking to the tasks leaf of a corrald: specs, a root file system, and an asyncio client that speaks of tasks."""

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import corral.shim
from corral.api.tasks.v1 import tasks_pb2 as pb
from corral.api.tasks.v1 import tasks_pb2_grpc
from corral.api.types.v1 import types_pb2 as types_pb
from corral.rpc.channel import open_channel
from support.corrald import Corrald

APPLETS = (
    *("cat", "chmod", "dd", "echo", "env", "false", "head", "id", "kill", "ls", "md5sum", "mkdir", "ps", "pwd"),
    *("seq", "sh", "sleep", "sort", "stty", "tail", "test", "touch", "tr", "true", "usleep", "wc", "yes"),
)
NAMESPACES = ("pid", "mount", "ipc", "uts", "network")
DEVICES = {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]}
MOUNTS = (
    {"destination": "/proc", "type": "proc", "source": "proc"},
    DEVICES,
    {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["newinstance", "ptmxmode=0666"]},
)


def make_rootfs(path: Path) -> Path:
    """A root directory with busybox's usual commands."""
    for name in ("bin", "dev", "etc", "proc", "root", "sys", "tmp"):
        (path / name).mkdir(parents=True)
    binary = shutil.which("busybox")
    assert binary is not None
    shutil.copy(binary, path / "bin/busybox")
    for name in APPLETS:
        (path / "bin" / name).symlink_to("busybox")
    (path / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000::/tmp:/bin/sh\n")
    (path / "etc/group").write_text("root:x:0:\napp:x:1000:\n")
    (path / "bin/notexecutable").write_text("#!/bin/sh\n")
    return path


def spec(*args: str, terminal: bool = False, env: Sequence[str] = (), namespaces: Sequence[str] = NAMESPACES) -> bytes:
    """A config.json that runs args."""
    document = {
        "ociVersion": "1.2.0",
        "process": {
            "terminal": terminal,
            "user": {"uid": 0, "gid": 0},
            "args": list(args),
            "env": ["PATH=/bin", *env],
            "cwd": "/",
        },
        "root": {"path": "rootfs"},
        "hostname": "corral-test",
        "mounts": MOUNTS,
        "linux": {"namespaces": [{"type": name} for name in namespaces]},
    }
    return json.dumps(document).encode()


@dataclass
class TaskClient:
    """Calls of the leaf, shortened."""

    daemon: Corrald
    rootfs: Path
    stub: "tasks_pb2_grpc.TasksAsyncStub"
    created: list[str] = field(default_factory=list)

    async def create(self, *args: str, task_id: str = "", terminal: bool = False, **options: object) -> str:
        """A task that waits for start; returns its id."""
        task_id = task_id or f"t{os.urandom(5).hex()}"
        options = {"spec": spec(*args, terminal=terminal), **options}
        mounts = [types_pb.Mount(type="bind", source=str(self.rootfs), options=["rbind"])]
        await self.stub.Create(pb.CreateTaskRequest(id=task_id, rootfs=mounts, **options))  # type: ignore[arg-type]
        self.created.append(task_id)
        return task_id

    async def run(self, *args: str, **options: object) -> str:
        """A task that was started; returns its id."""
        task_id = await self.create(*args, **options)  # type: ignore[arg-type]
        await self.start(task_id)
        return task_id

    async def start(self, task_id: str, exec_id: str = "") -> int:
        return (await self.stub.Start(pb.StartRequest(id=task_id, exec_id=exec_id))).pid

    async def wait(self, task_id: str, exec_id: str = "") -> types_pb.ExitStatus:
        return (await self.stub.Wait(pb.WaitRequest(id=task_id, exec_id=exec_id))).exit

    async def kill(self, task_id: str, signal: int, exec_id: str = "", *, everything: bool = False) -> None:
        await self.stub.Kill(pb.KillRequest(id=task_id, exec_id=exec_id, signal=signal, all=everything))

    async def get(self, task_id: str) -> pb.Task:
        return await self.stub.Get(pb.GetTaskRequest(id=task_id))

    async def delete(self, task_id: str, *, force: bool = False, must_exist: bool = False) -> pb.DeleteTaskResponse:
        return await self.stub.Delete(pb.DeleteTaskRequest(id=task_id, force=force, must_exist=must_exist))

    async def exec(self, task_id: str, exec_id: str, *args: str, terminal: bool = False, **options: object) -> None:
        process = {"args": list(args), "terminal": terminal}
        await self.stub.Exec(
            pb.ExecRequest(id=task_id, exec_id=exec_id, process=json.dumps(process).encode(), **options)  # type: ignore[arg-type]
        )

    async def logs(self, task_id: str, **options: object) -> list[pb.LogEntry]:
        responses = self.stub.Logs(pb.LogsRequest(id=task_id, **options))  # type: ignore[arg-type]
        return [entry async for response in responses for entry in response.entries]

    async def events(self, task_id: str = "") -> list[types_pb.Event]:
        """All that there are of a task."""
        request = types_pb.EventsRequest(no_follow=True, subjects=[task_id] if task_id else [])
        return [event async for response in self.stub.Events(request) for event in response.events]

    async def topics(self, task_id: str) -> list[str]:
        return [event.topic for event in await self.events(task_id)]

    @asynccontextmanager
    async def attached(self, task_id: str, exec_id: str = "", **options: object) -> AsyncIterator["Attached"]:
        """A client of a process's streams, once it is attached."""
        call = self.stub.Attach()
        await call.write(pb.AttachRequest(header=pb.AttachHeader(id=task_id, exec_id=exec_id, **options)))  # type: ignore[arg-type]
        first = await call.read()
        assert first.HasField("attached"), first
        try:
            yield Attached(call, first.attached.terminal)
        finally:
            call.cancel()


@dataclass
class Attached:
    """An Attach call."""

    call: object
    terminal: bool
    stdout: bytearray = field(default_factory=bytearray)
    stderr: bytearray = field(default_factory=bytearray)

    async def send(self, data: bytes) -> None:
        await self.call.write(pb.AttachRequest(stdin=data))  # type: ignore[attr-defined]

    async def resize(self, width: int, height: int) -> None:
        size = types_pb.WindowSize(width=width, height=height)
        await self.call.write(pb.AttachRequest(resize=size))  # type: ignore[attr-defined]

    async def end_stdin(self) -> None:
        await self.call.done_writing()  # type: ignore[attr-defined]

    async def read_until(self, text: bytes) -> None:
        """Collect output until stdout holds a text."""
        while text not in self.stdout:
            assert await self.read_one() is None, bytes(self.stdout)

    async def read_one(self) -> types_pb.ExitStatus | None:
        """Collect one message; the exit, if it was that."""
        message = await self.call.read()  # type: ignore[attr-defined]
        self.stdout += message.stdout
        self.stderr += message.stderr
        return message.exited if message.HasField("exited") else None

    async def drain(self) -> types_pb.ExitStatus:
        """Collect everything; returns the exit, after which nothing may come."""
        while (how := await self.read_one()) is None:
            pass
        import grpc.aio

        assert await self.call.read() is grpc.aio.EOF, "something came after the exit"  # type: ignore[attr-defined]
        return how


@asynccontextmanager
async def beside_older_shims(
    directory: Path, rootfs: Path, changed: Mapping[str, tuple[str, str]]
) -> AsyncIterator[TaskClient]:
    """A client of a leaf whose shims are as they once were: of these files the first text was the second one."""
    source = Path(next(iter(corral.shim.__path__)))
    shutil.copytree(source.parents[1], directory / "shim")
    for name, (now, once) in changed.items():
        text = (source / name).read_text()
        assert text.count(now) == 1, name
        (directory / "shim/corral/shim" / name).write_text(text.replace(now, once))
    with Corrald(services=("tasks",), environment={"PYTHONPATH": str(directory / "shim")}) as daemon:
        daemon.start()
        async with task_client(daemon, rootfs) as client:
            yield client


@asynccontextmanager
async def task_client(daemon: Corrald, rootfs: Path) -> AsyncIterator[TaskClient]:
    """A client that deletes what it created."""
    async with open_channel(daemon.address_of("tasks")) as channel:
        client = TaskClient(daemon, rootfs, tasks_pb2_grpc.TasksStub(channel))  # type: ignore[arg-type]
        try:
            yield client
        finally:
            async with asyncio.timeout(60):
                for task_id in client.created:
                    await client.delete(task_id, force=True)
