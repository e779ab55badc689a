"""What clients that are not ours are told by a server that leaves: an answer, or UNAVAILABLE if it was not begun."""

import asyncio
import collections
import fcntl
import resource
import shutil
import socket
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import grpc
import grpc.aio
import pytest

from corral.images.store import uninterrupted
from corral.rpc.address import TcpAddress, UnixAddress
from corral.rpc.farewell import AWAY_WITHIN_S, GOAWAY, READ_WITHIN_S, cut
from corral.rpc.handover import close_unclaimed, take_back
from corral.rpc.server import Host

METHOD = "/corral.test.v1.Doing/Do"
CLIENTS, AT_ONCE = 4, 25


class Doing:
    """What it was asked to do, it has done before it answers; some of it takes its time."""

    name = "doing"

    def __init__(self) -> None:
        self.done: collections.Counter[bytes] = collections.Counter()

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        handlers = {"Do": grpc.unary_unary_rpc_method_handler(self.do)}
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("corral.test.v1.Doing", handlers)])
        return ["corral.test.v1.Doing"]

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    async def do(self, request: bytes, _context: object) -> bytes:
        self.done[request] += 1
        await asyncio.sleep(0.002 * (request[-1] % 4))
        return request * 1000


class Client(threading.Thread):
    """Makes many calls at a time, by one connection, until it is told to leave."""

    def __init__(self, number: int, target: str, *, retries: bool = False) -> None:
        super().__init__()
        self.number, self.target, self.retries = number, target, retries
        self.answers: dict[bytes, grpc.StatusCode] = {}
        self.details: dict[bytes, str] = {}
        self.leave = threading.Event()

    def run(self) -> None:
        options = [("grpc.enable_retries", int(self.retries)), ("grpc.use_local_subchannel_pool", 1)]
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


async def hand_over(host: Host, *, grace_s: float = 5) -> None:
    places = host.make_places()
    await host.hand_over(places, grace_s=grace_s)
    for place in places.values():
        place.close()
    take_back()
    close_unclaimed()  # those at ports


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
    assert collections.Counter(details[r] for r in service.done.keys() - answered) == {}


async def test_who_uses_grpc_as_it_comes_sees_nothing_of_one_server_after_the_other(directory: Path) -> None:
    """Each call is answered, and each was begun once."""
    service = Doing()
    address = UnixAddress(directory / "s")
    host = Host([service])
    await host.start([address])
    clients = [Client(n, f"unix:{address.path}", retries=True) for n in range(CLIENTS)]
    for client in clients:
        client.start()
    try:
        for _ in range(5):
            before = [len(client.answers) for client in clients]
            # A client repeats a call for being sent away but once: all are to be served before the next time.
            while any(len(c.answers) < n + 2 * AT_ONCE for c, n in zip(clients, before, strict=True)):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            places = host.make_places()
            await host.hand_over(places, grace_s=5)
            host = Host([service])
            await host.start([address], waiting=tuple(places.values()))
    finally:
        for client in clients:
            client.leave.set()
        for client in clients:
            await asyncio.to_thread(client.join)
        await host.stop(grace_s=5)
    answers = collections.Counter(
        (code, client.details[request]) for client in clients for request, code in client.answers.items()
    )
    assert {code for code, _ in answers} == {grpc.StatusCode.OK}, answers
    assert set(service.done.values()) == {1}


