"""More processes in a container. tasks keeps them; the engine says which container and as whom."""

import asyncio
import json
from collections.abc import Sequence
from contextlib import suppress

import structlog

from corral.api.engine.v1.engine_pb2 import ExecContainerRequest
from corral.api.tasks.v1 import tasks_pb2
from corral.api.types.v1.types_pb2 import ExitStatus, WindowSize
from corral.engine import secrets
from corral.engine.core import Core, require_alive
from corral.engine.naming import random_id
from corral.engine.records import ContainerRecord, Status
from corral.engine.requests import ROOT
from corral.engine.resolve import lay_env
from corral.engine.spec import process_for_exec
from corral.oci.decode import encode
from corral.rpc.blocking import run_blocking
from corral.rpc.context import check_id
from corral.rpc.errors import CorralError, FailedPrecondition, InvalidArgument, Unavailable

log = structlog.get_logger()

RETRY_S = 0.2


class Execs:
    """See the module."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def make(self, request: ExecContainerRequest) -> tuple[ContainerRecord, str]:
        """Register a process; returns its container and its id. Raises FailedPrecondition unless it runs."""
        record, message = await self.planned(request)
        try:
            await self._core.leaves.tasks.Exec(message)
        except asyncio.CancelledError:
            if not request.exec_id:  # which nobody was told
                self.forget_soon(record, message.exec_id)
            raise
        return record, message.exec_id

    async def planned(self, request: ExecContainerRequest) -> tuple[ContainerRecord, tasks_pb2.ExecRequest]:
        """In which container, and what tasks has to be told. Raises FailedPrecondition unless it runs."""
        record = self._running(request.container)
        if not request.args or not request.args[0]:
            raise InvalidArgument("there is nothing to run: give a command", reason="NO_COMMAND")
        message = tasks_pb2.ExecRequest(
            id=record.id,
            exec_id=check_id(request.exec_id, "exec id") if request.exec_id else random_id(),
            process=await self._process(record, request),
            user=request.user or record.config.user or ROOT,
            stdin=request.stdin,
            console_size=request.console_size if request.HasField("console_size") else None,
        )
        return record, message

    async def probe(self, record: ContainerRecord, args: Sequence[str]) -> tasks_pb2.ProbeRequest:
        """What to run in it as whom, with all that is the container's; the rest is the caller's to say."""
        process = await self._process(record, ExecContainerRequest(args=args))
        return tasks_pb2.ProbeRequest(id=record.id, process=process, user=record.config.user or ROOT)

    async def _process(self, record: ContainerRecord, request: ExecContainerRequest) -> bytes:
        secret_env = await self._secret_env(record) if record.config.secrets else {}
        process = process_for_exec(
            record.config,
            self._core.host,
            args=tuple(request.args),
            env=lay_env((f"{name}={value}" for name, value in secret_env.items()), request.env),
            working_dir=request.working_dir,
            terminal=request.terminal,
            privileged=request.privileged,
        )
        return json.dumps(encode(process), separators=(",", ":")).encode()

    def forget_soon(self, record: ContainerRecord, exec_id: str) -> None:
        """Unless it runs. Nobody waits for that."""
        forget = tasks_pb2.DeleteExecRequest(id=record.id, exec_id=exec_id)
        self._core.background.spawn(self._forgotten(forget))

    async def _forgotten(self, request: tasks_pb2.DeleteExecRequest) -> None:
        with suppress(CorralError):
            await self._core.leaves.tasks.DeleteExec(request)

    async def _secret_env(self, record: ContainerRecord) -> dict[str, str]:
        _, env = await run_blocking(lambda: secrets.of_container(self._core, record, env_only=True))
        return env

    def _running(self, reference: str) -> ContainerRecord:
        record = self._core.resolve(reference)
        if record.status is Status.PAUSED:
            raise FailedPrecondition(
                f"container {record.name} is paused: resume it before running something in it", reason="PAUSED"
            )
        require_alive(record, "entered")
        return record

    async def start(self, reference: str, exec_id: str) -> int:
        """Run a registered process; returns its pid as the host counts. Raises as tasks.Start."""
        record = self._running(reference)
        request = tasks_pb2.StartRequest(id=record.id, exec_id=check_id(exec_id, "exec id"))
        return (await self._core.leaves.tasks.Start(request)).pid

    async def wait(self, reference: str, exec_id: str, *, remove: bool) -> ExitStatus:
        """How it ended, once it has; with remove it is forgotten then. The end is told also where that fails: if it was
        forgotten after all, nobody else could tell it."""
        record = self._core.resolve(reference)
        request = tasks_pb2.WaitRequest(id=record.id, exec_id=check_id(exec_id, "exec id"))
        while True:
            try:
                status = (await self._core.leaves.tasks.Wait(request)).exit
                break
            except Unavailable:
                await asyncio.sleep(RETRY_S)
        if remove:
            try:
                await self._core.leaves.tasks.DeleteExec(tasks_pb2.DeleteExecRequest(id=record.id, exec_id=exec_id))
            except CorralError as e:
                log.warning("exec.not_removed", container_id=record.id, exec_id=exec_id, error=str(e))
        return status

    async def resize(self, reference: str, exec_id: str, size: WindowSize) -> None:
        """Tell a terminal its new size."""
        record = self._core.resolve(reference)
        require_alive(record, "resized")
        await self._core.leaves.tasks.Resize(tasks_pb2.ResizeRequest(id=record.id, exec_id=exec_id, size=size))
