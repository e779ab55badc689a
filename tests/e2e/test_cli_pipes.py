"""Much data, which a client on the daemon's host moves itself, through the pipes of the process."""

import hashlib
import os
import random
import select
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
from support.corrald import CORRAL, PATIENCE, Corrald
from support.requirements import needs

from corral.cli.lost_end import LostEnd
from corral.client.execution import Attachment

if TYPE_CHECKING:
    from corral.client.sync import Client

pytestmark = needs("root", "overlayfs", "busybox", "netns")

MIB = 1 << 20
# What gRPC may have moved before, with all that it holds ready.
LITTLE = 24 * MIB
BLOCKS = "head -c 4194304 /dev/zero"


@pytest.fixture(scope="module")
def data() -> bytes:
    return random.Random(1).randbytes(64 * MIB + 12345)


@contextmanager
def command(
    box: Corrald,
    *arguments: str,
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.PIPE,
    before: Sequence[str] = (),
) -> Iterator["subprocess.Popen[bytes]"]:
    environment = os.environ | {"CORRAL_ADDRESS": box.address}
    args = [*before, str(CORRAL), *arguments]
    with subprocess.Popen(args, stdin=stdin, stdout=stdout, stderr=subprocess.PIPE, env=environment) as process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


def read_by(box: Corrald) -> int:
    """How much the daemon's processes have read so far. Source: proc_pid_io(5), rchar."""
    found = [Path(f"/proc/{process.pid}/io").read_text("ascii") for process in box.processes.values()]
    return sum(int(text.split()[1]) for text in found)


@contextmanager
def left_alone(box: Corrald) -> Iterator[None]:
    before = read_by(box)
    yield
    assert read_by(box) - before < LITTLE


def kill_shim_of(box: Corrald, name: str) -> None:
    with box.client() as client:
        shim = client.containers.get(name).shim_pid
    pidfd = os.pidfd_open(shim)
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    select.select([pidfd], [], [], 10)
    os.close(pidfd)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30 * PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("source", ["pipe", "file"])
def test_it_goes_both_ways_untouched_and_by_the_daemon(box: Corrald, data: bytes, tmp_path: Path, source: str) -> None:
    (tmp_path / "data").write_bytes(data)
    reading = (tmp_path / "data").open("rb")
    feeding = subprocess.Popen(["cat"], stdin=reading, stdout=subprocess.PIPE) if source == "pipe" else None
    with (
        left_alone(box),
        command(
            box, "run", "--rm", "-i", "busybox", "cat", stdin=(feeding.stdout if feeding else reading).fileno()
        ) as run,
    ):
        if feeding is not None:
            feeding.stdout.close()
        out, err = run.communicate()
    reading.close()
    assert feeding is None or feeding.wait() == 0
    assert (run.returncode, err) == (0, b"")
    assert hashlib.sha256(out).digest() == hashlib.sha256(data).digest()


def test_each_stream_goes_where_it_belongs_and_the_exit_code_comes_last(box: Corrald, name: str) -> None:
    script = f"{BLOCKS}; {BLOCKS} | tr '\\0' e >&2; echo out; echo err >&2; exit 7"
    with command(box, "run", "--name", name, "busybox", "sh", "-c", script) as run:
        out, err = run.communicate()
    assert (run.returncode, out == bytes(4 * MIB) + b"out\n", err == b"e" * 4 * MIB + b"err\n") == (7, True, True)
    logged = box.corral("logs", name)
    assert (logged.stdout == out, logged.stderr == err) == (True, True)


@pytest.mark.parametrize("flags", [os.O_TRUNC, os.O_APPEND, os.O_NONBLOCK])
def test_it_is_written_to_a_file_as_that_was_opened(box: Corrald, tmp_path: Path, flags: int) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"before\n")
    fd = os.open(path, os.O_WRONLY | flags)
    with left_alone(box), command(box, "run", "--rm", "busybox", "head", "-c", "64m", "/dev/zero", stdout=fd) as run:
        os.close(fd)
        assert run.communicate() == (None, b"")
    kept = b"before\n" if flags == os.O_APPEND else b""
    assert path.read_bytes() == kept + bytes(64 * MIB)


