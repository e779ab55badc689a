"""D-Bus: bytes as the specification has them, whatever can be sent comes back, and nothing that comes is believed."""

import contextlib
import socket
import struct
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.kernel.dbus import marshalling, text
from corral.kernel.dbus.connection import CallFailed, Connection, Target, unix_paths
from corral.kernel.dbus.marshalling import (
    ERROR,
    METHOD_CALL,
    METHOD_RETURN,
    SIGNAL,
    Message,
    Variant,
    decode,
    encode,
    length_of,
    marshal,
    split,
    unmarshal,
)

# Source: D-Bus Specification, "Marshaling": the first two are its own examples, the others follow its rules by hand.
EXAMPLES = [
    ("sss", ("foo", "+", "bar"), "03000000 666f6f00 01000000 2b00 0000 03000000 62617200", "<"),
    ("ax", ([5],), "00000008 00000000 0000000000000005", ">"),
    ("v", (Variant("u", 1),), "01 7500 00 01000000", "<"),
    ("ay", (b"\x01\x02",), "02000000 0102", "<"),
    ("g", ("a{sv}",), "05 617b73767d 00", "<"),
    ("yb", (7, True), "07 000000 01000000", "<"),
    ("a{sv}", ({"k": Variant("y", 9)},), "0a000000 00000000 01000000 6b00 017900 09", "<"),
]


@pytest.mark.parametrize(("signature", "values", "data", "order"), EXAMPLES)
def test_values_are_marshalled_as_the_specification_has_them(signature, values, data, order):
    assert marshal(signature, values, order=order).hex() == data.replace(" ", "")
    assert unmarshal(signature, bytes.fromhex(data), order=order) == values


BASIC = {
    "y": st.integers(0, 2**8 - 1),
    "b": st.booleans(),
    "n": st.integers(-(2**15), 2**15 - 1),
    "q": st.integers(0, 2**16 - 1),
    "i": st.integers(-(2**31), 2**31 - 1),
    "u": st.integers(0, 2**32 - 1),
    "x": st.integers(-(2**63), 2**63 - 1),
    "t": st.integers(0, 2**64 - 1),
    "d": st.floats(allow_nan=False),
    "s": st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
    "o": st.lists(st.text("abcXYZ019_", min_size=1)).map(lambda parts: "/" + "/".join(parts)),
    "g": st.sampled_from(["", "s", "a{sv}", "(ii)ay"]),
}


def typed(kind: str) -> st.SearchStrategy[tuple[str, object]]:
    return BASIC[kind].map(lambda value: (kind, value))


basic = st.sampled_from(sorted(BASIC)).flatmap(typed)


def containers(inner: st.SearchStrategy[tuple[str, object]]) -> st.SearchStrategy[tuple[str, object]]:
    arrays = inner.map(lambda each: (f"a{each[0]}", bytes([each[1]]) if each[0] == "y" else [each[1]] * 2))
    structs = st.lists(inner, min_size=1, max_size=4).map(
        lambda all_: (f"({''.join(kind for kind, _ in all_)})", tuple(value for _, value in all_))
    )
    dicts = st.tuples(basic, inner).map(lambda pair: (f"a{{{pair[0][0]}{pair[1][0]}}}", {pair[0][1]: pair[1][1]}))
    variants = inner.map(lambda each: ("v", Variant(*each)))
    return arrays | structs | dicts | variants


values = st.recursive(basic, containers, max_leaves=12)


@given(st.lists(values, max_size=5), st.sampled_from("<>"))
def test_whatever_is_marshalled_comes_back(all_, order):
    signature = "".join(kind for kind, _ in all_)
    wanted = tuple(value for _, value in all_)
    assert split(signature) == [kind for kind, _ in all_]
    assert unmarshal(signature, marshal(signature, wanted, order=order), order=order) == wanted


@given(values, st.binary(max_size=64))
def test_of_bytes_that_are_no_values_only_value_errors_come(typed_value, data):
    kind, value = typed_value
    for each in (data, marshal(kind, (value,))[:-1] + data):
        with contextlib.suppress(ValueError):
            unmarshal(kind, each)


@pytest.mark.parametrize(
    "signature",
    ["a", "(", "()", "(i", "{sv}", "a{vs}", "a{s}", "a{sss}", "z", "i)", "a" * 34 + "i", "(" * 33 + "i" + ")" * 33,
     "i" * 256],
)  # fmt: skip
def test_a_signature_that_is_none_is_refused(signature):
    with pytest.raises(ValueError, match="signature"):
        split(signature)


@pytest.mark.parametrize(
    ("signature", "value"),
    [("y", 256), ("i", "1"), ("b", 1), ("i", True), ("s", 5), ("s", "a\0b"), ("o", "a"), ("o", "/a/"), ("o", "//"),
     ("g", "a"), ("ai", 5), ("(ii)", (1,)), ("v", 5), ("v", Variant("ii", 5)), ("a{si}", [1])],
)  # fmt: skip
def test_a_value_that_is_not_of_its_type_is_refused(signature, value):
    with pytest.raises(ValueError, match=r"D-Bus|type"):
        marshal(signature, (value,))


