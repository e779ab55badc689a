"""A channel without gRPC's library is as one of gRPC's: each test is of both, but for what only one of them does."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from corral.client.http2 import Connection
from corral.client.local_channel import LocalChannel
from corral.client.transport import BriefTransport, Transport
from corral.rpc.errors import (
    CONNECTION_ENDED,
    CorralError,
    Internal,
    NotFound,
    ResourceExhausted,
    Unavailable,
    to_status,
)
from corral.rpc.frames import DATA, GOAWAY, HEADERS, PING, RESET, SETTINGS, frame
from corral.rpc.hpack import Decoder, encode

KINDS = (Transport, BriefTransport)
PATIENCE_S = 30
STATUS_OK = encode([(b"grpc-status", b"0")])
ANSWER_BEGINS = encode([(b":status", b"200"), (b"content-type", b"application/grpc")])
ENDS_STREAM, ENDS_HEADERS, ENDS_BOTH = 1, 4, 5
STATUSES_OF_HTTP = (200, 302, 400, 401, 403, 404, 429, 500, 502, 503, 504)


class Server:
    """gRPC's own, of raw bytes."""

    def __init__(self, path: Path) -> None:
        self.namespaces: list[str] = []
        self.released = threading.Event()
        self.cancelled = threading.Event()
        handlers = {
            "Echo": grpc.unary_unary_rpc_method_handler(self._echo),
            "Fail": grpc.unary_unary_rpc_method_handler(self._fail),
            "Repeat": grpc.unary_stream_rpc_method_handler(self._repeat),
            "Wait": grpc.unary_stream_rpc_method_handler(self._wait),
            "Join": grpc.stream_unary_rpc_method_handler(lambda requests, _: b"".join(requests)),
            "Talk": grpc.stream_stream_rpc_method_handler(lambda requests, _: requests),
        }
        options = [("grpc.max_receive_message_length", 64 << 20), ("grpc.max_send_message_length", 64 << 20)]
        self.server = grpc.server(ThreadPoolExecutor(8), options=options)
        self.server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test.Raw", handlers)])
        self.server.add_insecure_port(f"unix:{path}")
        self.server.start()

    def _echo(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        self.namespaces.append(str(dict(context.invocation_metadata())["corral-namespace"]))
        return request * 17 if len(request) == 1 << 20 else request

    def _fail(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        error = NotFound("no such thing: ü%41\n", reason="NO_THING", metadata={"name": request.decode()})
        code, message, trailers = to_status(error)
        context.set_trailing_metadata(trailers)
        context.abort(code, message)
        raise AssertionError

    def _repeat(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        for _ in range(40):
            yield request
        if request == b"fail":
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not so")

    def _wait(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        context.add_callback(self.cancelled.set)
        yield request
        self.released.wait(PATIENCE_S)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "socket")
    yield server
    server.released.set()
    server.server.stop(None).wait()


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def transport(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Transport]:
    transport = request.param(f"unix://{tmp_path}/socket", "blue", None)
    yield transport
    transport.close()


def method(transport: Transport, name: str, form: str = "unary_unary") -> Any:
    return getattr(transport.channel, form)(f"/test.Raw/{name}", request_serializer=bytes, response_deserializer=bytes)


@pytest.mark.parametrize("length", [0, 1, 16379, 16384, 65530, 65531, 200_000, 5 << 20])
def test_what_is_sent_comes_back(server: Server, transport: Transport, length: int) -> None:
    sent = bytes(range(256)) * (length // 256) + b"x" * (length % 256)
    for _ in range(3):
        assert transport.unary(method(transport, "Echo"), sent) == sent
    assert server.namespaces == ["blue"] * 3


def test_small_calls_go_on_when_a_window_is_used_up(server: Server, transport: Transport) -> None:
    for _ in range(20):
        assert transport.unary(method(transport, "Echo"), b"x" * 30_000) == b"x" * 30_000


def test_an_answer_that_is_too_large_is_refused(server: Server, transport: Transport) -> None:
    with pytest.raises(ResourceExhausted, match=r"larger than max \(17825792 vs\. 16777216\)"):
        transport.unary(method(transport, "Echo"), b"x" * (1 << 20))
    assert transport.unary(method(transport, "Echo"), b"x") == b"x"


def test_a_failure_is_told_with_all_that_belongs_to_it(server: Server, transport: Transport) -> None:
    for _ in range(2):
        with pytest.raises(NotFound) as caught:
            transport.unary(method(transport, "Fail"), b"this")
        assert caught.value.message == "no such thing: ü%41\n"
        assert (caught.value.reason, caught.value.metadata) == ("NO_THING", {"name": "this"})
    with pytest.raises(CorralError) as unknown:
        transport.unary(method(transport, "Nothing"), b"")
    assert (type(unknown.value).__name__, unknown.value.message) == ("Unimplemented", "Method not found!")


def test_answers_come_one_after_the_other_and_then_the_failure(server: Server, transport: Transport) -> None:
    repeat = method(transport, "Repeat", "unary_stream")
    assert list(transport.stream(repeat, b"x" * 300_000)) == [b"x" * 300_000] * 40
    assert list(transport.stream(repeat, b"")) == [b""] * 40
    answers = transport.stream(repeat, b"fail")
    assert [next(answers) for _ in range(40)] == [b"fail"] * 40
    with pytest.raises(CorralError, match="not so"):
        next(answers)


def test_who_takes_no_more_answers_ends_the_call(server: Server, transport: Transport) -> None:
    answers = transport.stream(method(transport, "Wait", "unary_stream"), b"first")
    assert next(answers) == b"first"
    assert not server.cancelled.is_set()
    answers.close()  # type: ignore[attr-defined]
    assert server.cancelled.wait(PATIENCE_S)
    assert transport.unary(method(transport, "Echo"), b"x") == b"x"


def test_calls_with_many_requests_are_possible(server: Server, transport: Transport) -> None:
    assert transport.gather(method(transport, "Join", "stream_unary"), iter([b"a", b"b"])) == b"ab"
    assert list(transport.exchange(method(transport, "Talk", "stream_stream"), iter([b"a", b"b"]))) == [b"a", b"b"]


def test_threads_call_side_by_side(server: Server, transport: Transport) -> None:
    with ThreadPoolExecutor(6) as pool:
        sent = [str(n).encode() * 1000 for n in range(200)]
        assert list(pool.map(lambda each: transport.unary(method(transport, "Echo"), each), sent)) == sent


@pytest.mark.parametrize("kind", KINDS)
def test_metadata_that_grpc_does_not_take_is_refused(server: Server, tmp_path: Path, kind: type[Transport]) -> None:
    transport = kind(f"unix://{tmp_path}/socket", "bl\nue", None)
    with pytest.raises(Internal, match="Invalid metadata"):
        transport.unary(method(transport, "Echo"), b"x")
    transport.close()


def test_a_server_that_is_not_there_is_told(transport: Transport) -> None:
    with pytest.raises(Unavailable) as caught:
        transport.unary(method(transport, "Echo"), b"x")
    assert "socket (No such file or directory): is corrald running?" in caught.value.message
    assert (caught.value.reason, caught.value.metadata) == ("UNREACHABLE", {})


class Scripted:
    """A server that says what a test has it say."""

    def __init__(self, path: Path, *scripts: "Callable[[Scripted], None]") -> None:
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen()
        self._scripts = scripts
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for script in self._scripts:
                self.connection, _ = self._listening.accept()
                with self.connection:
                    self.connection.settimeout(PATIENCE_S)
                    self.received = self.connection.makefile("rb")
                    assert self.received.read(24) == b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
                    script(self)
                    self.received.close()
        except BaseException as e:  # noqa: BLE001 - for the test to raise
            self.failure = e

    def say(self, kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> None:
        self.connection.sendall(frame(kind, flags, stream, payload))

    def hear(self, kind: int, flags: int | None = None) -> bytes:
        """The next frame of that kind."""
        while True:
            head = self.received.read(9)
            assert len(head) == 9, f"no frame of kind {kind} came"
            payload = self.received.read(int.from_bytes(head[:3]))
            if head[3] == kind and flags in (None, head[4]):
                return payload

    def answer(self, stream: int, text: bytes) -> None:
        self.say(HEADERS, ENDS_HEADERS, stream, ANSWER_BEGINS)
        self.say(DATA, 0, stream, b"\0" + len(text).to_bytes(4) + text)
        self.say(HEADERS, ENDS_BOTH, stream, STATUS_OK)

    def await_hang_up(self) -> None:
        """Of a client that may have left unread what came last."""
        with contextlib.suppress(ConnectionResetError):
            self.received.read()

    def close(self) -> None:
        self._listening.close()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        if self.failure is not None:
            raise self.failure


def begun(server: Scripted) -> None:
    """Up to the first request."""
    server.say(SETTINGS)
    server.hear(DATA)


def goes_away(server: Scripted, last: int = 0) -> None:
    server.say(GOAWAY, 0, 0, last.to_bytes(4) + bytes(4))


def test_a_call_that_was_not_begun_is_made_again(tmp_path: Path, transport: Transport) -> None:
    def sends_away(server: Scripted) -> None:
        begun(server)
        goes_away(server)
        assert server.received.read() is not None  # it hangs up

    def answers(server: Scripted) -> None:
        begun(server)
        server.answer(1, b"at last")
        server.received.read()

    with contextlib.closing(Scripted(tmp_path / "socket", sends_away, answers)):
        assert transport.unary(method(transport, "Echo"), b"x") == b"at last"
        transport.close()


def test_a_call_that_may_have_begun_is_not_made_again(tmp_path: Path, transport: Transport) -> None:
    with contextlib.closing(Scripted(tmp_path / "socket", begun)), pytest.raises(Unavailable) as caught:
        transport.unary(method(transport, "Echo"), b"x")
    assert caught.value.reason == "UNREACHABLE"
    assert caught.value.metadata == {"connection": CONNECTION_ENDED}


def test_what_was_answered_before_a_goaway_is_the_answer(tmp_path: Path, transport: Transport) -> None:
    def script(server: Scripted) -> None:
        begun(server)
        server.say(PING, 0, 0, b"12345678")
        server.answer(1, b"yes")
        goes_away(server)

    with contextlib.closing(Scripted(tmp_path / "socket", script)):
        assert transport.unary(method(transport, "Echo"), b"x") == b"yes"


def test_what_a_goaway_lets_be_is_waited_for(tmp_path: Path, transport: Transport) -> None:
    def script(server: Scripted) -> None:
        begun(server)
        goes_away(server, last=1)
        server.say(PING, 0, 0, b"12345678")
        assert server.hear(PING, 1) == b"12345678"
        server.answer(1, b"yes")
        server.received.read()

    with contextlib.closing(Scripted(tmp_path / "socket", script)):
        assert transport.unary(method(transport, "Echo"), b"x") == b"yes"
        transport.close()


def test_an_idle_connection_that_was_ended_is_not_used_again(tmp_path: Path) -> None:
    ended = threading.Semaphore(0)
    transport = BriefTransport(f"unix://{tmp_path}/socket", "blue", None)

    def script(server: Scripted) -> None:
        begun(server)
        server.answer(1, b"yes")
        goes_away(server, last=1)
        ended.release()
        server.await_hang_up()

    with contextlib.closing(Scripted(tmp_path / "socket", script, script, script)):
        for _ in range(3):
            assert transport.unary(method(transport, "Echo"), b"x") == b"yes"
            assert ended.acquire(timeout=PATIENCE_S)
        transport.close()


def test_a_connection_is_used_again_and_none_waits_while_answers_come(tmp_path: Path) -> None:
    transport = BriefTransport(f"unix://{tmp_path}/socket", "blue", None)

    def twice(server: Scripted) -> None:
        begun(server)
        server.answer(1, b"yes")
        server.hear(DATA)
        server.answer(3, b"again")
        server.received.read()

    def once(server: Scripted) -> None:
        begun(server)
        server.answer(1, b"one")

    with contextlib.closing(Scripted(tmp_path / "socket", twice, once)):
        assert transport.unary(method(transport, "Echo"), b"x") == b"yes"
        assert transport.unary(method(transport, "Echo"), b"x") == b"again"
        assert list(transport.stream(method(transport, "Repeat", "unary_stream"), b"x")) == [b"one"]
        transport.close()


@pytest.mark.parametrize("reason", [0, 1, 2, 7, 8, 11, 12, 99])
def test_a_reset_is_told_in_the_same_words(tmp_path: Path, reason: int) -> None:
    def script(server: Scripted) -> None:
        begun(server)
        server.say(RESET, 0, 1, reason.to_bytes(4))
        server.received.read()

    told = []
    with contextlib.closing(Scripted(tmp_path / "socket", script, script)):
        for kind in KINDS:
            transport = kind(f"unix://{tmp_path}/socket", "blue", None)
            with pytest.raises(grpc.RpcError) as caught:
                method(transport, "Echo")(b"x", metadata=(("corral-namespace", "blue"),))
            told.append((caught.value.code(), caught.value.details()))
            transport.close()
    assert told[0] == told[1]


@pytest.mark.parametrize(
    "frames",
    [
        *([(HEADERS, ENDS_BOTH, 1, encode([(b":status", b"%d" % status)]))] for status in STATUSES_OF_HTTP),
        [(HEADERS, ENDS_HEADERS, 1, encode([(b":status", b"503")])), (DATA, ENDS_STREAM, 1, b"Not now")],
        [(HEADERS, ENDS_BOTH, 1, encode([(b":status", b"404"), (b"grpc-status", b"5"), (b"grpc-message", b"it")]))],
    ],
)
def test_what_is_told_in_http_is_told_in_the_same_words(
    tmp_path: Path, frames: list[tuple[int, int, int, bytes]]
) -> None:
    def script(server: Scripted) -> None:
        begun(server)
        server.connection.sendall(b"".join(frame(*each) for each in frames))
        server.await_hang_up()

    told = []
    with contextlib.closing(Scripted(tmp_path / "socket", script, script)):
        for kind in KINDS:
            transport = kind(f"unix://{tmp_path}/socket", "blue", None)
            with pytest.raises(grpc.RpcError) as caught:
                method(transport, "Echo")(b"x", metadata=(("corral-namespace", "blue"),))
            told.append((caught.value.code(), caught.value.details()))
            transport.close()
    assert told[0] == told[1]


def test_a_connection_that_another_thread_takes_meanwhile_is_not_missed(server: Server, tmp_path: Path) -> None:
    class Contended(list[Connection]):
        def __bool__(self) -> bool:
            there = len(self) > 0
            for connection in self:
                connection.close()
            self.clear()
            return there

    transport = BriefTransport(f"unix://{tmp_path}/socket", "blue", None)
    transport.channel._idle = Contended()  # type: ignore[attr-defined]
    assert [transport.unary(method(transport, "Echo"), b"x") for _ in range(3)] == [b"x"] * 3
    transport.close()


def test_threads_share_one_channel_of_the_library(tmp_path: Path) -> None:
    opened: list[grpc.Channel] = []
    opened_twice = threading.Event()
    second = threading.Thread(target=lambda: channel.library)

    def opens() -> grpc.Channel:
        opened.append(grpc.insecure_channel(f"unix:{tmp_path}/socket"))
        if len(opened) == 1:
            second.start()
            opened_twice.wait(0.2)
        else:
            opened_twice.set()
        return opened[-1]

    channel = LocalChannel(f"{tmp_path}/socket", opens, is_brief=True)
    assert channel.library is opened[0]
    second.join(PATIENCE_S)
    channel.close()
    assert len(opened) == 1


def test_where_many_wait_already_it_waits_too(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.socket(socket.AF_UNIX))
        listening.bind(path)
        listening.listen(0)
        first = stack.enter_context(socket.socket(socket.AF_UNIX))
        first.connect(path)
        second = stack.enter_context(socket.socket(socket.AF_UNIX))
        second.setblocking(False)
        with pytest.raises(BlockingIOError):
            second.connect(path)
        transport = BriefTransport(f"unix://{path}", "blue", None)
        pool = stack.enter_context(ThreadPoolExecutor(1))
        answer = pool.submit(transport.unary, method(transport, "Echo"), b"x")
        listening.accept()[0].close()
        connection, _ = listening.accept()
        connection.sendall(frame(SETTINGS, 0, 0, b"") + frame(HEADERS, ENDS_BOTH, 1, STATUS_OK))
        with pytest.raises(Internal, match="not one answer"):
            answer.result(PATIENCE_S)
        connection.close()


@pytest.mark.parametrize("said", [b"HTTP/1.1 400 Bad Request\r\n\r\n", frame(DATA, 8, 1, b""), b""])
def test_who_does_not_greet_is_no_server(tmp_path: Path, transport: Transport, said: bytes) -> None:
    def script(server: Scripted) -> None:
        server.connection.sendall(said)

    with contextlib.closing(Scripted(tmp_path / "socket", script)), pytest.raises(Unavailable) as caught:
        transport.unary(method(transport, "Echo"), b"x")
    assert caught.value.reason == "UNREACHABLE"
    assert caught.value.message.startswith("cannot reach corral at unix:///")


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff\xff\xff" + bytes(40),
        frame(HEADERS, ENDS_BOTH, 1, b"\xff\xff\xff\xff\xff\xff"),
        frame(HEADERS, ENDS_BOTH, 1, b"\x80"),
        frame(HEADERS, ENDS_BOTH, 1, b"\x40\x05ab"),
        frame(HEADERS, ENDS_BOTH, 1, encode([(b":status", b"404")])),
        frame(DATA, 1, 1, b"\x01\0\0\0\1x"),
        frame(DATA, 1, 1, b"\0\0\0\0\1x"),
        frame(DATA, 1 | 8, 1, b""),
        frame(HEADERS, 4, 1, ANSWER_BEGINS) + frame(DATA, 1 | 8, 1, b"\1\0\0\0\0\1x\0"),
    ],
)
def test_garbage_is_a_failure_and_no_answer(tmp_path: Path, transport: Transport, garbage: bytes) -> None:
    def script(server: Scripted) -> None:
        begun(server)
        server.connection.sendall(garbage)

    with contextlib.closing(Scripted(tmp_path / "socket", script)), pytest.raises(CorralError):
        transport.unary(method(transport, "Echo"), b"x")
    transport.close()


# Source: RFC 7541, appendix C.6, which are the answers of one connection with a table of 256 bytes.
RFC_BLOCKS = (
    "3fe101488264025885aec3771a4b6196d07abe941054d444a8200595040b8166e082a62d1bff6e919d29ad171863c78f0b97c8e9ae82ae43d3",
    "4883640effc1c0bf",
    "88c16196d07abe941054d444a8200595040b8166e084a62d1bffc05a839bd9ab77ad94e7821dd7f2e6c7b335dfdfcd5b3960d5af27087f3672c1ab270fb5291f9587316065c003ed4ee5b1063d5007",
)


def test_fields_are_read_as_the_standard_shows() -> None:
    decoder = Decoder()
    first, second, third = (dict(decoder.fields(bytes.fromhex(block))) for block in RFC_BLOCKS)
    common = {b"cache-control": b"private", b"location": b"https://www.example.com"}
    date = b"Mon, 21 Oct 2013 20:13:2%d GMT"
    assert first == common | {b":status": b"302", b"date": date % 1}
    assert second == first | {b":status": b"307"}
    assert third == common | {
        b":status": b"200",
        b"date": date % 2,
        b"content-encoding": b"gzip",
        b"set-cookie": b"foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1",
    }


def test_fields_are_written_to_be_read() -> None:
    fields = [(b"a", b""), (b"b" * 126, b"c" * 127), (b"d" * 255, bytes(range(256)) * 300)]
    assert Decoder().fields(encode(fields)) == fields
