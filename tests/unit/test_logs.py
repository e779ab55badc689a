"""How output becomes lines of a log file, and what the file does when it is full."""

import base64
import errno
import json
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.shim import logs
from corral.shim.logs import BLOCK_LIMIT, LINES_LIMIT, PIECE_LIMIT, FileLog, LogFile, Part, cut

TIME = "2026-01-02T03:04:05.000000006Z"


def make(path: Path, driver: str = "json-file", *, max_size: int = 0, max_files: int = 3) -> FileLog:
    return FileLog(LogFile(str(path), max_size=max_size, max_files=max_files), driver)


def entries(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def cri_entries(path: Path) -> list[tuple[str, str, bytes]]:
    """(stream, tag, text) of each line."""
    found = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        _, stream, tag, text = line.split(b" ", 3)
        found.append((stream.decode(), tag.decode(), text))
    return found


CHUNKS = [b"\n", b"x" * PIECE_LIMIT, b"y" * (3 * PIECE_LIMIT), bytes(2 * PIECE_LIMIT), (b"z" * 1000 + b"\n") * 99]
LIMITS = {Part.LINES: LINES_LIMIT, Part.PIECE: PIECE_LIMIT, Part.REST: PIECE_LIMIT - 1}


@pytest.mark.parametrize("block_limit", [0, PIECE_LIMIT, BLOCK_LIMIT])
@given(st.lists(st.binary(max_size=40) | st.sampled_from(CHUNKS)))
def test_cutting_loses_and_adds_no_byte_and_keeps_to_the_limit(block_limit: int, chunks: list[bytes]) -> None:
    data = b"".join(chunks)
    parts = list(cut(data, block_limit))
    assert b"".join(group for _, group in parts) == data
    for part, group in parts:
        assert 0 < len(group) <= (LIMITS | {Part.BLOCK: block_limit})[part]
        if part is Part.BLOCK:
            assert b"\0" in group
        else:
            assert group.endswith(b"\n") == (part is Part.LINES)
            assert all(len(line) < PIECE_LIMIT for line in group.split(b"\n")) or part is Part.PIECE
    assert all(part is not Part.REST for part, _ in parts[:-1])


@given(st.lists(st.binary(max_size=40) | st.sampled_from(CHUNKS)), st.integers(0, 9))
def test_what_follows_a_group_is_cut_as_before(chunks: list[bytes], count: int) -> None:
    data = b"".join(chunks)
    parts = list(cut(data, BLOCK_LIMIT))
    rest = b"".join(group for _, group in parts[count:])
    assert list(cut(rest, BLOCK_LIMIT)) == parts[count:]


def test_a_character_is_not_torn_by_the_limit() -> None:
    for offset in range(4):
        data = b"a" * offset + "\N{GRINNING FACE}".encode() * PIECE_LIMIT
        pieces = [group for part, group in cut(data) if part is Part.PIECE]
        assert pieces
        for piece in pieces:
            piece.decode()


def test_bytes_that_are_no_characters_are_cut_at_the_limit() -> None:
    data = b"\x80" * (2 * PIECE_LIMIT)
    assert [len(group) for _, group in cut(data)] == [PIECE_LIMIT, PIECE_LIMIT]


@given(st.lists(st.text(st.characters(blacklist_characters="\n\0", blacklist_categories=["Cs"])), min_size=1))
def test_json_lines_decode_to_the_text_that_was_written(lines: list[str]) -> None:
    group = "".join(f"{line}\n" for line in lines).encode()
    framed = logs.json_lines(group, "stderr", TIME, True)
    decoded = [json.loads(line) for line in framed.split(b"\n")[:-1]]
    assert [entry["log"] for entry in decoded] == [f"{line}\n" for line in lines]
    assert all(entry["stream"] == "stderr" and entry["time"] == TIME for entry in decoded)


@pytest.mark.parametrize(
    "text",
    [
        '\\n "quoted" \\',
        "tab\tand escape\x1b[0m",
        "\x80\xff umlaut ü",
        "\ud7ff\ufffe",
        "\\\\n",
        "\x01 mark",
        "\\\\u0001",
        "\\u0001",
    ],
)
def test_json_escapes_what_looks_like_a_seam(text: str) -> None:
    group = f"{text}\n{text}\n".encode()
    decoded = [json.loads(line)["log"] for line in logs.json_lines(group, "stdout", TIME, True).split(b"\n")[:-1]]
    assert decoded == [f"{text}\n"] * 2


def test_lines_are_not_made_shorter_by_being_no_text() -> None:
    """Else a log of any size could hold any number of them."""
    framed = logs.json_lines(b"\0\xff\n" + b"\n" * 1000, "stdout", TIME, True)
    assert framed.count(b"\n") == 1001


def test_of_lines_that_are_no_utf8_the_others_stay_text() -> None:
    framed = logs.json_lines(b"a\r\xc3\xbc\n\xff\xfe\nb\n", "stdout", TIME, True)
    entries = [json.loads(line) for line in framed.split(b"\n")[:-1]]
    assert [entry["log"] for entry in entries] == ["a\rü\n", "", "b\n"]
    assert base64.b64decode(entries[1]["data"]) == b"\xff\xfe\n"
    assert logs.cri_lines(b"a\xff\xfeb\n", "stdout", TIME, True) == f"{TIME} stdout F a".encode() + b"\xff\xfeb\n"


def test_what_is_no_text_is_kept_byte_for_byte() -> None:
    lines = b"\0\xff\n" + b"\xfe" * 200 + b"\n"
    for group, whole in ((lines, True), (bytes(range(256)), False), (bytes(logs.PIECE_LIMIT), False)):
        (framed,) = logs.json_lines(group, "stderr", TIME, whole, attrs=',"attrs":{"a":"b"}').splitlines()
        entry = json.loads(framed)
        assert (entry["log"], base64.b64decode(entry["data"])) == ("", group)
        assert (entry["stream"], entry["attrs"], entry["time"]) == ("stderr", {"a": "b"}, TIME)
        assert len(framed) < 4 / 3 * len(group) + 120


def test_much_that_is_no_text_is_cut_into_blocks_that_a_file_holds(tmp_path: Path) -> None:
    data = bytes(range(256)) * 2048
    for max_size, count in ((0, 4), (2 * BLOCK_LIMIT, 4), (100_000, 32)):
        path = tmp_path / str(max_size)
        log = FileLog(LogFile(str(path), max_size=max_size, max_files=99), "json-file")
        log.write("stdout", data)
        log.close()
        files = [path, *(Path(f"{path}.{n}") for n in range(1, 99))]
        found = [entry for file in reversed(files) if file.exists() for entry in entries(file)]
        assert b"".join(base64.b64decode(entry["data"]) for entry in found) == data
        assert len(found) == count
        assert all(file.stat().st_size <= (max_size or len(data) * 2) for file in files if file.exists())


def test_a_line_written_in_dribs_is_one_entry(tmp_path: Path) -> None:
    log = make(tmp_path / "log")
    for byte in b"hello world\n":
        log.write("stdout", bytes([byte]))
    assert [entry["log"] for entry in entries(tmp_path / "log")] == ["hello world\n"]
    log.close()


def test_streams_do_not_mix_within_a_line(tmp_path: Path) -> None:
    log = make(tmp_path / "log")
    log.write("stdout", b"out")
    log.write("stderr", b"err\n")
    log.write("stdout", b"put\n")
    found = [(entry["stream"], entry["log"]) for entry in entries(tmp_path / "log")]
    assert found == [("stderr", "err\n"), ("stdout", "output\n")]
    log.close()


def test_a_long_line_is_pieces_of_which_only_the_last_ends_it(tmp_path: Path) -> None:
    line = b"0123456789" * 5000
    json_log, cri_log = make(tmp_path / "json"), make(tmp_path / "cri", "cri")
    for log in (json_log, cri_log):
        log.write("stdout", line + b"\nnext\n")
        log.close()
    texts = [entry["log"] for entry in entries(tmp_path / "json")]
    assert "".join(texts[:-1]).encode() == line + b"\n"
    assert [text.endswith("\n") for text in texts] == [False, False, False, True, True]
    cri = cri_entries(tmp_path / "cri")
    assert [tag for _, tag, _ in cri] == ["P", "P", "P", "F", "F"]
    assert b"".join(text for _, _, text in cri[:-1]) == line


def test_the_end_of_a_stream_writes_the_line_that_had_no_end(tmp_path: Path) -> None:
    json_log, cri_log = make(tmp_path / "json"), make(tmp_path / "cri", "cri")
    for log in (json_log, cri_log):
        log.write("stdout", b"one\ntwo")
        log.end("stdout")
        log.end("stdout")
        log.close()
    assert [entry["log"] for entry in entries(tmp_path / "json")] == ["one\n", "two"]
    assert cri_entries(tmp_path / "cri") == [("stdout", "F", b"one"), ("stdout", "F", b"two")]


def test_times_are_rfc3339_with_nanoseconds() -> None:
    assert logs.timestamp(1_767_323_045_000_000_006) == TIME


def test_rotation_keeps_the_newest_files_and_tears_no_line(tmp_path: Path) -> None:
    log = make(tmp_path / "log", max_size=10_000, max_files=3)
    for n in range(1000):
        log.write("stdout", b"line %d\n" % n)
    log.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "log.1", "log.2"]
    assert all(path.stat().st_size <= 10_000 for path in tmp_path.iterdir())
    kept = [entry["log"] for name in ("log.2", "log.1", "log") for entry in entries(tmp_path / name)]
    assert kept == [f"line {n}\n" for n in range(1000 - len(kept), 1000)]
    assert log.dropped_bytes == 0