def test_both_streams_and_another_program_write_to_one_file(box: Corrald, name: str, tmp_path: Path) -> None:
    path = tmp_path / "out"
    lines = "i=0; while [ $i -lt 9 ]; do i=$((i+1)); echo out $i; usleep 9999; echo err $i >&2; usleep 9999; done"
    script = f"{BLOCKS}; {BLOCKS} >&2; while ! test -e /go; do usleep 9999; done; {lines}"
    with path.open("wb") as file:
        environment = os.environ | {"CORRAL_ADDRESS": box.address}
        command = [str(CORRAL), "run", "--name", name, "busybox", "sh", "-c", script]
        with subprocess.Popen(command, stdout=file, stderr=file, env=environment) as run:
            wait_for(lambda: path.stat().st_size == 8 * MIB)
            file.write(b"\nanother\n")
            file.flush()
            with box.client() as client:
                Path(f"/proc/{client.containers.get(name).pid}/root/go").touch()
            assert run.wait(30 * PATIENCE) == 0
    said = path.read_bytes()[8 * MIB :].decode().splitlines()[1:]
    assert said[0] == "another"
    assert sorted(said[1:]) == sorted(f"{stream} {i}" for i in range(1, 10) for stream in ("out", "err"))


def test_a_pipe_that_somebody_has_set_not_to_block_is_waited_for(box: Corrald, name: str) -> None:
    reader, writer = os.pipe2(os.O_NONBLOCK)
    with command(
        box, "run", "--name", name, "busybox", "sh", "-c", f"{BLOCKS}; sleep 2; {BLOCKS}", stdout=writer
    ) as run:
        os.close(writer)
        got, used = 0, []
        while (ready := select.select([reader], [], [], 30 * PATIENCE)[0]) and (block := os.read(reader, MIB)):
            got += len(block)
            if got == 4 * MIB:
                used.append(time_used(run.pid))
                time.sleep(1)
                used.append(time_used(run.pid))
        assert ready
        assert run.wait(30 * PATIENCE) == 0
    os.close(reader)
    assert got == 8 * MIB
    assert used[1] - used[0] < 0.1


