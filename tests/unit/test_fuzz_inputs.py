"""What containers and images write, parsed on the host: users, mount options, frames, sentences, log lines."""

import base64
import contextlib
import json
import os
import socket
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fuzz import fuzz, junk, refusal, texts

from corral.kernel.overlay import split_lower
from corral.oci import mount_options, users
from corral.oci.channel import ParentEnd
from corral.oci.errors import EXEC_DENIED, EXEC_NOT_FOUND, SETUP, ExecFailed
from corral.oci.stage import normal
from corral.oci.sysctl import check_sysctl, sysctl_path
from corral.shim import logs, wire

NAMES = st.sampled_from(["root", "bob", "0", "00", "1000", "0x0", "-1", "+0", " 0", "4294967295", "4294967296", ""])
FIELDS = NAMES | st.text(max_size=5)
LINES = st.lists(FIELDS, max_size=8).map(":".join)
DATABASES = (
    st.lists(LINES | st.text(max_size=20), max_size=8).map(lambda lines: "\n".join(lines).encode("utf-8", "replace"))
    | st.lists(st.sampled_from([b":", b"\n", b"0", b"root", b"\0", b"\xff", b"#", b"\r", b"x" * 5000])).map(b"".join)
    | st.binary(max_size=300)
)
USERS = NAMES | st.tuples(NAMES, NAMES).map(":".join) | st.text(max_size=12)


@fuzz(400)
@given(USERS, DATABASES, DATABASES)
def test_a_user_is_somebody_or_nobody(user: str, passwd: bytes, group: bytes):
    refused = refusal(ExecFailed, lambda: users.resolve(user, passwd, group))
    if refused is not None:
        assert (refused.kind, bool(refused.message)) == (SETUP, True)
        return
    found = users.resolve(user, passwd, group)
    for number in (found.uid, found.gid, *found.groups):
        assert type(number) is int
        assert 0 <= number <= users.MAX_ID
    name = user.partition(":")[0]
    if found.uid == 0 and not name.strip("0"):
        return
    if found.uid == 0:  # only whom a line calls root by that very name
        assert any(account.name == name and account.uid == 0 for account in users.parse_passwd(passwd))


@fuzz(300)
@given(DATABASES)
def test_every_line_of_a_database_is_whole_or_absent(data: bytes):
    for account in users.parse_passwd(data):
        assert account.name
        assert account.home.startswith("/")
        assert os.fsencode(account.name) in data
    for group in users.parse_group(data):
        assert group.name
        assert all(group.members)


