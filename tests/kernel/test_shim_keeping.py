"""What a zygote keeps for a shim that is killed, and what lies in pipes meanwhile."""

import fcntl
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from shimclient import Shim, Workshop, Zygote, connect, read_until, wait_gone, workshop
from support.requirements import needs

from corral.kernel.process import is_dying, pidfd_info, pidfd_open
from corral.shim.records import UNSTARTED
from corral.shim.server import ABANDONED_S
from corral.shim.zygote import LOOK_S
from corral.tasks.keeper import fetch

pytestmark = needs("root", "busybox")


@pytest.fixture(scope="module")
def shop() -> Iterator[Workshop]:
    with workshop() as made:
        yield made


def kill(shim: Shim) -> dict[str, object]:
    """Returns the state before."""
    state = shim.state()
    os.kill(shim.pid, signal.SIGKILL)
    wait_gone(shim.pid)
    shim.peer.close()
    return state


def heir_of(zygote: Zygote, shim: Shim) -> Shim:
    (shim.bundle / "socket").unlink()
    shim.pid = int(str(zygote.spawn(shim.bundle, container=shim.name)["pid"]))
    shim.peer = connect(shim.bundle)
    shim.call = shim.peer.call
    return shim


def adopt(heir: Shim, of: dict[str, object], streams: dict[str, int], **fields: object) -> None:
    log = {"driver": "json-file", "path": str(heir.log)}
    identity = {name: of[name] for name in ("pid", "start_time")}
    heir.call(
        "adopt",
        list(streams.values()),
        streams=list(streams),
        log=log,
        started_at_ns=1,
        stdin=True,
        **identity,
        **fields,
    )
    for fd in streams.values():
        os.close(fd)


def kept_by_zygote(shim: Shim, exec_id: str = "") -> dict[str, int]:
    deadline = time.monotonic() + 5
    while (kept := fetch(shim.bundle, timeout_s=5)) is None:
        assert time.monotonic() < deadline, "nobody keeps anything"
        time.sleep(0.01)
    for other in kept.keys() - {exec_id}:
        for fd in kept[other].streams.values():
            os.close(fd)
    return kept[exec_id].streams


def test_a_terminal_outlives_its_shim_though_no_daemon_has_a_copy(shop: Workshop) -> None:
    shim = shop.run("sh", "-c", "echo first; read x; echo got $x; exit 19", terminal=True, stdin=True)
    (out,) = shim.attach("stdout", lossless=True, replay=True)
    read_until(out, b"first")
    os.close(out)
    of = kill(shim)
    streams = kept_by_zygote(shim)
    assert list(streams) == ["console"]
    heir = heir_of(shop.zygote, shim)
    adopt(heir, of, streams)
    stdin, out = heir.attach("stdin", "stdout", lossless=True)
    os.write(stdin, b"that\n")
    read_until(out, b"got that")
    os.close(stdin)
    os.close(out)
    assert heir.wait()["code"] == 19


def test_a_stdin_that_is_closed_is_kept_by_nobody(shop: Workshop) -> None:
    shim = shop.run("sh", "-c", "cat; exit 5", stdin=True)
    shim.call("close_stdin")
    assert shim.wait()["code"] == 5


@pytest.mark.parametrize("failpoint", ["shim.exec.after_clone", "shim.exec.before_reply"])
def test_an_exec_reads_on_though_its_shim_was_killed_as_soon_as_it_ran(failpoint: str) -> None:
    with workshop({"CORRAL_FAILPOINTS": f"{failpoint}=kill"}) as shop:
        shim = shop.run("sleep", "1000")
        init = int(str(shim.state()["pid"]))
        shim.exec("e", "sh", "-c", "cat; echo end", stdin=True)
        with pytest.raises(EOFError):
            shim.start("e")
        wait_gone(shim.pid)
        while (kept := fetch(shim.bundle, timeout_s=5)) is None:
            time.sleep(0.01)
        streams = kept["e"].streams
        os.write(streams["stdin"], b"more\n")
        assert read_until(streams["stdout"], b"more\n") == b"more\n"
        assert kept["e"].identity is not None
        assert Path(f"/proc/{kept['e'].identity.pid}/cmdline").read_bytes() == b"sh\0-c\0cat; echo end\0"
        for each in kept.values():
            for fd in each.streams.values():
                os.close(fd)
        os.kill(init, signal.SIGKILL)