def time_used(pid: int) -> float:
    """CPU time in seconds. Source: proc_pid_stat(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_stdin_that_breaks_has_ended(box: Corrald) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as ours:
        theirs, _ = server.accept()
        with theirs, command(box, "run", "--rm", "-i", "busybox", "wc", "-c", stdin=ours.fileno()) as run:
            theirs.sendall(bytes(8 * MIB))
            time.sleep(1)
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
            theirs.close()
            assert run.wait(30 * PATIENCE) == 0
            assert run.stdout is not None
            assert run.stdout.read() == b"8388608\n"


def test_a_command_in_a_container_likewise(box: Corrald, name: str, data: bytes) -> None:
    assert box.corral("run", "-d", "--name", name, "busybox", "sleep", "999").returncode == 0
    with left_alone(box), command(box, "exec", "-i", name, "cat", stdin=subprocess.PIPE) as run:
        out, err = run.communicate(data)
    assert (run.returncode, err, out == data) == (0, b"", True)


def test_whoever_reads_slowly_makes_the_process_wait(box: Corrald, name: str) -> None:
    script = f"for i in 1 2 3 4 5 6 7 8; do {BLOCKS}; done; touch /written; {BLOCKS}"
    with command(box, "run", "--name", name, "busybox", "sh", "-c", script) as run:
        assert run.stdout is not None
        assert len(run.stdout.read(2 * MIB)) == 2 * MIB
        with box.client() as client:
            root = Path(f"/proc/{client.containers.get(name).pid}/root")
        time.sleep(1)
        assert not (root / "written").exists()
        rest, _ = run.communicate()
    assert (run.returncode, len(rest)) == (0, 34 * MIB)


def test_input_does_not_wait_for_output_that_nobody_reads(box: Corrald, name: str) -> None:
    script = f"exec 3<&0; {BLOCKS} & wc -c <&3 >/in; touch /read; wait; cat /in"
    with command(box, "run", "-i", "--name", name, "busybox", "sh", "-c", script, stdin=subprocess.PIPE) as run:
        assert run.stdin is not None
        run.stdin.write(bytes(16 * MIB))
        run.stdin.close()
        assert run.stdout is not None
        assert run.stdout.read() == bytes(4 * MIB) + b"16777216\n"
        assert run.wait(30 * PATIENCE) == 0


def test_a_reader_that_leaves_ends_the_command(box: Corrald, name: str) -> None:
    with command(box, "run", "--name", name, "busybox", "cat", "/dev/zero") as run:
        assert run.stdout is not None
        run.stdout.read(8 * MIB)
        run.stdout.close()
        code = run.wait(30 * PATIENCE)
    assert box.corral("rm", "-f", name).returncode == 0
    with command(box, "run", "--name", name, "busybox", "sh", "-c", "while echo little; do usleep 9999; done") as run:
        assert run.stdout is not None
        run.stdout.readline()
        run.stdout.close()
        assert run.wait(30 * PATIENCE) == code


def test_a_process_that_wants_no_more_input_leaves_it(box: Corrald) -> None:
    with command(
        box,
        "run",
        "--rm",
        "-i",
        "busybox",
        "sh",
        "-c",
        "head -c 8388608 | wc -c; exec <&-; sleep 1; exit 5",
        stdin=subprocess.PIPE,
    ) as run:
        feeding = threading.Thread(target=feed_until_refused, args=(run.stdin,))
        feeding.start()
        assert run.stdout is not None
        assert run.stdout.read() == b"8388608\n"
        assert run.wait(30 * PATIENCE) == 5
        feeding.join()


def feed_until_refused(stdin: object) -> None:
    try:
        while True:
            stdin.write(bytes(MIB))  # type: ignore[attr-defined]
    except BrokenPipeError:
        pass


def test_from_another_network_namespace_it_comes_by_the_daemon(box: Corrald) -> None:
    with command(box, "run", "--rm", "-i", "busybox", "cat", stdin=subprocess.PIPE, before=["unshare", "--net"]) as run:
        out, err = run.communicate(bytes(8 * MIB))
    assert (run.returncode, err, out == bytes(8 * MIB)) == (0, b"", True)


def test_of_a_shim_that_is_killed_the_next_one_goes_on(box: Corrald, name: str) -> None:
    """What it had passed on comes first, then what comes by the other one: again much."""
    begin = f"exec 3<&0; cat <&3 >/in & {BLOCKS}; echo"
    script = f"{begin}; while ! test -e /go; do usleep 9999; done; echo b; {BLOCKS}; wait; wc -c </in"
    with command(box, "run", "-i", "--name", name, "busybox", "sh", "-c", script, stdin=subprocess.PIPE) as run:
        assert run.stdin is not None
        assert run.stdout is not None
        run.stdin.write(bytes(4 * MIB))
        run.stdin.flush()
        assert run.stdout.read(4 * MIB) == bytes(4 * MIB)
        with box.client() as client:
            root = Path(f"/proc/{client.containers.get(name).pid}/root")
        wait_for(lambda: (root / "in").stat().st_size == 4 * MIB)
        kill_shim_of(box, name)
        run.stdin.write(bytes(4 * MIB))
        run.stdin.close()
        (root / "go").touch()
        rest = run.stdout.read()
        code = run.wait(30 * PATIENCE)
    lines = rest.split(b"\n")
    assert (code, lines[-1], lines[-2].strip(b"\0"), lines[-3]) == (0, b"", b"8388608", b"b")


def pipes_of(pid: int) -> set[str]:
    found = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.add(str(fd.readlink()))
        except FileNotFoundError:
            continue
    return {target for target in found if target.startswith("pipe:")}


def wait_until_taken(box: Corrald, name: str, client: int, *, count: int) -> None:
    with box.client() as ask:
        shim = ask.containers.get(name).shim_pid
    wait_for(lambda: len(pipes_of(shim) & pipes_of(client)) == count)


@contextmanager
def waits_for_a_line(box: Corrald, name: str, *arguments: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A command that has said one line, has its pipes by now, and goes on once it is told another one."""
    with command(box, *arguments, stdin=subprocess.PIPE) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"ready\n"
        wait_until_taken(box, name, run.pid, count=3)
        yield run


def feed(stdin: object, data: bytes, *, to_the_end: bool) -> threading.Thread:
    def write() -> None:
        stdin.write(data)  # type: ignore[attr-defined]
        stdin.flush()  # type: ignore[attr-defined]
        if to_the_end:
            stdin.close()  # type: ignore[attr-defined]

    thread = threading.Thread(target=write)
    thread.start()
    return thread


def test_a_daemon_that_is_killed_and_comes_back_is_not_missed(box: Corrald, name: str, data: bytes) -> None:
    script = "echo ready; cat; exit 7"
    half = len(data) // 2
    with waits_for_a_line(box, name, "run", "-i", "--name", name, "busybox", "sh", "-c", script) as run:
        assert run.stdout is not None
        box.kill9()
        feeding = feed(run.stdin, data[:half], to_the_end=False)
        out = run.stdout.read(half - MIB)
        box.start()
        feeding.join()
        feeding = feed(run.stdin, data[half:], to_the_end=True)
        out += run.stdout.read()
        feeding.join()
        assert run.wait(30 * PATIENCE) == 7
    assert hashlib.sha256(out).digest() == hashlib.sha256(data).digest()


