"""A shim that is killed, and the one that takes its container over."""

import base64
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from shimclient import Shim, Workshop, connect, process, read_to_end, read_until, wait_gone, workshop
from support.requirements import needs

pytestmark = needs("root", "busybox")
COUNT = "i=0; while [ $i -lt {} ]; do i=$((i+1)); echo line $i; done; "


@pytest.fixture(scope="module")
def shop() -> Iterator[Workshop]:
    with workshop() as made:
        yield made


def streams_of(shim: Shim, exec_id: str) -> dict[str, int]:
    shim.peer.send({"id": 1000, "op": "streams", "exec": exec_id})
    while True:
        for message in shim.peer.channel.receive():
            if message.get("id") == 1000:
                reply = message["ok"]
                assert isinstance(reply, dict)
                names = reply["streams"]
                return dict(zip(names, shim.peer.channel.take_fds(len(names)), strict=True))
            shim.peer.inbox.append(message)


def test_who_does_not_read_is_not_told_that_an_exec_has_no_stdin(shop: Workshop) -> None:
    shim = shop.run("sleep", "100")
    peer, begin = connect(shim.bundle), {"op": "exec", "start": True, "stdin": True, "process": process("cat")}
    for _ in range(1000):  # more answers than its socket takes
        peer.send({"id": 1, "op": "state"})
    peer.send({"id": 2, "exec": "e", **begin})
    while not shim.state()["execs"]:
        time.sleep(0.005)
    while (answer := peer.receive())["id"] != 2:
        pass
    assert isinstance(answer["ok"], dict)
    assert answer["ok"].keys() == {"pid", "start_time"}
    peer.close()


def test_a_run_that_gains_privileges_is_ended_by_the_heir(shop: Workshop) -> None:
    """The kernel does not send it the signal that others get at their shim's end."""
    shim = shop.run("sleep", "100")
    shim.run_exec("sh", "-c", "mkdir /suid && cp /bin/busybox /suid/sleep && chmod 4755 /suid/sleep")
    keeper, peer = Keeper(shim), connect(shim.bundle)
    peer.send({"id": 1, "op": "run", "exec": "r", "process": process("/suid/sleep", "4719"), "user": "user"})
    runs = shim.bundle / "runs"
    deadline = time.monotonic() + 10
    while not (noted := [int(file.name.split(".")[0]) for file in runs.glob("*")]) or not runs_now(noted[0]):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    kill(shim)
    time.sleep(0.1)
    assert runs_now(noted[0])
    keeper.hand_over(heir_of(shop, shim))
    wait_gone(noted[0])
    assert list(runs.iterdir()) == []
    peer.close()


def runs_now(pid: int) -> bool:
    return Path(f"/proc/{pid}/cmdline").read_bytes() == b"/suid/sleep\0004719\0"


class Keeper:
    """What the daemon does: it keeps a process's streams, and hands them to the next shim."""

    def __init__(self, shim: Shim, exec_id: str = "") -> None:
        self.shim, self.exec_id = shim, exec_id
        self.fds = streams_of(shim, exec_id)
        state = shim.state()
        execs = state["execs"]
        assert isinstance(execs, dict)
        self.process = execs[exec_id] if exec_id else state

    def hand_over(self, heir: Shim, **fields: object) -> None:
        log = {"driver": "json-file", "path": str(self.shim.log)}
        identity = {name: self.process[name] for name in ("pid", "start_time")}
        more = {"exec": self.exec_id, "started_at_ns": 1, "log": log, "streams": list(self.fds), **identity, **fields}
        heir.call("adopt", list(self.fds.values()), **more)  # type: ignore[arg-type]

    def let_go(self, *names: str) -> None:
        for name in names or tuple(self.fds):
            os.close(self.fds.pop(name))


def kill(shim: Shim) -> None:
    os.kill(shim.pid, signal.SIGKILL)
    wait_gone(shim.pid)
    shim.peer.close()


def heir_of(shop: Workshop, shim: Shim) -> Shim:
    """A new shim in the place of one that was killed, which has adopted nothing yet."""
    (shim.bundle / "socket").unlink()
    spawned = shop.zygote.spawn(shim.bundle, container=shim.name)
    assert isinstance(spawned["pid"], int)
    shim.pid = spawned["pid"]
    shim.peer = connect(shim.bundle)
    shim.call = shim.peer.call
    return shim


def lines_of(shim: Shim) -> list[str]:
    return [json.loads(line)["log"] for line in shim.log.read_bytes().splitlines()]


