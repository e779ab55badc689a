"""What a shim that is killed has taken and not logged, found by the next one."""

import base64
import contextlib
import json
import os
import resource
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from corral.shim.log_drivers import open_log
from corral.shim.log_options import LogOptions, ToSyslog
from corral.shim.log_program import PipeReceiver
from corral.shim.logs import FileLog, Log, LogFile
from corral.shim.loop import Loop
from corral.shim.sending import PipingLog, SendingLog
from corral.shim.spool import KEPT, MARK, MUCH, STREAMS, Spool
from corral.shim.syslog import Address, SyslogFraming, SyslogReceiver

LINES = b"".join(b"line %d\n" % number for number in range(1000))


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def opened(path: Path, directory: int, driver: str = "json-file") -> FileLog:
    """As a shim opens it; it is killed by not being closed."""
    return FileLog(LogFile(str(path), max_size=0, max_files=1), driver, Spool(directory))


def take(log: Log, data: bytes) -> bytes:
    reader, writer = os.pipe()
    try:
        os.write(writer, data)
        return log.take("stdout", reader, len(data), pipe=True)
    finally:
        os.close(reader)
        os.close(writer)


def logged(path: Path) -> bytes:
    return "".join(json.loads(line)["log"] for line in path.read_bytes().splitlines()).encode()


@pytest.mark.parametrize("text", [b"no newline", b"a line\n"])
def test_what_was_taken_before_the_first_append_is_kept(tmp_path: Path, directory: int, text: bytes) -> None:
    path = tmp_path / "log"
    take(opened(path, directory), text)
    opened(path, directory).close()
    assert logged(path) == text


def test_a_spool_that_was_only_just_made_is_none(tmp_path: Path, directory: int) -> None:
    path = tmp_path / "log"
    log = opened(path, directory)
    log.write("stdout", take(log, b"first\n"))
    (tmp_path / "stdout.spool").write_bytes(b"\0\0\0")
    heir = opened(path, directory)
    take(heir, b"second\n")
    opened(path, directory).close()
    assert logged(path) == b"first\nsecond\n"


@pytest.mark.parametrize("driver", ["json-file", "cri"])
@pytest.mark.parametrize("torn", [1, 4096, -1])
def test_an_append_that_was_torn_is_made_again(tmp_path: Path, directory: int, torn: int, driver: str) -> None:
    path = tmp_path / "log"
    log = opened(path, directory, driver)
    log.write("stdout", take(log, b"before\n"))
    mark, before = (tmp_path / MARK).read_bytes(), path.stat().st_size
    log.write("stdout", take(log, LINES))
    whole = path.read_bytes()
    for kept, expected in ((before + torn if torn > 0 else len(whole) + torn, whole), (len(whole), whole)):
        path.write_bytes(whole[:kept])
        (tmp_path / MARK).write_bytes(mark)
        opened(path, directory, driver).close()
        stamped = len(b"2026-01-02T03:04:05.123456789Z")
        assert len(path.read_bytes()) == len(expected)
        assert texts(path, driver, stamped) == [b"before\n", *LINES.splitlines(keepends=True)]


def texts(path: Path, driver: str, stamped: int) -> list[bytes]:
    lines = path.read_bytes().splitlines(keepends=True)
    if driver == "cri":
        return [line[stamped + len(b" stdout F ") :] for line in lines]
    return [json.loads(line)["log"].encode() for line in lines]


def waiting(directory: int, size: int) -> Spool:
    """A spool that so much waits in, and nothing was logged of."""
    spool = Spool(directory)
    spool.begin("stdout", (0, 0))
    reader, writer = os.pipe()
    for _ in range(size // KEPT):
        os.write(writer, bytes(KEPT))
        assert len(spool.take("stdout", reader, KEPT, pipe=True)) == KEPT
    os.close(reader)
    os.close(writer)
    return spool


def test_what_waits_is_not_copied_for_the_sake_of_less_that_goes(tmp_path: Path, directory: int) -> None:
    spool = waiting(directory, 32 * KEPT)
    first = (tmp_path / "stdout.spool").stat().st_ino
    copies = 0
    for _ in range(31):
        spool.logged("stdout", KEPT, (0, 0))
        spool.tidy("stdout")
        copies += (tmp_path / "stdout.spool").stat().st_ino != first
        first = (tmp_path / "stdout.spool").stat().st_ino
    assert 1 <= copies <= 6
    assert len(spool.unlogged("stdout")) == KEPT
    spool.close()


def test_what_is_all_in_the_log_is_let_go_without_a_new_file(tmp_path: Path, directory: int) -> None:
    spool = waiting(directory, 3 * KEPT)
    file = (tmp_path / "stdout.spool").stat()
    spool.logged("stdout", 3 * KEPT, (0, 0))
    spool.tidy("stdout")
    after = (tmp_path / "stdout.spool").stat()
    assert after.st_ino == file.st_ino
    assert after.st_size < 16
    spool.close()


@pytest.mark.parametrize("told", [True, False])
def test_a_shim_killed_while_it_lets_go_leaves_nothing_twice(tmp_path: Path, directory: int, told: bool) -> None:
    path = tmp_path / "log"
    log = opened(path, directory)
    line = b"x" * 99 + b"\n"
    first, last = line * 30, line * 640
    log.write("stdout", take(log, first))
    log.write("stdout", take(log, last))
    if not told:  # cut, and not told where it begins now
        os.pwrite(log._spool._fds["stdout"], bytes(8), 0)
    heir = opened(path, directory)
    heir.write("stdout", take(heir, b"more\n"))
    again = opened(path, directory)
    again.close()
    assert logged(path) == first + last + b"more\n"


def test_a_spool_that_a_full_disk_tears_is_given_up(tmp_path: Path, directory: int) -> None:
    spool = waiting(directory, MUCH + 2 * KEPT)
    spool.logged("stdout", MUCH, (0, 0))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (KEPT, before[1]))  # as a disk that is nearly full: it takes a part
    try:
        spool.tidy("stdout")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not spool.kept
    assert not (tmp_path / "stdout.spool").exists()


