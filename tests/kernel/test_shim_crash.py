"""kill -9 at every step of a shim that changes the world: what the next daemon finds."""

import json
import os
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from shimclient import RequestError, Shim, Workshop, connect, read_until, wait_gone, workshop
from support.requirements import needs

import corral.shim
from corral.oci.reaper import ANNOTATION
from corral.shim.records import BY_ZYGOTE, UNSTARTED

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
        assert shim.exit_file()["reason"] == UNSTARTED


@pytest.mark.parametrize("annotations", [{}, {ANNOTATION: "true"}], ids=["executed", "beside_its_program"])
def test_killed_when_the_program_runs_it_is_not_told_to_be_unstarted(annotations: dict[str, str]) -> None:
    """It ends with the exit code of an init that nobody has told to start."""
    with workshop(killed_at("shim.start.after_exec")) as shop:
        shim = shop.spawn("sh", "-c", "sleep 0.3; exit 1")
        config = shim.bundle / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"annotations": annotations}))
        shim.create()
        with pytest.raises(EOFError):
            shim.start()
        wait_for(shim.bundle / "exit.json")
        exited = shim.exit_file()
        assert (exited["code"], exited["reason"]) == (1, BY_ZYGOTE)


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
    assert exit_left_at(failpoint) == (34, "")


def exit_left_at(failpoint: str, source: str | None = None) -> tuple[object, object] | None:
    """Code and reason in exit.json, if there is one after all."""
    with workshop(killed_at(failpoint), source=source) as shop:
        shim = shop.run("sh", "-c", "exit 34")
        wait_gone(shim.pid)
        try:
            exited = shim.exit_file()
        except FileNotFoundError:
            return None
        return exited["code"], exited["reason"]


def test_a_shim_that_writes_its_exit_after_telling_of_it_is_found_out(tmp_path: Path) -> None:
    """The fault that these tests are for, put into a copy of the sources: what is killed between the two loses it."""
    source = Path(next(iter(corral.shim.__path__))).parents[1]
    shutil.copytree(source, tmp_path / "shim", ignore=shutil.ignore_patterns("__pycache__"))
    module = tmp_path / "shim/corral/shim/processes.py"
    now, later = "self._ledger.write_exit(exit_record)", "lambda: self._ledger.write_exit(exit_record)"
    sound = module.read_text()
    assert sound.count(now) == 1
    module.write_text(sound.replace(now, f"self._loop.call_later(0, {later})"))
    assert exit_left_at("shim.exit.after_event", str(tmp_path / "shim")) is None


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
