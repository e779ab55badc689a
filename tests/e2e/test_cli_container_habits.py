"""Containers as the hands of docker's users expect: filters, and options that are easily missed."""

import calendar
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cli import ok
from support.corrald import Corrald
from support.engine_fixtures import loaded
from support.requirements import needs

__all__ = ["loaded"]
pytestmark = needs("root", "overlayfs", "busybox")


@pytest.fixture(scope="module")
def own(loaded: Corrald) -> Iterator[Corrald]:
    """Two that have ended, with codes 3 and 0, and one that runs, made in this order."""
    words = {"three": ("sh", "-c", "echo a; echo b; exit 3"), "zero": ("true",), "runs": ("sleep", "1000")}
    for name, args in words.items():
        loaded.corral(
            "run", "-d", "--network", "none", "--name", name, "-v", f"{name}:/data", "busybox", *args, check=True
        )
        if name != "runs":
            loaded.corral("wait", name, check=True)
    yield loaded
    for name in words:
        loaded.corral("rm", "-f", name, check=True)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("-l",), ["runs"]),
        (("-n", "2"), ["runs", "zero"]),
        (("--filter", "exited=3"), ["three"]),
        (("-a", "--filter", "before=zero"), ["three"]),
        (("-a", "--filter", "since=zero"), ["runs"]),
        (("-a", "--filter", "ancestor=busybox", "--filter", "volume=zero"), ["zero"]),
        (("--filter", "health=none"), ["runs"]),
    ],
)
def test_ps_finds(own: Corrald, options: tuple[str, ...], expected: list[str]) -> None:
    shown = own.corral("ps", *options, "--format", "{{.Names}}", check=True).stdout.decode().split()
    assert shown == expected


@pytest.mark.parametrize("wrong", ["exited=three", "health=ill", "before=nobody", "colour=red"])
def test_a_filter_that_is_none_is_refused(own: Corrald, wrong: str) -> None:
    refused = own.corral("ps", "--filter", wrong)
    assert refused.returncode == 1
    assert wrong.partition("=")[2] in refused.stderr.decode() or "no filter" in refused.stderr.decode()


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (("container=three", "event=die"), {("container.died", "three")}),
        (("type=container", "event=create", "container=zero"), {("container.created", "zero")}),
        (
            ("container=runs", "event=start", "event=create", "type=container"),
            {("container.created", "runs"), ("container.started", "runs")},
        ),
        (("type=volume", "volume=runs"), {("volume.created", "runs")}),
    ],
)
def test_events_are_found_by_dockers_words(own: Corrald, filters: tuple[str, ...], expected: set[object]) -> None:
    options = [word for text in filters for word in ("--filter", text)]
    lines = own.corral("events", "--no-follow", "--format", "json", *options, check=True).stdout.decode().splitlines()
    events = [json.loads(line) for line in lines]
    assert {(event["topic"], event["payload"].get("name", event["subject"])) for event in events} == expected
    words = own.corral("events", "--no-follow", "--format", "{{.Type}}.{{.Action}} {{.Actor.ID}}", *options, check=True)
    assert words.stdout.decode().splitlines() == [f"{event['topic']} {event['subject']}" for event in events]
    refused = own.corral("events", "--no-follow", "--filter", "event=dance")
    assert b"is no event: it is one of" in refused.stderr


def test_templates_that_were_written_for_docker_find_its_names(own: Corrald) -> None:
    form = (
        "{{.State.Status}} {{.State.Running}} {{.State.ExitCode}} {{.HostConfig.RestartPolicy.Name}} {{.Config.Image}}"
    )
    assert own.corral("inspect", "-f", form, "three", check=True).stdout == b"exited false 3 no busybox\n"
    own.corral("update", "--cpus", "0.5", "--pids-limit", "50", "runs", check=True)
    limits = "{{.HostConfig.NanoCpus}} {{.HostConfig.CpuQuota}} {{.HostConfig.PidsLimit}}"
    assert own.corral("inspect", "-f", limits, "runs").stdout == b"500000000 50000 50\n"
    pid = int(own.corral("inspect", "-f", "{{.State.Pid}}", "runs", check=True).stdout)
    assert Path(f"/proc/{pid}/comm").read_text() == "sleep\n"
    assert own.corral("inspect", "-f", "{{.Path}} {{json .Args}}", "runs").stdout == b'sleep ["1000"]\n'
    assert own.corral("inspect", "-f", "{{.State.FinishedAt}}", "runs").stdout == b"0001-01-01T00:00:00Z\n"


def test_results_of_a_health_check_have_dockers_names(loaded: Corrald) -> None:
    options = ("--network", "none", "--health-cmd", "echo looked; exit 3", "--health-interval", "100ms")
    loaded.corral("run", "-d", "--name", "ill", *options, "busybox", "sleep", "1000", check=True)
    try:
        deadline = time.monotonic() + 20
        while not (log := health_log(loaded, "ill")):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        loaded.corral("rm", "-f", "ill", check=True)
    assert (log[0]["ExitCode"], log[0]["Output"]) == (3, "looked\n")
    assert str(log[0]["Start"]) < str(log[0]["End"])


def health_log(box: Corrald, name: str) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(
        box.corral("inspect", "-f", "{{json .State.Health.Log}}", name, check=True).stdout
    )
    return found