@pytest.mark.parametrize("earlier", [0, 1])
def test_of_an_exec_that_was_not_told_to_start_the_zygote_knows_that_it_never_did(earlier: int) -> None:
    """The first one by Python, the next as a list of calls."""
    with workshop({"CORRAL_FAILPOINTS": f"shim.exec.before_start=kill@{earlier + 1}"}) as shop:
        shim = shop.run("sleep", "1000")
        init = int(str(shim.state()["pid"]))
        for _ in range(earlier):
            assert shim.run_exec("echo", "hello") == b"hello\n"
        shim.exec("e", "touch", "/tmp/ran")
        with pytest.raises(EOFError):
            shim.start("e")
        written = shim.bundle / "execs/e.json"
        deadline = time.monotonic() + 5
        while not written.exists():
            assert time.monotonic() < deadline, "nobody has written it"
            time.sleep(0.01)
        how = json.loads(written.read_text())
        assert (how["reason"], how["started_at_ns"], how["code"], how["known"]) == (UNSTARTED, None, 255, False)
        assert not (shop.root / "tmp/ran").exists()
        os.kill(init, signal.SIGKILL)


def test_the_zygote_writes_how_an_exec_ended_whose_shim_was_killed(shop: Workshop) -> None:
    shim = shop.run("sleep", "1000")
    shim.exec("e", "sh", "-c", "sleep 0.3; exit 23")
    shim.start("e")
    of = kill(shim)
    written = shim.bundle / "execs/e.json"
    deadline = time.monotonic() + 5
    while not written.exists():
        assert time.monotonic() < deadline, "nobody has written it"
        time.sleep(0.01)
    assert json.loads(written.read_text())["code"] == 23
    heir = heir_of(shop.zygote, shim)
    adopt(heir, of, {})
    execs = of["execs"]
    assert isinstance(execs, dict)
    adopt(heir, execs["e"], {}, exec="e")
    found = heir.wait_state("stopped", "e")["exit"]
    assert isinstance(found, dict)
    assert (found["code"], found["known"]) == (23, True)


def streams_of(shim: Shim) -> dict[str, int]:
    shim.peer.send({"id": 1000, "op": "streams", "exec": ""})
    while True:
        for message in shim.peer.channel.receive():
            if message.get("id") == 1000:
                reply = message["ok"]
                assert isinstance(reply, dict)
                names = reply["streams"]
                return dict(zip(names, shim.peer.channel.take_fds(len(names)), strict=True))


def test_an_exit_that_neither_shim_nor_zygote_lived_to_see_is_told_by_a_pidfd() -> None:
    with workshop() as shop, Zygote() as other:
        shim = shop.run("sh", "-c", "read x; exit 21", stdin=True)
        streams = streams_of(shim)
        os.kill(shop.zygote.pid, signal.SIGKILL)
        wait_gone(shop.zygote.pid)
        of = kill(shim)
        os.write(streams["stdin"], b"\n")
        wait_gone(int(str(of["pid"])))
        heir = heir_of(other, shim)
        adopt(heir, of, streams)
        exited = heir.wait()
        assert (exited["code"], exited["known"]) == (21, True) if tells_exits() else not exited["known"]


def tells_exits() -> bool:
    """Whether this kernel tells by a pidfd how a process ended that somebody else has reaped (Linux >= 6.15)."""
    pid = os.posix_spawn("/bin/true", ["true"], {})
    pidfd = pidfd_open(pid)
    try:
        os.waitpid(pid, 0)
        return pidfd_info(pidfd).exit_status == 0
    except OSError:
        return False
    finally:
        os.close(pidfd)


def test_what_an_exited_container_wrote_last_is_said_to_be_missing_if_nobody_held_it(shop: Workshop) -> None:
    shim = shop.run("sh", "-c", "sleep 0.2; exit 3")
    of = kill(shim)
    wait_gone(int(str(of["pid"])))
    heir = heir_of(shop.zygote, shim)
    adopt(heir, of, {}, unattended=True)
    exited = heir.wait()
    assert "may be missing" in str(exited["reason"])
    assert exited["code"] == 3


