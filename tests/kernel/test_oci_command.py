"""corral-oci: the life of a container over several commands, seen as runc's clients see it."""

import fcntl
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.ocicommand import Runtime, runtime_in, wait_until
from support.requirements import needs

pytestmark = needs("root", "busybox", "cgroup")


@pytest.fixture
def oci(tmp_path: Path) -> Iterator[Runtime]:
    with runtime_in(tmp_path) as runtime:
        yield runtime


def cgroups(name: str) -> list[Path]:
    return list(Path("/sys/fs/cgroup").glob(f"**/corral-oci/{name}"))


def test_create_leaves_an_init_that_waits_and_start_lets_it_go(oci: Runtime, tmp_path: Path) -> None:
    name = oci.new_id()
    oci.write("echo started > /started; sleep 1000")
    oci.detached("create", "--pid-file", str(tmp_path / "pid"), name)
    state = oci.state(name)
    assert state["status"] == "created"
    assert state["pid"] == int((tmp_path / "pid").read_text())
    assert not (oci.bundle / "rootfs/started").exists()
    oci.ok("start", name)
    assert oci.status(name) == "running"
    wait_until((oci.bundle / "rootfs/started").exists)
    assert "already running" in oci.call("start", name).stderr


def test_a_pid_file_is_written_where_others_may_plant_links(oci: Runtime, tmp_path: Path) -> None:
    victim, directory = tmp_path / "victim", tmp_path / "shared"
    victim.write_text("as it was")
    directory.mkdir()
    last = int(Path("/proc/sys/kernel/ns_last_pid").read_text())
    for name in ("pid", ".pid", *(f".pid.{last + n}" for n in range(2000))):
        (directory / name).symlink_to(victim)
    name = oci.new_id()
    oci.write("true")
    oci.detached("create", "--pid-file", str(directory / "pid"), name)
    assert (directory / "pid").read_text() == str(oci.state(name)["pid"])
    assert not (directory / "pid").is_symlink()
    assert victim.read_text() == "as it was"
    assert all(path.is_symlink() or path.name == "pid" for path in directory.iterdir())


def test_state_has_what_the_specification_wants(oci: Runtime) -> None:
    name = oci.new_id()
    spec = oci.spec("sleep", "1000")
    oci.write_spec(spec | {"annotations": {"a": "b"}})
    oci.detached("create", name)
    state = oci.state(name)
    assert {key: state[key] for key in ("ociVersion", "id", "status", "bundle", "annotations")} == {
        "ociVersion": "1.3.0", "id": name, "status": "created", "bundle": str(oci.bundle), "annotations": {"a": "b"},
    }  # fmt: skip


def test_a_stopped_container_is_told_apart_and_deleted_with_its_cgroups(oci: Runtime) -> None:
    name = oci.sleeping()
    assert cgroups(name)
    refused = oci.call("delete", name)
    assert refused.returncode == 1
    assert "is not stopped" in refused.stderr
    oci.ok("kill", name, "9")
    wait_until(lambda: oci.status(name) == "stopped")
    assert oci.state(name)["pid"] == 0
    late = oci.call("kill", name, "TERM")
    assert late.returncode == 1
    assert "not running" in late.stderr
    oci.ok("delete", name)
    assert not cgroups(name)
    gone = oci.call("delete", name)
    assert gone.returncode == 1
    assert "does not exist" in gone.stderr
    oci.ok("delete", "--force", name)


def test_a_created_container_can_be_deleted(oci: Runtime) -> None:
    name = oci.new_id()
    oci.write("true")
    oci.detached("create", name)
    pid = oci.state(name)["pid"]
    oci.ok("delete", name)
    wait_until(lambda: not Path(f"/proc/{pid}").exists())
    assert not cgroups(name)


