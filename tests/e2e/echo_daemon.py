"""corrald with a small service of its own, for tests of the daemon alone. It journals, forwards and takes its time."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio

from corral.daemon import table
from corral.daemon.main import main
from corral.rpc.channel import Channels
from corral.rpc.context import current_namespace, only_follows
from corral.rpc.errors import FailedPrecondition
from corral.store import Database


@dataclass(frozen=True, slots=True)
class EchoConfig:
    root: Path
    state: Path
    addresses: Mapping[str, str] = field(default_factory=dict)
    greeting: str = "hello"
    start_s: float = 0.0
    fail: bool = False
    forward_to: str = ""


class EchoService:
    """Say returns a greeting and journals it; Follow never ends; a composer forwards Say."""

    def __init__(self, config: EchoConfig) -> None:
        self._config = config
        self.name = "composer" if config.forward_to else "echo"
        self._full_name = f"corral.test.v1.{self.name.title()}"

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        handlers = {
            "Say": grpc.unary_unary_rpc_method_handler(self._say),
            "Follow": grpc.unary_stream_rpc_method_handler(self._follow),
            "Block": grpc.unary_unary_rpc_method_handler(self._block),
        }
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(self._full_name, handlers)])
        return [self._full_name]

    async def start(self) -> None:
        self._db = Database(self._config.root / "echo.db", [], durable=False)
        self._channels = Channels()
        await asyncio.sleep(self._config.start_s)
        if self._config.fail:
            raise FailedPrecondition("echo has no voice: give it one")
        if self._config.forward_to:
            await self._forward(b"started")

    async def stop(self) -> None:
        await self._channels.close()
        self._db.close()
        (self._config.root / f"{self.name}-stopped").write_text(str(os.getpid()))

    async def _forward(self, request: bytes) -> bytes:
        address = self._config.addresses[self._config.forward_to]
        say = self._channels.get(address).unary_unary("/corral.test.v1.Echo/Say")
        answer: bytes = await say(request, wait_for_ready=True)
        return answer

    async def _say(self, request: bytes, context: object) -> bytes:
        if self._config.forward_to:
            return b"via composer: " + await self._forward(request)
        namespace = current_namespace()
        await self._db.write(lambda tx: tx.journal("echo.said", request.decode(), namespace=namespace))
        count = self._db.journal.last_seq()
        return f"{self._config.greeting} {request.decode()} in {namespace}, number {count}".encode()

    async def _follow(self, request: bytes, context: object) -> AsyncIterator[bytes]:
        only_follows()
        async for event in self._db.journal.follow(0):
            yield event.subject.encode()

    async def _block(self, request: bytes, context: object) -> bytes:
        import time

        time.sleep(float(request))  # noqa: ASYNC251  # what no service may do
        return b""


if __name__ == "__main__":
    table.TABLE.clear()
    table.TABLE["echo"] = table.Entry("__main__:EchoService", "__main__:EchoConfig")
    table.TABLE["composer"] = table.Entry("__main__:EchoService", "__main__:EchoConfig")
    table.TABLE["absent"] = table.Entry("corral.absent.service:AbsentService", "corral.absent.config:AbsentConfig")
    sys.exit(main())
