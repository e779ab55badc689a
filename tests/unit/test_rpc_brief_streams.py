"""Calls with one request and many answers, without gRPC's library: to clients of the library and to ours."""

import asyncio
import gc
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from support.peer import Peer

from corral.client.http2 import Connection
from corral.client.transport import Transport
from corral.rpc.address import UnixAddress, beside
from corral.rpc.brief_connection import _Stream
from corral.rpc.context import only_follows
from corral.rpc.errors import UNSERVED, NotFound, Unavailable, from_rpc_error
from corral.rpc.frames import DATA, INITIAL_WINDOW, RESET, WINDOW, frame
from corral.rpc.server import Host

SERVICE = "corral.test.v1.Streams"
PATIENCE_S = 30
FUNCTIONS = {"request_serializer": bytes, "response_deserializer": bytes}


class Talker:
    """Says what it was asked, many times: COUNT LENGTH."""

    name = "talker"

    def __init__(self) -> None:
        self.said = 0
        self.calls = 0
        self.after_requests = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.held = asyncio.Event()
        self.left = asyncio.Event()

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        handlers = {
            "Talk": grpc.stream_stream_rpc_method_handler(self.talk),
            "Tell": grpc.unary_stream_rpc_method_handler(self.tell),
            "Gather": grpc.stream_unary_rpc_method_handler(self.gather),
            "Fail": grpc.stream_stream_rpc_method_handler(self.fail),
            "Wait": grpc.stream_stream_rpc_method_handler(self.wait),
            "Follow": grpc.unary_stream_rpc_method_handler(self.follow),
            "Think": grpc.stream_stream_rpc_method_handler(self.think),
            "Linger": grpc.stream_stream_rpc_method_handler(self.linger),
        }
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, handlers)])
        return [SERVICE]

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    async def talk(self, requests: AsyncIterator[bytes], context: Any) -> None:
        self.calls += 1
        request = await anext(aiter(requests))
        async for _ in requests:
            raise AssertionError
        self.after_requests.set()
        count, length = map(int, request.split())
        try:
            for number in range(count):
                await context.write(b"%d " % number + bytes(length))
                self.said += 1
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def tell(self, request: bytes, _context: object) -> AsyncIterator[bytes]:
        for number in range(int(request)):
            yield b"%d" % number

    async def gather(self, requests: AsyncIterator[bytes], _context: object) -> bytes:
        return b"".join([each async for each in requests])

    async def fail(self, requests: AsyncIterator[bytes], context: Any) -> None:
        for number in range(int(await anext(aiter(requests)))):
            await context.write(b"%d" % number)
        raise NotFound("no more: ü", reason="NO_MORE")

    async def wait(self, requests: AsyncIterator[bytes], context: Any) -> None:
        await context.write(await anext(aiter(requests)))
        try:
            await self.held.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        await context.write(b"end")

    async def follow(self, request: bytes, _context: object) -> AsyncIterator[bytes]:
        only_follows()
        self.calls += 1
        await self.held.wait()
        yield request

    async def think(self, requests: AsyncIterator[bytes], context: Any) -> None:
        self.calls += 1
        await self.held.wait()
        await context.write(await anext(aiter(requests)))

    async def linger(self, requests: AsyncIterator[bytes], context: Any) -> None:
        try:
            await self.talk(requests, context)
        except asyncio.CancelledError:
            with suppress(asyncio.CancelledError):
                await context.write(b"bye")
            self.left.set()