def test_the_copy_of_a_log_has_what_is_no_text_once_after_a_kill(tmp_path: Path, directory: int) -> None:
    socket_path, data = tmp_path / "server", [bytes(20000) + b"\n", bytes(500), b"\n"]
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as server, closing(Loop()) as loop:
        server.bind(str(socket_path))
        to = ToSyslog(Address("unix", str(socket_path)), 3, "", "t", "-")
        wanted = LogOptions("syslog", str(tmp_path / "log"), 0, 1, to=to)
        first = open_log(loop, wanted, directory=directory)
        first.write("stdout", take(first, b"".join(data[:2])))
        second = open_log(loop, wanted, directory=directory, resumed={})
        second.write("stdout", take(second, data[2]))
        written = (tmp_path / "log").read_bytes()
        for log in (first, second):
            log.close()
    entries = [json.loads(line) for line in written.splitlines()]
    kept = b"".join(base64.b64decode(entry["data"]) if "data" in entry else entry["log"].encode() for entry in entries)
    assert kept == b"".join(data)


@pytest.mark.parametrize("sends", ["lines", "bytes"])
def test_the_copy_of_a_log_that_nobody_took_has_each_line_once_after_a_kill(
    tmp_path: Path, directory: int, sends: str
) -> None:
    path, loop = tmp_path / "log", Loop()

    def opened() -> Log:
        cache = FileLog(LogFile(str(path), max_size=0, max_files=1), "json-file")
        if sends == "lines":
            nobody = SyslogReceiver(Address("unix", str(tmp_path / "nobody")))
            return SendingLog(loop, nobody, SyslogFraming(3, "", "t", "-"), cache=cache, spool=Spool(directory))
        pipes = {stream: PipeReceiver(full_pipe()) for stream in STREAMS}
        return PipingLog(loop, pipes, cache=cache, spool=Spool(directory))

    def full_pipe() -> int:
        reader, writer = os.pipe()
        fds.append(reader)
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while os.write(writer, bytes(4096)):
                pass
        return writer

    fds: list[int] = []
    first = opened()
    first.write("stdout", take(first, b"one\ntw"))
    second = opened()  # the first was killed
    second.write("stdout", take(second, b"o\nthree\n"))
    take(second, b"four\n")  # and the second before it wrote that
    third = opened()
    third.write("stdout", take(third, b"five\n"))
    assert logged(path) == b"one\ntwo\nthree\nfour\nfive\n"
    for log in (first, second, third):
        log.close()
    for fd in fds:
        os.close(fd)
    loop.close()


def test_a_program_that_ended_and_a_copy_that_the_disk_did_not_take_are_told_of(directory: int) -> None:
    told: list[str] = []
    with closing(Loop()) as loop:
        ends = [os.pipe() for _ in STREAMS]
        pipes = {stream: PipeReceiver(writer) for stream, (_, writer) in zip(STREAMS, ends, strict=True)}
        cache = FileLog(LogFile("/dev/full", max_size=0, max_files=1), "json-file")
        log = PipingLog(loop, pipes, cache=cache, spool=Spool(directory), tell=told.append)
        log.write("stdout", b"read\n")
        assert told == []
        for reader, _ in ends:
            os.close(reader)
        for _ in range(3):
            log.write("stdout", b"lost\n")
        assert [text for text in told if "has ended" in text] == told[:1]
        log.close()
        assert len(told) == 2
        assert "lacks 20 bytes" in told[1]
        assert log.dropped_bytes == 15