@pytest.mark.parametrize(
    ("signature", "data"),
    [
        ("b", "02000000"),  # neither true nor false
        ("yu", "01 010000 01000000"),  # what pads is not zero
        ("s", "01000000 6161"),  # no NUL at the end
        ("s", "02000000 6100 00"),  # one in the middle
        ("s", "ffffffff 00"),  # longer than what came
        ("s", "01000000 ff00"),  # not UTF-8
        ("ai", "03000000 00000000"),  # ends in the middle of an element
        ("ay", "ffffffff"),
        ("v", "02 6969 00 00000000 00000000"),  # two types
        ("u", "01000000 00"),  # one byte too many
    ],
)
def test_bytes_that_no_values_have_are_refused(signature, data):
    with pytest.raises(ValueError):  # noqa: PT011 - which error of these it is does not matter
        unmarshal(signature, bytes.fromhex(data))


def test_variants_in_variants_end_somewhere():
    nested = Variant("y", 1)
    for _ in range(60):
        nested = Variant("v", nested)
    assert unmarshal("v", marshal("v", (nested,))) == (nested,)
    for _ in range(20):
        nested = Variant("v", nested)
    with pytest.raises(ValueError, match="too many"):
        unmarshal("v", marshal("v", (nested,)))


HELLO = Message(
    METHOD_CALL,
    1,
    path="/org/freedesktop/DBus",
    interface="org.freedesktop.DBus",
    member="Hello",
    destination="org.freedesktop.DBus",
)


def test_a_call_is_laid_out_as_the_specification_has_it():
    data = encode(HELLO)
    assert data[:16] == struct.pack("<cBBBIII", b"l", 1, 0, 1, 0, 1, 109)
    assert data[16:24] == b"\x01\x01o\0\x15\0\0\0"  # PATH, a variant of an object path of 21 bytes
    assert len(data) % 8 == 0
    assert decode(data) == HELLO
    assert [length_of(data[:n]) for n in (0, 15, 16, len(data))] == [16, 16, len(data), len(data)]


@given(values, st.integers(1, 2**32 - 1))
def test_messages_come_back_as_they_were(typed_value, serial):
    kind, value = typed_value
    message = Message(METHOD_RETURN, serial, reply_serial=serial, signature=kind, body=(value,))
    assert decode(encode(message)) == message


def test_fields_that_are_not_known_are_passed_over():
    fields = [(1, Variant("o", "/a")), (3, Variant("s", "M")), (99, Variant("(ii)", (1, 2)))]
    data = marshal("yyyyuua(yv)", (ord("l"), METHOD_CALL, 0, 1, 0, 7, fields))
    assert decode(data + bytes(-len(data) % 8)) == Message(METHOD_CALL, 7, path="/a", member="M")


@pytest.mark.parametrize(
    "data",
    [
        b"x" + encode(HELLO)[1:],  # no byte order
        encode(HELLO)[:3] + b"\x02" + encode(HELLO)[4:],  # version 2
        encode(HELLO)[:-1],
        marshal("yyyyuua(yv)", (ord("l"), SIGNAL, 0, 1, 0, 7, [])),  # lacks its path
        marshal("yyyyuua(yv)", (ord("l"), METHOD_CALL, 0, 1, 0, 7, [(1, Variant("s", "/a"))])) + bytes(2),
        struct.pack("<cBBBIII", b"l", 1, 0, 1, 1 << 30, 1, 0),  # too long
    ],
)
def test_what_is_not_a_message_is_refused(data):
    with pytest.raises(ValueError, match="D-Bus"):
        decode(data)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("true", Variant("b", True)),
        ("5", Variant("i", 5)),
        ("-0x1f", Variant("i", -31)),
        ("1.5", Variant("d", 1.5)),
        ("'it\\'s \\u00e9'", Variant("s", "it's é")),
        ('"two"', Variant("s", "two")),
        ("uint64 123456789", Variant("t", 123456789)),
        ("byte 0x10", Variant("y", 16)),
        ("double 2", Variant("d", 2.0)),
        ("objectpath '/a/b'", Variant("o", "/a/b")),
        ("['a', 'b']", Variant("as", ["a", "b"])),
        ("[byte 1, 2]", Variant("ay", b"\x01\x02")),
        ("@as []", Variant("as", [])),
        ("@t 5", Variant("t", 5)),
        ("@a(ss) [('/dev/null', 'rw')]", Variant("a(ss)", [("/dev/null", "rw")])),
        ("('a', uint32 5)", Variant("(su)", ("a", 5))),
        ("(1,)", Variant("(i)", (1,))),
        ("{'a': <5>, 'b': <true>}", Variant("a{sv}", {"a": Variant("i", 5), "b": Variant("b", True)})),
        ("@a{su} {}", Variant("a{su}", {})),
        (" [ [1] , [2,3] ] ", Variant("aai", [[1], [2, 3]])),
    ],
)
def test_a_value_is_read_as_it_is_written(written, meant):
    assert text.parse(written) == meant


