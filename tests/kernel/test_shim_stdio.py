"""What goes in and out of a container's processes: pipes, terminals, many clients, slow clients, replay, EOF."""

import hashlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from shimclient import RequestError, Workshop, connect, read_to_end, read_until, workshop
from support.requirements import needs

pytestmark = needs("root", "busybox")


@pytest.fixture(scope="module")
def shop() -> Iterator[Workshop]:
    with workshop() as made:
        yield made


def refused(kind: str) -> AbstractContextManager[object]:
    return pytest.raises(RequestError, match=f"^{kind}: ")


def write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


class Collector(threading.Thread):
    """Reads a descriptor to its end beside the test."""

    def __init__(self, fd: int) -> None:
        super().__init__(daemon=True)
        self.fd, self.data = fd, b""
        self.start()

    def run(self) -> None:
        self.data = read_to_end(self.fd)

    def result(self) -> bytes:
        self.join(20)
        assert not self.is_alive(), "no EOF"
        return self.data


def test_output_goes_to_its_stream_and_ends_with_eof(shop: Workshop) -> None:
    shim = shop.spawn("sh", "-c", "echo out; echo err >&2")
    shim.create()
    out, err = shim.attach("stdout", "stderr")
    shim.start()
    assert (read_to_end(out), read_to_end(err)) == (b"out\n", b"err\n")


def test_every_client_sees_every_byte(shop: Workshop) -> None:
    shim = shop.spawn("sh", "-c", "for i in $(seq 1000); do echo line $i; done")
    shim.create()
    clients = [Collector(shim.attach("stdout", lossless=True)[0]) for _ in range(8)]
    shim.start()
    expected = b"".join(b"line %d\n" % n for n in range(1, 1001))
    assert [client.result() for client in clients] == [expected] * 8


def test_a_client_that_leaves_does_not_disturb_the_others(shop: Workshop) -> None:
    shim = shop.spawn("sh", "-c", "for i in $(seq 2000); do echo line $i; done")
    shim.create()
    (leaver,) = shim.attach("stdout", lossless=True)
    stayer = Collector(shim.attach("stdout", lossless=True)[0])
    os.close(leaver)
    shim.start()
    assert stayer.result().endswith(b"line 2000\n")
    assert shim.wait()["code"] == 0


def test_a_late_client_gets_the_recent_output_first_and_no_gap(shop: Workshop) -> None:
    shim = shop.run("sh", "-c", "i=0; while read x; do i=$((i+1)); echo line $i; done", stdin=True)
    stdin, early = shim.attach("stdin", "stdout")
    os.write(stdin, b"x\n" * 3)
    read_until(early, b"line 3\n")
    late, plain = *shim.attach("stdout", replay=True), *shim.attach("stdout")
    os.write(stdin, b"x\n" * 2)
    assert read_until(late, b"line 5\n") == b"".join(b"line %d\n" % n for n in range(1, 6))
    assert read_until(plain, b"line 5\n") == b"line 4\nline 5\n"
    for fd in (stdin, early, late, plain):
        os.close(fd)


def test_replay_is_the_last_64_kib(shop: Workshop) -> None:
    shim = shop.run("sh", "-c", "for i in $(seq 30000); do echo line $i; done; echo done; sleep 100")
    (early,) = shim.attach("stdout", replay=True)
    read_until(early, b"done\n")
    (late,) = shim.attach("stdout", replay=True)
    replayed = read_until(late, b"done\n")
    full = b"".join(b"line %d\n" % n for n in range(1, 30001)) + b"done\n"
    assert replayed == full[-65536:]
    os.close(early)
    os.close(late)


def test_input_reaches_the_process_and_its_end_too(shop: Workshop) -> None:
    shim = shop.spawn("sh", "-c", "cat; echo eof")
    shim.create(stdin=True)
    stdin, out = shim.attach("stdin", "stdout", stdin_once=True)
    shim.start()
    os.write(stdin, b"some input\n")
    assert read_until(out, b"\n") == b"some input\n"
    os.close(stdin)
    assert read_to_end(out) == b"eof\n"