def test_the_heir_has_all_output_the_streams_and_the_exit_code(shop: Workshop) -> None:
    shim = shop.run("sh", "-c", COUNT.format(50) + "read x; echo got $x; exit 17", stdin=True)
    keeper = Keeper(shim)
    kill(shim)
    heir = heir_of(shop, shim)
    keeper.fds["of.a.newer.version"] = os.open("/dev/null", os.O_RDONLY)
    keeper.hand_over(heir, stdin=True)
    keeper.let_go()
    assert heir.run_exec("echo", "hello") == b"hello\n"
    stdin, out = heir.attach("stdin", "stdout", lossless=True)
    os.write(stdin, b"that\n")
    assert read_until(out, b"got that\n")
    os.close(stdin)
    os.close(out)
    exited = heir.wait()
    assert (exited["code"], exited["reason"], exited["known"]) == (17, "", True)
    assert lines_of(heir) == [f"line {i}\n" for i in range(1, 51)] + ["got that\n"]
    assert heir.reports() == ""


def test_what_was_written_and_how_it_ended_while_there_was_no_shim_is_not_lost(shop: Workshop) -> None:
    shim = shop.run("sh", "-c", "read x; " + COUNT.format(2000) + "exit 18", stdin=True)
    keeper = Keeper(shim)
    kill(shim)
    os.write(keeper.fds["stdin"], b"go\n")
    wait_gone(int(str(keeper.process["pid"])))
    heir = heir_of(shop, shim)
    keeper.hand_over(heir, stdin=True)
    keeper.let_go()
    exited = heir.wait()
    assert (exited["code"], exited["signal"]) == (18, None)
    assert lines_of(heir) == [f"line {i}\n" for i in range(1, 2001)]


def test_a_terminal_survives_its_shim(shop: Workshop) -> None:
    shim = shop.run("sh", "-c", "read x; stty size; read y; exit 19", terminal=True, stdin=True)
    keeper = Keeper(shim)
    kill(shim)
    heir = heir_of(shop, shim)
    keeper.hand_over(heir, stdin=True)
    keeper.let_go()
    heir.call("resize", width=91, height=37)
    stdin, out = heir.attach("stdin", "stdout", lossless=True)
    os.write(stdin, b"\n")
    assert b"37 91" in read_until(out, b"37 91")
    os.write(stdin, b"\n")
    assert heir.wait()["code"] == 19
    os.close(stdin)
    os.close(out)


def test_an_exec_survives_its_shim_with_its_exit_code(shop: Workshop) -> None:
    shim = shop.run("sleep", "1000")
    shim.exec("e", "sh", "-c", "echo first; read x; echo $x; exit 23", stdin=True)
    (out,) = shim.attach("stdout", exec_id="e", lossless=True)
    shim.start("e")
    read_until(out, b"first\n")
    keepers = [Keeper(shim), Keeper(shim, "e")]
    kill(shim)
    os.close(out)
    heir = heir_of(shop, shim)
    for keeper in keepers:
        keeper.hand_over(heir, stdin=True)
    (out,) = heir.attach("stdout", exec_id="e", lossless=True)
    (stdin,) = heir.attach("stdin", exec_id="e")
    os.write(stdin, b"second\n")
    assert read_to_end(out) == b"second\n"
    os.close(stdin)
    found = heir.wait_state("stopped", "e")["exit"]
    assert isinstance(found, dict)
    assert found["code"] == 23


def test_an_exec_that_somebody_else_has_reaped_does_not_keep_the_heir_from_its_end(shop: Workshop) -> None:
    """Of both ends it is told at once, of init's first."""
    shim = shop.spawn("sleep", "1000", namespaces=("mount", "ipc", "uts", "network"))
    shim.create()
    shim.start()
    shim.exec("e", "sleep", "1001")
    shim.start("e")
    keepers = [Keeper(shim), Keeper(shim, "e")]
    kill(shim)
    heir = heir_of(shop, shim)
    for keeper in keepers:
        keeper.hand_over(heir)
    os.kill(heir.pid, signal.SIGSTOP)
    for keeper in keepers:
        pid = int(str(keeper.process["pid"]))
        os.kill(pid, signal.SIGKILL)
        while Path(f"/proc/{pid}").exists():
            time.sleep(0.005)
    os.kill(heir.pid, signal.SIGCONT)
    assert heir.wait()["code"] == 137
    assert heir.reports() == ""