def test_a_recycled_pid_is_not_taken_for_the_container(oci: Runtime) -> None:
    name = oci.sleeping()
    file = oci.root / name / "state.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | {"start_time": record["start_time"] - 1}))
    assert oci.status(name) == "stopped"
    assert oci.call("kill", name, "9").returncode == 1
    assert Path(f"/proc/{record['pid']}").exists()
    file.write_text(json.dumps(record))


def test_an_id_is_taken_once_and_never_leads_out_of_the_root(oci: Runtime) -> None:
    name = oci.sleeping()
    again = oci.call("run", name)
    assert again.returncode == 1
    assert "already exists" in again.stderr
    assert oci.status(name) == "running"
    for bad in ("", "..", "a/b", "a b", "x" * 300):
        assert "invalid container id" in oci.call("state", bad).stderr
        assert "invalid container id" in oci.call("create", bad).stderr


def test_run_passes_output_and_exit_code_on_and_leaves_nothing(oci: Runtime) -> None:
    name = oci.new_id()
    oci.write("echo out; echo err >&2; cat; exit 7")
    result = oci.call("run", name, stdin=None, input="in\n")
    assert (result.returncode, result.stdout, result.stderr) == (7, "out\nin\n", "err\n")
    assert oci.ok("list", "-q") == ""
    assert not cgroups(name)


def test_run_of_what_is_killed_ends_with_128_and_the_signal(oci: Runtime) -> None:
    name = oci.new_id()
    oci.write("sleep", "1000")
    process = subprocess.Popen(oci.words("run", name), cwd=oci.bundle, stdin=subprocess.DEVNULL)
    wait_until(lambda: oci.call("state", name).stdout.count("running") == 1)
    oci.ok("kill", name, "SIGKILL")
    assert process.wait(10) == 137


def test_run_passes_signals_on(oci: Runtime) -> None:
    name = oci.new_id()
    oci.write("trap 'exit 42' TERM; echo ready; while :; do sleep 0.05; done")
    process = subprocess.Popen(oci.words("run", name), cwd=oci.bundle, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 42
    process.stdout.close()


def test_run_reads_no_more_input_than_the_terminal_of_its_container_takes(oci: Runtime) -> None:
    name = oci.new_id()
    oci.write("stty raw -echo; echo ready; sleep 0.7; head -c 3000000 | wc -c", terminal=True)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen(oci.words("run", name), cwd=oci.bundle, **pipes)  # type: ignore[call-overload]
    assert process.stdout.readline() == b"ready\n"
    os.set_blocking(process.stdin.fileno(), False)
    sent, stop = 0, time.monotonic() + 0.5
    while time.monotonic() < stop:
        try:
            sent += os.write(process.stdin.fileno(), b"x" * 65536)
        except BlockingIOError:
            time.sleep(0.01)
    assert sent < 1_000_000
    os.set_blocking(process.stdin.fileno(), True)
    output, _ = process.communicate(b"x" * (3_000_000 - sent), timeout=20)
    assert output == b"3000000\n"
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("nope", 'exec: "nope": executable file not found in $PATH'),
        ("/nope", 'exec: "/nope": no such file or directory'),
        ("/etc", 'exec: "/etc": is a directory'),
    ],
)
def test_a_program_that_cannot_run_fails_create_in_words_that_clients_know(
    oci: Runtime, program: str, reason: str
) -> None:
    name = oci.new_id()
    oci.write(program, "x")
    for command in ("create", "run"):
        result = oci.call(command, name)
        assert result.returncode == 1
        assert json.dumps(reason)[1:-1] in result.stderr
        assert oci.ok("list", "-q") == ""
        assert not cgroups(name)
    running = oci.sleeping()
    result = oci.call("exec", running, program)
    assert result.returncode == 255
    assert json.dumps(reason)[1:-1] in result.stderr


def test_the_log_file_has_the_reason_as_json(oci: Runtime, tmp_path: Path) -> None:
    log = tmp_path / "log"
    result = oci.call(f"--log={log}", "--log-format", "json", "state", "nope")
    assert result.returncode == 1
    entry = json.loads(log.read_text())
    assert entry["level"] == "error"
    assert "does not exist" in entry["msg"]
    assert entry["time"]
    assert entry["msg"] in result.stderr