def test_input_stays_open_when_a_client_leaves_that_did_not_ask_for_once(shop: Workshop) -> None:
    shim = shop.spawn("cat")
    shim.create(stdin=True)
    shim.start()
    first, out = shim.attach("stdin", "stdout")
    os.write(first, b"one\n")
    read_until(out, b"one\n")
    os.close(first)
    (second,) = shim.attach("stdin")
    os.write(second, b"two\n")
    read_until(out, b"two\n")
    shim.call("close_stdin")
    assert read_to_end(out) == b""
    assert shim.wait()["code"] == 0
    os.close(second)


def test_once_ends_input_only_with_the_last_client(shop: Workshop) -> None:
    shim = shop.spawn("cat")
    shim.create(stdin=True)
    shim.start()
    (first,) = shim.attach("stdin", stdin_once=True)
    second, out = shim.attach("stdin", "stdout", stdin_once=True)
    os.close(first)
    os.write(second, b"still\n")
    assert read_until(out, b"\n") == b"still\n"
    os.close(second)
    assert read_to_end(out) == b""


def test_input_of_several_clients_is_merged_write_by_write(shop: Workshop) -> None:
    shim = shop.spawn("cat")
    shim.create(stdin=True)
    shim.start()
    (out,) = shim.attach("stdout", lossless=True)
    clients = [shim.attach("stdin")[0] for _ in range(4)]
    for round_ in range(10):
        for n, client in enumerate(clients):
            os.write(client, b"client %d round %d\n" % (n, round_))
    shim_lines = read_until(out, b"client 3 round 9\n")
    while shim_lines.count(b"\n") < 40:
        shim_lines += os.read(out, 65536)
    assert sorted(shim_lines.splitlines()) == sorted(
        b"client %d round %d" % (n, r) for n in range(4) for r in range(10)
    )
    for client in clients:
        os.close(client)
    os.close(out)


def test_input_before_the_start_waits_for_the_process(shop: Workshop) -> None:
    shim = shop.spawn("cat")
    shim.create(stdin=True)
    stdin, out = shim.attach("stdin", "stdout", stdin_once=True)
    write_all(stdin, b"early\n")
    os.close(stdin)
    time.sleep(0.02)
    shim.start()
    assert read_to_end(out) == b"early\n"


def test_a_process_that_does_not_want_input_closes_the_clients_end(shop: Workshop) -> None:
    shim = shop.spawn("sh", "-c", "exec <&-; echo closed; sleep 100")
    shim.create(stdin=True)
    stdin, out = shim.attach("stdin", "stdout")
    shim.start()
    read_until(out, b"closed\n")
    poll = select.poll()
    poll.register(stdin, 0)
    assert poll.poll(5000) == [(stdin, select.POLLERR)]
    with pytest.raises(BrokenPipeError):
        os.write(stdin, b"x")
    os.close(stdin)
    os.close(out)


def test_without_i_input_is_empty_and_cannot_be_attached(shop: Workshop) -> None:
    shim = shop.spawn("cat")
    shim.create()
    with refused("failed_precondition"):
        shim.attach("stdin")
    (out,) = shim.attach("stdout")
    shim.start()
    assert read_to_end(out) == b""
    assert shim.wait()["code"] == 0


@pytest.mark.parametrize("kind", ["file", "directory", "null"])
def test_only_pipes_and_sockets_are_attached(shop: Workshop, tmp_path: Path, kind: str) -> None:
    shim = shop.spawn("true")
    shim.create()
    path = {"file": tmp_path / "file", "directory": tmp_path, "null": Path("/dev/null")}[kind]
    fd = os.open(path, os.O_RDONLY if kind == "directory" else os.O_RDWR | os.O_CREAT)
    with refused("invalid_argument"):
        shim.call("attach", [fd], stdout=True)
    os.close(fd)


