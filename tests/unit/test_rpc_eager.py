"""Calls of other processes begin at once."""

import asyncio
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from corral.rpc import eager
from corral.rpc.address import UnixAddress
from corral.rpc.eager import begin_calls_at_once
from corral.rpc.server import hosted

NAME = "corral.test.v1.Plain"


class Plain:
    """One method, which says what it is told."""

    name = "plain"

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        handlers = {"One": grpc.unary_unary_rpc_method_handler(self.one)}
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(NAME, handlers)])
        return [NAME]

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def one(self, request: bytes, context: object) -> bytes:
        return request


async def test_each_task_that_grpc_makes_for_a_call_begins_when_it_is_made(tmp_path: Path) -> None:
    """Should this fail with a new version of gRPC, its tasks have other names."""
    loop, begun = asyncio.get_running_loop(), set()
    async with hosted([Plain()], UnixAddress(tmp_path / "s")) as address:
        make = loop.get_task_factory()
        assert make is not None

        def noted(loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any], **options: Any) -> Any:
            begun.add(coro.__qualname__)
            return make(loop, coro, **options)

        loop.set_task_factory(noted)
        async with grpc.aio.insecure_channel(f"unix:{address.path}") as channel:  # type: ignore[union-attr]
            assert await channel.unary_unary(f"/{NAME}/One")(b"hear") == b"hear"
    assert begun >= eager._GRPCS


async def test_a_task_of_ones_own_begins_as_ever() -> None:
    begin_calls_at_once(asyncio.get_running_loop())
    begun: list[str] = []

    async def own() -> None:
        begun.append("own")

    task = asyncio.create_task(own(), name="mine")
    assert not begun
    await task
    assert (begun, task.get_name()) == (["own"], "mine")


async def test_who_makes_the_tasks_of_a_loop_already_goes_on_to() -> None:
    loop = asyncio.get_running_loop()

    def other(loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any], **options: Any) -> Any:
        return asyncio.Task(coro, loop=loop, **options)

    loop.set_task_factory(other)
    begin_calls_at_once(loop)
    assert loop.get_task_factory() is other
