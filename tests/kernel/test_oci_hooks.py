"""Hooks of containers that corral-oci runs, each of whose commands is another process."""

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.ocicommand import Runtime, runtime_in, wait_until
from support.requirements import needs

pytestmark = needs("root", "cgroup", "busybox")

POINTS = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")


@pytest.fixture
def oci(tmp_path: Path) -> Iterator[Runtime]:
    with runtime_in(tmp_path) as runtime:
        yield runtime


@pytest.fixture
def log(oci: Runtime, tmp_path: Path) -> Path:
    """A bundle whose hooks write what they are told, one line each."""
    log = tmp_path / "log"
    hook = tmp_path / "hook"
    hook.write_text(
        f'#!/bin/sh\n(echo "$1 $(cat)") >> {log}; test ! -e {tmp_path}/fail-$1 || {{ echo woe; exit 4; }}\n'
    )
    hook.chmod(0o755)
    spec = oci.spec("sleep", "1000")
    script = "echo startContainer $(cat) >> /log; test ! -e /fail-startContainer"
    inside = {"path": "/bin/busybox", "args": ["busybox", "sh", "-c", script]}
    spec["hooks"] = {
        point: [inside if point == "startContainer" else {"path": str(hook), "args": ["hook", point], "timeout": 20}]
        for point in POINTS
    }
    spec["annotations"] = {"org.example": "yes"}
    oci.write_spec(spec)
    return log


def lines(log: Path) -> list[tuple[str, dict[str, object]]]:
    found = (line.split(" ", 1) for line in log.read_text().splitlines())
    return [(point, json.loads(state)) for point, state in found]


def test_are_run_by_the_command_whose_moment_it_is(oci: Runtime, log: Path) -> None:
    name = oci.new_id()
    oci.detached("create", name)
    assert [point for point, _ in lines(log)] == ["prestart", "createRuntime", "createContainer"]
    pid = oci.state(name)["pid"]
    assert lines(log)[0][1] == {
        "ociVersion": "1.3.0",
        "id": name,
        "status": "creating",
        "pid": pid,
        "bundle": str(oci.bundle),
        "annotations": {"org.example": "yes"},
    }
    oci.ok("start", name)
    assert [point for point, _ in lines(log)][3:] == ["poststart"]
    assert (lines(log)[3][1]["status"], lines(log)[3][1]["pid"]) == ("running", pid)
    (inside,) = lines(oci.bundle / "rootfs/log")
    assert (inside[1]["status"], inside[1]["id"]) == ("created", name)
    oci.ok("kill", name, "KILL")
    while oci.status(name) != "stopped":
        time.sleep(0.01)
    assert len(lines(log)) == 4
    oci.ok("delete", name)
    assert lines(log)[4] == ("poststop", lines(log)[0][1] | {"status": "stopped", "pid": 0})


def test_start_waits_for_those_that_take_their_time(oci: Runtime) -> None:
    spec = oci.spec("sleep", "1000")
    slow = {"path": "/bin/busybox", "args": ["busybox", "sh", "-c", "sleep 0.5; echo done > /log"]}
    spec["hooks"] = {"startContainer": [slow]}
    oci.write_spec(spec)
    name = oci.new_id()
    oci.detached("create", name)
    oci.ok("start", name)
    assert (oci.bundle / "rootfs/log").read_text() == "done\n"
    assert oci.status(name) == "running"


def test_start_fails_where_init_is_killed_while_they_run(oci: Runtime) -> None:
    spec = oci.spec("sleep", "1000")
    slow = {"path": "/bin/busybox", "args": ["busybox", "sh", "-c", "echo there > /log; sleep 1000"]}
    spec["hooks"] = {"startContainer": [slow]}
    oci.write_spec(spec)
    name = oci.new_id()
    oci.detached("create", name)
    start = subprocess.Popen(oci.words("start", name), stderr=subprocess.PIPE, text=True)
    wait_until((oci.bundle / "rootfs/log").exists)
    oci.ok("kill", name, "KILL")
    _, said = start.communicate(timeout=20)
    assert start.returncode == 1
    assert "killed before" in said
    assert oci.status(name) == "stopped"


@pytest.mark.parametrize("point", ["prestart", "createRuntime", "createContainer"])
def test_that_fail_undo_the_creation_and_poststop_follows(oci: Runtime, log: Path, tmp_path: Path, point: str) -> None:
    (tmp_path / f"fail-{point}").touch()
    name = oci.new_id()
    result = oci.call("create", name)
    assert result.returncode == 1
    assert f"error running {point} hook #0: {tmp_path}/hook: exit status 4: woe" in result.stderr
    assert name not in oci.ok("list", "-q")
    points = [which for which, _ in lines(log)]
    assert points == [*POINTS[: POINTS.index(point) + 1], "poststop"]


@pytest.mark.parametrize("point", ["startContainer", "poststart"])
def test_that_fail_at_start_destroy_the_container(oci: Runtime, log: Path, tmp_path: Path, point: str) -> None:
    """Source: runtime-spec runtime.md "Lifecycle", 7, 9, 12 and 13."""
    failing = tmp_path if point == "poststart" else oci.bundle / "rootfs"
    (failing / f"fail-{point}").touch()
    name = oci.new_id()
    oci.detached("create", name)
    assert f"error running {point} hook #0" in oci.call("start", name).stderr
    assert "does not exist" in oci.call("state", name).stderr
    assert lines(log)[-1][0] == "poststop"
    assert oci.call("delete", "--force", name).returncode == 0


def test_poststop_that_fails_is_a_warning(oci: Runtime, log: Path, tmp_path: Path) -> None:
    (tmp_path / "fail-poststop").touch()
    name = oci.new_id()
    oci.detached("create", name)
    result = oci.call("delete", "--force", name)
    assert result.returncode == 0
    assert "level=warning" in result.stderr
    assert "error running poststop hook #0" in result.stderr
    assert name not in oci.ok("list", "-q")


def test_run_runs_them_all(oci: Runtime, log: Path) -> None:
    spec = json.loads((oci.bundle / "config.json").read_text())
    spec["process"]["args"] = ["true"]
    oci.write_spec(spec)
    oci.ok("run", oci.new_id())
    assert [point for point, _ in lines(log)] == [point for point in POINTS if point != "startContainer"]