@pytest.mark.parametrize("line", [b":", b"\n", b"a", b",", b"\xff", b":::::\n", b"a::1:1:::\n", b"g::1:bob,bob\n"])
def test_cve_2026_47262_four_mebibytes_of_the_same_take_no_time(line: bytes):
    data = line * (users.MAX_FILE_BYTES // len(line))
    began = time.process_time()
    for user in ("bob", "1"):
        with contextlib.suppress(ExecFailed):
            users.resolve(user, data, data)
    assert time.process_time() - began < 5


OPTIONS = st.lists(st.sampled_from(sorted(mount_options.known())) | texts | st.text("r=,\\:", max_size=6), max_size=10)


@fuzz(400)
@given(OPTIONS)
def test_mount_options_are_sorted_or_refused(options: list[str]):
    refused = refusal(ValueError, lambda: mount_options.parse(options))
    if refused is not None:
        assert str(refused)
        return
    parsed = mount_options.parse(options)
    both = [parsed.attributes, parsed.recursive]
    assert all(not each.set & each.clear for each in both), "what is set is not cleared too"
    left = [option for option in options if option in parsed.data]
    assert list(parsed.data) == left, "what is left for the file system is as it was given, in order"
    assert not set(parsed.data) & mount_options.known() - set(mount_options.OF_ACLS)


@fuzz(300)
@given(texts | st.text("./", max_size=20))
def test_a_sysctl_stays_below_proc_sys(name: str):
    with contextlib.suppress(ValueError):
        path = sysctl_path(name)
        assert not path.startswith("/")
        assert ".." not in path.split("/")
    with contextlib.suppress(ValueError):
        assert not check_sysctl({name: ""}, []), "without a namespace of its own a container has no parameter"


@fuzz(300)
@given(st.text("/.a\\:", max_size=20))
def test_names_and_layers(text: str):
    assert normal(text).startswith("/")
    assert ".." not in normal(text).split("/")
    assert isinstance(split_lower(text), list)


def _framed(body: bytes) -> bytes:
    return wire.HEADER.pack(len(body)) + body


FRAMES = (
    st.binary(max_size=200)
    | junk.map(lambda value: _framed(json.dumps(value).encode()))
    | st.binary(max_size=60).map(_framed)
    | st.integers(0, 2**32 - 1).map(wire.HEADER.pack)
)


@fuzz(400)
@given(st.lists(FRAMES, max_size=4), st.integers(1, 50))
def test_a_stream_of_frames_is_messages_or_refused(parts: list[bytes], step: int):
    stream, decoder, last = b"".join(parts), wire.Decoder(), 0
    with contextlib.suppress(wire.ProtocolError):
        for at in range(0, len(stream), step):
            for message, end in decoder.feed(stream[at : at + step]):
                assert isinstance(message, dict)
                assert last < end <= len(stream)
                last = end


WORDS = (
    junk.map(lambda value: json.dumps(value).encode())
    | st.fixed_dictionaries({}, optional={"error": junk, "errno": junk, "message": junk, "ready": junk}).map(
        lambda value: json.dumps(value).encode()
    )
    | st.binary(min_size=1, max_size=100)
)


@fuzz(300)
@given(WORDS)
def test_what_the_last_process_says_before_execve_is_a_sentence(word: bytes):
    """It may be in the hands of the container by then."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        theirs.send(word)
        end = ParentEnd(ours)
        with contextlib.closing(end):
            refused = refusal(Exception, lambda: end.wait_for_exec(lambda: None))
    assert isinstance(refused, ExecFailed | OSError), f"it passed for an execve, or broke the shim: {refused!r}"
    if isinstance(refused, ExecFailed):
        assert refused.kind in (SETUP, EXEC_DENIED, EXEC_NOT_FOUND)
    assert len(str(refused)) < 3000


OUTPUT = st.lists(
    st.binary(max_size=30)
    | st.sampled_from(
        [b"\n", b"\r", b"\0", b'"', b"\\", b"\x01", "\u2028".encode(), b"\xed\xa0\x80", b"\xf0\x9f", b"\x80"]
    )
    | st.sampled_from([b"x" * logs.PIECE_LIMIT, "é".encode() * logs.PIECE_LIMIT, b"\xff" * (logs.PIECE_LIMIT + 1)])
    | st.just(bytes(3 * logs.PIECE_LIMIT)),
    max_size=12,
).map(b"".join)
STAMP = "2026-01-02T03:04:05.123456789Z"


@fuzz(200)
@given(OUTPUT)
def test_output_is_cut_and_framed_whole(data: bytes):
    groups = list(logs.cut(data, logs.BLOCK_LIMIT))
    assert b"".join(group for _, group in groups) == data
    assert all(0 < len(group) <= logs.BLOCK_LIMIT for _, group in groups)
    kept = b""
    for part, group in groups:
        framed = logs.json_lines(group, "stdout", STAMP, part is logs.Part.LINES)
        assert framed.endswith(b"\n")
        for line in framed.splitlines():
            record = json.loads(line)
            assert set(record) - {"data"} == {"log", "stream", "time"}
            assert (record["stream"], record["time"]) == ("stdout", STAMP)
            kept += record["log"].encode() + base64.b64decode(record.get("data", ""))
    assert kept == data
    for part, group in logs.cut(data):
        cri = logs.cri_lines(group, "stdout", STAMP, part is logs.Part.LINES)
        assert cri.endswith(b"\n")
        head = f"{STAMP} stdout ".encode()
        assert all(line.startswith(head) for line in cri.split(b"\n")[:-1]), "no output passes for a line of another"