def test_rotation_with_one_file_starts_it_anew(tmp_path: Path) -> None:
    log = make(tmp_path / "log", max_size=1000, max_files=1)
    for n in range(100):
        log.write("stdout", b"line %d\n" % n)
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
    assert entries(tmp_path / "log")[-1]["log"] == "line 99\n"


def test_a_write_of_many_rotations_keeps_every_line_whole(tmp_path: Path) -> None:
    log = make(tmp_path / "log", "cri", max_size=100_000, max_files=50)
    data = b"".join(b"line %d\n" % n for n in range(50_000))
    log.write("stdout", data)
    log.close()
    names = sorted((p.name for p in tmp_path.iterdir()), key=lambda name: -int(name.partition(".")[2] or 0))
    assert len(names) > 10
    assert b"".join(text + b"\n" for name in names for _, _, text in cri_entries(tmp_path / name)) == data


def test_lines_of_one_write_are_spread_over_files_that_keep_to_their_size(tmp_path: Path) -> None:
    log = make(tmp_path / "log", max_size=1024, max_files=3)
    log.write("stdout", b"".join(b"%d\n" % n for n in range(1000)) + b"\0" * 1000 + b"\n")
    log.write("stdout", b"x" * 2000 + b"\n" + b"y\n" * 100)
    log.close()
    *lines, last = (entry["log"] for name in ("log.2", "log.1", "log") for entry in entries(tmp_path / name))
    assert len(lines) > 20
    assert {*lines, last} == {"y\n"}
    assert all(path.stat().st_size <= 1024 for path in tmp_path.iterdir())
    assert log.dropped_bytes == 0


