"""A host that hands over to the program that follows: what callers are told, and what is there meanwhile."""

import asyncio
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import grpc
import grpc.aio
import pytest

from corral.rpc import errors
from corral.rpc.address import UnixAddress
from corral.rpc.context import only_follows
from corral.rpc.handover import Latecomers, connected, hidden, make_waiting
from corral.rpc.server import Host, Upgrade, serve


class Slow:
    """One call, which takes as long as it is told to; so does its stop."""

    def __init__(self, name: str = "slow", *, starts_s: float = 0, stops_s: float = 0) -> None:
        self.name, self.starts_s, self.stops_s = name, starts_s, stops_s
        self.entered = asyncio.Event()
        self.follows_after_s: float | None = None

    @property
    def full_name(self) -> str:
        return f"corral.test.v1.{self.name.title()}"

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        handlers = {"Take": grpc.unary_stream_rpc_method_handler(self.take)}
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(self.full_name, handlers)])
        return [self.full_name]

    async def start(self) -> None:
        await asyncio.sleep(self.starts_s)

    async def stop(self) -> None:
        await asyncio.sleep(self.stops_s)

    async def take(self, request: bytes, _context: object) -> AsyncIterator[bytes]:
        self.entered.set()
        if self.follows_after_s is not None:
            await asyncio.sleep(self.follows_after_s)
            only_follows()
        await asyncio.sleep(float(request))
        yield b"done"


@pytest.fixture
def directory() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="corral-test-"))
    yield path
    shutil.rmtree(path)


def there(directory: Path) -> list[Path]:
    return [*directory.iterdir()]


