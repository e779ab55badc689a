"""Hooks that are clients of their container, and other commands meanwhile: nobody waits for a hook, or for ever."""

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.ocicommand import Runtime, runtime_in, wait_until
from support.requirements import needs

pytestmark = needs("root", "cgroup", "busybox")


@pytest.fixture
def oci(tmp_path: Path) -> Iterator[Runtime]:
    with runtime_in(tmp_path) as runtime:
        yield runtime


def write(oci: Runtime, point: str, script: str, *args: str) -> None:
    """A bundle with a hook: a script of the host, which finds the command as $oci, or of the container."""
    hook = oci.directory / "hook"
    hook.write_text(f"#!/bin/sh\noci='{' '.join(oci.words())}'\n{script}\n")
    hook.chmod(0o755)
    inside = {"path": "/bin/busybox", "args": ["busybox", "sh", "-c", script]}
    spec = oci.spec(*(args or ("sleep", "1000")))
    spec["hooks"] = {point: [inside if point == "startContainer" else {"path": str(hook), "timeout": 20}]}
    oci.write_spec(spec)


def cgroups(name: str) -> list[Path]:
    return list(Path("/sys/fs/cgroup").glob(f"**/corral-oci/{name}"))


def started(oci: Runtime, name: str, *, until: Path) -> "subprocess.Popen[str]":
    """A start that has come to its hook."""
    oci.detached("create", name)
    start = subprocess.Popen(oci.words("start", name), stderr=subprocess.PIPE, text=True)
    wait_until(until.exists)
    return start


@pytest.mark.parametrize("command", ["start", "run"])
def test_a_hook_after_the_start_is_a_client_as_any_other(oci: Runtime, command: str) -> None:
    name, log = oci.new_id(), oci.directory / "log"
    script = f"exec > {log} 2>&1; $oci state {name} && $oci exec {name} echo inside && $oci kill {name} 0"
    write(oci, "poststart", f"{script} && $oci pause {name} && $oci resume {name} && echo all")
    if command == "start":
        oci.detached("create", name)
        oci.ok("start", name)
    else:
        oci.detached("run", "--detach", name)
    said = log.read_text()
    assert json.loads(said.partition("inside")[0])["status"] == "running"
    assert said.endswith("all\n")
    assert oci.status(name) == "running"


def test_who_starts_it_waits_for_a_hook_alone(oci: Runtime) -> None:
    name = oci.new_id()
    write(oci, "startContainer", "echo there > /log; while ! test -e /go; do sleep 0.01; done")
    start = started(oci, name, until=oci.bundle / "rootfs/log")
    assert oci.status(name) == "running"
    assert oci.ok("exec", name, "echo", "inside") == "inside\n"
    assert "already running" in oci.call("start", name).stderr
    assert "not stopped" in oci.call("delete", name).stderr
    oci.ok("pause", name)
    assert oci.status(name) == "paused"
    oci.ok("resume", name)
    (oci.bundle / "rootfs/go").touch()
    assert start.communicate(timeout=20) == (None, "")
    assert start.returncode == 0
    assert oci.status(name) == "running"


@pytest.mark.parametrize("point", ["startContainer", "poststart"])
def test_a_forced_delete_does_not_wait_for_a_hook(oci: Runtime, point: str) -> None:
    name = oci.new_id()
    there = oci.bundle / "rootfs/log" if point == "startContainer" else oci.directory / "log"
    write(oci, point, f"echo there > {'/log' if point == 'startContainer' else there}; sleep 3")
    start = started(oci, name, until=there)
    began = time.monotonic()
    oci.ok("delete", "--force", name)
    assert time.monotonic() - began < 2
    assert not cgroups(name)
    assert "does not exist" in oci.call("state", name).stderr
    start.communicate(timeout=20)
    assert (start.returncode == 0) is (point == "poststart")


def test_a_hook_may_delete_its_container(oci: Runtime) -> None:
    name = oci.new_id()
    write(oci, "poststart", f"$oci delete --force {name}")
    oci.detached("create", name)
    oci.ok("start", name)
    assert "does not exist" in oci.call("state", name).stderr
    assert not cgroups(name)


