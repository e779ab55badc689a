"""`run --timeout`: who has had its time is killed, whoever else was killed meanwhile."""

import os
import signal
import time
from pathlib import Path

from support.cli import eventually, ok, state
from support.corrald import Corrald
from support.requirements import needs

pytestmark = needs("root", "overlayfs", "busybox", "netns")


def test_a_container_whose_time_is_over_is_killed_and_that_is_told(box: Corrald, name: str) -> None:
    began = time.monotonic()
    result = box.corral("run", "--timeout", "1", "--name", name, "busybox", "sleep", "1000")
    assert (result.returncode, result.stderr) == (
        137,
        b"corral: the container was killed: its time (--timeout) was over\n",
    )
    assert 0.9 < time.monotonic() - began < 8
    how = state(box, name)["exit"]
    assert isinstance(how, dict)
    assert (how["timed_out"], how["signal"]) == (True, 9)
    assert "--timeout" in how["reason"]
    assert "Exited (137)" in (row := ok(box, "ps", "-a", "--filter", f"name={name}"))
    assert "(timed out)" in row


def test_who_ends_in_time_or_is_killed_by_others_has_not_timed_out(box: Corrald, name: str) -> None:
    assert (
        box.corral("run", "--timeout", "60", "--name", name, "busybox", "sh", "-c", "kill -9 $$; exit 3").returncode
        == 3
    )
    ok(box, "rm", name)
    ok(box, "run", "-d", "--timeout", "1m", "--name", name, "busybox", "sleep", "1000")
    ok(box, "kill", name)
    ok(box, "wait", name)
    how = state(box, name)["exit"]
    assert isinstance(how, dict)
    assert how["timed_out"] is False
    assert "timed out" not in ok(box, "ps", "-a")


def test_each_start_has_the_time_anew(box: Corrald, name: str) -> None:
    script = "[ -e /again ] || { touch /again; exit; }; sleep 1000"
    ok(box, "run", "-d", "--timeout", "5", "--name", name, "busybox", "sh", "-c", script)
    first = time.monotonic()
    ok(box, "wait", name)
    time.sleep(3.5)
    ok(box, "start", name)
    time.sleep(max(0.0, first + 5.5 - time.monotonic()))
    assert state(box, name)["status"] == "running"
    assert ok(box, "wait", name) == "137\n"


def test_the_time_is_over_while_no_daemon_runs(box: Corrald, name: str) -> None:
    ok(box, "run", "-d", "--timeout", "2", "--name", name, "busybox", "sleep", "1000")
    pid = state(box, name)["pid"]
    box.kill9()
    try:
        eventually(lambda: not Path(f"/proc/{pid}").exists())
    finally:
        box.start()
    eventually(lambda: state(box, name)["status"] == "exited")
    how = state(box, name)["exit"]
    assert isinstance(how, dict)
    assert (how["code"], how["timed_out"]) == (137, True)


def test_another_shim_knows_how_much_time_is_left(box: Corrald, name: str) -> None:
    ok(box, "run", "-d", "--timeout", "3", "--name", name, "busybox", "sleep", "1000")
    began = time.monotonic()
    shim = state(box, name)["shim_pid"]
    assert isinstance(shim, int)
    os.kill(shim, signal.SIGKILL)
    eventually(lambda: state(box, name).get("shim_pid") not in (None, shim))
    assert ok(box, "wait", name) == "137\n"
    assert 1.5 < time.monotonic() - began < 8
    how = state(box, name)["exit"]
    assert isinstance(how, dict)
    assert how["timed_out"] is True


def test_no_time_at_all_is_refused(box: Corrald, name: str) -> None:
    for time_, told in (("-1", "must be more than 0"), ("soon", "'soon' is not understood")):
        result = box.corral("run", f"--timeout={time_}", "--name", name, "busybox", "true")
        assert result.returncode == 125
        assert told in result.stderr.decode()
    assert box.corral("inspect", name).returncode == 1


def test_a_log_that_was_renamed_is_opened_again_on_request(box: Corrald, name: str) -> None:
    script = "echo one; while [ ! -e /go ]; do usleep 5000; done; echo two; sleep 1000"
    ok(box, "run", "-d", "--name", name, "busybox", "sh", "-c", script)
    log = Path(ok(box, "inspect", "-f", "{{.LogPath}}", name).strip())
    eventually(lambda: "one" in log.read_text())
    log.rename(log.with_suffix(".kept"))
    ok(box, "logs", "--reopen", name)
    ok(box, "exec", name, "touch", "/go")
    eventually(lambda: log.exists() and "two" in log.read_text())
    assert "two" not in log.with_suffix(".kept").read_text()
    ok(box, "kill", name)
    ok(box, "wait", name)
    result = box.corral("logs", "--reopen", name)
    assert (result.returncode, b"is not running" in result.stderr) == (1, True)
