"""How the command ends: its exit code, and that what it wrote is out by then or is told to be lost."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence

import pytest
from support.corrald import CORRAL, PATIENCE, Corrald
from support.requirements import needs

pytestmark = needs("root", "overlayfs", "busybox", "netns")

LARGE = 10_000_000
FULL = b"corral: [Errno 28] No space left on device\n"


def command(box: Corrald, *args: str, **streams: int) -> "subprocess.Popen[bytes]":
    """The installed command, executed, whatever the other tests do."""
    environment = os.environ | {"CORRAL_ADDRESS": box.address}
    return subprocess.Popen([CORRAL, *args], env=environment, stdin=subprocess.DEVNULL, **streams)


@pytest.fixture
def talker(box: Corrald, name: str) -> str:
    """A container that has written some and sleeps."""
    box.corral("run", "-d", "--network", "none", "--name", name, "busybox", "sh", "-c", "seq 9; sleep 1000", check=True)
    deadline = time.monotonic() + 10 * PATIENCE
    while box.corral("logs", name).stdout[-2:] != b"9\n":
        assert time.monotonic() < deadline
    return name


WRITERS = (["ps"], ["inspect", "TALKER"], ["logs", "TALKER"], ["logs", "-f", "TALKER"], ["exec", "TALKER", "seq", "9"])


def named(words: Sequence[str], talker: str) -> list[str]:
    return [talker if word == "TALKER" else word for word in words]


@pytest.mark.parametrize("words", WRITERS, ids=" ".join)
def test_a_reader_that_went_away_ends_it_as_sigpipe_would_and_quietly(
    box: Corrald, talker: str, words: Sequence[str]
) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    with command(box, *named(words, talker), stdout=writes, stderr=subprocess.PIPE) as process:
        os.close(writes)
        _, said = process.communicate(timeout=30 * PATIENCE)
    assert (process.returncode, said) == (141, b"")


@pytest.mark.parametrize("words", WRITERS, ids=" ".join)
def test_a_full_disk_is_a_failure_and_told_once(box: Corrald, talker: str, words: Sequence[str]) -> None:
    with (
        open("/dev/full", "wb") as full,
        command(box, *named(words, talker), stdout=full.fileno(), stderr=subprocess.PIPE) as process,
    ):
        _, said = process.communicate(timeout=30 * PATIENCE)
    assert (process.returncode, said) == (1, FULL)


def test_a_full_disk_under_what_a_container_writes_is_the_engines_failure(box: Corrald) -> None:
    with (
        open("/dev/full", "wb") as full,
        command(box, "run", "--rm", "busybox", "echo", "x", stdout=full.fileno(), stderr=subprocess.PIPE) as process,
    ):
        _, said = process.communicate(timeout=30 * PATIENCE)
    assert (process.returncode, said) == (125, FULL)


def test_stdout_that_the_caller_has_closed_is_nowhere(box: Corrald, talker: str) -> None:
    environment = os.environ | {"CORRAL_ADDRESS": box.address}
    for words in WRITERS[:3]:
        line = ["sh", "-c", 'exec "$@" >&-', "sh", CORRAL, *named(words, talker)]
        result = subprocess.run(line, env=environment, capture_output=True, timeout=30 * PATIENCE, check=False)
        assert (result.returncode, result.stderr) == (0, b""), words


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0, ["true"]),
        (3, ["sh", "-c", "exit 3"]),
        (126, ["/etc"]),
        (127, ["/no/such/program"]),
        (137, ["sh", "-c", "sh -c 'kill -9 $$'; exit $?"]),
    ],
)
def test_the_code_is_the_one_of_what_ran(box: Corrald, talker: str, code: int, words: Sequence[str]) -> None:
    for verb in (["run", "--rm", "busybox"], ["exec", talker]):
        with command(box, *verb, *words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            process.communicate(timeout=30 * PATIENCE)
        assert process.returncode == code, (verb, words)


def test_the_code_of_a_failure_of_its_own_depends_on_the_verb(box: Corrald) -> None:
    for code, words in ((125, ["run", "no/such:image"]), (125, ["run", "--no-such"]), (1, ["ps", "-f", "x"])):
        with command(box, *words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            said, complained = process.communicate(timeout=30 * PATIENCE)
        assert (process.returncode, said) == (code, b""), complained
        assert complained


def test_a_slow_reader_gets_all_of_it(box: Corrald, name: str) -> None:
    writes = f"head -c {LARGE} /dev/zero | tr '\\0' x | fold -w 5000; echo"
    with command(box, "run", "--name", name, "busybox", "sh", "-c", writes, stdout=subprocess.PIPE) as process:
        got = _slowly(process)
    assert (len(got), process.returncode) == (LARGE + LARGE // 5000, 0)
    with command(box, "logs", name, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        logged = _slowly(process)
    assert (len(logged), logged == got) == (len(got), True)
    assert process.returncode == 0


def _slowly(process: "subprocess.Popen[bytes]") -> bytes:
    assert process.stdout is not None
    got = b""
    for number in range(LARGE):
        data = os.read(process.stdout.fileno(), 65536)
        if not data:
            break
        got += data
        if number % 20 == 0:
            time.sleep(0.02)
    return got


def test_ctrl_c_ends_one_that_follows_quietly(box: Corrald, talker: str) -> None:
    followed = command(box, "logs", "-f", talker, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with followed as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"1\n"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=10 * PATIENCE)
    assert (process.returncode, said.strip()) == (130, b"")


def test_ctrl_c_ends_one_whose_reader_does_not_read(box: Corrald, name: str) -> None:
    box.corral("run", "--name", name, "busybox", "sh", "-c", f"yes | head -c {LARGE // 10}", check=True)
    with command(box, "logs", name, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        os.read(process.stdout.fileno(), 1)
        while process.poll() is None:  # it writes what it holds once more, and is interrupted once more
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)
    assert process.returncode == 130


def test_a_fault_shows_where_it_is_if_asked(box: Corrald) -> None:
    with command(box, "--debug", "logs", "nobody", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        _, said = process.communicate(timeout=30 * PATIENCE)
    assert process.returncode == 1
    assert said.startswith(b"Traceback (most recent call last):")
    assert said.endswith(b"corral.rpc.errors.NotFound: no such container: nobody\n")
