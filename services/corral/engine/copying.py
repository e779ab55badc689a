"""Files of a container as a tar, in either direction: run by a process that goes where the container is.

See corral.oci.copying for what it does, and why it is a process of its own.
"""

import asyncio
import contextlib
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from corral.api.engine.v1 import engine_pb2 as pb
from corral.api.images.v1.images_pb2 import SnapshotRequest
from corral.api.tasks.v1.tasks_pb2 import GetTaskRequest, ImageMount
from corral.api.types.v1.types_pb2 import Mount
from corral.engine import image_mounts
from corral.engine.core import Core
from corral.engine.mounts import asked_binds
from corral.engine.records import ALIVE, ContainerRecord, Status
from corral.engine.task_making import TaskMaking, open_namespace_of
from corral.kernel.namespaces import Kind
from corral.oci import spec
from corral.rpc.errors import (
    CorralError,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)

_PROGRAM = "import sys; sys.path.insert(0, sys.argv[1]); from corral.oci.copying import main; main()"
_KINDS: Mapping[str, type[CorralError]] = {
    "not_found": NotFound,
    "failed_precondition": FailedPrecondition,
    "invalid_argument": InvalidArgument,
    "resource_exhausted": ResourceExhausted,
}
CHUNK_BYTES = 256 << 10
MAX_LINE_BYTES = 1 << 20

type Job = dict[str, object]


class Copying:
    """See the module."""

    def __init__(self, core: Core, task_making: TaskMaking) -> None:
        self._core = core
        self._task_making = task_making

    async def out(self, request: pb.CopyFromRequest) -> AsyncIterator[pb.CopyFromResponse]:
        """What a path is, then the tar of it. Raises NotFound, InvalidArgument."""
        record = self._core.resolve(request.container)
        job: Job = {
            "op": "out",
            "path": _checked(request.path),
            "follow": request.follow_link,
            "data": not request.stat_only,
        }
        async with self._at(record, job) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.close()
            line = await process.stdout.readline()
            if line:
                yield pb.CopyFromResponse(stat=_stat(json.loads(line)))
                while data := await process.stdout.read(CHUNK_BYTES):
                    yield pb.CopyFromResponse(data=data)
            await _finished(process, record)

    async def into(self, requests: AsyncIterator[pb.CopyToRequest]) -> None:
        """Put a tar into a directory. Raises NotFound, FailedPrecondition, InvalidArgument, ResourceExhausted."""
        first = await anext(aiter(requests), pb.CopyToRequest())
        if first.WhichOneof("part") != "header":
            raise InvalidArgument("the first message of CopyTo must be the header", reason="NO_HEADER")
        record = self._core.resolve(first.header.container)
        job: Job = {"op": "in", "path": _checked(first.header.path), "keep_ids": not first.header.as_root}
        async with self._at(record, job) as process:
            assert process.stdin is not None
            with contextlib.suppress(ConnectionError):  # it has refused, and says why
                async for request in requests:
                    process.stdin.write(request.data)
                    await process.stdin.drain()
            process.stdin.close()
            await _finished(process, record)

    @asynccontextmanager
    async def _at(self, record: ContainerRecord, job: Job) -> AsyncIterator[Process]:
        """The process, with its job. A container that does not run can't be started meanwhile."""
        key = (record.namespace, record.id)
        async with contextlib.AsyncExitStack() as stack:
            opened = stack.enter_context(ExitStack())
            where = await self._living(record, opened)
            if where is None:
                await stack.enter_async_context(self._core.locks.of(key))
                where = await self._living(record, opened) or await self._still(self._core.get(*key))
            fds = [fd for fd in (where.get("namespace"),) if isinstance(fd, int)]
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-I", "-S", "-c", _PROGRAM, _shim_root(),
                stdin=PIPE, stdout=PIPE, stderr=PIPE, pass_fds=fds, limit=MAX_LINE_BYTES,
            )  # fmt: skip
            try:
                assert process.stdin is not None
                process.stdin.write(json.dumps({**job, **where}).encode() + b"\n")
                yield process
            finally:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()

    async def _living(self, record: ContainerRecord, opened: ExitStack) -> Job | None:
        """The mount namespace of one that has a process."""
        now = self._core.get(record.namespace, record.id)
        if now.status not in ALIVE | {Status.CREATED}:
            return None
        try:
            task = await self._core.leaves.tasks.Get(GetTaskRequest(id=now.id))
            fd = open_namespace_of(task, Kind.MOUNT)
        except (NotFound, FailedPrecondition):  # it has just ended
            return None
        opened.callback(os.close, fd)
        return {"namespace": fd}

    async def _still(self, record: ContainerRecord) -> Job:
        """What the root of one without a process is made of."""
        mounts = (await self._core.leaves.snapshots.Mounts(SnapshotRequest(key=record.id))).mounts
        volumes = await self._task_making.ready_sources(record) if record.config.mounts else {}
        images = [
            *await image_mounts.mounted(self._core.leaves, record),
            *image_mounts.parts_of_volumes(record.config, volumes),
        ]
        return {
            "bundle": self._core.make_container_directory(record),
            "rootfs": [_mount(mount) for mount in mounts],
            "parts": [_mount(part) for mount in mounts for part in mount.parts],
            "binds": [_bind(mount) for mount in asked_binds(record.config, volumes)],
            "images": [_image(image) for image in images],
            "read_only": record.config.read_only_rootfs,
        }


def _checked(path: str) -> str:
    if not path or "\0" in path:
        raise InvalidArgument("path: an absolute path inside the container is missing", reason="BAD_PATH")
    return path


def _mount(mount: Mount) -> Job:
    return {"type": mount.type, "source": mount.source, "target": mount.target, "options": list(mount.options)}


def _image(image: ImageMount) -> Job:
    return {
        "target": image.target,
        "tree": _mount(image.tree),
        "subpath": image.subpath,
        "writable": image.writable,
    }


def _bind(mount: spec.Mount) -> Job:
    return {
        "type": mount.type,
        "source": mount.source,
        "target": mount.destination,
        "options": list(mount.options),
    }


def _stat(told: Mapping[str, Any]) -> pb.PathStat:
    seconds, nanos = divmod(int(told["mtime_ns"]), 1_000_000_000)
    return pb.PathStat(
        name=_text(told["name"]),
        size=told["size"],
        mode=told["mode"],
        mtime=Timestamp(seconds=seconds, nanos=nanos),
        link_target=_text(told["link_target"]),
    )


def _text(name: str) -> str:
    """A name that may hold any byte, on the wire."""
    return name.encode(errors="surrogateescape").decode(errors="replace")


async def _finished(process: Process, record: ContainerRecord) -> None:
    assert process.stderr is not None
    said = await process.stderr.read(MAX_LINE_BYTES)
    status = await process.wait()
    if status == 0:
        return
    try:
        answer = json.loads(said.splitlines()[-1])
    except (ValueError, IndexError):
        raise Internal(f"the process that copies ended with status {status}; try again") from None
    raise _KINDS.get(answer["error"], Internal)(f"container {record.name}: {answer['message']}", reason="COPY")


def _shim_root() -> str:
    """The source root that corral.oci lies in."""
    found = find_spec("corral.oci.copying")
    assert found is not None
    assert found.origin is not None
    return str(Path(found.origin).parents[2])