class Hosted:
    """A host, and threads to call it from."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.talker = Talker()
        self.host = Host([self.talker])
        self.pool = ThreadPoolExecutor(16)

    async def call[T](self, fn: Callable[..., T], *args: Any, **options: Any) -> T:
        async with asyncio.timeout(PATIENCE_S):
            return await asyncio.get_running_loop().run_in_executor(self.pool, lambda: fn(*args, **options))


@pytest_asyncio.fixture
async def hosted(tmp_path: Path) -> AsyncIterator[Hosted]:
    hosted = Hosted(tmp_path / "socket")
    await hosted.host.start([UnixAddress(hosted.path)])
    yield hosted
    hosted.talker.held.set()
    await hosted.host.stop(grace_s=1)
    hosted.pool.shutdown()


@pytest.fixture
def transport(hosted: Hosted) -> Iterator[Transport]:
    with closing(Transport(f"unix://{hosted.path}", "default", None)) as transport:
        yield transport


@pytest.fixture(params=["library", "ours"])
def ask(request: pytest.FixtureRequest, hosted: Hosted, transport: Transport) -> Iterator[Callable[[str, bytes], Any]]:
    """Asks a method of this server, by name, with one request."""
    if request.param == "ours":
        yield lambda name, data: transport.channel.stream_stream(f"/{SERVICE}/{name}", **FUNCTIONS)(iter((data,)))
        library: Any = transport.channel
        assert library._library is None
        return
    options = [("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(f"unix:{beside(str(hosted.path))}", options) as channel:
        yield lambda name, data: channel.stream_stream(f"/{SERVICE}/{name}", **FUNCTIONS)(iter((data,)))


@pytest.mark.parametrize(("count", "length"), [(0, 0), (1, 0), (1000, 10), (100, 16384), (30, 300_000), (2, 5 << 20)])
async def test_all_answers_come_in_order(
    hosted: Hosted, ask: Callable[[str, bytes], Any], count: int, length: int
) -> None:
    for _ in range(2):
        answers = await hosted.call(lambda: list(ask("Talk", b"%d %d" % (count, length))))
        assert [int(each.split(b" ")[0]) for each in answers] == list(range(count))
        assert all(len(each.split(b" ", 1)[1]) == length for each in answers)
    assert hosted.talker.calls == 2


async def test_a_method_with_one_request_may_have_many_answers(
    hosted: Hosted, ask: Callable[[str, bytes], Any]
) -> None:
    assert await hosted.call(lambda: list(ask("Tell", b"3"))) == [b"0", b"1", b"2"]
    assert await hosted.call(lambda: list(ask("Tell", b"0"))) == []
    assert await hosted.call(lambda: list(ask("Gather", b"all"))) == [b"all"]


@pytest.mark.parametrize("count", [0, 3])
async def test_a_failure_comes_after_what_was_said(
    hosted: Hosted, ask: Callable[[str, bytes], Any], count: int
) -> None:
    answers = iter(await hosted.call(ask, "Fail", b"%d" % count))
    assert [await hosted.call(next, answers) for _ in range(count)] == [b"%d" % number for number in range(count)]
    with pytest.raises(grpc.RpcError) as caught:
        await hosted.call(list, answers)
    error = caught.value
    assert (error.code(), error.details()) == (grpc.StatusCode.NOT_FOUND, "no more: ü")
    assert "grpc-status-details-bin" in dict(error.trailing_metadata())


async def test_who_reads_slowly_holds_who_speaks(hosted: Hosted, ask: Callable[[str, bytes], Any]) -> None:
    call = await hosted.call(ask, "Talk", b"1000 65536")
    answers = await hosted.call(iter, call)
    assert (await hosted.call(next, answers)).startswith(b"0 ")
    said = -1
    async with asyncio.timeout(PATIENCE_S):
        while said != hosted.talker.said:
            said = hosted.talker.said
            await asyncio.sleep(0.2)
    assert said < 900
    rest = await hosted.call(list, answers)
    assert len(rest) == 999


async def test_who_cancels_ends_what_was_begun(hosted: Hosted, ask: Callable[[str, bytes], Any]) -> None:
    call = await hosted.call(ask, "Wait", b"x")
    answers = await hosted.call(iter, call)
    assert await hosted.call(next, answers) == b"x"
    await hosted.call(call.cancel)
    async with asyncio.timeout(PATIENCE_S):
        await hosted.talker.cancelled.wait()
    with pytest.raises(grpc.RpcError):
        await hosted.call(list, answers)


async def test_who_is_held_and_cancelled_says_no_more(hosted: Hosted, ask: Callable[[str, bytes], Any]) -> None:
    call = await hosted.call(ask, "Talk", b"1000 65536")
    answers = await hosted.call(iter, call)
    await hosted.call(next, answers)
    await hosted.call(call.cancel)
    async with asyncio.timeout(PATIENCE_S):
        await hosted.talker.cancelled.wait()
        while any(each._streams for each in hosted.host._brief._connections):  # noqa: ASYNC110  # nobody tells
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("hangs_up", [False, True])
async def test_who_is_held_and_lingers_is_not_held_for_good(hosted: Hosted, hangs_up: bool) -> None:
    with await hosted.call(Peer, hosted.path, SERVICE, (INITIAL_WINDOW, 10)) as peer:
        stream = await hosted.call(peer.ask, "Linger", b"2 100")
        await hosted.call(peer.hear, DATA)
        if not hangs_up:
            await hosted.call(peer.say, frame(RESET, 0, stream, (8).to_bytes(4)))
            async with asyncio.timeout(PATIENCE_S):
                await hosted.talker.left.wait()
    async with asyncio.timeout(PATIENCE_S):
        await hosted.talker.left.wait()


async def test_who_speaks_much_lets_others_speak(hosted: Hosted) -> None:
    def talk() -> Counter[int]:
        with Peer(hosted.path, SERVICE, (INITIAL_WINDOW, 0x7FFFFFFF)) as peer:
            peer.say(frame(WINDOW, 0, 0, (1 << 30).to_bytes(4)))
            for _ in range(3):
                peer.ask("Talk", b"1000 200000")
            return Counter(peer.hear(DATA)[0] for _ in range(1000))

    heard = await hosted.call(talk)
    assert len(heard) == 3
    assert min(heard.values()) > 200


async def test_a_call_that_is_over_leaves_nothing_behind(hosted: Hosted, transport: Transport) -> None:
    method = transport.channel.stream_stream(f"/{SERVICE}/Talk", **FUNCTIONS)
    gc.collect()
    gc.disable()
    try:
        assert len(await hosted.call(lambda: list(transport.ask(method, b"3 1")))) == 3
        assert not [each for each in gc.get_objects() if type(each) is _Stream]
    finally:
        gc.enable()


async def test_who_cancels_too_late_ends_no_other_call(
    hosted: Hosted, transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancels, goes_on = threading.Event(), threading.Event()
    interrupt = Connection.interrupt

    def slowly(connection: Connection) -> None:
        cancels.set()
        assert goes_on.wait(PATIENCE_S)
        interrupt(connection)

    monkeypatch.setattr(Connection, "interrupt", slowly)
    method = transport.channel.stream_stream(f"/{SERVICE}/Wait", **FUNCTIONS)
    call: Any = await hosted.call(method, iter((b"x",)))
    answers = iter(call)
    assert await hosted.call(next, answers) == b"x"
    cancelling = asyncio.ensure_future(hosted.call(call.cancel))
    assert await hosted.call(cancels.wait, PATIENCE_S)
    hosted.talker.held.set()
    assert await hosted.call(list, answers) == [b"end"]
    hosted.talker.held.clear()
    others = iter(await hosted.call(method, iter((b"y",))))
    assert await hosted.call(next, others) == b"y"
    goes_on.set()
    await cancelling
    hosted.talker.held.set()
    assert await hosted.call(list, others) == [b"end"]


async def test_who_cancels_what_is_being_made_again_ends_that(
    hosted: Hosted, transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel: Any = transport.channel
    call = await hosted.call(channel.stream_stream(f"/{SERVICE}/Think", **FUNCTIONS), iter((b"x",)))
    opens = channel._open_library

    def cancelled_meanwhile() -> grpc.Channel:
        call.cancel()
        return opens()

    monkeypatch.setattr(channel, "_open_library", cancelled_meanwhile)
    answers = asyncio.ensure_future(hosted.call(list, call))
    async with asyncio.timeout(PATIENCE_S):
        while not hosted.talker.calls:  # noqa: ASYNC110  # nobody tells
            await asyncio.sleep(0.001)
    await hosted.host._brief.leave(0, may_come_again=True)
    with pytest.raises(grpc.RpcError) as caught:
        await answers
    assert caught.value.code() is grpc.StatusCode.CANCELLED


async def test_a_failure_is_not_its_own_cause(hosted: Hosted, transport: Transport) -> None:
    method = transport.channel.stream_stream(f"/{SERVICE}/Fail", **FUNCTIONS)
    with pytest.raises(grpc.RpcError) as caught:
        await hosted.call(lambda: list(method(iter((b"1",)))))
    assert caught.value.__cause__ is None


async def test_who_has_more_to_say_is_told_at_once(hosted: Hosted) -> None:
    """And not when it has said all, as it may wait for an answer."""
    said = threading.Event()

    def requests() -> Iterator[bytes]:
        yield b"1 1"
        yield b"2 2"
        said.wait(PATIENCE_S)

    with grpc.insecure_channel(f"unix:{beside(str(hosted.path))}") as channel:
        call = channel.stream_stream(f"/{SERVICE}/Talk", **FUNCTIONS)(requests())
        with pytest.raises(grpc.RpcError) as caught:
            await hosted.call(list, call)
        said.set()
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert hosted.talker.calls == 0


async def test_who_wants_no_answers_ends_the_call(hosted: Hosted, transport: Transport) -> None:
    method = transport.channel.stream_stream(f"/{SERVICE}/Wait", **FUNCTIONS)
    channel: Any = transport.channel
    await hosted.call(lambda: bool(transport.ask(method, b"x")))
    gc.collect()
    async with asyncio.timeout(PATIENCE_S):
        await hosted.talker.cancelled.wait()
    assert not channel._busy


async def test_who_takes_no_more_answers_ends_the_call(hosted: Hosted, transport: Transport) -> None:
    method = transport.channel.stream_stream(f"/{SERVICE}/Wait", **FUNCTIONS)

    def first() -> bytes:
        for answer in transport.ask(method, b"x"):
            return answer
        raise AssertionError

    assert await hosted.call(first) == b"x"
    async with asyncio.timeout(PATIENCE_S):
        await hosted.talker.cancelled.wait()


async def test_a_connection_serves_for_the_next_call(hosted: Hosted, transport: Transport) -> None:
    method = transport.channel.stream_stream(f"/{SERVICE}/Talk", **FUNCTIONS)
    for _ in range(3):
        assert len(await hosted.call(lambda: list(transport.ask(method, b"3 1")))) == 3
        assert len(hosted.host._brief._connections) == 1


async def test_conversations_are_for_the_library(hosted: Hosted, transport: Transport) -> None:
    method = transport.channel.stream_stream(f"/{SERVICE}/Gather", **FUNCTIONS)
    assert await hosted.call(lambda: list(transport.exchange(method, iter((b"a", b"b"))))) == [b"ab"]
    assert not hosted.host._brief._connections


async def test_who_closes_the_client_ends_them(hosted: Hosted, transport: Transport) -> None:
    method = transport.channel.stream_stream(f"/{SERVICE}/Wait", **FUNCTIONS)
    call: Any = await hosted.call(method, iter((b"x",)))
    answers = iter(call)
    assert await hosted.call(next, answers) == b"x"
    waiting = asyncio.ensure_future(hosted.call(list, answers))
    await asyncio.sleep(0.05)
    await hosted.call(transport.close)
    with pytest.raises(grpc.RpcError) as caught:
        await waiting
    assert caught.value.code() is grpc.StatusCode.CANCELLED
    async with asyncio.timeout(PATIENCE_S):
        await hosted.talker.cancelled.wait()


async def test_a_call_that_an_upgrade_does_not_begin_is_made_again(tmp_path: Path) -> None:
    first, second = Hosted(tmp_path / "socket"), Hosted(tmp_path / "socket")
    await first.host.start([UnixAddress(first.path)])
    transport = Transport(f"unix://{first.path}", "default", None)
    talk = transport.channel.stream_stream(f"/{SERVICE}/Talk", **FUNCTIONS)
    assert len(await first.call(lambda: list(transport.ask(talk, b"2 1")))) == 2
    for hosted in first.host._hosted:
        hosted.gate.shut(upgrading=True)
    calling = asyncio.ensure_future(first.call(lambda: list(transport.ask(talk, b"3 1"))))
    [connection] = first.host._brief._connections
    async with asyncio.timeout(PATIENCE_S):
        while not connection.tasks():  # noqa: ASYNC110  # nobody tells
            await asyncio.sleep(0.001)
    places = first.host.make_places()
    await first.host.hand_over(places, grace_s=1)
    await second.host.start([UnixAddress(second.path)], waiting=list(places.values()))
    assert len(await calling) == 3
    assert (first.talker.calls, second.talker.calls) == (1, 1)
    await first.call(transport.close)
    await second.host.stop(grace_s=0)


async def test_who_follows_while_it_is_upgraded_is_told_so(tmp_path: Path) -> None:
    """A client of the library's that is sent away while nobody is to be found there waits for good."""
    hosted = Hosted(tmp_path / "socket")
    await hosted.host.start([UnixAddress(hosted.path)])
    with grpc.insecure_channel(f"unix:{beside(str(hosted.path))}") as channel:
        call = channel.unary_stream(f"/{SERVICE}/Follow", **FUNCTIONS)(b"x")
        answers = asyncio.ensure_future(hosted.call(list, call))
        async with asyncio.timeout(PATIENCE_S):
            while not hosted.talker.calls:  # noqa: ASYNC110  # nobody tells
                await asyncio.sleep(0.001)
        places = hosted.host.make_places()
        await hosted.host.hand_over(places, grace_s=1)
        with pytest.raises(grpc.RpcError) as caught:
            await answers
    assert from_rpc_error(caught.value).reason == UNSERVED
    for place in places.values():
        place.close()


async def test_one_that_an_upgrade_cuts_off_is_told_so_and_not_made_again(tmp_path: Path) -> None:
    first, second = Hosted(tmp_path / "socket"), Hosted(tmp_path / "socket")
    await first.host.start([UnixAddress(first.path)])
    transport = Transport(f"unix://{first.path}", "default", None)
    wait = transport.channel.stream_stream(f"/{SERVICE}/Wait", **FUNCTIONS)
    answers = iter(await first.call(transport.ask, wait, b"x"))
    assert await first.call(next, answers) == b"x"
    rest = asyncio.ensure_future(first.call(list, answers))
    places = first.host.make_places()
    await first.host.hand_over(places, grace_s=0)
    await second.host.start([UnixAddress(second.path)], waiting=list(places.values()))
    with pytest.raises(Unavailable) as caught:
        await rest
    assert caught.value.reason == "CUT_OFF"
    assert second.talker.calls == 0
    await first.call(transport.close)
    await second.host.stop(grace_s=0)
