"""The server without gRPC's library is as one of the library's, to clients of the library and to ours."""

import asyncio
import errno
import os
import socket
import stat
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from support.peer import Peer

from corral.client.http2 import Connection, NobodyThereError
from corral.client.transport import BriefTransport, Transport
from corral.rpc.address import UnixAddress, beside
from corral.rpc.brief_connection import MOST_CALLS
from corral.rpc.context import current_namespace
from corral.rpc.errors import UNSERVED, NotFound, Unavailable, from_rpc_error
from corral.rpc.frames import DATA, GOAWAY, HEADERS, INITIAL_WINDOW, PING, PREFACE, SETTINGS, WINDOW, frame
from corral.rpc.hpack import Decoder, encode
from corral.rpc.server import Host

SERVICE = "corral.test.v1.Brief"
KINDS = (Transport, BriefTransport)
PATIENCE_S = 30


class Echo:
    """Answers with what it was asked."""

    name = "echo"

    def __init__(self) -> None:
        self.served = 0
        self.waits = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.released = asyncio.Event()

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        handlers = {
            "Echo": grpc.unary_unary_rpc_method_handler(self.echo),
            "Wait": grpc.unary_unary_rpc_method_handler(self.wait),
            "Fail": grpc.unary_unary_rpc_method_handler(self.fail),
            "GiveUp": grpc.unary_unary_rpc_method_handler(self.give_up),
            "Namespace": grpc.unary_unary_rpc_method_handler(self.namespace),
            "Large": grpc.unary_unary_rpc_method_handler(self.large),
            "Repeat": grpc.unary_stream_rpc_method_handler(self.repeat),
        }
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, handlers)])
        return [SERVICE]

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    async def echo(self, request: bytes, _context: object) -> bytes:
        self.served += 1
        if request.startswith(b"slow"):
            await asyncio.sleep(0.001)
        return request

    async def wait(self, request: bytes, _context: object) -> bytes:
        self.waits.set()
        try:
            await self.released.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return request

    async def fail(self, request: bytes, _context: object) -> bytes:
        raise NotFound("no such thing: ü%41\n", reason="NO_THING", metadata={"name": request.decode()})

    async def give_up(self, _request: bytes, _context: object) -> bytes:
        raise asyncio.CancelledError

    async def namespace(self, _request: bytes, _context: object) -> bytes:
        return current_namespace().encode()

    async def large(self, request: bytes, _context: object) -> bytes:
        return bytes(int.from_bytes(request))

    async def repeat(self, request: bytes, _context: object) -> AsyncIterator[bytes]:
        yield request


class Hosted:
    """A host, and threads to call it from."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.echo = Echo()
        self.host = Host([self.echo])
        self.pool = ThreadPoolExecutor(16)

    async def call[T](self, fn: Callable[..., T], *args: Any, **options: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.pool, lambda: fn(*args, **options))


@pytest_asyncio.fixture
async def hosted(tmp_path: Path) -> AsyncIterator[Hosted]:
    hosted = Hosted(tmp_path / "socket")
    await hosted.host.start([UnixAddress(hosted.path)])
    yield hosted
    hosted.echo.released.set()
    await hosted.host.stop(grace_s=1)
    hosted.pool.shutdown()


@pytest.fixture(params=["library", "ours"])
def method(request: pytest.FixtureRequest, hosted: Hosted) -> Iterator[Callable[[str], Any]]:
    """By name, of this server, as the library's client or ours calls it."""
    if request.param == "library":
        channel = grpc.insecure_channel(f"unix:{beside(str(hosted.path))}", [("grpc.max_receive_message_length", -1)])
    else:
        transport = Transport(f"unix://{hosted.path}", "default", None)
        channel = transport.channel

    def found(name: str) -> Any:
        return channel.unary_unary(f"/{SERVICE}/{name}", request_serializer=bytes, response_deserializer=bytes)

    yield found
    channel.close()