def test_that_is_said_of_one_that_was_ending_when_it_was_found() -> None:
    """Its files are closed long before the kernel says that it has ended: here while one in its PID namespace stays."""
    with workshop() as shop, Zygote() as other:
        shim = shop.run("sh", "-c", "sleep 1; echo late; exit 3")
        pid = int(str(shim.state()["pid"]))
        with subprocess.Popen(["nsenter", f"--pid=/proc/{pid}/ns/pid", "sleep", "1000"]) as parent:
            try:
                until(lambda: Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text())
                os.kill(parent.pid, signal.SIGSTOP)  # so it does not reap that one
                os.kill(shop.zygote.pid, signal.SIGKILL)
                wait_gone(shop.zygote.pid)
                of = kill(shim)
                until(lambda: is_dying(pid))
                heir = heir_of(other, shim)
                adopt(heir, of, {}, unattended=True)
            finally:
                os.kill(parent.pid, signal.SIGCONT)
        exited = heir.wait()
    assert "may be missing" in str(exited["reason"])
    assert exited["code"] == 3 or not tells_exits()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_that_is_said_also_by_a_shim_that_comes_after_who_found_it(shop: Workshop) -> None:
    shim = shop.run("sh", "-c", "sleep 0.2; exit 3")
    of = kill(shim)
    wait_gone(int(str(of["pid"])))
    heir = heir_of(shop.zygote, shim)
    adopt(heir, of, {}, unattended=True)
    os.kill(heir.pid, signal.SIGKILL)  # whether it has written the exit or not
    wait_gone(heir.pid)
    heir.peer.close()
    heir = heir_of(shop.zygote, heir)
    adopt(heir, of, {}, unattended=False)
    assert "may be missing" in str(heir.wait()["reason"])


def test_output_is_not_lost_with_a_container_that_ends_before_its_zygote_knows_of_its_shim(shop: Workshop) -> None:
    shim = shop.run("sh", "-c", "sleep 0.3; echo late; exit 3")
    of = shim.state()
    time.sleep(0.1)  # the zygote has what the shim gave it
    os.kill(shop.zygote.pid, signal.SIGSTOP)
    try:
        kill(shim)
        wait_gone(int(str(of["pid"])))
    finally:
        os.kill(shop.zygote.pid, signal.SIGCONT)
    streams = kept_by_zygote(shim)
    heir = heir_of(shop.zygote, shim)
    adopt(heir, of, streams)
    assert heir.wait()["code"] == 3
    assert [line for _, line in heir.log_entries()] == ["late\n"]


def test_input_on_its_way_is_not_lost_with_a_shim(shop: Workshop) -> None:
    shim = shop.run("sh", "-c", "sleep 0.3; cat; exit 6", stdin=True)
    streams = streams_of(shim)
    text = "".join(f"line {number}\n" for number in range(100_000)).encode()
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 1 << 20)
    shim.call("attach", [reader], stdin=True, stdin_once=True)
    os.set_blocking(writer, False)
    sent = os.write(writer, text)
    time.sleep(0.1)  # the shim has passed on as much as the process's pipe takes
    sent += os.write(writer, text[sent:])
    of = kill(shim)
    heir = heir_of(shop.zygote, shim)
    adopt(heir, of, streams)
    heir.call("attach", [reader], stdin=True, stdin_once=True)
    os.close(reader)
    os.set_blocking(writer, True)
    while sent < len(text):
        sent += os.write(writer, text[sent:])
    os.close(writer)
    assert heir.wait()["code"] == 6
    assert "".join(line for _, line in heir.log_entries()).encode() == text


def test_the_end_that_an_heir_has_seen_is_kept_by_its_own_zygote_though_another_one_has_reaped_it(
    shop: Workshop,
) -> None:
    shim = shop.run("sh", "-c", "read x; exit 24", stdin=True)
    with Zygote({"CORRAL_FAILPOINTS": "shim.exit.before_rename=kill"}) as other:
        state = kill(shim)
        kept = kept_by_zygote(shim)
        stdin = os.dup(kept["stdin"])
        heir = heir_of(other, shim)
        adopt(heir, state, kept)
        time.sleep(3 * LOOK_S)  # until the first zygote has let go of it
        os.write(stdin, b"\n")
        wait_gone(heir.pid)
        os.close(stdin)
        deadline = time.monotonic() + 5
        while not (shim.bundle / "exit.json").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert shim.exit_file()["code"] == 24


def test_only_who_was_told_to_start_may_have_run(shop: Workshop) -> None:
    shim = shop.spawn("sleep", "100")
    shim.create()
    assert not (shim.bundle / "starting").exists()
    shim.start()
    assert (shim.bundle / "starting").exists()
    assert Path(f"/proc/{shim.state()['pid']}").exists()


def test_a_shim_that_nobody_wants_any_more_ends(shop: Workshop) -> None:
    """Who asked for it has given up waiting, as a daemon does when a zygote is late."""
    shim = shop.spawn("true")
    shim.peer.close()
    wait_gone(shim.pid, ABANDONED_S + 10)