@pytest.mark.parametrize("flags", [("--rm",), (), ("--restart", "on-failure:1")], ids=["rm", "plain", "restart"])
def test_what_ends_while_no_daemon_runs_is_told_of_by_the_next(box: Corrald, name: str, flags: tuple[str, ...]) -> None:
    script = "test -e /again && exec sleep 1000; touch /again; echo ready; read line; echo $line; exit 9"
    with waits_for_a_line(box, name, "run", "-i", *flags, "--name", name, "busybox", "sh", "-c", script) as run:
        assert run.stdout is not None
        box.kill9()
        feed(run.stdin, b"on\n", to_the_end=True).join()
        assert run.stdout.readline() == b"on\n"
        box.start()
        assert (run.wait(30 * PATIENCE), run.stdout.read()) == (9, b"")


@pytest.mark.parametrize("is_back", [False, True], ids=["before", "after"])
def test_so_it_is_with_a_command_in_a_container(box: Corrald, name: str, is_back: bool) -> None:
    assert box.corral("run", "-d", "--name", name, "busybox", "sleep", "999").returncode == 0
    script = "echo ready; read line; echo $line; exit 9"
    with waits_for_a_line(box, name, "exec", "-i", name, "sh", "-c", script) as run:
        assert run.stdout is not None
        box.kill9()
        if is_back:
            box.start()
        feed(run.stdin, b"on\n", to_the_end=True).join()
        assert run.stdout.readline() == b"on\n"
        box.start()
        assert (run.wait(30 * PATIENCE), run.stdout.read()) == (9, b"")


def test_a_signal_that_comes_while_no_daemon_runs_is_passed_on_by_the_next(box: Corrald, name: str) -> None:
    script = "trap 'exit 9' TERM; echo ready; while :; do usleep 9999; done"
    with waits_for_a_line(box, name, "run", "-i", "--name", name, "busybox", "sh", "-c", script) as run:
        box.kill9()
        run.send_signal(signal.SIGTERM)
        box.start()
        assert run.wait(30 * PATIENCE) == 9


def test_a_second_one_that_asks_for_the_end_ends_the_client_alone(box: Corrald, name: str) -> None:
    script = "echo ready; exec sleep 999"
    with waits_for_a_line(box, name, "run", "-i", "--name", name, "busybox", "sh", "-c", script) as run:
        assert run.stderr is not None
        with box.client() as client:
            pid = client.containers.get(name).pid
        box.kill9()
        run.send_signal(signal.SIGTERM)
        run.send_signal(signal.SIGINT)
        try:
            code = run.wait(30 * PATIENCE)
            assert (code, b"the container goes on" in run.stderr.read()) == (125, True)
            assert b"sleep" in Path(f"/proc/{pid}/cmdline").read_bytes()
        finally:
            box.start()


def waits_of(pid: int) -> int:
    """How often its first thread has waited for something. Source: proc_pid_status(5)."""
    status = Path(f"/proc/{pid}/task/{pid}/status").read_text("ascii")
    return int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])


def test_a_daemon_that_stays_away_is_asked_for_now_and_then(box: Corrald, name: str) -> None:
    with waits_for_a_line(box, name, "run", "-i", "--name", name, "busybox", "sh", "-c", "echo ready; cat") as run:
        assert run.stdin is not None
        box.kill9()
        time.sleep(1)
        before = waits_of(run.pid)
        time.sleep(3)
        waits = waits_of(run.pid) - before
        box.start()
        run.stdin.close()
        assert run.wait(30 * PATIENCE) == 0
    assert waits < 300


def test_what_runs_in_its_place_since_the_journal_was_read_is_not_it(box: Corrald, name: str) -> None:
    script = "test -e /again && { sleep 2; exit 4; }; touch /again; exec sleep 999"
    begun = ("run", "-d", "--restart", "on-failure:1", "--name", name, "busybox", "sh", "-c", script)
    since_ns = time.time_ns()
    assert box.corral(*begun).returncode == 0
    with box.client() as client:
        made = client.containers.get(name)

        def attach(process: Attachment) -> object:
            os.kill(made.pid, signal.SIGKILL)
            wait_for(lambda: client.containers.get(name).pid not in (0, made.pid))
            return client.containers.attach(process)

        late = SimpleNamespace(system=client.system, containers=SimpleNamespace(attach=attach))
        end = LostEnd(cast("Client", late), Attachment(made.id), since_ns).ask(lambda call: None, lambda: None)
    assert end is not None
    assert end.code == 137