@pytest.mark.parametrize("length", [0, 1, 16379, 16384, 65530, 65531, 1 << 20, 5 << 20])
async def test_what_is_sent_comes_back(hosted: Hosted, method: Callable[[str], Any], length: int) -> None:
    sent = bytes(range(256)) * (length // 256) + b"x" * (length % 256)
    for _ in range(3):
        assert await hosted.call(method("Echo"), sent) == sent


async def test_calls_go_on_when_windows_are_used_up(hosted: Hosted, method: Callable[[str], Any]) -> None:
    for _ in range(60):
        assert await hosted.call(method("Echo"), b"x" * 60_000) == b"x" * 60_000


async def test_calls_are_made_side_by_side(hosted: Hosted, method: Callable[[str], Any]) -> None:
    sent = [b"slow%d" % number * 2000 for number in range(3 * MOST_CALLS)]
    assert await asyncio.gather(*(hosted.call(method("Echo"), each) for each in sent)) == sent


async def test_the_namespace_goes_along(hosted: Hosted, method: Callable[[str], Any]) -> None:
    assert await hosted.call(method("Namespace"), b"", metadata=(("corral-namespace", "blue"),)) == b"blue"
    with pytest.raises(grpc.RpcError) as caught:
        await hosted.call(method("Namespace"), b"", metadata=(("corral-namespace", "../blue"),))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_failure_is_told_with_all_that_belongs_to_it(hosted: Hosted, method: Callable[[str], Any]) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        await hosted.call(method("Fail"), b"this")
    error = caught.value
    assert (error.code(), error.details()) == (grpc.StatusCode.NOT_FOUND, "no such thing: ü%41\n")
    assert "grpc-status-details-bin" in dict(error.trailing_metadata())


async def test_what_is_not_served_here_is_unimplemented(hosted: Hosted, method: Callable[[str], Any]) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        await hosted.call(method("Nothing"), b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_who_gives_up_within_ends_the_call_and_may_have_done_something(
    hosted: Hosted, method: Callable[[str], Any]
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        await hosted.call(method("GiveUp"), b"")
    assert caught.value.code() is grpc.StatusCode.CANCELLED
    assert from_rpc_error(caught.value).reason != UNSERVED
    assert not any(connection._streams for connection in hosted.host._brief._connections)


async def test_a_deadline_ends_a_call(hosted: Hosted, method: Callable[[str], Any]) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        await hosted.call(method("Wait"), b"", timeout=0.2)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    async with asyncio.timeout(PATIENCE_S):
        await hosted.echo.cancelled.wait()


async def test_who_cancels_ends_what_was_begun(hosted: Hosted) -> None:
    with grpc.insecure_channel(f"unix:{beside(str(hosted.path))}") as channel:
        call = channel.unary_unary(f"/{SERVICE}/Wait").future(b"")
        async with asyncio.timeout(PATIENCE_S):
            await hosted.echo.waits.wait()
            call.cancel()
            await hosted.echo.cancelled.wait()
        assert await hosted.call(channel.unary_unary(f"/{SERVICE}/Echo"), b"x") == b"x"


async def test_who_hangs_up_ends_what_was_begun(hosted: Hosted) -> None:
    with grpc.insecure_channel(f"unix:{beside(str(hosted.path))}") as channel:
        call = channel.unary_unary(f"/{SERVICE}/Wait").future(b"")
        async with asyncio.timeout(PATIENCE_S):
            await hosted.echo.waits.wait()
        assert not call.done()
    async with asyncio.timeout(PATIENCE_S):
        await hosted.echo.cancelled.wait()


async def test_a_request_that_is_too_large_is_refused(hosted: Hosted) -> None:
    options = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(f"unix:{beside(str(hosted.path))}", options) as channel:
        echo = channel.unary_unary(f"/{SERVICE}/Echo")
        with pytest.raises(grpc.RpcError) as caught:
            await hosted.call(echo, bytes(17 << 20))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await hosted.call(echo, b"x") == b"x"


@pytest.mark.parametrize("kind", KINDS)
async def test_our_client_loads_no_library_for_it_and_does_without_it_where_there_is_none(
    hosted: Hosted, kind: type[Transport]
) -> None:
    with closing(kind(f"unix://{hosted.path}", "blue", None)) as transport:
        channel: Any = transport.channel
        namespace = channel.unary_unary(f"/{SERVICE}/Namespace", request_serializer=bytes, response_deserializer=bytes)
        assert await hosted.call(transport.unary, namespace, b"") == b"blue"
        assert channel._library is None
        assert [each.path for each in channel._idle] == [beside(str(hosted.path))]
        os.unlink(beside(str(hosted.path)))  # noqa: PTH108 - as Path, ruff takes it for slow
        channel._hang_up(for_good=True)
        assert await hosted.call(transport.unary, namespace, b"") == b"blue"
        assert [each.path for each in channel._idle] == ([str(hosted.path)] if kind is BriefTransport else [])


async def test_who_closes_it_ends_the_calls_of_other_threads(hosted: Hosted) -> None:
    transport = Transport(f"unix://{hosted.path}", "default", None)
    channel: Any = transport.channel
    functions = {"request_serializer": bytes, "response_deserializer": bytes}
    waiting = asyncio.ensure_future(hosted.call(channel.unary_unary(f"/{SERVICE}/Wait", **functions), b""))
    async with asyncio.timeout(PATIENCE_S):
        await hosted.echo.waits.wait()
        await hosted.call(transport.close)
        with pytest.raises(grpc.RpcError) as caught:
            await waiting
        await hosted.echo.cancelled.wait()
    assert caught.value.code() is grpc.StatusCode.CANCELLED
    assert (channel._library, channel._idle, channel._busy) == (None, [], set())
    for form, name in (("unary_unary", "Echo"), ("unary_stream", "Repeat")):
        with pytest.raises(ValueError, match="closed"):
            await hosted.call(
                lambda form=form, name=name: getattr(channel, form)(f"/{SERVICE}/{name}", **functions)(b"")
            )


async def test_a_fork_ends_no_calls_of_its_parent(hosted: Hosted) -> None:
    with closing(Transport(f"unix://{hosted.path}", "default", None)) as transport:
        channel: Any = transport.channel
        functions = {"request_serializer": bytes, "response_deserializer": bytes}
        waiting = asyncio.ensure_future(hosted.call(channel.unary_unary(f"/{SERVICE}/Wait", **functions), b"x"))
        async with asyncio.timeout(PATIENCE_S):
            await hosted.echo.waits.wait()
            [connection] = channel._busy
            connection._process = os.getppid()
            connection.interrupt()
            hosted.echo.released.set()
            assert await waiting == b"x"


async def test_a_socket_of_another_user_is_not_spoken_to(hosted: Hosted, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a directory of everybody's somebody could put one beside ours while there is none."""
    monkeypatch.setattr(Connection, "owner", lambda _: os.geteuid() + 1)
    with closing(Transport(f"unix://{hosted.path}", "default", None)) as transport:
        channel: Any = transport.channel
        echo = channel.unary_unary(f"/{SERVICE}/Echo", request_serializer=bytes, response_deserializer=bytes)
        assert await hosted.call(echo, b"x") == b"x"
        assert channel._library is not None


async def test_without_a_descriptor_it_is_the_library_that_tells(
    hosted: Hosted, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(*_: int) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("corral.client.http2._socket.socket", none_left)
    with pytest.raises(NobodyThereError):
        Connection(beside(str(hosted.path)))


async def test_a_stream_leaves_its_connections_for_later(hosted: Hosted) -> None:
    with closing(Transport(f"unix://{hosted.path}", "default", None)) as transport:
        channel: Any = transport.channel
        functions = {"request_serializer": bytes, "response_deserializer": bytes}
        echo = channel.unary_unary(f"/{SERVICE}/Echo", **functions)
        repeat = channel.unary_stream(f"/{SERVICE}/Repeat", **functions)
        await hosted.call(transport.unary, echo, b"x")
        [connection] = channel._idle
        assert await hosted.call(lambda: list(transport.stream(repeat, b"x"))) == [b"x"]
        await hosted.call(transport.unary, echo, b"x")
        assert channel._idle == [connection]


@pytest.mark.parametrize("pair", [("x-bin", b"\0\1"), ("Upper", "x"), ("x", "line\n")])
async def test_metadata_that_is_not_plain_is_the_librarys_business(hosted: Hosted, pair: tuple[str, Any]) -> None:
    with closing(Transport(f"unix://{hosted.path}", "default", None)) as transport:
        channel: Any = transport.channel
        echo = channel.unary_unary(f"/{SERVICE}/Echo", request_serializer=bytes, response_deserializer=bytes)
        if pair[0] == "x-bin":
            assert await hosted.call(echo, b"x", metadata=(pair,)) == b"x"
        else:
            with pytest.raises(grpc.RpcError, match=r"metadata was invalid|Invalid metadata"):
                await hosted.call(echo, b"x", metadata=(pair,))
        assert channel._library is not None


async def test_a_fork_has_a_connection_of_its_own(hosted: Hosted) -> None:
    with closing(Transport(f"unix://{hosted.path}", "default", None)) as transport:
        channel: Any = transport.channel
        echo = channel.unary_unary(f"/{SERVICE}/Echo", request_serializer=bytes, response_deserializer=bytes)
        await hosted.call(transport.unary, echo, b"x")
        [connection] = channel._idle
        assert connection.is_still_usable()
        connection._process = os.getppid()
        await hosted.call(transport.unary, echo, b"x")
        assert channel._idle[0] is not connection


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        PREFACE + frame(DATA, 0, 1, bytes(1 << 15)),
        PREFACE + frame(SETTINGS, 0, 0, b"") + frame(HEADERS, 4, 2, b""),
        PREFACE + frame(SETTINGS, 0, 0, b"") + frame(HEADERS, 4, 1, b"\xff\xff\xff\xff\xff\xff"),
        PREFACE + frame(SETTINGS, 0, 0, b"") + frame(HEADERS, 0, 1, b"") + frame(DATA, 0, 1, b""),
    ],
)
async def test_what_is_malformed_ends_that_connection_alone(hosted: Hosted, said: bytes) -> None:
    def talk() -> bytes:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(PATIENCE_S)
            connection.connect(beside(str(hosted.path)))
            connection.sendall(said)
            heard = b""
            while data := connection.recv(4096):
                heard += data
            return heard

    assert frame(GOAWAY, 0, 0, b"")[3:5] in await hosted.call(talk)
    with grpc.insecure_channel(f"unix:{beside(str(hosted.path))}") as channel:
        assert await hosted.call(channel.unary_unary(f"/{SERVICE}/Echo"), b"x") == b"x"


async def test_who_does_not_read_is_not_read_from(hosted: Hosted) -> None:
    def talk() -> int:
        with Peer(hosted.path, SERVICE) as peer:
            return peer.say_what_is_taken(frame(PING, 0, 0, bytes(16384)), 64 << 20)

    assert await hosted.call(talk) < 8 << 20


async def test_who_reads_late_is_answered_all(hosted: Hosted) -> None:
    pings = 200

    def talk() -> int:
        with Peer(hosted.path, SERVICE) as peer, ThreadPoolExecutor(1) as other:
            saying = other.submit(peer.say, frame(PING, 0, 0, bytes(16384)) * pings)
            with pytest.raises(TimeoutError):
                saying.result(timeout=1)
            for _ in range(pings):
                assert len(peer.hear(PING)[1]) == 16384
            saying.result()
            peer.ask("Echo", b"x")
            return peer.hear(DATA)[1][-1]

    assert await hosted.call(talk) == ord("x")


async def test_a_window_that_grows_by_bytes_costs_no_copy_of_the_rest(hosted: Hosted) -> None:
    with await hosted.call(Peer, hosted.path, SERVICE, (INITIAL_WINDOW, 1)) as peer:
        number = await hosted.call(peer.ask, "Large", (15 << 20).to_bytes(4))
        await hosted.call(peer.hear, DATA)
        [connection] = hosted.host._brief._connections
        stream = connection._streams[number]
        before = stream.unsent
        await hosted.call(peer.say, frame(WINDOW, 0, number, (1).to_bytes(4)))
        await hosted.call(peer.hear, DATA)
        assert (len(stream.unsent), stream.unsent.obj) == (len(before) - 1, before.obj)


async def test_what_was_begun_to_be_answered_is_not_to_be_asked_again(hosted: Hosted) -> None:
    with await hosted.call(Peer, hosted.path, SERVICE, (INITIAL_WINDOW, 10)) as peer:
        begun = await hosted.call(peer.ask, "Echo", bytes(100))
        await hosted.call(peer.hear, DATA)
        await hosted.call(peer.ask, "Wait", b"")
        await hosted.echo.waits.wait()
        [gate] = {each.gate for each in hosted.host._hosted}
        assert len(gate.answering) == 1
        await hosted.host._brief.leave(0, may_come_again=True)
        _, gone = await hosted.call(peer.hear, GOAWAY)
        assert int.from_bytes(gone[:4]) == begun


async def test_the_rest_of_an_answer_is_waited_for(hosted: Hosted) -> None:
    with await hosted.call(Peer, hosted.path, SERVICE, (INITIAL_WINDOW, 10)) as peer:
        stream = await hosted.call(peer.ask, "Echo", bytes(100))
        await hosted.call(peer.hear, DATA)
        [gate] = {each.gate for each in hosted.host._hosted}
        assert len(gate.answering) == 1
        draining = asyncio.ensure_future(gate.drain(1))
        await hosted.call(peer.say, frame(WINDOW, 0, stream, (1000).to_bytes(4)))
        _, rest = await hosted.call(peer.hear, DATA)
        assert len(rest) == 95
        async with asyncio.timeout(PATIENCE_S):
            await draining
        assert not gate.answering


@pytest.mark.parametrize("packed", [False, True])
async def test_header_fields_without_measure_are_refused(hosted: Hosted, packed: bool) -> None:
    def talk() -> tuple[int, bytes]:
        with Peer(hosted.path, SERVICE) as peer:
            peer.ask("Echo", b"x", *[(b"x", bytes(100))] * 5)
            peer.hear(DATA)
            if packed:  # an entry of 4000 bytes, by a byte each time
                entry = b"\x40\1x" + encode([(b"", b"y" * 4000)])[2:]
                block = entry + b"\xbe" * 10_000
                peer.say(frame(HEADERS, 5, 3, block))
            else:
                peer.ask("Echo", b"x", *[(b"x", bytes(100))] * 130)
            while b"grpc-status" not in (heard := peer.hear(HEADERS))[1] or heard[0] != 3:
                pass
            return heard

    _, fields = await hosted.call(talk)
    assert dict(Decoder().fields(fields))[b"grpc-status"] == b"8"


async def test_what_one_client_has_the_table_forget_is_not_forgotten_for_others() -> None:
    """A block that changes the decoder's table is decoded by each."""
    fields = Decoder()
    assert fields.fields(b"\x20\x3f\xe1\x1f" + encode([(b"a", b"b")])) == [(b"a", b"b")]
    assert not fields.has_learnt_nothing


async def test_a_long_path_is_not_looked_for_where_it_was_bound(tmp_path: Path) -> None:
    """What the descriptor of its directory was may be something else when it is served."""
    directory = tmp_path / ("d" * 110)
    directory.mkdir()
    hosted = Hosted(directory / "socket")
    bind = hosted.host._brief.bind
    others = []

    def bound(*args: Any) -> None:
        bind(*args)
        others.extend(open(os.devnull, "rb") for _ in range(20))  # noqa: SIM115

    hosted.host._brief.bind = bound  # type: ignore[method-assign]
    await hosted.host.start([UnixAddress(hosted.path)])
    with closing(Transport(f"unix://{hosted.path}", "default", None)) as transport:
        channel: Any = transport.channel
        echo = channel.unary_unary(f"/{SERVICE}/Echo", request_serializer=bytes, response_deserializer=bytes)
        assert await hosted.call(echo, b"x") == b"x"
        assert channel._library is None
    for each in others:
        each.close()
    await hosted.host.stop(grace_s=0)
    assert os.listdir(directory) == []  # noqa: PTH208 - likewise


async def test_what_could_not_be_put_in_its_place_is_not_left_behind(tmp_path: Path) -> None:
    hosted = Hosted(tmp_path / "socket")
    os.mkdir(beside(str(hosted.path)))  # noqa: PTH102 - likewise
    await hosted.host.start([UnixAddress(hosted.path)])
    assert sorted(os.listdir(tmp_path)) == ["socket", "socket.brief"]  # noqa: PTH208 - likewise
    with closing(Transport(f"unix://{hosted.path}", "default", None)) as transport:
        channel: Any = transport.channel
        echo = channel.unary_unary(f"/{SERVICE}/Echo", request_serializer=bytes, response_deserializer=bytes)
        assert await hosted.call(echo, b"x") == b"x"
    await hosted.host.stop(grace_s=0)


async def test_the_socket_is_as_the_other_and_goes_with_it(tmp_path: Path) -> None:
    host = Host([Echo()])
    path = str(tmp_path / "socket")
    await host.start([UnixAddress(Path(path))])
    assert [stat.filemode(os.stat(each).st_mode) for each in (path, beside(path))] == ["srw-rw----"] * 2  # noqa: PTH116 - likewise
    await host.stop(grace_s=0)
    assert os.listdir(tmp_path) == []  # noqa: PTH208 - likewise


async def test_a_call_that_an_upgrade_leaves_without_an_answer_is_made_again(tmp_path: Path) -> None:
    first, second = Hosted(tmp_path / "socket"), Hosted(tmp_path / "socket")
    await first.host.start([UnixAddress(first.path)])
    transport = Transport(f"unix://{first.path}", "default", None)
    functions = {"request_serializer": bytes, "response_deserializer": bytes}
    echo = transport.channel.unary_unary(f"/{SERVICE}/Echo", **functions)
    assert await first.call(transport.unary, echo, b"x") == b"x"
    for hosted in first.host._hosted:
        hosted.gate.shut(upgrading=True)
    calling = asyncio.ensure_future(first.call(transport.unary, echo, b"again"))
    [connection] = first.host._brief._connections
    async with asyncio.timeout(PATIENCE_S):
        while not connection.tasks():  # noqa: ASYNC110  # nobody tells
            await asyncio.sleep(0.001)
    places = first.host.make_places()
    await first.host.hand_over(places, grace_s=1)
    await second.host.start([UnixAddress(second.path)], waiting=list(places.values()))
    async with asyncio.timeout(PATIENCE_S):
        assert await calling == b"again"
    assert (first.echo.served, second.echo.served) == (1, 1)
    await first.call(transport.close)
    await second.host.stop(grace_s=0)


async def test_who_is_told_that_it_stops_is_told_so_by_our_client(hosted: Hosted) -> None:
    with closing(Transport(f"unix://{hosted.path}", "default", None)) as transport:
        wait = transport.channel.unary_unary(f"/{SERVICE}/Wait", request_serializer=bytes, response_deserializer=bytes)
        calling = asyncio.ensure_future(hosted.call(transport.unary, wait, b""))
        async with asyncio.timeout(PATIENCE_S):
            await hosted.echo.waits.wait()
            await hosted.host.stop(grace_s=0)
        with pytest.raises(Unavailable) as caught:
            await calling
        assert caught.value.reason == "STOPPING"