def test_kill_all_reaches_every_process(oci: Runtime) -> None:
    name = oci.new_id()
    oci.write("sleep 1000 & sleep 1000 & wait")
    oci.detached("run", "-d", name)
    wait_until(lambda: len(json.loads(oci.ok("ps", "--format", "json", name))) == 3)
    oci.ok("kill", "--all", name, "KILL")
    wait_until(lambda: oci.status(name) == "stopped")
    oci.ok("kill", "--all", name, "KILL")
    oci.ok("delete", name)


def test_a_container_in_the_hosts_pid_namespace_dies_as_a_whole(oci: Runtime) -> None:
    name = oci.new_id()
    spec = oci.spec("sleep 1000 & sleep 1000")
    spec["linux"]["namespaces"] = [{"type": "mount"}]  # type: ignore[index]
    del spec["hostname"]
    oci.write_spec(spec)
    oci.detached("run", "-d", name)
    wait_until(lambda: len(json.loads(oci.ok("ps", "--format=json", name))) == 2)
    pids = json.loads(oci.ok("ps", "--format=json", name))
    oci.ok("kill", name, "KILL")
    wait_until(lambda: not any(Path(f"/proc/{pid}/exe").is_symlink() and _alive(pid) for pid in pids))
    for number in ("KILL", "TERM", "0"):
        late = oci.call("kill", name, number)
        assert late.returncode == 1
        assert "container not running" in late.stderr
    oci.ok("kill", "--all", name, "KILL")


def test_what_an_init_leaves_in_the_hosts_pid_namespace_can_be_killed(oci: Runtime) -> None:
    name = oci.new_id()
    spec = oci.spec("sleep 1000 &")
    spec["linux"]["namespaces"] = [{"type": "mount"}]  # type: ignore[index]
    del spec["hostname"]
    oci.write_spec(spec)
    oci.detached("run", "-d", name)
    wait_until(lambda: oci.status(name) == "stopped")
    (pid,) = json.loads(oci.ok("ps", "--format=json", name))
    assert oci.call("kill", name, "TERM").returncode == 1
    oci.ok("kill", name, "KILL")
    wait_until(lambda: not _alive(pid))