class Stubborn(Doing):
    """It does what it was asked to, to the end, whoever gives up waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.may_end = asyncio.Event()

    async def do(self, request: bytes, _context: object) -> bytes:
        self.done[request] += 1
        await uninterrupted(self.may_end.wait())
        return request


async def test_a_call_that_goes_on_when_the_next_server_comes_is_not_made_again(directory: Path) -> None:
    service = Stubborn()
    address = UnixAddress(directory / "s")
    host = Host([service])
    await host.start([address])
    async with grpc.aio.insecure_channel(f"unix:{address.path}") as channel:
        call = channel.unary_unary(METHOD)(b"once", timeout=20)
        while not service.done:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        places = host.make_places()
        await host.hand_over(places, grace_s=0.1)
        host = Host([service])
        await host.start([address], waiting=tuple(places.values()))
        try:
            assert await call.code() is grpc.StatusCode.UNAVAILABLE
            service.may_end.set()
            assert await channel.unary_unary(METHOD)(b"another", timeout=20, wait_for_ready=True) == b"another"
        finally:
            service.may_end.set()
            await host.stop(grace_s=5)
    assert service.done == {b"once": 1, b"another": 1}


BIG = 15_000_000
FRAME_HEADER = 9


class Telling:
    """Much, for as long as one listens."""

    name = "telling"

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        handlers = {"Tell": grpc.unary_stream_rpc_method_handler(self.tell)}
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("corral.test.v1.Telling", handlers)])
        return ["corral.test.v1.Telling"]

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    async def tell(self, _request: bytes, _context: object) -> AsyncIterator[bytes]:
        while True:
            yield b"x" * BIG


class Stalled(threading.Thread):
    """Between a client and a server; what the server says is not read from some byte on until it may go on."""

    def __init__(self, listen: Path, to: Path) -> None:
        super().__init__()
        self.got = bytearray()
        self.stalls, self.goes_on = threading.Event(), threading.Event()
        self.listening, self.server = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        self.listening.bind(str(listen))
        self.listening.listen()
        self.to = to

    def run(self) -> None:
        self.server.connect(str(self.to))
        with self.listening, self.server, self.listening.accept()[0] as client:
            back = threading.Thread(target=self.say, args=(client,))
            back.start()
            with suppress(OSError):
                while data := self.server.recv(1 << 20):
                    self.got += data
                    client.sendall(data)
                    if len(self.got) > BIG // 10 and not self.stalls.is_set():
                        self.stalls.set()
                        self.goes_on.wait()
                    if self.stalls.is_set():
                        self.goes_on.wait(0.002)
            client.shutdown(socket.SHUT_RDWR)
            back.join()

    def say(self, client: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(1 << 16):
                self.server.sendall(data)


def listen(path: Path) -> None:
    """Until the connection ends, taking frames as large as they may be."""
    options = [
        ("grpc.max_receive_message_length", -1),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.http2.lookahead_bytes", 8 << 20),
        ("grpc.http2.max_frame_size", 1 << 20),
    ]
    with grpc.insecure_channel(f"unix:{path}", options) as channel, suppress(grpc.RpcError):
        for _ in channel.unary_stream("/corral.test.v1.Telling/Tell")(b"", timeout=20):
            pass


def frames(data: bytes) -> list[tuple[int, int]]:
    """Type and length of each; the last may be cut short. Source: RFC 9113, 4.1."""
    found, at = [], 0
    while at + FRAME_HEADER <= len(data):
        length = int.from_bytes(data[at : at + 3])
        found.append((data[at + 3], length))
        at += FRAME_HEADER + length
    return found


@pytest.mark.parametrize("goes_on_after_s", [0.15, 0.2, 0.25])
async def test_who_reads_slowly_gets_whole_frames_until_the_connection_ends(
    directory: Path, goes_on_after_s: float
) -> None:
    host = Host([Telling()])
    await host.start([UnixAddress(directory / "s")])
    stalled = Stalled(directory / "r", directory / "s")
    listening = threading.Thread(target=listen, args=(directory / "r",))
    stalled.start()
    listening.start()
    try:
        await asyncio.to_thread(stalled.stalls.wait, 20)
        asyncio.get_running_loop().call_later(goes_on_after_s, stalled.goes_on.set)
        await hand_over(host, grace_s=0.1)
    finally:
        stalled.goes_on.set()
        await asyncio.to_thread(listening.join)
        await asyncio.to_thread(stalled.join)
    kinds = collections.Counter(kind for kind, _ in frames(stalled.got))
    assert set(kinds) <= set(range(10)), kinds
    assert max(length for _, length in frames(stalled.got)) <= 4 << 20


async def test_who_does_not_read_keeps_nobody_from_the_next_server_for_long(directory: Path) -> None:
    host = Host([Telling()])
    await host.start([UnixAddress(directory / "s")])
    stalled = Stalled(directory / "r", directory / "s")
    listening = threading.Thread(target=listen, args=(directory / "r",))
    stalled.start()
    listening.start()
    try:
        await asyncio.to_thread(stalled.stalls.wait, 20)
        began = asyncio.get_running_loop().time()
        await hand_over(host, grace_s=0.1)
        assert asyncio.get_running_loop().time() - began < AWAY_WITHIN_S
    finally:
        stalled.goes_on.set()
        await asyncio.to_thread(listening.join)
        await asyncio.to_thread(stalled.join)


async def test_who_has_read_that_he_is_sent_away_may_take_his_time_to_hang_up(directory: Path) -> None:
    """As on a busy machine, where he has another call on his lips."""
    loop = asyncio.get_running_loop()
    host = Host([Doing()])
    await host.start([UnixAddress(directory / "s")])
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as client:
        client.connect(str(directory / "s"))
        client.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
        got = await loop.sock_recv(client, 1 << 16)  # it is served
        leaving = asyncio.ensure_future(hand_over(host))
        while GOAWAY not in got:
            more = await loop.sock_recv(client, 1 << 16)
            assert more
            got += more
        await asyncio.sleep(2 * READ_WITHIN_S)
        client.send(bytes([0, 0, 8, 6, 0, 0, 0, 0, 0, *b"anything"]))  # a ping; EPIPE once it is cut off
    await leaving


async def test_to_look_for_connections_ends_no_lock_on_a_file_and_needs_no_descriptor(directory: Path) -> None:
    """fcntl(2): a process that closes any descriptor of a file loses its locks on it."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    host = Host([Doing()])
    await host.start([UnixAddress(directory / "s")])
    with ExitStack() as held, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(directory / "s"))
        locked = held.enter_context((directory / "file").open("w"))
        fcntl.lockf(locked, fcntl.LOCK_EX)
        lock = f":{(directory / 'file').stat().st_ino} "
        await asyncio.sleep(0.2)  # until it has been accepted
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (400, limits[1]))
            with suppress(OSError):
                while True:
                    held.enter_context(socket.socket())
            await cut([str(directory / ".s.new")])
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        client.settimeout(5)
        while client.recv(1 << 16):
            pass
        with open("/proc/locks") as locks:  # noqa: ASYNC230
            assert lock in locks.read()
    await host.stop(grace_s=0)