def test_reopening_follows_the_name_after_somebody_else_rotated(tmp_path: Path) -> None:
    log = make(tmp_path / "log")
    log.write("stdout", b"before\n")
    (tmp_path / "log").rename(tmp_path / "old")
    log.write("stdout", b"between\n")
    log.reopen()
    log.write("stdout", b"after\n")
    log.close()
    assert [entry["log"] for entry in entries(tmp_path / "old")] == ["before\n", "between\n"]
    assert [entry["log"] for entry in entries(tmp_path / "log")] == ["after\n"]


def test_reopening_that_fails_keeps_the_old_file(tmp_path: Path) -> None:
    directory = tmp_path / "logs"
    directory.mkdir()
    log = make(directory / "log")
    directory.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError):
        log.reopen()
    log.write("stdout", b"still\n")
    log.close()
    assert [entry["log"] for entry in entries(tmp_path / "moved" / "log")] == ["still\n"]


@pytest.fixture
def file_size_limit() -> Iterator[int]:
    """A disk that is full after 5,000 bytes: writes come back short, then fail."""
    limit, old = 5000, resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, old)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_drops_whole_lines_and_counts_the_bytes(tmp_path: Path, file_size_limit: int) -> None:
    log = make(tmp_path / "log", "cri")
    lines = [b"line %d of some length\n" % n for n in range(500)]
    for line in lines:
        log.write("stdout", line)
    log.close()
    kept = [text + b"\n" for _, _, text in cri_entries(tmp_path / "log")]
    assert kept == lines[: len(kept)]
    assert 0 < len(kept) < len(lines)
    assert log.dropped_bytes == sum(len(line) for line in lines[len(kept) :])


def test_a_disk_with_room_again_is_written_again(tmp_path: Path, file_size_limit: int) -> None:
    log = make(tmp_path / "log", "cri")
    for _ in range(500):
        log.write("stdout", b"something of a length\n")
    dropped = log.dropped_bytes
    os.truncate(tmp_path / "log", 0)
    log.write("stdout", b"again\n")
    log.close()
    assert dropped > 0
    assert log.dropped_bytes == dropped
    assert cri_entries(tmp_path / "log")[-1] == ("stdout", "F", b"again")


def test_a_stuck_reader_of_a_fifo_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log")
    reader = os.open(tmp_path / "log", os.O_RDONLY | os.O_NONBLOCK)
    log = make(tmp_path / "log", "cri")
    for _ in range(100):
        log.write("stdout", b"x" * 1000 + b"\n")
    assert log.dropped_bytes > 0
    log.close()
    os.close(reader)


def test_a_log_that_cannot_be_opened_says_so(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="log") as caught:
        LogFile(str(tmp_path / "none" / "log"), max_size=0, max_files=1)
    assert caught.value.errno == errno.ENOENT