def test_signal_0_asks_whether_the_container_runs(oci: Runtime) -> None:
    name = oci.sleeping()
    oci.ok("kill", name, "0")
    assert "unknown signal" in oci.call("kill", name, "65").stderr
    assert "unknown signal" in oci.call("kill", name, "-1").stderr
    oci.ok("kill", name, "KILL")
    wait_until(lambda: oci.call("kill", name, "0").returncode == 1)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_commands_on_one_container_wait_for_each_other(oci: Runtime) -> None:
    name = oci.new_id()
    oci.write("sleep", "1000")
    oci.detached("create", name)
    starts = [
        subprocess.Popen(oci.words("start", name), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for _ in range(4)
    ]
    codes = []
    for start in starts:
        _, said = start.communicate(timeout=20)
        codes.append(start.returncode)
        assert start.returncode == 0 or b"already running" in said
    assert sorted(codes) == [0, 1, 1, 1]


def test_what_a_killed_create_left_can_be_deleted_by_force(oci: Runtime) -> None:
    name = oci.new_id()
    (oci.root / name).mkdir(parents=True)
    assert oci.call("state", name).returncode == 1
    oci.ok("delete", "--force", name)
    assert not (oci.root / name).exists()


def test_a_start_that_was_killed_behind_the_gate_has_started_the_container(oci: Runtime) -> None:
    name = oci.new_id()
    oci.write("sleep 1000")
    oci.detached("create", name)
    kept = oci.root / name / "kept"
    os.link(oci.root / name / "gate", kept)
    assert [oci.status(name) for _ in range(3)] == ["created"] * 3  # to look does not start it
    oci.ok("start", name)
    kept.rename(oci.root / name / "gate")  # as if it had not come to removing it
    assert oci.status(name) == "running"
    assert "not stopped" in oci.call("delete", name).stderr
    oci.ok("delete", "--force", name)


def test_what_a_killed_create_left_takes_nobody_elses_cgroup_along(oci: Runtime) -> None:
    """Killed before it looked whether the cgroup that config.json names is another container's."""
    first, second = oci.sleeping(), oci.new_id()
    record = json.loads((oci.root / first / "state.json").read_text())
    left = record | {"id": second, "pid": 0, "start_time": 0, "cgroup_is_own": False}
    (oci.root / second).mkdir()
    (oci.root / second / "state.json").write_text(json.dumps(left))
    assert oci.call("ps", second).returncode == 1
    oci.ok("kill", "--all", second, "KILL")
    oci.ok("delete", "--force", second)
    assert oci.status(first) == "running"
    assert cgroups(first)


def test_a_cgroup_that_is_in_use_or_frozen_is_refused_and_left_alone(oci: Runtime) -> None:
    first = oci.sleeping()
    oci.write_spec(oci.spec("true") | {"linux": oci.spec("true")["linux"] | {"cgroupsPath": f"/corral-oci/{first}"}})
    result = oci.call("run", oci.new_id())
    assert result.returncode == 1
    assert "container's cgroup is not empty" in result.stderr
    assert oci.status(first) == "running"
    empty = oci.new_id()
    directory = Path("/sys/fs/cgroup/freezer/corral-oci") / empty
    if not directory.parent.exists():
        return  # cgroup v2 alone: its empty cgroups are frozen by the same file, seen by is_frozen()
    directory.mkdir()
    (directory / "freezer.state").write_text("FROZEN")
    try:
        oci.write("true")
        result = oci.call("run", empty)
        assert result.returncode == 1
        assert "container's cgroup unexpectedly frozen" in result.stderr
        assert (directory / "freezer.state").read_text() == "FROZEN\n"
    finally:
        (directory / "freezer.state").write_text("THAWED")
        directory.rmdir()


def test_an_empty_cgroup_that_is_there_already_is_taken_over(oci: Runtime) -> None:
    name = oci.new_id()
    made = [Path(root) / "corral-oci" / name for root in _hierarchies()]
    for directory in made:
        directory.mkdir(parents=True)
    oci.write("echo fine")
    result = oci.call("run", name)
    assert (result.returncode, result.stdout) == (0, "fine\n")
    assert not any(directory.exists() for directory in made)


def _hierarchies() -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line.split()[4] for line in lines if " - cgroup cgroup rw,memory" in line or " - cgroup2 " in line]


def test_events_wait_for_the_end_of_the_container_however_long_the_interval_is(oci: Runtime) -> None:
    name = oci.sleeping()
    events = subprocess.Popen(oci.words("events", "--interval", "1000000h", name), stdout=subprocess.PIPE, text=True)
    assert events.stdout is not None
    assert json.loads(events.stdout.readline())["type"] == "stats"
    oci.ok("kill", name, "KILL")
    assert events.communicate(timeout=20)[0] == ""
    assert events.returncode == 0


