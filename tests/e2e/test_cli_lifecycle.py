"""Verbs on containers that exist: start, stop, kill, pause, wait, logs, exec, rm, events."""

import json
import os
import subprocess
import time

from support.cli import ok, state
from support.corrald import CORRAL, PATIENCE, Corrald


def wait_for(box: Corrald, name: str, text: str, timeout_s: float = 10) -> str:
    deadline = time.monotonic() + timeout_s
    while text not in (logs := ok(box, "logs", name)):
        assert time.monotonic() < deadline, logs
        time.sleep(0.05)
    return logs


def test_create_start_wait_rm(box: Corrald, name: str) -> None:
    ok(box, "create", "--name", name, "busybox", "sh", "-c", "echo made; exit 3")
    assert state(box, name)["status"] == "created"
    ok(box, "start", name)
    assert ok(box, "wait", name) == "3\n"
    assert ok(box, "logs", name) == "made\n"
    assert state(box, name)["status"] == "exited"
    ok(box, "rm", name)
    assert box.corral("inspect", name).returncode == 1


def test_start_with_attach_shows_every_run_and_ends_with_its_code(box: Corrald, name: str) -> None:
    ok(box, "create", "--name", name, "busybox", "sh", "-c", "echo begun; exit 3")
    for _ in range(3):
        shown = box.corral("start", "-a", name)
        assert (shown.stdout, shown.returncode) == (b"begun\n", 3), shown.stderr
    assert ok(box, "logs", name) == "begun\n" * 3


def test_an_exited_container_starts_again_on_its_own_files(box: Corrald, name: str) -> None:
    script = "echo x >> /count; wc -l < /count"
    ok(box, "run", "--name", name, "busybox", "sh", "-c", script)
    ok(box, "start", name)
    ok(box, "wait", name)
    assert ok(box, "logs", name) == "1\n2\n"


def test_wait_tells_of_every_container_though_one_is_unknown(box: Corrald, name: str) -> None:
    ok(box, "run", "-d", "--name", name, "busybox", "sh", "-c", "exit 3")
    result = box.corral("wait", "nobody", name)
    assert (result.returncode, result.stdout) == (1, b"3\n")
    assert b"nobody" in result.stderr


def test_stop_sends_sigterm_and_waits(box: Corrald, name: str) -> None:
    script = "trap 'echo bye; exit 5' TERM; echo ready; while :; do sleep 0.1; done"
    ok(box, "run", "-d", "--name", name, "busybox", "sh", "-c", script)
    wait_for(box, name, "ready")
    ok(box, "stop", name)
    assert state(box, name)["status"] == "exited"
    assert ok(box, "wait", name) == "5\n"
    assert ok(box, "logs", name) == "ready\nbye\n"


def test_stop_kills_after_the_grace(box: Corrald, name: str) -> None:
    ok(box, "run", "-d", "--name", name, "busybox", "sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.1; done")
    wait_for(box, name, "ready")
    began = time.monotonic()
    ok(box, "stop", "-t", "1", name)
    assert 0.9 < time.monotonic() - began < 10, "not the grace that is the default"
    assert ok(box, "wait", name) == "137\n"


def test_kill_sends_a_signal_by_name_or_number(box: Corrald, name: str) -> None:
    script = "trap 'echo usr1' USR1; trap 'echo hup; exit 0' HUP; echo ready; while :; do sleep 0.1; done"
    ok(box, "run", "-d", "--name", name, "busybox", "sh", "-c", script)
    wait_for(box, name, "ready")
    ok(box, "kill", "-s", "SIGUSR1", name)
    wait_for(box, name, "usr1")
    ok(box, "kill", "-s", "1", name)
    assert ok(box, "wait", name) == "0\n"
    failed = box.corral("kill", name)
    assert failed.returncode == 1
    assert b"not running" in failed.stderr


def test_a_paused_container_makes_no_progress_and_goes_on(box: Corrald, name: str) -> None:
    ok(box, "run", "-d", "--name", name, "busybox", "sh", "-c", "while :; do echo tick; sleep 0.02; done")
    wait_for(box, name, "tick")
    ok(box, "pause", name)
    assert state(box, name)["status"] == "paused"
    ticks = -1
    while ticks != (ticks := len(ok(box, "logs", name))):  # what it wrote before is on its way to the log
        time.sleep(0.2)
    time.sleep(0.4)
    assert len(ok(box, "logs", name)) == ticks
    assert b"paused" in box.corral("exec", name, "true").stderr
    ok(box, "unpause", name)
    deadline = time.monotonic() + 20
    while len(ok(box, "logs", name)) <= ticks:
        assert time.monotonic() < deadline


