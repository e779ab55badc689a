"""Logs that a shim sends: to receivers that are slow, go away or never take anything, and over the shim's own death."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from itertools import groupby
from pathlib import Path

import pytest
from shimclient import Workshop, workshop
from support.requirements import needs
from test_shim_adoption import Keeper, heir_of, kill, wait_gone_or_told

from corral.kernel.cgroup import detect

pytestmark = needs("root", "busybox")


@pytest.fixture(scope="module")
def shop() -> Iterator[Workshop]:
    with workshop() as made:
        yield made


def to_syslog(path: Path, **more: object) -> dict[str, object]:
    return {"driver": "syslog", "to": {"kind": "unixgram", "path": str(path), "tag": "t"}, **more}


def server_at(path: Path) -> socket.socket:
    server = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    server.bind(os.fspath(path))
    server.settimeout(10)
    return server


def until(check: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not check():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


class Reader(threading.Thread):
    """Reads all that arrives, up to the last line."""

    def __init__(self, server: socket.socket, last: str) -> None:
        super().__init__()
        self._server, self._last = server, last
        self.texts: list[str] = []
        self.start()

    def run(self) -> None:
        with suppress(TimeoutError):
            while not self.texts or self.texts[-1] != self._last:
                self.texts.append(self._server.recv(65536).decode().rpartition("]: ")[2].rstrip("\n"))

    def all(self) -> list[str]:
        self.join()
        return self.texts


@pytest.mark.parametrize("moment", ["shim.log.sent@3", "shim.log.taken@2"])
def test_no_line_is_lost_or_out_of_order_whenever_a_shim_is_killed(moment: str, tmp_path: Path) -> None:
    """At most the line that was being sent comes twice."""
    with (
        workshop({"CORRAL_FAILPOINTS": moment.replace("@", "=kill@")}) as shop,
        closing(server_at(tmp_path / "log")) as server,
    ):
        count = "i=0; while [ $i -lt 20 ]; do i=$((i+1)); echo line $i; usleep 5000; done; exit 20"
        shim = shop.spawn("sh", "-c", count)
        log = to_syslog(tmp_path / "log")
        shim.create(log=log)
        keeper, reader = Keeper(shim), Reader(server, "line 20")
        shim.start()
        heirs = 0
        while not wait_gone_or_told(shim):
            shim.peer.close()
            heirs += 1
            with suppress(EOFError):
                keeper.hand_over(heir_of(shop, shim), log=log)
        keeper.let_go()
        assert heirs >= 1
        assert shim.exit_file()["code"] == 20
        got = reader.all()
        assert [line for line, _ in groupby(got)] == [f"line {i}" for i in range(1, 21)]
        assert len(got) <= 20 + heirs


def test_a_receiver_that_takes_nothing_costs_counted_bytes_of_the_oldest(shop: Workshop, tmp_path: Path) -> None:
    with closing(server_at(tmp_path / "log")) as server:
        shim = shop.spawn("sh", "-c", "seq 1 20000; read x")
        shim.create(log=to_syslog(tmp_path / "log", buffer_size=10_000), stdin=True)
        shim.start()
        deadline = time.monotonic() + 10
        while not (dropped := shim.state()["dropped_bytes"]) or shim.state()["dropped_bytes"] != dropped:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (stdin,) = shim.attach("stdin")
        os.write(stdin, b"\n")
        os.close(stdin)
        got = Reader(server, "20000").all()
        exited = shim.wait()
        assert exited["code"] == 0
        everything = "".join(f"{n}\n" for n in range(1, 20001))
        assert exited["dropped_bytes"] == len(everything) - sum(len(text) + 1 for text in got)
        assert got == sorted(got, key=int)


def test_a_program_that_reads_nothing_holds_up_nobody(shop: Workshop, tmp_path: Path) -> None:
    program = tmp_path / "stuck"
    program.write_text("#!/bin/sh\nexec 5>&-\nsleep 100\n")
    program.chmod(0o755)
    shim = shop.spawn("sh", "-c", "seq 1 100000; exit 7")
    shim.create(log={"driver": "binary", "to": {"args": [str(program)], "env": {}}, "buffer_size": 4096})
    try:
        shim.start()
        shim.wait_state("stopped")
        found = shim.exit_file()
        assert found["code"] == 7
        assert isinstance(found["dropped_bytes"], int)
        assert found["dropped_bytes"] > 300_000
    finally:
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if os.fsencode(program) in (process / "cmdline").read_bytes().split(b"\0"):
                    os.killpg(int(process.name), signal.SIGKILL)
    shim.wait()


def test_a_program_that_lives_on_and_reads_no_more_is_told_of_and_costs_counted_bytes(
    shop: Workshop, tmp_path: Path
) -> None:
    program = tmp_path / "closing"
    program.write_text(f"#!/bin/sh\nexec 3<&- 4<&- 5>&-\nwhile [ -e {tmp_path}/on ]; do sleep 0.05; done\n")
    program.chmod(0o755)
    (tmp_path / "on").touch()
    shim = shop.spawn("sh", "-c", "echo one; echo two >&2")
    try:
        shim.create(log={"driver": "binary", "to": {"args": [str(program)], "env": {}}})
        shim.start()
        assert shim.wait()["dropped_bytes"] == len("one\ntwo\n")
    finally:
        (tmp_path / "on").unlink()
    assert "the logging program has ended, or closed what it was to read" in (shim.bundle / "shim.log").read_text()


def attendants(keeper: Keeper) -> list[int]:
    """Who has the reading end of the pipe that tells them that all is over."""
    pipe = Path("/proc/self/fd", str(keeper.fds["log.life"])).readlink()
    found = []
    for fd in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            flags = Path(fd.parent.parent, "fdinfo", fd.name).read_text() if fd.readlink() == pipe else ""
            if flags and not int(flags.split("flags:")[1].split()[0], 8) & os.O_ACCMODE:
                found.append(int(fd.parts[2]))
    return found


def test_an_heir_finds_that_nobody_attends_to_a_program_and_has_it_attended_to(shop: Workshop, tmp_path: Path) -> None:
    program = tmp_path / "attended"
    program.write_text("#!/bin/sh\nexec 5>&-\ncat <&3 >> $1\n")
    program.chmod(0o755)
    shim = shop.spawn("sh", "-c", "read x; echo two; exit 3")
    log = {"driver": "binary", "to": {"args": [str(program), str(tmp_path / "out")], "env": {}}}
    shim.create(log=log, stdin=True)
    keeper = Keeper(shim)
    shim.start()
    (attendant,) = attendants(keeper)
    os.kill(attendant, signal.SIGKILL)
    until(lambda: not attendants(keeper))
    kill(shim)
    heir = heir_of(shop, shim)
    keeper.hand_over(heir, stdin=True, log=log)
    (attendant,) = attendants(keeper)
    (stdin,) = heir.attach("stdin")
    keeper.let_go()
    os.write(stdin, b"\n")
    os.close(stdin)
    assert heir.wait()["code"] == 3
    until(lambda: not Path("/proc", str(attendant)).exists())
    assert (tmp_path / "out").read_text() == "two\n"


@pytest.mark.parametrize("kept", [True, False])
def test_a_program_goes_on_with_the_next_shim_if_its_pipes_were_kept_and_else_reads_the_end(
    shop: Workshop, tmp_path: Path, kept: bool
) -> None:
    program = tmp_path / "keeping"
    program.write_text("#!/bin/sh\nexec 5>&-\ncat <&3 >> $1\necho END >> $1\n")
    program.chmod(0o755)
    out = tmp_path / f"out-{kept}"
    shim = shop.spawn("sh", "-c", "echo one; read x; echo two; exit 3")
    log = {"driver": "binary", "to": {"args": [str(program), str(out)], "env": {}}}
    shim.create(log=log, stdin=True)
    keeper = Keeper(shim)
    assert {"log.stdout", "log.stderr", "log.life", "log.program"} <= keeper.fds.keys()
    shim.start()
    until(lambda: out.exists() and out.read_text() == "one\n")
    shim.state()  # who answers has marked what was sent: else it may be sent twice
    if not kept:
        keeper.let_go("log.stdout", "log.stderr")
    kill(shim)
    heir = heir_of(shop, shim)
    keeper.hand_over(heir, stdin=True, log=log)
    (stdin,) = heir.attach("stdin")
    keeper.let_go()
    os.write(stdin, b"\n")
    os.close(stdin)
    assert heir.wait()["code"] == 3
    until(lambda: out.read_text().endswith("END\n"))
    assert out.read_text() == ("one\ntwo\nEND\n" if kept else "one\nEND\n")


def test_an_heir_kills_who_has_had_its_time_while_there_was_no_shim(shop: Workshop) -> None:
    shim = shop.spawn("sleep", "1000")
    shim.create(timeout_ns=400_000_000)
    keeper = Keeper(shim)
    shim.start()
    started_at_ns = time.time_ns()
    kill(shim)
    time.sleep(0.5)
    assert Path(f"/proc/{keeper.process['pid']}").exists()
    heir = heir_of(shop, shim)
    keeper.hand_over(heir, started_at_ns=started_at_ns, timeout_ns=400_000_000)
    keeper.let_go()
    exited = heir.wait()
    assert (exited["code"], exited["signal"], exited["timed_out"]) == (137, 9, True)


def test_who_was_killed_in_time_has_not_timed_out_however_late_that_is_told(shop: Workshop) -> None:
    shim = shop.spawn("sleep", "1000")
    pid = shim.create(timeout_ns=600_000_000)
    keeper = Keeper(shim)
    shim.start()
    started_at_ns = time.time_ns()
    kill(shim)
    os.kill(pid, signal.SIGKILL)
    time.sleep(0.8)
    heir = heir_of(shop, shim)
    keeper.hand_over(heir, started_at_ns=started_at_ns, timeout_ns=600_000_000)
    keeper.let_go()
    exited = heir.wait()
    assert (exited["code"], exited["signal"], exited["timed_out"]) == (137, 9, False)


def test_who_is_frozen_when_its_time_is_over_dies_all_the_same(shop: Workshop) -> None:
    hierarchy = detect().of("freezer")
    assert hierarchy is not None
    path = Path(hierarchy.mount_point) / f"corral-shim-frozen-{os.getpid()}"
    state, frozen = ("cgroup.freeze", "1") if hierarchy.version == 2 else ("freezer.state", "FROZEN")
    path.mkdir()
    try:
        shim = shop.spawn("sleep", "1000")
        shim.create(cgroup={"paths": [str(path)]}, timeout_ns=500_000_000)
        try:
            shim.start()
            (path / state).write_text(frozen)
            exited = shim.wait()
            assert (exited["code"], exited["timed_out"]) == (137, True)
        finally:
            (path / state).write_text("0" if hierarchy.version == 2 else "THAWED")
    finally:
        until(lambda: gone(path))


def gone(path: Path) -> bool:
    with suppress(OSError):
        path.rmdir()
    return not path.exists()