async def refusal(channel: grpc.aio.Channel, service: Slow, seconds: float) -> str:
    """Why the call was not answered."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in channel.unary_stream(f"/{service.full_name}/Take")(str(seconds).encode()):
            pass
    return errors.from_rpc_error(caught.value).reason


async def handed_over(host: Host, grace_s: float) -> None:
    """To nobody."""
    places = host.make_places()
    await host.hand_over(places, grace_s=grace_s)
    for place in places.values():
        place.close()


async def followed(host: Host, grace_s: float, *services: Slow) -> Host:
    """By another one at the same address."""
    places = host.make_places()
    await host.hand_over(places, grace_s=grace_s)
    [path] = places
    successor = Host(services)
    await successor.start([UnixAddress(path)], waiting=tuple(places.values()))
    return successor


async def test_a_call_that_outlasts_the_grace_is_told_that_it_was_an_upgrade_however_slow_the_others_stop(
    directory: Path,
) -> None:
    leaf, composer = Slow("leaf"), Slow("composer", stops_s=0.8)
    host = Host([leaf, composer])
    [address] = await host.start([UnixAddress(directory / "s")])
    async with grpc.aio.insecure_channel(str(address)) as channel:
        call = asyncio.ensure_future(refusal(channel, leaf, 30))
        await leaf.entered.wait()
        await handed_over(host, 0.2)
        assert await call == "CUT_OFF"


@pytest.mark.parametrize("follows_after_s", [0, 0.3], ids=["before", "after"])
async def test_a_call_that_follows_and_was_told_nothing_goes_on_at_the_successor(
    directory: Path, follows_after_s: float
) -> None:
    """It may begin to follow only when its service was told to stop."""
    service, successor = Slow(), Slow()
    service.follows_after_s = follows_after_s
    host = Host([service])
    [address] = await host.start([UnixAddress(directory / "s")])
    async with asyncio.timeout(20), grpc.aio.insecure_channel(str(address)) as channel:
        call = asyncio.ensure_future(answered(channel, service, 1))
        await service.entered.wait()
        host = await followed(host, 20, successor)
        assert await call == b"done"
        assert successor.entered.is_set()
    await host.stop(grace_s=0)


async def test_who_does_without_retries_is_told_that_it_may_call_again(directory: Path) -> None:
    service = Slow()
    service.follows_after_s = 0
    host = Host([service])
    [address] = await host.start([UnixAddress(directory / "s")])
    async with asyncio.timeout(20), grpc.aio.insecure_channel(str(address), [("grpc.enable_retries", 0)]) as channel:
        call = asyncio.ensure_future(refusal(channel, service, 30))
        await service.entered.wait()
        await handed_over(host, 20)
        assert await call == errors.UNSERVED


@pytest.fixture
def waiting(directory: Path) -> Iterator[socket.socket]:
    """As the program before has left it, for the address `s`."""
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(directory / "s"))
        waiting = make_waiting(directory / "s")
        hidden(directory / "s").rename(directory / "s")
    with waiting:
        yield waiting


async def test_who_may_not_connect_to_the_socket_may_not_to_the_one_of_latecomers(
    directory: Path, waiting: socket.socket
) -> None:
    host = Host([Slow()])
    await host.start([UnixAddress(directory / "s")], waiting=[waiting])
    late = directory / ".s.late"
    async with asyncio.timeout(5):
        while not late.exists():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert late.stat().st_mode & 0o777 == 0o600
    await host.stop(grace_s=0)


async def test_who_is_asked_to_stop_in_the_middle_of_a_hand_over_stops(directory: Path) -> None:
    service, stop, ready = Slow(), asyncio.Event(), asyncio.Event()
    begun: list[bool] = []
    upgrade = Upgrade(5, lambda: begun.append(True), lambda e: None, wanted=True)
    address = UnixAddress(directory / "s")
    serving = asyncio.ensure_future(
        serve([service], addresses=[address], stop=stop, grace_s=0, upgrade=upgrade, on_ready=lambda _: ready.set())
    )
    await ready.wait()
    async with asyncio.timeout(20), grpc.aio.insecure_channel(str(address)) as channel:
        call = asyncio.ensure_future(answered(channel, service, 1))
        await service.entered.wait()
        stop.set()
        while not begun:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        upgrade.wanted = False
        assert await call == b"done"
        assert await serving is None
    assert not there(directory)


async def answered(channel: grpc.aio.Channel, service: Slow, seconds: float) -> bytes:
    return b"".join([each async for each in channel.unary_stream(f"/{service.full_name}/Take")(str(seconds).encode())])


async def test_nobody_is_refused_while_an_upgrade_waits_for_a_call_that_takes_its_time(directory: Path) -> None:
    service = Slow()
    host = Host([service])
    [address] = await host.start([UnixAddress(directory / "s")])
    async with asyncio.timeout(20), grpc.aio.insecure_channel(str(address)) as channel:
        slow = asyncio.ensure_future(answered(channel, service, 1))
        await service.entered.wait()
        leaving = asyncio.ensure_future(followed(host, 10, service))
        while not leaving.done():
            assert await answered(channel, service, 0) == b"done"
            async with grpc.aio.insecure_channel(str(address), [("grpc.use_local_subchannel_pool", 1)]) as new:
                assert await answered(new, service, 0) == b"done"
            await asyncio.wait((leaving,), timeout=0.1)
        assert await slow == b"done"
    await (await leaving).stop(grace_s=0)


async def test_who_has_come_while_others_were_waited_for_is_answered(directory: Path) -> None:
    service = Slow()
    host = Host([service])
    [address] = await host.start([UnixAddress(directory / "s")])
    async with asyncio.timeout(20), grpc.aio.insecure_channel(str(address)) as channel:
        overdue = asyncio.ensure_future(refusal(channel, service, 30))
        await service.entered.wait()
        leaving = asyncio.ensure_future(handed_over(host, 0.5))
        await asyncio.sleep(0.3)
        assert await answered(channel, service, 0.5) == b"done"
        assert await overdue == "CUT_OFF"
        await leaving


async def test_what_a_server_has_answered_before_it_hung_up_is_passed_on_although_it_was_told_more(
    directory: Path, waiting: socket.socket
) -> None:
    name, answer = str(directory / "server"), b"answer" * 50_000
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.setblocking(False)
        listening.bind(name)
        listening.listen()
        latecomers = Latecomers((waiting,), lambda: connected(socket.AF_UNIX, name))
        async with asyncio.timeout(10):
            client = await connected(socket.AF_UNIX, str(directory / "s"))
            server, _ = await loop.sock_accept(listening)
        with client, server:
            answering = asyncio.create_task(loop.sock_sendall(server, answer))
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            await asyncio.sleep(0.05)  # until no more fits into what lies between
            server.shutdown(socket.SHUT_RD)
            await loop.sock_sendall(client, b"more")
            await asyncio.sleep(0.05)
            received = b""
            async with asyncio.timeout(10):
                while len(received) < len(answer):
                    received += await loop.sock_recv(client, 64 << 10)
                await answering
        assert received == answer
    await latecomers.close()