def test_a_paused_container_can_be_stopped_and_removed(box: Corrald, name: str) -> None:
    ok(box, "run", "-d", "--name", name, "busybox", "sleep", "100")
    ok(box, "pause", name)
    ok(box, "stop", "-t", "0", name)
    assert state(box, name)["status"] == "exited"


def test_exec_runs_beside_the_first_process(box: Corrald, name: str) -> None:
    ok(box, "run", "-d", "--name", name, "-e", "A=1", "busybox", "sleep", "100")
    assert (
        ok(box, "exec", "-e", "B=2", "-w", "/tmp", "-u", "app", name, "sh", "-c", "echo $A $B; pwd; id -un")
        == "1 2\n/tmp\napp\n"
    )
    assert "sleep 100" in ok(box, "exec", name, "ps")
    assert box.corral("exec", name, "sh", "-c", "exit 9").returncode == 9
    assert box.corral("exec", "-i", name, "cat", stdin=b"through").stdout == b"through"
    missing = box.corral("exec", name, "no-such-command")
    assert missing.returncode == 127
    assert b"no-such-command" in missing.stderr


def test_exec_in_a_stopped_container_is_refused(box: Corrald, name: str) -> None:
    ok(box, "run", "--name", name, "busybox", "true")
    failed = box.corral("exec", name, "true")
    assert failed.returncode == 1
    assert b"not running" in failed.stderr


def test_logs_follow_to_the_end_and_tail(box: Corrald, name: str) -> None:
    ok(box, "run", "-d", "--name", name, "busybox", "sh", "-c", "for i in 1 2 3 4 5; do echo $i; sleep 0.1; done")
    assert ok(box, "logs", "-f", name) == "1\n2\n3\n4\n5\n"
    assert ok(box, "logs", "--tail", "2", name) == "4\n5\n"
    stamped = ok(box, "logs", "-t", "--tail", "1", name)
    assert stamped.endswith("Z 5\n")


def test_a_running_container_is_only_removed_by_force(box: Corrald, name: str) -> None:
    ok(box, "run", "-d", "--name", name, "busybox", "sleep", "100")
    failed = box.corral("rm", name)
    assert failed.returncode == 1
    assert b"-f" in failed.stderr or b"force" in failed.stderr
    ok(box, "rm", "-f", name)


def test_ids_may_be_shortened_and_names_changed(box: Corrald, name: str) -> None:
    identity = ok(box, "create", "--name", name, "busybox", "true").strip()
    assert state(box, identity[:8])["name"] == name
    ok(box, "rename", name, f"{name}-new")
    assert state(box, identity)["name"] == f"{name}-new"
    ok(box, "rename", f"{name}-new", name)


def test_events_tell_a_life_in_order(box: Corrald, name: str) -> None:
    identity = ok(box, "run", "-d", "--name", name, "busybox", "sh", "-c", "exit 4").strip()
    ok(box, "wait", name)
    ok(box, "rm", name)
    deadline = time.monotonic() + 5
    wanted = ["container.created", "container.started", "container.died", "container.removed"]
    while True:
        lines = ok(
            box, "events", "--no-follow", "--format", "json", "-f", "topic=container.*", "-f", f"subject={identity}"
        )
        events = [json.loads(line) for line in lines.splitlines()]
        if [e["topic"] for e in events] == wanted or time.monotonic() > deadline:
            break
    assert [e["topic"] for e in events] == wanted
    assert events[2]["payload"]["exit_code"] == 4
    assert [e["seq"] for e in events] == sorted(e["seq"] for e in events)