def test_a_hook_of_creation_sees_a_container_that_nothing_can_be_done_with(oci: Runtime) -> None:
    name, log = oci.new_id(), oci.directory / "log"
    calls = [f"$oci {command} {name}" for command in ("exec", "start", "pause", "update", "delete", "kill")]
    calls[0] += " true"
    write(oci, "createRuntime", f"exec > {log} 2>&1; $oci state {name}; {'; '.join(calls)}; $oci list")
    oci.detached("create", name)
    state, _, said = log.read_text().partition("}\n")
    assert json.loads(state + "}")["status"] == "creating"
    refused = said.splitlines()
    assert ["still being created" in line for line in refused[:5]] == [True] * 5, said
    assert "not running" in refused[5]
    assert " creating " in refused[-1]
    assert oci.status(name) == "created"


def test_a_forced_delete_by_a_hook_of_creation_gives_up(oci: Runtime) -> None:
    name, log = oci.new_id(), oci.directory / "log"
    write(oci, "createRuntime", f"$oci delete --force {name} 2> {log}; true")
    oci.detached("create", name)
    assert "still being created" in log.read_text()
    assert oci.status(name) == "created"


@pytest.mark.parametrize("failing", [True, False])
def test_nobody_waits_for_what_comes_after_the_end(oci: Runtime, *, failing: bool) -> None:
    """poststop finds the container gone, and a delete of it has nothing to wait for."""
    name, log = oci.new_id(), oci.directory / "log"
    script = f"$oci delete --force {name} && $oci state {name} 2>&1 | grep -o 'not exist' > {log}"
    write(oci, "poststop", script, "/none" if failing else "sleep", "1000")
    if failing:
        assert oci.call("create", name).returncode == 1
    else:
        oci.detached("create", name)
        oci.ok("delete", name)
    assert log.read_text() == "not exist\n"


def test_run_leaves_a_container_alone_that_has_its_id_by_now(oci: Runtime) -> None:
    name = oci.new_id()
    oci.write("sleep", "1000")
    process = subprocess.Popen(oci.words("run", name), cwd=oci.bundle, stdin=subprocess.DEVNULL)
    wait_until(lambda: oci.call("state", name).stdout.count("running") == 1)
    process.send_signal(signal.SIGSTOP)
    try:
        oci.ok("delete", "--force", name)
        oci.detached("run", "--detach", name)
    finally:
        process.send_signal(signal.SIGCONT)
        code = process.wait(20)
    assert code == 137
    assert oci.status(name) == "running"


def test_what_cannot_be_undone_is_left_to_a_forced_delete(oci: Runtime) -> None:
    """Here the runtime itself is in the cgroup that it is to remove, put there by a hook that fails then."""
    name = oci.new_id()
    join = f"for procs in /sys/fs/cgroup/*/corral-oci/{name}/cgroup.procs; do echo $PPID > $procs; done"
    write(oci, "createRuntime", f"{join}; echo $PPID > /sys/fs/cgroup/corral-oci/{name}/cgroup.procs; exit 1")
    result = oci.call("create", name)
    assert result.returncode == 1
    assert "error running createRuntime hook #0" in result.stderr
    assert "left to be deleted by force" in result.stderr
    assert oci.status(name) == "stopped"
    assert cgroups(name)
    oci.ok("delete", "--force", name)
    assert not cgroups(name)
    assert "does not exist" in oci.call("state", name).stderr


def test_a_record_in_which_another_version_has_put_more_is_read(oci: Runtime) -> None:
    name = oci.new_id()
    oci.write("sleep", "1000")
    oci.detached("create", name)
    file = oci.root / name / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"mood": "fine"}))
    assert oci.status(name) == "created"
    oci.ok("delete", "--force", name)
    assert not cgroups(name)


def test_a_container_whose_specification_cannot_be_read_any_more_can_be_deleted(oci: Runtime) -> None:
    name = oci.new_id()
    write(oci, "poststop", "true")
    oci.detached("create", name)
    (oci.root / name / "config.json").write_text('{"ociVersion": "2.0.0"}')
    result = oci.call("delete", "--force", name)
    assert result.returncode == 0
    assert "poststop" in result.stderr
    assert not cgroups(name)
    assert "does not exist" in oci.call("state", name).stderr
