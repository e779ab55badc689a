"""Reading logs that the shim's own writer writes, rotates and is still writing."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.shim.logs import FileLog, LogFile, timestamp
from corral.tasks.entries import PARSERS, Entry, Selection, parse_cri, parse_json, time_ns
from corral.tasks.logfiles import BLOCK, LogFiles

BOTH = frozenset({"stdout", "stderr"})
ALL = Selection(BOTH)
DRIVERS = ("json-file", "cri")


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def write(tmp_path: Path, driver: str) -> Iterator[Callable[..., None]]:
    """Writes lines to tmp_path/log as the shim would."""
    log = FileLog(LogFile(str(tmp_path / "log"), max_size=2000, max_files=4), driver)
    yield lambda text, stream="stdout": log.write(stream, text.encode())
    log.close()


def opened(path: Path, driver: str, selection: Selection = ALL, max_files: int = 4) -> LogFiles:
    return LogFiles(str(path / "log"), max_files, PARSERS[driver], selection)


def read_all(files: LogFiles) -> list[Entry]:
    """What there is now."""
    found: list[Entry] = []
    at_end = False
    while not at_end:
        entries, at_end = files.read()
        found += entries
    return found


def texts(entries: list[Entry]) -> list[str]:
    return [entry.line.decode().rstrip("\n") for entry in entries]


def test_times_are_exact_to_the_nanosecond():
    for at_ns in (0, 1, 999_999_999, 1_700_000_000_123_456_789):
        assert time_ns(timestamp(at_ns)) == at_ns
    assert time_ns("2026-01-02T03:04:05Z") == time_ns("2026-01-02T03:04:05.000000000Z")
    assert time_ns("2026-01-02T03:04:05.5Z") % 1_000_000_000 == 500_000_000
    for bad in ("", "yesterday", "2026-01-02 03:04:05Z", "2026-01-02T03:04:05.xZ"):
        with pytest.raises(ValueError, match=r"time in UTC|invalid literal"):
            time_ns(bad)


@pytest.mark.parametrize(
    "line",
    [
        b'{"log":"","data":"?","stream":"stdout","time":"2026-01-02T03:04:05Z"}',
        b"",
        b"{",
        b"[]",
        b"3",
        b'{"log":"x"}',
        b'{"log":"x","stream":"stdout","time":3}',
    ],
)
def test_what_is_no_entry_is_passed_over(line: bytes):
    assert not parse_json(line)
    assert not parse_cri(line)
    assert not parse_cri(b"2026-01-02T03:04:05Z stdlog F x")


def test_cri_lines_keep_spaces_and_carriage_returns():
    (entry,) = parse_cri(b"2026-01-02T03:04:05.1Z stderr F  a  b\r")
    assert (entry.stream, entry.line, entry.partial) == ("stderr", b" a  b\r\n", False)
    (piece,) = parse_cri(b"2026-01-02T03:04:05.1Z stdout P abc")
    assert (piece.line, piece.partial) == (b"abc", True)


def test_an_absent_log_is_empty_and_then_found(tmp_path: Path, driver: str, request: pytest.FixtureRequest):
    files = opened(tmp_path, driver)
    assert read_all(files) == []
    request.getfixturevalue("write")("late\n")
    assert texts(read_all(files)) == ["late"]
    files.close()


def test_rotated_files_are_read_in_order(tmp_path: Path, driver: str, write: Callable[..., None]):
    for number in range(120):
        write(f"line {number}\n")
    assert (tmp_path / "log.2").exists()
    files = opened(tmp_path, driver)
    found = texts(read_all(files))
    files.close()
    assert found == [f"line {number}" for number in range(120)][-len(found) :]
    assert len(found) > 30


def test_a_follower_sees_every_line_once_over_rotations(tmp_path: Path, driver: str, write: Callable[..., None]):
    files = opened(tmp_path, driver)
    found: list[str] = []
    for number in range(500):
        write(f"line {number}\n")
        if number % 7 == 0:
            found += texts(read_all(files))
    found += texts(read_all(files))
    files.close()
    assert found == [f"line {number}" for number in range(500)]


def test_several_rotations_between_two_looks_lose_nothing_that_is_kept(
    tmp_path: Path, driver: str, write: Callable[..., None]
):
    write("first\n")
    files = opened(tmp_path, driver)
    assert texts(read_all(files)) == ["first"]
    count = 0
    while not (tmp_path / "log.3").exists():
        write(f"line {count}\n")
        count += 1
    found = texts(read_all(files))
    files.close()
    assert found == [f"line {number}" for number in range(count)]


def test_a_line_is_shown_once_it_is_complete(tmp_path: Path):
    path = tmp_path / "log"
    whole = b'{"log":"abc\\n","stream":"stdout","time":"2026-01-02T03:04:05Z"}\n'
    path.write_bytes(whole + whole[:30])
    files = opened(tmp_path, "json-file")
    assert texts(read_all(files)) == ["abc"]
    with path.open("ab") as file:
        file.write(whole[30:])
    assert texts(read_all(files)) == ["abc"]
    files.close()


def test_a_single_file_that_is_truncated_is_read_from_its_beginning(tmp_path: Path):
    log = FileLog(LogFile(str(tmp_path / "log"), max_size=500, max_files=1), "json-file")
    files = opened(tmp_path, "json-file", max_files=1)
    found = []
    for number in range(40):
        log.write("stdout", f"line {number}\n".encode())
        found += texts(read_all(files))
    log.close()
    files.close()
    assert found == [f"line {number}" for number in range(40)]


@pytest.mark.parametrize("count", [0, 1, 3, 17, 1000])
def test_tail_is_the_last_lines_and_goes_on_after_them(
    tmp_path: Path, driver: str, write: Callable[..., None], count: int
):
    for number in range(60):
        write(f"line {number}\n", "stderr" if number % 3 == 0 else "stdout")
    everything = opened(tmp_path, driver)
    kept = texts(read_all(everything))
    everything.close()
    files = opened(tmp_path, driver, Selection(BOTH, tail=count))
    assert texts(read_all(files)) == (kept[-count:] if count else [])
    write("more\n")
    assert texts(read_all(files)) == ["more"]
    files.close()
    errors = opened(tmp_path, driver, Selection(frozenset({"stderr"}), tail=2))
    assert texts(read_all(errors)) == ["line 54", "line 57"]
    errors.close()


def test_tail_counts_a_line_in_pieces_as_one(tmp_path: Path, driver: str):
    log = FileLog(LogFile(str(tmp_path / "log"), max_size=1 << 20, max_files=4), driver)
    log.write("stdout", b"short\n" + b"x" * 40_000 + b"\nlast\n")
    log.close()
    files = opened(tmp_path, driver, Selection(BOTH, tail=2))
    entries = read_all(files)
    files.close()
    assert [entry.partial for entry in entries] == [True, True, False, False]
    assert b"".join(entry.line for entry in entries) == b"x" * 40_000 + b"\nlast\n"


def test_tail_counts_the_lines_of_what_is_no_text(tmp_path: Path, driver: str):
    log = FileLog(LogFile(str(tmp_path / "log"), max_size=0, max_files=1), driver)
    lines = [b"first\n", b"\0" * 500 + b"\n", b"\0\xff\n", b"last\n", b"\0torn"]
    log.write("stdout", b"".join(lines))
    log.close()
    for count, wanted in ((count, lines[5 - count :]) for count in range(6)):
        files = opened(tmp_path, driver, Selection(BOTH, tail=count))
        assert b"".join(entry.line for entry in read_all(files)).removesuffix(b"\n") == b"".join(wanted)
        files.close()


def test_tail_of_a_log_larger_than_a_block(tmp_path: Path):
    lines = [{"log": f"{n:06}\n", "stream": "stdout", "time": timestamp(n)} for n in range(20_000)]
    (tmp_path / "log").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert (tmp_path / "log").stat().st_size > 3 * BLOCK
    for count in (1, 5_000, 19_999, 20_001):
        files = opened(tmp_path, "json-file", Selection(BOTH, tail=count))
        assert texts(read_all(files)) == [f"{n:06}" for n in range(20_000)][-count:]
        files.close()


def test_since_and_until_bound_what_is_read(tmp_path: Path):
    entries = [{"log": f"{n}\n", "stream": "stdout", "time": timestamp(n * 10**9)} for n in range(10)]
    (tmp_path / "log").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    for tail, wanted in ((None, ["3", "4", "5"]), (2, ["4", "5"])):
        selection = Selection(BOTH, since_ns=3 * 10**9, until_ns=5 * 10**9, tail=tail)
        files = opened(tmp_path, "json-file", selection)
        assert texts(read_all(files)) == wanted
        files.close()


def test_closing_leaves_no_descriptor(tmp_path: Path, driver: str, write: Callable[..., None]):
    for number in range(60):
        write(f"line {number}\n")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for selection in (ALL, Selection(BOTH, tail=1), Selection(BOTH, since_ns=1 << 62)):
        files = opened(tmp_path, driver, selection)
        files.read()
        files.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@settings(max_examples=60, deadline=None)
@given(
    chunks=st.lists(st.binary(max_size=60) | st.text('ab\n\r\0\\" é', max_size=60).map(str.encode), max_size=40),
    looks=st.sets(st.integers(0, 40)),
    driver=st.sampled_from(DRIVERS),
)
def test_what_was_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, chunks: list[bytes], looks: set[int], driver: str
):
    path = tmp_path_factory.mktemp("log")
    log = FileLog(LogFile(str(path / "log"), max_size=3000, max_files=50), driver)
    files = opened(path, driver, max_files=50)
    found: list[Entry] = []
    for number, chunk in enumerate(chunks):
        log.write("stdout", chunk)
        if number in looks:
            found += read_all(files)
    log.close()
    found += read_all(files)
    files.close()
    written = b"".join(chunks)
    assert b"".join(entry.line for entry in found).removesuffix(b"\n") == written.removesuffix(b"\n")
