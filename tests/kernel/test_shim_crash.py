"""kill -9 at every step of a shim that changes the world: what the next daemon finds."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from shimclient import RequestError, Shim, Workshop, connect, read_until, wait_gone, workshop
from support.requirements import needs

pytestmark = needs("root", "busybox")


def killed_at(failpoint: str, action: str = "kill") -> dict[str, str]:
    return {"CORRAL_FAILPOINTS": f"{failpoint}={action}"}


def processes_in(root: Path) -> list[int]:
    """Processes whose root directory is the container's, or a mount over its bundle."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if str(root) in (entry / "mountinfo").read_text():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def wait_for(path: Path, timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.005)


def create_until_killed(shop: Workshop) -> Shim:
    shim = shop.spawn("sleep", "100")
    with suppress(EOFError):  # the reply may be out already, before the record is written
        shim.create()
    wait_gone(shim.pid)
    return shim


def test_killed_when_it_was_just_forked() -> None:
    with workshop(killed_at("shim.spawned")) as shop, pytest.raises((EOFError, ConnectionRefusedError)):
        shop.spawn("true")


@pytest.mark.parametrize(
    "failpoint", ["shim.create.before_clone", "shim.create.after_clone", "shim.record.before_rename"]
)
def test_killed_while_creating_leaves_no_process(failpoint: str) -> None:
    with workshop(killed_at(failpoint)) as shop:
        shim = create_until_killed(shop)
        deadline = time.monotonic() + 5
        while processes_in(shim.bundle) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert processes_in(shim.bundle) == []
        assert not (shim.bundle / "record.json").exists()


def test_killed_before_the_program_runs_ends_the_container() -> None:
    with workshop(killed_at("shim.start.before_exec")) as shop:
        shim = shop.spawn("sleep", "100")
        pid = shim.create()
        with pytest.raises(EOFError):
            shim.start()
        wait_gone(pid)
        wait_for(shim.bundle / "exit.json")
        assert "shim was killed" in str(shim.exit_file()["reason"])


def test_killed_when_the_program_runs_leaves_it_running_and_its_exit_is_kept() -> None:
    with workshop(killed_at("shim.start.after_exec")) as shop:
        shim = shop.spawn("sh", "-c", "sleep 0.3; exit 21")
        pid = shim.create()
        with pytest.raises(EOFError):
            shim.start()
        assert Path(f"/proc/{pid}/comm").read_text() == "sh\n"
        wait_for(shim.bundle / "exit.json")
        exited = shim.exit_file()
        assert (exited["code"], exited["pid"]) == (21, pid)


@pytest.mark.parametrize("failpoint", ["shim.exit.seen", "shim.exit.before_rename"])
def test_killed_before_the_exit_is_written_does_not_lose_it(failpoint: str) -> None:
    with workshop(killed_at(failpoint)) as shop:
        shim = shop.run("sh", "-c", "exit 33")
        wait_for(shim.bundle / "exit.json")
        wait_gone(shim.pid)
        assert shim.exit_file()["code"] == 33


@pytest.mark.parametrize("failpoint", ["shim.exit.after_rename", "shim.exit.before_event", "shim.exit.after_event"])
def test_killed_after_the_exit_was_written_keeps_it_as_it_is(failpoint: str) -> None:
    with workshop(killed_at(failpoint)) as shop:
        shim = shop.run("sh", "-c", "exit 34")
        wait_gone(shim.pid)
        exited = shim.exit_file()
        assert (exited["code"], exited["reason"]) == (34, "")


def test_a_shim_that_is_killed_leaves_its_container_running_and_its_output_unbroken() -> None:
    with workshop() as shop:
        script = "i=0; while [ $i -lt 20 ]; do i=$((i+1)); echo line $i || exit 99; sleep 0.02; done; exit 12"
        shim = shop.spawn("sh", "-c", script)
        pid = shim.create()
        (out,) = shim.attach("stdout")
        shim.start()
        read_until(out, b"line 3\n")
        os.kill(shim.pid, signal.SIGKILL)
        assert Path(f"/proc/{pid}").exists()
        os.close(out)
        wait_for(shim.bundle / "exit.json")
        assert shim.exit_file()["code"] == 12, "neither SIGPIPE nor a failed write"


@pytest.mark.parametrize("failpoint", ["shim.exec.before_clone", "shim.exec.after_clone"])
def test_killed_while_starting_an_exec_leaves_the_container(failpoint: str) -> None:
    with workshop(killed_at(failpoint)) as shop:
        shim = shop.run("sleep", "100")
        pid = int(str(shim.state()["pid"]))
        shim.exec("e", "sleep", "101")
        with pytest.raises(EOFError):
            shim.start("e")
        assert Path(f"/proc/{pid}/comm").read_text() == "sleep\n"
        os.kill(pid, signal.SIGKILL)
        wait_for(shim.bundle / "exit.json")


def test_errors_while_creating_are_reported_and_the_shim_lives() -> None:
    with workshop(killed_at("shim.create.before_clone", "error@1")) as shop:
        shim = shop.spawn("true")
        with pytest.raises(RequestError, match="failpoint"):
            shim.create()
        shim.create()
        shim.start()
        assert shim.wait()["code"] == 0


def test_a_log_that_fails_drops_counted_bytes_and_the_container_does_not_notice() -> None:
    with workshop(killed_at("shim.log.write", "error")) as shop:
        shim = shop.run("sh", "-c", "echo twelve bytes; echo more >&2; exit 3")
        exited = shim.wait()
        assert (exited["code"], exited["dropped_bytes"]) == (3, 18)


def test_an_exit_that_cannot_be_written_is_still_told() -> None:
    with workshop(killed_at("shim.exit.before_rename", "error")) as shop:
        shim = shop.run("sh", "-c", "read x; exit 4", stdin=True)
        shim.call("subscribe")
        shim.call("close_stdin")
        assert shim.peer.event()["code"] == 4
        wait_gone(shim.pid)
        assert "exit.json" in shim.reports()


def test_a_zygote_killed_before_the_fork_leaves_a_socket_that_nobody_holds() -> None:
    with workshop(killed_at("zygote.spawn.before_fork")) as shop:
        with pytest.raises(EOFError):
            shop.spawn("true")
        with pytest.raises(ConnectionRefusedError):
            connect(shop.directory / "c1")


def test_a_zygote_killed_after_the_fork_leaves_a_shim_that_serves() -> None:
    with workshop(killed_at("zygote.spawn.after_fork")) as shop:
        with pytest.raises(EOFError):
            shop.spawn("true")
        peer = connect(shop.directory / "c1")
        assert peer.hello["state"] == "new"
        peer.call("delete")
        peer.close()
