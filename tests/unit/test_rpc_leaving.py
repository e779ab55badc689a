"""What clients that are not ours are told by a server that leaves: an answer, or UNAVAILABLE if it was not begun."""

import asyncio
import collections
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import grpc
import grpc.aio
import pytest

from corral.rpc.address import TcpAddress, UnixAddress
from corral.rpc.server import Host

METHOD = "/corral.test.v1.Doing/Do"
CLIENTS, AT_ONCE = 4, 25


class Doing:
    """What it was asked to do, it has done before it answers; some of it takes its time."""

    name = "doing"

    def __init__(self) -> None:
        self.done: set[bytes] = set()

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        handlers = {"Do": grpc.unary_unary_rpc_method_handler(self.do)}
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("corral.test.v1.Doing", handlers)])
        return ["corral.test.v1.Doing"]

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    async def do(self, request: bytes, _context: object) -> bytes:
        self.done.add(request)
        await asyncio.sleep(0.002 * (request[-1] % 4))
        return request * 1000


class Client(threading.Thread):
    """Makes many calls at a time, by one connection, until it is told to leave."""

    def __init__(self, number: int, target: str) -> None:
        super().__init__()
        self.number, self.target = number, target
        self.answers: dict[bytes, grpc.StatusCode] = {}
        self.details: dict[bytes, str] = {}
        self.leave = threading.Event()

    def run(self) -> None:
        options = [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(self.target, options) as channel:
            do = channel.unary_unary(METHOD)
            turn = 0
            while not self.leave.is_set():
                requests = [b"%d-%d-%d" % (self.number, turn, n) for n in range(AT_ONCE)]
                futures = [do.future(request, timeout=20) for request in requests]
                for request, future in zip(requests, futures, strict=True):
                    self.answers[request] = future.code()
                    self.details[request] = future.details()
                turn += 1


@pytest.fixture
def directory() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="corral-test-"))
    yield path
    shutil.rmtree(path)


async def hand_over(host: Host) -> None:
    places = host.make_places()
    await host.hand_over(places, grace_s=5)
    for place in places.values():
        place.close()


async def stop(host: Host) -> None:
    await host.stop(grace_s=5)


@pytest.mark.parametrize("leave", [hand_over, stop])
@pytest.mark.parametrize("kind", ["unix", "tcp"])
async def test_what_was_begun_is_answered_and_nothing_else_was_begun(
    directory: Path, leave: Callable[[Host], "asyncio.Future[None]"], kind: str
) -> None:
    service = Doing()
    host = Host([service])
    [address] = await host.start([UnixAddress(directory / "s") if kind == "unix" else TcpAddress("127.0.0.1", 0)])
    clients = [Client(n, str(address).replace("unix://", "unix:").removeprefix("tcp://")) for n in range(CLIENTS)]
    for client in clients:
        client.start()
    try:
        while len(service.done) < 200:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await leave(host)
    finally:
        for client in clients:
            client.leave.set()
        for client in clients:
            await asyncio.to_thread(client.join)
    answers = {request: code for client in clients for request, code in client.answers.items()}
    details = {request: said for client in clients for request, said in client.details.items()}
    answered = {request for request, code in answers.items() if code is grpc.StatusCode.OK}
    wrong = {
        request: (code, details[request])
        for request, code in answers.items()
        if code not in (grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE)
    }
    assert not wrong
    assert collections.Counter(details[r] for r in service.done - answered) == {}