def test_a_client_may_use_one_socket_for_all(shop: Workshop) -> None:
    shim = shop.spawn("cat")
    shim.create(stdin=True)
    shim.start()
    ours, theirs = socket.socketpair()
    shim.call("attach", [theirs.fileno()] * 2, stdin=True, stdout=True, stdin_once=True)
    theirs.close()
    ours.sendall(b"both ways\n")
    assert ours.recv(100) == b"both ways\n"
    ours.shutdown(socket.SHUT_WR)
    assert ours.recv(100) == b""
    ours.close()


def test_a_lossless_client_that_does_not_read_holds_the_process_and_loses_nothing(shop: Workshop) -> None:
    total = 8 << 20
    shim = shop.spawn("sh", "-c", f"head -c {total} /dev/zero; echo finished >&2")
    shim.create()
    out, err = shim.attach("stdout", "stderr", lossless=True)
    shim.start()
    time.sleep(0.5)
    assert select.select([err], [], [], 0)[0] == [], "the process went on without its reader"
    data = Collector(out)
    assert read_until(err, b"finished\n") == b"finished\n"
    assert data.result() == bytes(total)
    os.close(err)


def test_a_lossy_client_that_does_not_read_loses_counted_bytes_and_holds_nobody(shop: Workshop) -> None:
    total = 8 << 20
    shim = shop.spawn("sh", "-c", f"head -c {total} /dev/zero; echo finished >&2; read x")
    shim.create(stdin=True, driver="none")
    out, err = shim.attach("stdout", "stderr")
    shim.start()
    assert read_until(err, b"finished\n") == b"finished\n"
    data = Collector(out)
    shim.call("close_stdin")
    received = len(data.result())
    assert 1 << 20 <= received < total
    os.close(err)


def test_dropped_bytes_of_clients_are_reported(shop: Workshop) -> None:
    total = 4 << 20
    shim = shop.spawn("sh", "-c", f"head -c {total} /dev/zero; echo finished >&2; sleep 100")
    shim.create(driver="none")
    out, err = shim.attach("stdout", "stderr")
    shim.start()
    read_until(err, b"finished\n")
    time.sleep(0.3)  # until the shim has read what is still in the pipe
    dropped = shim.state()["client_dropped_bytes"]
    assert isinstance(dropped, int)
    received = 0
    while received + dropped < total:
        received += len(os.read(out, 1 << 20))
    assert received + dropped == total
    os.close(out)
    os.close(err)


def test_no_byte_is_lost_when_the_process_ends_before_its_reader_catches_up(shop: Workshop) -> None:
    total = 900_000
    shim = shop.spawn("head", "-c", str(total), "/dev/zero")
    shim.create()
    (out,) = shim.attach("stdout", lossless=True)
    shim.call("subscribe")
    shim.start()
    shim.peer.event()
    assert shim.peer.event()["code"] == 0
    time.sleep(0.3)
    assert read_to_end(out) == bytes(total)


def test_a_reader_that_stopped_does_not_keep_the_shim_for_ever(shop: Workshop) -> None:
    shim = shop.spawn("head", "-c", "900000", "/dev/zero")
    shim.create()
    (out,) = shim.attach("stdout", lossless=True)
    shim.start()
    assert shim.wait()["code"] == 0
    os.close(out)


def test_binary_data_passes_unchanged_both_ways(shop: Workshop) -> None:
    data = os.urandom(16 << 20)
    shim = shop.spawn("cat")
    shim.create(stdin=True, driver="none")
    stdin, out = shim.attach("stdin", "stdout", stdin_once=True, lossless=True)
    shim.start()
    collector = Collector(out)
    write_all(stdin, data)
    os.close(stdin)
    assert hashlib.sha256(collector.result()).digest() == hashlib.sha256(data).digest()