@pytest.mark.parametrize(
    "written",
    ["", "five", "5 6", "[", "[]", "{}", "[1, 'a']", "uint64 -1", "byte 256", "@zz 5", "@(i) 5", "'open", "'\\uZZZZ'",
     "objectpath 'a'", "(1", "<5", "{'a' 5}", "@as 5", "boolean 1", "5a"],
)  # fmt: skip
def test_what_is_no_value_is_refused(written):
    with pytest.raises(ValueError):  # noqa: PT011 - which error of these it is does not matter
        text.parse(written)


@given(st.text(max_size=20))
def test_of_any_text_only_value_errors_come(written):
    with contextlib.suppress(ValueError):
        text.parse(written)


def test_only_sockets_are_taken_of_a_list_of_addresses():
    assert unix_paths("unixexec:path=/bin/x;unix:path=/a%2cb,guid=00;unix:tmpdir=/tmp;unix:abstract=c") == [
        "/a,b",
        "\0c",
    ]
    with pytest.raises(OSError, match="none"):
        unix_paths("unix:path=%zz")


# What a service of a test does: it takes what the client says before it is let in, and then answers by the script.


def serve(path: Path, *answers: bytes) -> threading.Thread:
    """A service that answers each thing that is said to it with the next of the answers, and then hangs up."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen(1)

    def run() -> None:
        end, _ = server.accept()
        with server, end, contextlib.suppress(ConnectionError):  # a client that has had enough
            for answer in answers:
                end.recv(65536)
                end.sendall(answer)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


LET_IN = b"DATA\r\nOK 0123\r\n"
SERVICE = Target("org.example", "/a", "org.example.I")


def test_a_call_waits_for_its_own_answer_and_signals_are_kept(tmp_path):
    signal = Message(SIGNAL, 5, path="/a", interface="org.example.I", member="Done", signature="u", body=(7,))
    other = Message(METHOD_RETURN, 6, reply_serial=99)
    answer = Message(METHOD_RETURN, 8, reply_serial=1, signature="s", body=("yes",))
    serving = serve(tmp_path / "s", LET_IN + encode(signal)[:10], encode(signal)[10:] + encode(other) + encode(answer))
    with Connection(str(tmp_path / "s"), timeout_s=5) as connection:
        assert connection.call(SERVICE, "Ask", "s", "is it?") == ("yes",)
        assert connection.wait_for_signal("org.example.I", "Done", lambda body: body == (7,)) == (7,)
    serving.join()


def test_an_error_is_raised_with_its_name(tmp_path):
    answer = Message(ERROR, 8, error_name="org.example.No", reply_serial=1, signature="s", body=("not today",))
    serving = serve(tmp_path / "s", LET_IN, encode(answer))
    with Connection(str(tmp_path / "s"), timeout_s=5) as connection, pytest.raises(CallFailed, match="not today") as e:
        connection.call(SERVICE, "Ask")
    assert e.value.name == "org.example.No"
    serving.join()


@pytest.mark.parametrize(
    ("answers", "error"),
    [
        ([b"REJECTED EXTERNAL\r\n"], PermissionError),
        ([b"x" * 20000, b""], OSError),
        ([LET_IN, b"this is no message, whatever it is"], OSError),
        ([LET_IN, b""], ConnectionResetError),
    ],
)
def test_a_service_that_does_not_speak_it_ends_in_an_error(tmp_path, answers, error):
    serving = serve(tmp_path / "s", *answers)
    with pytest.raises(error), Connection(str(tmp_path / "s"), timeout_s=5) as connection:
        connection.call(SERVICE, "Ask")
    serving.join()


def test_a_service_that_takes_nobody_in_is_not_waited_for_for_ever(tmp_path):
    path = str(tmp_path / "s")
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(path)
        listener.listen(0)
        stack.enter_context(socket.socket(socket.AF_UNIX)).connect(path)
        with pytest.raises(TimeoutError, match=r"no answer within 0\.1 s"):
            Connection(path, timeout_s=0.1)


def test_who_does_not_answer_is_not_waited_for_for_ever(tmp_path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        server.listen(1)
        with pytest.raises(TimeoutError, match=r"no answer within 0\.1 s"):
            Connection(str(tmp_path / "s"), timeout_s=0.1)


def test_who_answers_slowly_is_asked_no_longer_than_all_may_take(tmp_path):
    serving = serve(tmp_path / "s", LET_IN, encode(Message(METHOD_RETURN, 8, reply_serial=1)))
    with Connection(str(tmp_path / "s"), timeout_s=60, until=time.monotonic() + 1) as connection:
        assert connection.call(SERVICE, "Ask") == ()
        time.sleep(1)
        with pytest.raises(TimeoutError):
            connection.call(SERVICE, "Ask")
    serving.join()


def test_marshalling_refuses_an_array_longer_than_the_specification_allows():
    with pytest.raises(ValueError, match="64 MiB"):
        marshal("ay", (bytes((1 << 26) + 1),))
    assert marshalling.LONGEST_MESSAGE == 1 << 27