def test_events_follow(box: Corrald, name: str) -> None:
    follower = subprocess.Popen(
        [CORRAL, "events", "--since", "10m", "-f", "topic=container.created"],
        env=os.environ | {"CORRAL_ADDRESS": box.address}, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert follower.stdout is not None
        told = ""
        identity = ok(box, "create", "--name", f"{name}-before", "busybox", "true").strip()
        while identity not in told:  # it has come to what there was
            told = follower.stdout.readline().decode()
        identity = ok(box, "create", "--name", name, "busybox", "true").strip()
        assert identity in follower.stdout.readline().decode()
    finally:
        box.corral("rm", "-f", f"{name}-before")
        follower.kill()
        follower.communicate()


def test_namespaces_do_not_see_each_other(box: Corrald, name: str) -> None:
    ok(box, "create", "--name", name, "busybox", "true")
    other = box.corral("-n", "other", "inspect", name)
    assert other.returncode == 1
    assert ok(box, "-n", "other", "ps", "-aq") == ""


def test_lists_speak_json(box: Corrald, name: str) -> None:
    ok(box, "create", "--name", name, "busybox", "true")
    listed = [json.loads(line) for line in ok(box, "ps", "-a", "--format", "json").splitlines()]
    assert name in [c["name"] for c in listed]
    images = [json.loads(line) for line in ok(box, "image", "ls", "--format", "json").splitlines()]
    assert [i["familiar_name"] for i in images] == ["busybox:latest"]


def test_version_info_and_check_host_answer(box: Corrald) -> None:
    assert "images" in ok(box, "version") or "engine" in ok(box, "version")
    assert json.loads(ok(box, "system", "info", "--format", "json"))["cgroup_layout"] in ("v1", "v2", "hybrid")
    assert "overlayfs" in box.corral("system", "check-host").stdout.decode()


def test_no_daemon_is_one_sentence_with_the_remedy(box: Corrald) -> None:
    failed = subprocess.run(
        [CORRAL, "--address", "unix:///tmp/corral-nowhere.sock", "ps"], capture_output=True, text=True, check=False
    )
    assert failed.returncode == 1
    assert "corrald" in failed.stderr
    assert failed.stderr.count("\n") == 1


def test_update_changes_a_container_that_runs(box: Corrald, name: str) -> None:
    ok(box, "run", "-d", "--name", name, "--restart", "on-failure:3", "busybox", "sleep", "1000")
    assert box.corral("update", name).returncode == 2
    assert ok(box, "update", "--memory", "64m", "--restart", "unless-stopped", "--label", "a=b=c", name) == f"{name}\n"
    config = state(box, name)["config"]
    assert isinstance(config, dict)
    assert int(config["resources"]["memory"]["limit_bytes"]) == 64 << 20
    assert config["restart"]["mode"] == "unless-stopped"
    assert config["labels"]["a"] == "b=c"
    assert box.corral("update", "--restart", "sometimes", name).returncode != 0


def test_ps_tells_what_is_restarting_and_stop_ends_that(box: Corrald, name: str) -> None:
    ok(box, "run", "-d", "--name", name, "--restart", "always", "busybox", "sh", "-c", "exit 4")
    deadline = time.monotonic() + 10
    while "Restarting (4)" not in (listed := ok(box, "ps", "--filter", f"name={name}")):
        assert time.monotonic() < deadline, listed
        time.sleep(0.05)
    ok(box, "stop", name)
    assert "Exited (4)" in ok(box, "ps", "-a", "--filter", f"name={name}")
    ok(box, "rm", name)


def test_several_are_stopped_at_once_and_told_of_in_their_order(box: Corrald, name: str) -> None:
    """The first one ends only as the second does."""
    until = "while ! test -e /v/ended; do usleep 9999; done"
    scripts = {"a": f"trap '{until}; exit 4' TERM", "b": "trap 'touch /v/ended; exit 5' TERM"}
    names = [f"{name}-{which}" for which in scripts]
    try:
        for each, trap in zip(names, scripts.values(), strict=True):
            script = f"{trap}; echo ready; while :; do usleep 9999; done"
            box.corral("run", "-d", "--name", each, "-v", f"{name}:/v", "busybox", "sh", "-c", script, check=True)
            wait_for(box, each, "ready", timeout_s=30 * PATIENCE)
        stopped = box.corral("stop", "-t", "300", names[0], "nobody", names[1])
        assert stopped.returncode == 1
        assert stopped.stdout.decode().split() == names
        assert stopped.stderr.decode() == "corral: no such container: nobody\n"
        codes = box.corral("wait", *names, check=True).stdout.split()
        assert codes == [b"4", b"5"]
    finally:
        removed = box.corral("rm", "-f", *names)
        box.corral("volume", "rm", name)
    assert (removed.returncode, removed.stdout.decode().split()) == (0, names)