def test_output_is_logged_whether_or_not_anybody_watches(shop: Workshop) -> None:
    shim = shop.run("sh", "-c", "echo one; echo two >&2; printf three")
    shim.wait()
    assert sorted(shim.log_entries()) == [("stderr", "two\n"), ("stdout", "one\n"), ("stdout", "three")]


def test_a_process_that_leaves_children_on_its_output_is_still_reported(shop: Workshop) -> None:
    # Its children outlive it only in a pid namespace that is not their own.
    shim = shop.spawn("sh", "-c", "echo hi; sleep 60 & echo $!", namespaces=("mount", "ipc", "uts"))
    shim.create()
    (out,) = shim.attach("stdout")
    started = time.monotonic()
    shim.start()
    said, child = read_to_end(out).split()
    assert said == b"hi"
    assert time.monotonic() - started > 1
    assert shim.wait()["code"] == 0
    os.kill(int(child), signal.SIGKILL)  # which would fail if it had ended


def test_the_exit_is_on_disk_while_children_still_hold_the_output(shop: Workshop) -> None:
    shim = shop.spawn("sh", "-c", "sleep 5 & exit 9", namespaces=("mount", "ipc", "uts"))
    shim.create()
    shim.start()
    deadline = time.monotonic() + 1.5
    while not (shim.bundle / "exit.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert shim.exit_file()["code"] == 9


def test_a_user_other_than_root_can_reopen_its_output(shop: Workshop) -> None:
    shim = shop.spawn("sh", "-c", "id -u; echo again > /proc/self/fd/1; echo err > /proc/self/fd/2")
    shim.create(user="user")
    out, err = shim.attach("stdout", "stderr")
    shim.start()
    assert (read_to_end(out), read_to_end(err)) == (b"1000\nagain\n", b"err\n")


# Terminals.


def test_a_terminal_is_one_and_has_the_size_that_was_asked_for(shop: Workshop) -> None:
    shim = shop.spawn("sh", "-c", "tty; stty size; read x; stty size", terminal=True)
    shim.create(stdin=True, console_size=[132, 43])
    stdin, out = shim.attach("stdin", "stdout")
    shim.start()
    assert read_until(out, b"43 132\r\n").startswith(b"/dev/")
    shim.call("resize", width=90, height=20)
    os.write(stdin, b"\r")
    assert b"20 90\r\n" in read_to_end(out)
    os.close(stdin)


def test_a_terminal_interrupts_on_control_c(shop: Workshop) -> None:
    shim = shop.spawn(
        "sh", "-c", "trap 'echo caught; exit 4' INT; echo ready; while :; do sleep 0.05; done", terminal=True
    )
    shim.create(stdin=True)
    stdin, out = shim.attach("stdin", "stdout")
    shim.start()
    read_until(out, b"ready\r\n")
    os.write(stdin, b"\x03")
    assert read_to_end(out) == b"^Ccaught\r\n"
    assert shim.wait()["code"] == 4
    os.close(stdin)


def test_resizing_signals_the_program(shop: Workshop) -> None:
    shim = shop.spawn("sh", "-c", "trap 'stty size' WINCH; echo ready; while :; do sleep 0.05; done", terminal=True)
    shim.create()
    (out,) = shim.attach("stdout")
    shim.start()
    read_until(out, b"ready\r\n")
    shim.call("resize", width=77, height=11)
    read_until(out, b"11 77\r\n")
    os.close(out)


def test_a_terminal_survives_its_clients(shop: Workshop) -> None:
    shim = shop.spawn("sh", "-c", "while read x; do echo got $x; done", terminal=True)
    shim.create(stdin=True)
    stdin, out = shim.attach("stdin", "stdout", stdin_once=True)
    shim.start()
    os.write(stdin, b"one\r")
    read_until(out, b"got one\r\n")
    os.close(stdin)
    os.close(out)
    stdin, out = shim.attach("stdin", "stdout", stdin_once=True)
    os.write(stdin, b"two\r")
    read_until(out, b"got two\r\n")
    os.close(stdin)
    os.close(out)
    assert shim.state()["state"] == "running"


def test_closing_the_input_of_a_terminal_types_its_end_of_file(shop: Workshop) -> None:
    shim = shop.spawn("cat", terminal=True)
    shim.create(stdin=True)
    (out,) = shim.attach("stdout")
    shim.start()
    shim.call("close_stdin")
    read_to_end(out)
    assert shim.wait()["code"] == 0


def test_a_terminal_that_all_processes_closed_for_a_while_is_read_again(shop: Workshop) -> None:
    script = "exec <&- >&- 2>&-; sleep 0.3; exec >/dev/console 2>/dev/null || exec >/dev/pts/0; echo back"
    shim = shop.spawn("sh", "-c", script, terminal=True)
    shim.create()
    (out,) = shim.attach("stdout")
    shim.start()
    assert read_to_end(out) == b"back\r\n"


def test_a_terminal_has_no_stderr_of_its_own(shop: Workshop) -> None:
    shim = shop.spawn("true", terminal=True)
    shim.create()
    with refused("invalid_argument"):
        shim.attach("stderr")


def test_terminal_output_is_complete_at_the_end(shop: Workshop) -> None:
    shim = shop.spawn("sh", "-c", "stty -opost; for i in $(seq 5000); do echo line $i; done", terminal=True)
    shim.create()
    out = Collector(shim.attach("stdout", lossless=True)[0])
    shim.start()
    assert out.result() == b"".join(b"line %d\n" % n for n in range(1, 5001))


def test_a_large_paste_into_a_terminal_arrives(shop: Workshop) -> None:
    shim = shop.spawn("sh", "-c", "stty raw -echo; echo ready; head -c 200000 | md5sum", terminal=True)
    shim.create(stdin=True)
    stdin, out = shim.attach("stdin", "stdout", lossless=True)
    shim.start()
    read_until(out, b"ready\n")
    data = os.urandom(200_000)
    write_all(stdin, data)
    assert read_until(out, b"-\n").split()[0].decode() == hashlib.md5(data, usedforsecurity=False).hexdigest()
    os.close(stdin)
    os.close(out)


# Execs.


def test_an_exec_has_streams_and_an_exit_of_its_own(shop: Workshop) -> None:
    shim = shop.run("sleep", "100")
    shim.call("subscribe")
    shim.exec("e1", "sh", "-c", "cat; echo err >&2; exit 6", stdin=True)
    stdin, out, err = shim.attach("stdin", "stdout", "stderr", exec_id="e1", stdin_once=True)
    os.write(stdin, b"input\n")
    os.close(stdin)
    started = shim.start("e1")
    assert (read_to_end(out), read_to_end(err)) == (b"input\n", b"err\n")
    assert [(e["event"], e["exec"], e["pid"]) for e in (shim.peer.event(), shim.peer.event())] == [
        ("started", "e1", started["pid"]),
        ("exited", "e1", started["pid"]),
    ]
    found = shim.wait_state("stopped", "e1")["exit"]
    assert isinstance(found, dict)
    assert (found["code"], found["exec"]) == (6, "e1")
    assert (shim.bundle / "execs/e1.json").exists()
    shim.call("delete_exec", exec="e1")
    assert not any((shim.bundle / "execs").iterdir())
    assert shim.state()["execs"] == {}
    assert shim.log_entries() == []


def test_an_exec_may_have_a_terminal(shop: Workshop) -> None:
    shim = shop.run("sleep", "100")
    size = {"width": 66, "height": 33}
    shim.exec("e", "sh", "-c", "stty size; read x; stty size", stdin=True, terminal=True, consoleSize=size)
    stdin, out = shim.attach("stdin", "stdout", exec_id="e")
    shim.start("e")
    read_until(out, b"33 66\r\n")
    shim.call("resize", exec="e", width=44, height=22)
    os.write(stdin, b"\r")
    assert b"22 44\r\n" in read_to_end(out)
    os.close(stdin)


def test_an_exec_that_cannot_run_is_an_error_and_no_event(shop: Workshop) -> None:
    shim = shop.run("sleep", "100")
    shim.call("subscribe")
    shim.exec("e", "/none")
    (out,) = shim.attach("stdout", exec_id="e")
    with refused("exec_not_found"):
        shim.start("e")
    assert read_to_end(out) == b""
    shim.exec("d", "/etc/passwd")
    with refused("exec_denied"):
        shim.start("d")
    assert not shim.peer.events
    for exec_id in ("e", "d"):
        with refused("failed_precondition"):
            shim.start(exec_id)
        shim.call("delete_exec", exec=exec_id)
    assert shim.state()["state"] == "running"


def test_exec_ids_are_unique_until_deleted(shop: Workshop) -> None:
    shim = shop.run("sleep", "100")
    shim.exec("e", "true")
    with refused("already_exists"):
        shim.exec("e", "true")
    shim.call("delete_exec", exec="e")
    shim.exec("e", "sleep", "100")
    shim.start("e")
    with refused("failed_precondition"):
        shim.call("delete_exec", exec="e")
    shim.call("kill", exec="e", signal=9)
    found = shim.wait_state("stopped", "e")["exit"]
    assert isinstance(found, dict)
    assert found["code"] == 137
    with refused("failed_precondition"):
        shim.call("kill", exec="e", signal=9)


def test_execs_end_with_their_container_and_are_reported(shop: Workshop) -> None:
    shim = shop.run("sleep", "100")
    shim.call("subscribe")
    shim.exec("e", "sleep", "100")
    shim.start("e")
    shim.peer.event()
    shim.call("kill", signal=9)
    ended = {str(e["exec"]): e["code"] for e in (shim.peer.event(), shim.peer.event())}
    assert ended == {"": 137, "e": 137}
    shim.wait()
    assert (shim.bundle / "execs/e.json").exists()


def test_an_exec_whose_child_keeps_the_output_is_reported_within_seconds(shop: Workshop) -> None:
    shim = shop.run("sleep", "100")
    shim.exec("e", "sh", "-c", "(while sleep 0.2; do echo tick; done) & echo main")
    (out,) = shim.attach("stdout", exec_id="e")
    started = time.monotonic()
    shim.start("e")
    assert read_to_end(out).startswith(b"main\n")
    assert time.monotonic() - started < 20
    shim.wait_state("stopped", "e")


def test_many_execs_at_once(shop: Workshop) -> None:
    shim = shop.run("sleep", "100")
    count = 30
    outs = []
    for n in range(count):
        shim.exec(f"e{n}", "sh", "-c", f"sleep 0.1; echo {n}; exit {n}")
        outs += shim.attach("stdout", exec_id=f"e{n}")
        shim.start(f"e{n}")
    assert [read_to_end(out) for out in outs] == [b"%d\n" % n for n in range(count)]
    for n in range(count):
        found = shim.wait_state("stopped", f"e{n}")["exit"]
        assert isinstance(found, dict)
        assert found["code"] == n


def test_a_second_daemon_attaches_after_the_first_has_died(shop: Workshop) -> None:
    shim = shop.run("sh", "-c", "while read x; do echo got $x; done", stdin=True)
    stdin, out = shim.attach("stdin", "stdout", lossless=True)
    os.write(stdin, b"one\n")
    read_until(out, b"got one\n")
    shim.peer.close()
    os.close(stdin)
    os.close(out)
    shim.peer = connect(shim.bundle)
    shim.call = shim.peer.call
    stdin, out = shim.attach("stdin", "stdout", lossless=True, replay=True)
    os.write(stdin, b"two\n")
    assert read_until(out, b"got two\n") == b"got one\ngot two\n"
    os.close(stdin)
    os.close(out)