def test_preserved_descriptors_arrive_and_no_other_does(oci: Runtime, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("kept\n")
    oci.write("cat <&3; for fd in /proc/self/fd/*; do [ -e $fd ] && echo ${fd##*/}; done; true")
    script = f'exec 3<{kept} 4<{kept} 5<{kept}; exec "$@"'
    words = oci.words("run", "--preserve-fds", "1", oci.new_id())
    result = subprocess.run(
        ["sh", "-c", script, "sh", *words], cwd=oci.bundle, capture_output=True, text=True, check=False, timeout=20
    )
    assert (result.returncode, result.stdout) == (0, "kept\n0\n1\n2\n3\n"), result.stderr
    assert "is not open" in oci.call("run", "--preserve-fds", "4", oci.new_id()).stderr


def test_flags_are_taken_in_both_spellings_and_unknown_ones_are_refused(oci: Runtime) -> None:
    oci.root.mkdir()
    assert oci.call("--log-format=text", "--rootless", "auto", "list").returncode == 0
    assert "not defined" in oci.call("list", "--nope").stderr
    assert "needs an argument" in oci.call("create", "--bundle").stderr
    assert oci.call("nope").returncode == 3
    assert "USAGE" in oci.ok("checkpoint", "--help")
    assert "CRIU" in oci.call("checkpoint", "x").stderr
    assert oci.call("--systemd-cgroup", "list").returncode == 0  # it is about containers to be made
    assert "corral-oci version" in oci.ok("--version")


@needs("no systemd")
def test_where_systemd_does_not_run_it_is_said_what_to_do_without(oci: Runtime) -> None:
    name = oci.new_id()
    oci.write("true")
    for flag in ("--systemd-cgroup", "--cgroup-manager=systemd"):
        result = oci.call(flag, "create", name)
        assert result.returncode == 1
        assert "leave --systemd-cgroup out, or have the engine use cgroupfs" in result.stderr
    assert not (oci.root / name).exists()
    spec = oci.spec("true")
    oci.write_spec(spec | {"linux": spec["linux"] | {"cgroupsPath": "system.slice:corral:x"}})
    assert "use a path, or give --systemd-cgroup" in oci.call("create", name).stderr


def test_capabilities_of_a_later_kernel_are_ignored_with_a_warning(oci: Runtime) -> None:
    name = oci.new_id()
    held = ["CAP_KILL", "CAP_OF_TOMORROW"]
    oci.write("sleep", "1000", capabilities={"bounding": held, "effective": held, "permitted": held})
    oci.detached("create", name)
    assert "CAP_OF_TOMORROW" in (oci.directory / "stderr").read_text()
    oci.ok("start", name)
    status = oci.call("exec", "--cap", "CAP_OF_NEXT_WEEK", name, "cat", "/proc/self/status")
    assert "level=warning" in status.stderr
    assert "CAP_OF_NEXT_WEEK" in status.stderr
    assert "CapBnd:\t0000000000000020" in status.stdout


def test_spec_writes_a_bundle_that_runs_and_features_is_json(oci: Runtime) -> None:
    oci.ok("spec")
    assert "exists" in oci.call("spec").stderr
    spec = json.loads((oci.bundle / "config.json").read_text())
    spec["process"] |= {"terminal": False, "args": ["echo", "ran"]}
    oci.write_spec(spec)
    assert oci.ok("run", oci.new_id()) == "ran\n"
    assert json.loads(oci.ok("features"))["ociVersionMax"] == spec["ociVersion"] == "1.3.0"
    assert "\nspec: 1.3.0\n" in oci.ok("--version")


def test_the_interpreter_cannot_be_written_to_by_way_of_its_processes_cve_2019_5736(oci: Runtime) -> None:
    """/proc/PID/exe of what is to become a container's process, and of the exec that makes one, kept until it may."""
    name = oci.new_id()
    oci.write("sleep", "1000")
    oci.detached("create", name)
    held = [os.open(f"/proc/{oci.state(name)['pid']}/exe", os.O_RDONLY)]
    oci.ok("start", name)
    process = subprocess.Popen(oci.words("exec", name, "sleep", "1000"), stdin=subprocess.DEVNULL)
    wait_until(lambda: len(json.loads(oci.ok("ps", "--format", "json", name))) == 2)
    held.append(os.open(f"/proc/{process.pid}/exe", os.O_RDONLY))
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 143
    for fd in held:
        # Not tried out: as long as some Python runs on this host, the answer is ETXTBSY whatever the mount says.
        assert os.fstatvfs(fd).f_flag & os.ST_RDONLY or fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE
        os.close(fd)