def test_the_end_of_stdin_is_told_to_who_keeps_a_copy(shop: Workshop) -> None:
    shim = shop.run("sh", "-c", "cat; exit 5", stdin=True)
    shim.call("subscribe")
    keeper = Keeper(shim)
    shim.call("close_stdin")
    assert shim.peer.event() == {"event": "stdin_closed", "exec": ""}
    assert shim.state()["state"] == "running"
    keeper.let_go("stdin")
    assert shim.wait()["code"] == 5
    keeper.let_go()


@pytest.mark.parametrize("moment", ["shim.log.taken@1", "shim.log.taken@2", "shim.log.written@2", "shim.log.rotate@2"])
def test_no_byte_is_lost_or_repeated_whenever_a_shim_is_killed(moment: str) -> None:
    """Each heir is killed there too, after it has come some lines further."""
    with workshop({"CORRAL_FAILPOINTS": moment.replace("@", "=kill@")}) as shop:
        count = (
            "i=0; while [ $i -lt 20 ]; do i=$((i+1)); echo line $i; printf part; usleep 5000; done; echo e >&2; exit 20"
        )
        shim = shop.spawn("sh", "-c", count)
        log = {"driver": "json-file", "path": str(shim.log), "max_size": 700, "max_files": 50}
        live_with_heirs(shop, shim, log)
        assert shim.exit_file()["code"] == 20
        entries = [json.loads(line) for file in rotated(shim.log) for line in file.read_bytes().splitlines()]
        out = "".join(entry["log"] for entry in entries if entry["stream"] == "stdout")
        assert out == "".join(f"line {i}\npart" for i in range(1, 21))
        assert [entry["log"] for entry in entries if entry["stream"] == "stderr"] == ["e\n"]


@pytest.mark.parametrize("moment", ["shim.log.emptied@2", "shim.log.taken@9", "shim.log.written@9"])
def test_no_byte_of_much_is_lost_or_repeated_whenever_a_shim_is_killed(moment: str) -> None:
    with workshop({"CORRAL_FAILPOINTS": moment.replace("@", "=kill@")}) as shop:
        shim = shop.spawn("sh", "-c", "i=0; while [ $i -lt 9 ]; do i=$((i+1)); head -c 999999 /dev/zero; echo $i; done")
        log = {"driver": "json-file", "path": str(shim.log), "max_size": 1_000_000, "max_files": 50}
        live_with_heirs(shop, shim, log)
        entries = [json.loads(line) for file in rotated(shim.log) for line in file.read_bytes().splitlines()]
        out = b"".join(
            base64.b64decode(entry["data"]) if "data" in entry else entry["log"].encode() for entry in entries
        )
        assert out == b"".join(bytes(999999) + b"%d\n" % i for i in range(1, 10))


def live_with_heirs(shop: Workshop, shim: Shim, log: dict[str, object]) -> None:
    """Make the container and wait for its end, over the deaths of its shims, of which there is one at least."""
    shim.create(log=log)
    keeper = Keeper(shim)
    shim.start()
    heirs = 0
    while not wait_gone_or_told(shim):
        shim.peer.close()
        heirs += 1
        with suppress(EOFError):
            keeper.hand_over(heir_of(shop, shim), log=log)
    keeper.let_go()
    assert heirs >= 1


def wait_gone_or_told(shim: Shim) -> bool:
    """Wait until the shim is gone; whether it had come to its end."""
    wait_gone(shim.pid)
    with suppress(FileNotFoundError):
        return shim.exit_file()["reason"] == ""
    return False


def rotated(log: Path) -> list[Path]:
    """Oldest first."""
    return sorted(
        log.parent.glob(f"{log.name}*"), key=lambda path: -int(path.suffix[1:] if path.suffix[1:].isdigit() else 0)
    )


def test_a_shim_before_a_container_of_its_own_refuses_nonsense(shop: Workshop) -> None:
    shim = shop.run("sleep", "1000")
    with pytest.raises(Exception, match="already"):
        shim.call("adopt", pid=1, start_time=1, started_at_ns=1)
    other = shop.spawn("true")
    with pytest.raises(Exception, match="streams"):
        other.call("adopt", pid=1, start_time=1, started_at_ns=1, streams=["stdin", "stdin"])
    with pytest.raises(Exception, match="pid"):
        other.call("adopt", pid=-1, start_time=1, started_at_ns=1)
    assert Path(f"/proc/{shim.state()['pid']}").exists()
