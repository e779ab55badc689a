"""Real servers and channels over unix sockets, one method of each kind of call."""

import asyncio
import contextvars
import gc
import shutil
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from corral.rpc import context, errors
from corral.rpc.address import TcpAddress, UnixAddress
from corral.rpc.blocking import MAX_THREADS, run_blocking
from corral.rpc.channel import Channels, open_channel
from corral.rpc.server import Host, hosted, serve

NAME = "corral.test.v1.Echo"
SLOW_S = 30


class Echo:
    """A service whose messages are raw bytes; `hook` is what each method does first."""

    def __init__(self, name: str = "echo", full_name: str = NAME) -> None:
        self.name = name
        self.full_name = full_name
        self.hook = self.nothing
        self.log: list[str] = []
        self.starting: asyncio.Event | None = None
        self.fail_start = False

    async def nothing(self, request: bytes) -> None:
        """The default hook."""

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        handlers = {
            "One": grpc.unary_unary_rpc_method_handler(self.one),
            "Many": grpc.unary_stream_rpc_method_handler(self.many),
            "Fill": grpc.unary_stream_rpc_method_handler(self._fill),
            "Written": grpc.unary_stream_rpc_method_handler(self.written),
            "Sum": grpc.stream_unary_rpc_method_handler(self.sum),
            "Both": grpc.stream_stream_rpc_method_handler(self.both),
            "Talk": grpc.stream_stream_rpc_method_handler(self._talk),
        }
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(self.full_name, handlers)])
        return [self.full_name]

    async def start(self) -> None:
        self.log.append("start")
        if self.starting is not None:
            await self.starting.wait()
        if self.fail_start:
            raise errors.FailedPrecondition("no good")

    async def stop(self) -> None:
        self.log.append("stop")

    async def one(self, request: bytes, context_: grpc.aio.ServicerContext) -> bytes:
        self.peer = context_.peer()
        await self.hook(request)
        return b"%s/%s" % (context.current_namespace().encode(), context.current_request_id().encode())

    async def many(self, request: bytes, context_: object) -> AsyncIterator[bytes]:
        try:
            yield request
            await self.hook(request)
            yield context.current_namespace().encode()
        finally:
            self.log.append("many ended")

    async def _fill(self, request: bytes, context_: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        async for item in self.fill(request, context_):
            yield item

    async def written(self, request: bytes, context_: grpc.aio.ServicerContext) -> None:
        await context_.write(request)
        await self.hook(request)

    async def sum(self, requests: AsyncIterator[bytes], context_: object) -> bytes:
        total = b"".join([request async for request in requests])
        await self.hook(total)
        return total

    async def both(self, requests: AsyncIterator[bytes], context_: object) -> AsyncIterator[bytes]:
        async for request in requests:
            await self.hook(request)
            yield request

    async def _talk(self, requests: AsyncIterator[bytes], context_: grpc.aio.ServicerContext) -> None:
        await self.talk(requests, context_)


def stub(channel: grpc.aio.Channel, full_name: str = NAME) -> SimpleNamespace:
    return SimpleNamespace(
        one=channel.unary_unary(f"/{full_name}/One"),
        many=channel.unary_stream(f"/{full_name}/Many"),
        fill=channel.unary_stream(f"/{full_name}/Fill"),
        written=channel.unary_stream(f"/{full_name}/Written"),
        sum=channel.stream_unary(f"/{full_name}/Sum"),
        both=channel.stream_stream(f"/{full_name}/Both"),
        talk=channel.stream_stream(f"/{full_name}/Talk"),
        missing=channel.unary_unary(f"/{full_name}/Missing"),
    )


async def stream(*items: bytes) -> AsyncIterator[bytes]:
    for item in items:
        yield item


@pytest.fixture(params=["wire", "local"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Unary calls within a process do not take the wire, and nobody may be able to tell."""
    if request.param == "wire":
        monkeypatch.setattr("corral.rpc.local.find", lambda address, method: None)
    return request.param


@pytest.fixture
def directory():
    path = Path(tempfile.mkdtemp(prefix="corral-rpc-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
async def echo(directory: Path):
    service = Echo()
    async with hosted([service], UnixAddress(directory / "s")) as address, open_channel(str(address)) as channel:
        service.stub = stub(channel)
        service.address = str(address)
        service.channel = channel
        yield service


async def test_all_four_kinds_of_call_carry_messages(echo: Echo):
    assert await echo.stub.one(b"x") != b""
    assert [m async for m in echo.stub.many(b"x")] == [b"x", b"default"]
    assert [m async for m in echo.stub.written(b"x")] == [b"x"]
    assert await echo.stub.sum(stream(b"a", b"b")) == b"ab"
    assert [m async for m in echo.stub.both(stream(b"a", b"b"))] == [b"a", b"b"]


async def test_streams_can_also_be_read_and_written_message_by_message(echo: Echo):
    call = echo.stub.both()
    await call.write(b"a")
    assert await call.read() == b"a"
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF


async def test_who_writes_to_a_conversation_that_failed_is_not_held_up(echo: Echo):
    async def refuse(request: bytes) -> None:
        raise errors.NotFound("gone")

    echo.hook = refuse
    call = echo.stub.both()
    await call.write(b"a")
    with pytest.raises(errors.NotFound):
        await call.read()
    with pytest.raises(errors.NotFound):
        await call.write(b"b")


async def test_who_writes_to_a_conversation_that_is_refused_at_once_is_told_why(echo: Echo):
    """It may be refused before or after the first message is on its way."""

    async def refuse(_requests: AsyncIterator[bytes], _context: object) -> None:
        raise errors.NotFound("no such thing")

    async def talk() -> None:
        call = echo.stub.talk()
        await call.write(b"a")
        await call.write(b"b")
        await call.read()

    echo.talk = refuse
    for _ in range(100):
        with pytest.raises(errors.NotFound, match="no such thing"):
            await talk()


async def test_a_conversation_whose_caller_leaves_is_cancelled(echo: Echo):
    call = echo.stub.both()
    await call.write(b"a")
    assert await call.read() == b"a"
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call.read()


async def test_a_call_within_the_process_takes_the_short_cut(echo: Echo, path: str):
    await echo.stub.one(b"")
    assert (echo.peer == "local") is (path == "local")


async def test_a_slow_reader_holds_the_stream_up(echo: Echo, path: str):
    if path == "wire":
        return  # there the buffers of HTTP/2 and the socket decide
    sent = []

    async def fill(request: bytes, context_: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        for n in range(100):
            sent.append(n)
            yield b"x" * 100_000

    echo.fill = fill
    call = echo.stub.fill(b"")
    await call.read()
    await asyncio.sleep(0.2)
    assert len(sent) < 100
    assert len(await collect(call)) == 99


async def test_a_stream_that_nobody_reads_any_more_ends(echo: Echo, path: str):
    if path == "wire":
        return  # gRPC's channel keeps the call

    async def sleep(request: bytes) -> None:
        await asyncio.sleep(SLOW_S)

    echo.hook = sleep
    call = echo.stub.many(b"x")
    assert await call.read() == b"x"
    del call
    gc.collect()
    async with asyncio.timeout(5):
        while "many ended" not in echo.log:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_what_a_stream_has_open_is_closed_where_its_caller_leaves_without_having_read(
    echo: Echo, capsys: pytest.CaptureFixture[str]
):
    """At once, not when garbage is collected; and it is no fault of ours."""

    async def fill(request: bytes, context_: object) -> AsyncIterator[bytes]:
        try:
            while True:
                yield bytes(1 << 20)
        finally:
            echo.log.append("closed")

    echo.fill = fill
    gc.disable()
    try:
        async with open_channel(echo.address) as channel:
            call = stub(channel).fill(b"")
            await asyncio.sleep(0.3)
            call.cancel()
        for _ in range(100):
            if "closed" in echo.log:
                break
            await asyncio.sleep(0.05)
    finally:
        gc.enable()
    assert "closed" in echo.log
    assert "rpc.failed" not in capsys.readouterr().err


async def test_a_cancelled_read_cancels_the_stream(echo: Echo):
    arrived = asyncio.Event()

    async def sleep(request: bytes) -> None:
        arrived.set()
        await asyncio.sleep(SLOW_S)

    echo.hook = sleep
    reading = asyncio.ensure_future(collect(echo.stub.many(b"x")))
    async with asyncio.timeout(5):
        await arrived.wait()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    async with asyncio.timeout(5):
        while "many ended" not in echo.log:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_closing_the_channel_cancels_its_calls(echo: Echo):
    async def sleep(request: bytes) -> None:
        await asyncio.sleep(SLOW_S)

    echo.hook = sleep
    channel = open_channel(echo.address)
    calls = [asyncio.ensure_future(collect(stub(channel).many(b"x"))), asyncio.ensure_future(one(channel))]
    await asyncio.sleep(0.1)
    await channel.close()
    done, pending = await asyncio.wait(calls, timeout=5)
    assert not pending
    assert all(call.cancelled() or call.exception() for call in done)


async def one(channel: grpc.aio.Channel) -> bytes:
    return await stub(channel).one(b"")


async def test_what_the_caller_has_bound_does_not_travel(echo: Echo):
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="")
    seen = []

    async def look(request: bytes) -> None:
        seen.append(variable.get())

    echo.hook = look
    variable.set("mine")
    await echo.stub.one(b"")
    assert seen == [""]


async def test_a_caller_that_is_cancelled_leaves_at_once_and_the_call_is_cancelled(echo: Echo):
    ended = asyncio.Event()

    async def linger(request: bytes) -> None:
        try:
            await asyncio.sleep(SLOW_S)
        except asyncio.CancelledError:
            await may_end.wait()
            ended.set()
            raise

    may_end = asyncio.Event()
    echo.hook = linger
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(wait_for(echo.stub.one(b"")), 0.1)
    assert not ended.is_set()
    may_end.set()
    await asyncio.wait_for(ended.wait(), 20)


async def wait_for(call: Awaitable[bytes]) -> bytes:
    return await call


async def test_a_call_can_be_cancelled(echo: Echo):
    async def sleep(request: bytes) -> None:
        await asyncio.sleep(SLOW_S)

    echo.hook = sleep
    call = echo.stub.one(b"")
    await asyncio.sleep(0.05)
    assert call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert call.cancelled()
    assert call.done()


async def test_a_failed_call_that_nobody_awaits_is_silent(echo: Echo):
    async def fail(request: bytes) -> None:
        raise errors.NotFound("gone")

    echo.hook = fail
    echo.stub.one(b"")
    await asyncio.sleep(0.1)
    gc.collect()


async def test_the_namespace_travels_and_is_default_otherwise(echo: Echo):
    assert (await echo.stub.one(b"")).startswith(b"default/")
    with context.in_namespace("blue", request_id="r1"):
        assert await echo.stub.one(b"") == b"blue/r1"
        assert [m async for m in echo.stub.many(b"")][1] == b"blue"
    metadata = ((context.NAMESPACE_KEY, "red"),)
    assert (await echo.stub.one(b"", metadata=metadata)).startswith(b"red/")


async def test_concurrent_calls_do_not_see_each_others_namespace(echo: Echo):
    async def pause(request: bytes) -> None:
        await asyncio.sleep(0.02)

    echo.hook = pause
    names = [f"ns{i}" for i in range(20)]
    calls = [echo.stub.one(b"", metadata=((context.NAMESPACE_KEY, name),)) for name in names]
    answers = [answer.partition(b"/")[0].decode() for answer in await asyncio.gather(*calls)]
    assert answers == names


@pytest.mark.parametrize("bad", ["", "../x", "-a", "a b", "a" * 129])
async def test_a_malformed_namespace_is_refused(echo: Echo, bad: str):
    with pytest.raises(errors.InvalidArgument, match="namespace"):
        await echo.stub.one(b"", metadata=((context.NAMESPACE_KEY, bad),))


@pytest.mark.parametrize("kind", errors.KINDS)
async def test_every_kind_of_error_arrives_as_it_was_raised(echo: Echo, kind: type[errors.CorralError]):
    async def fail(request: bytes) -> None:
        raise kind("ein Satz für den Benutzer", reason="SOME_REASON", metadata={"id": "x1"})

    echo.hook = fail
    calls = [
        lambda: echo.stub.one(b""),
        lambda: collect(echo.stub.many(b"")),
        lambda: collect(echo.stub.written(b"")),
        lambda: echo.stub.sum(stream(b"")),
        lambda: collect(echo.stub.both(stream(b""))),
    ]
    for call in calls:
        with pytest.raises(kind, match="ein Satz für den Benutzer") as caught:
            await call()
        assert type(caught.value) is kind
        assert (caught.value.reason, caught.value.metadata) == ("SOME_REASON", {"id": "x1"})


async def collect(call: AsyncIterator[bytes]) -> list[bytes]:
    return [message async for message in call]


@pytest.mark.parametrize("text", ["a", "ü", "%", "\U0001f600", "\udcff"])
async def test_an_error_longer_than_metadata_may_be_is_shortened(echo: Echo, text: str):
    async def fail(request: bytes) -> None:
        raise errors.NotFound(f"start {text * 50_000}", reason="R", metadata={f"k{i}": text * 900 for i in range(90)})

    echo.hook = fail
    for _ in range(20):  # gRPC drops what is too large at random, up to a hard limit
        with pytest.raises(errors.NotFound, match=r"(?s)^start .*…$") as caught:
            await echo.stub.one(b"")
        assert len(caught.value.metadata) >= 5
        assert len(caught.value.message) > 190


async def test_a_full_disk_is_resource_exhausted(echo: Echo):
    async def fail(request: bytes) -> None:
        raise OSError(28, "No space left on device", "/var/lib/x")

    echo.hook = fail
    with pytest.raises(errors.ResourceExhausted, match="No space left on device: /var/lib/x"):
        await echo.stub.one(b"")


async def test_a_broken_disk_is_no_fault_of_ours(echo: Echo, capsys: pytest.CaptureFixture[str]):
    async def fail(request: bytes) -> None:
        raise OSError(5, "Input/output error", "/var/lib/x")

    echo.hook = fail
    with pytest.raises(errors.Internal, match="One: Input/output error: /var/lib/x") as caught:
        await echo.stub.one(b"")
    assert "inside corral" not in caught.value.message
    assert "rpc.failed" in "".join(capsys.readouterr())


async def test_an_unexpected_exception_is_internal_and_logged(echo: Echo, capsys: pytest.CaptureFixture[str]):
    async def fail(request: bytes) -> None:
        raise ZeroDivisionError("boom")

    echo.hook = fail
    with pytest.raises(errors.Internal, match="ZeroDivisionError: boom") as caught:
        await echo.stub.one(b"")
    assert caught.value.metadata["request_id"]
    output = "".join(capsys.readouterr())
    assert "rpc.failed" in output
    assert "ZeroDivisionError" in output


async def test_an_unknown_method_is_unimplemented(echo: Echo):
    with pytest.raises(errors.Unimplemented):
        await echo.stub.missing(b"")


async def test_nobody_listening_is_unavailable_with_the_address(directory: Path):
    address = f"unix://{directory}/nobody"
    async with open_channel(address) as channel:
        with pytest.raises(errors.Unavailable, match=r"nobody.*is corrald running") as caught:
            await stub(channel).one(b"")
        assert caught.value.reason == "UNREACHABLE"


async def test_a_deadline_is_unavailable_with_its_reason(echo: Echo):
    async def sleep(request: bytes) -> None:
        await asyncio.sleep(SLOW_S)

    echo.hook = sleep
    with pytest.raises(errors.Unavailable) as caught:
        await echo.stub.one(b"", timeout=0.1)
    assert caught.value.reason == "DEADLINE_EXCEEDED"


async def test_a_client_that_goes_away_ends_the_call(echo: Echo):
    async def sleep(request: bytes) -> None:
        await asyncio.sleep(SLOW_S)

    echo.hook = sleep
    call = echo.stub.many(b"x")
    assert await call.read() == b"x"
    call.cancel()
    async with asyncio.timeout(5):
        while "many ended" not in echo.log:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_socket_path_of_any_length_works(directory: Path):
    deep = directory / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    async with hosted([Echo()], UnixAddress(deep / "socket")) as address:
        assert (deep / "socket").is_socket()
        async with open_channel(str(address)) as channel:
            assert (await stub(channel).one(b"")).startswith(b"default/")


async def test_the_socket_is_for_owner_and_group_only(directory: Path):
    async with hosted([Echo()], UnixAddress(directory / "s")):
        assert (directory / "s").stat().st_mode & 0o777 == 0o660


async def test_tcp_on_loopback_chooses_a_port(directory: Path):
    async with hosted([Echo()], TcpAddress("127.0.0.1", 0)) as address, open_channel(str(address)) as channel:
        assert (await stub(channel).one(b"")).startswith(b"default/")


async def test_plain_tcp_to_the_world_is_refused():
    host = Host([Echo()])
    with pytest.raises(errors.FailedPrecondition, match="needs TLS"):
        await host.start([TcpAddress("0.0.0.0", 0)])
    await host.stop(grace_s=0)


async def test_one_channel_per_address(echo: Echo):
    channels = Channels()
    assert channels.get(echo.address) is channels.get(echo.address)
    assert await stub(channels.get(echo.address)).one(b"")
    await channels.close()


async def test_health_per_service_and_overall(echo: Echo):
    health = health_pb2_grpc.HealthStub(echo.channel)
    for name in ("", "echo", NAME):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_calls_wait_until_the_service_has_started(directory: Path):
    service = Echo()
    service.starting = asyncio.Event()
    host = Host([service])
    starting = asyncio.ensure_future(host.start([UnixAddress(directory / "s")]))
    async with open_channel(f"unix://{directory}/s") as channel:
        call = stub(channel).one(b"", wait_for_ready=True)
        health = health_pb2_grpc.HealthStub(channel)
        answer = await health.Check(health_pb2.HealthCheckRequest(service="echo"), wait_for_ready=True)
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert not call.done()
        service.starting.set()
        assert await call
        await starting
        await host.stop(grace_s=1)


async def test_a_service_that_cannot_start_stops_those_before_it(directory: Path):
    first, second, third = Echo("a"), Echo("b", "corral.test.v1.B"), Echo("c", "corral.test.v1.C")
    second.fail_start = True
    with pytest.raises(errors.FailedPrecondition, match="no good"):
        await Host([first, second, third]).start([UnixAddress(directory / "s")])
    assert (first.log, second.log, third.log) == (["start", "stop"], ["start", "stop"], [])


async def test_stopping_lets_calls_end_within_the_grace_and_refuses_new_ones(directory: Path):
    service = Echo()
    release = asyncio.Event()

    entered = asyncio.Event()

    async def wait(request: bytes) -> None:
        entered.set()
        await release.wait()

    host = Host([service])
    await host.start([UnixAddress(directory / "s")])
    async with open_channel(f"unix://{directory}/s") as channel:
        service.hook = wait
        inside = asyncio.ensure_future(collect(stub(channel).many(b"x")))
        await entered.wait()
        stopping = asyncio.ensure_future(host.stop(grace_s=10))
        await asyncio.sleep(0.1)
        with pytest.raises(errors.Unavailable, match="stopping"):
            await stub(channel).one(b"")
        assert "stop" not in service.log
        release.set()
        assert await inside == [b"x", b"default"]
        await stopping
    assert service.log[-1] == "stop"


async def test_calls_that_outstay_the_grace_end_as_unavailable(directory: Path):
    service = Echo()

    entered = []

    async def sleep(request: bytes) -> None:
        entered.append(request)
        await asyncio.sleep(SLOW_S)

    service.hook = sleep
    host = Host([service])
    await host.start([UnixAddress(directory / "s")])
    async with open_channel(f"unix://{directory}/s") as channel:
        calls = [asyncio.ensure_future(collect(stub(channel).many(b"x")))]
        calls += [asyncio.ensure_future(collect(stub(channel).written(b"x")))]
        async with asyncio.timeout(20):
            while len(entered) < len(calls):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await host.stop(grace_s=0.1)
            for call in calls:
                with pytest.raises(errors.Unavailable, match="stopping"):
                    await call


async def test_leaves_still_answer_while_a_composer_drains(directory: Path):
    leaf, composer = Echo("leaf"), Echo("composer", "corral.test.v1.Composer")
    host = Host([leaf, composer])
    [address] = await host.start([UnixAddress(directory / "s")])
    async with open_channel(str(address)) as channel:
        entered = asyncio.Event()

        async def use_the_leaf(request: bytes) -> None:
            entered.set()
            await asyncio.sleep(0.2)
            await stub(channel).one(b"")

        composer.hook = use_the_leaf
        inside = asyncio.ensure_future(call(channel))
        await entered.wait()
        await host.stop(grace_s=5)
        assert await inside


async def call(channel: grpc.aio.Channel) -> bytes:
    return await stub(channel, "corral.test.v1.Composer").one(b"")


async def test_serve_ends_when_asked_even_while_starting(directory: Path):
    service = Echo()
    service.starting = asyncio.Event()
    stop = asyncio.Event()
    serving = asyncio.ensure_future(serve([service], addresses=[UnixAddress(directory / "s")], stop=stop, grace_s=1))
    await asyncio.sleep(0.1)
    stop.set()
    await asyncio.wait_for(serving, 5)
    assert service.log == ["start", "stop"]


async def test_blocking_work_sees_the_context_of_its_caller():
    with context.in_namespace("green"):
        assert await run_blocking(context.current_namespace) == "green"


async def test_blocking_work_raises_to_its_caller_and_is_not_begun_for_one_that_left():
    def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        await run_blocking(fail)
    gate, begun = threading.Event(), []
    waiting = [asyncio.ensure_future(run_blocking(gate.wait, 5)) for _ in range(MAX_THREADS)]
    await asyncio.sleep(0.05)
    late = asyncio.ensure_future(run_blocking(begun.append, 1))
    await asyncio.sleep(0.05)
    late.cancel()
    with pytest.raises(asyncio.CancelledError):
        await late
    gate.set()
    assert await asyncio.gather(*waiting) == [True] * MAX_THREADS
    await run_blocking(begun.append, 2)
    assert begun == [2]


async def test_what_is_said_last_is_heard_by_who_still_writes(echo: Echo):
    """Also if writing fails before the reading side knows that the call has ended."""
    said = [b"%d" % n * 10_000 for n in range(20)]

    async def ends_early(requests: AsyncIterator[bytes], context_: grpc.aio.ServicerContext) -> None:
        await anext(aiter(requests))
        for each in said:
            await context_.write(each)

    async def write(call: object) -> None:
        with suppress(asyncio.InvalidStateError, errors.CorralError):
            while True:
                await call.write(b"x")

    echo.talk = ends_early
    for _ in range(20):
        call = echo.stub.talk()
        writing = asyncio.ensure_future(write(call))
        heard = []
        while isinstance(message := await call.read(), bytes):
            heard.append(message)
            await asyncio.sleep(0.001)
        assert heard == said
        await writing