def test_networks_and_ports_have_dockers_names(loaded: Corrald) -> None:
    loaded.corral("create", "--name", "net", "-p", "127.0.0.1:0:80", "busybox", "true", check=True)
    try:
        shown = loaded.corral("inspect", "-f", "{{json .NetworkSettings}}", "net", check=True).stdout
    finally:
        loaded.corral("rm", "-f", "net", check=True)
    found = json.loads(shown)
    assert found["Networks"]["bridge"]["IPAddress"] == found["IPAddress"] != ""
    [port] = found["Ports"]["80/tcp"]
    assert port["HostIp"] == "127.0.0.1"
    assert int(port["HostPort"])


def test_logs_take_all_for_a_number(own: Corrald) -> None:
    assert own.corral("logs", "--tail", "all", "three").stdout == b"a\nb\n"
    assert own.corral("logs", "-n", "1", "three").stdout == b"b\n"
    assert b"give a number of lines, or all" in own.corral("logs", "--tail", "many", "three").stderr


def test_exec_takes_its_environment_from_files_and_from_here(own: Corrald, tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_text("# a comment\nFROM_FILE=one\nPATH_LIKE\n")
    os.environ["FROM_HERE"] = "two"
    script = "echo $FROM_FILE $FROM_HERE $LAST"
    options = ("--env-file", str(file), "-e", "FROM_HERE", "-e", "LAST=three")
    try:
        shown = own.corral("exec", *options, "runs", "sh", "-c", script, check=True).stdout
    finally:
        del os.environ["FROM_HERE"]
    assert shown == b"one two three\n"


def test_top_shows_what_ps_has_to_say(box: Corrald, name: str) -> None:
    ok(box, "run", "-d", "--name", name, "busybox", "sh", "-c", "sleep 600 & wait")
    pid = ok(box, "inspect", "-f", "{{.State.Pid}}", name).strip()
    for options in (("-o", "pid,comm"), ("axo", "pid,comm", "--forest")):  # the second excludes -q
        rows = [line.split() for line in ok(box, "top", name, *options).splitlines()]
        assert [row[0] for row in rows][:2] == ["PID", pid]
        assert [row[-1] for row in rows] == ["COMMAND", "sh", "sleep"]
    assert ok(box, "top", name, "aux").split()[:3] == ["USER", "PID", "%CPU"]
    assert "1" not in ok(box, "top", name, "-q", "1", "-o", "pid,args").split()
    for options, why in (
        (("-o", "comm"), b"the column PID has to be among"),
        (("-o", "ppid=PID,comm"), b"cannot be called PID"),
        (("--bogus",), b"ps does not take these options"),
    ):
        refused = box.corral("top", name, *options)
        assert (refused.returncode, why in refused.stderr) == (1, True)
    ok(box, "rm", "-f", name)


def test_annotations_reach_config_json_and_never_ours(box: Corrald, name: str) -> None:
    ok(box, "create", "--name", name, "--init", "--annotation", "a.b/c=d=e", "busybox", "true")
    [shown] = json.loads(ok(box, "inspect", name))
    assert shown["config"]["annotations"] == {"a.b/c": "d=e"}
    written = json.loads(Path(shown["bundle"], "config.json").read_bytes())["annotations"]
    assert (written["a.b/c"], len(written)) == ("d=e", 2)
    refused = box.corral("run", "--rm", "--annotation", "dev.corral.init=true", "busybox", "true")
    assert (refused.returncode, b"corral's own" in refused.stderr) == (125, True)
    ok(box, "rm", name)


def test_what_is_removed_by_force_need_not_be_there(box: Corrald) -> None:
    for noun in ("container", "volume", "network"):
        assert box.corral(noun, "rm", "no-such").returncode == 1
        gone = box.corral(noun, "rm", "-f", "no-such")
        assert (gone.returncode, b"no-such" in gone.stderr) == (0, True)


def test_a_volume_can_be_asked_for_twice(box: Corrald, name: str) -> None:
    for _ in range(2):
        assert ok(box, "volume", "create", name) == f"{name}\n"
    other = box.corral("volume", "create", "--label", "a=b", name)
    assert (other.returncode, b"exists already" in other.stderr) == (1, True)
    ok(box, "volume", "rm", name)


def test_logs_show_times_of_nine_digits_that_since_and_until_take(box: Corrald, name: str) -> None:
    script = "i=0; while [ $i -lt 50 ]; do echo $i; i=$((i+1)); usleep 1000; done"
    box.corral("run", "--name", name, "busybox", "sh", "-c", script, check=True)
    lines = box.corral("logs", "-t", name, check=True).stdout.decode().splitlines()
    times = [line.split()[0] for line in lines]
    assert len(times) == 50
    assert {len(time) for time in times} == {len("2026-01-01T00:00:00.000000000Z")}
    shown = box.corral("logs", "-t", "--since", times[20], "--until", times[29], name, check=True).stdout.decode()
    assert shown.splitlines() == [
        line for line, time in zip(lines, times, strict=True) if times[20] <= time <= times[29]
    ]
    whole = calendar.timegm(time.strptime(times[20][:19], "%Y-%m-%dT%H:%M:%S"))
    shown = box.corral("logs", "-t", "--since", f"{whole}.{times[20][20:29]}", name, check=True).stdout.decode()
    assert shown.splitlines() == [line for line, time in zip(lines, times, strict=True) if time >= times[20]]
    assert box.corral("logs", "--since", "10m", name).stdout.count(b"\n") == 50
    assert box.corral("logs", "--until", "10m", name).stdout == b""
