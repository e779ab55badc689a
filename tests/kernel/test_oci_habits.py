"""What the test suites of runc and crun hold a runtime to, and no specification says."""

import contextlib
import json
import os
import pty
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.ocicommand import Runtime, runtime_in, wait_until
from support.requirements import needs

from corral.kernel.cgroup import detect
from corral.kernel.cgroup.layout import Kind

pytestmark = [needs("root", "busybox"), pytest.mark.timeout(90)]

CHOWN, KILL, SYSLOG = 1 << 0, 1 << 5, 1 << 34


@pytest.fixture
def oci(tmp_path: Path) -> Iterator[Runtime]:
    with runtime_in(tmp_path) as runtime:
        yield runtime


def ambient(status: str) -> int:
    return next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapAmb:"))


def linux(oci: Runtime, *args: str, **members: object) -> str:
    """Run a container to its end whose linux has these members."""
    spec = oci.spec(*args)
    oci.write_spec(spec | {"linux": spec["linux"] | members})  # type: ignore[operator]
    return oci.ok("run", oci.new_id())


@pytest.mark.parametrize(("inheritable", "added"), [(["CAP_CHOWN", "CAP_SYSLOG"], SYSLOG), ([], 0)])
def test_a_capability_of_exec_is_ambient_where_it_is_inheritable(
    oci: Runtime, inheritable: list[str], added: int
) -> None:
    own = ["CAP_CHOWN"] if inheritable else []
    sets = {"bounding": ["CAP_CHOWN", "CAP_SYSLOG"], "effective": ["CAP_CHOWN"], "permitted": ["CAP_CHOWN"]}
    oci.write("sleep", "1000", capabilities=sets | {"inheritable": inheritable, "ambient": own})
    name = oci.new_id()
    oci.detached("run", "--detach", name)
    before = CHOWN if inheritable else 0
    assert ambient(oci.ok("exec", name, "cat", "/proc/self/status")) == before
    assert ambient(oci.ok("exec", "--cap", "CAP_SYSLOG", name, "cat", "/proc/self/status")) == before | added


def test_what_cant_be_ambient_is_told(oci: Runtime) -> None:
    sets = {which: ["CAP_CHOWN", "CAP_KILL"] for which in ("bounding", "effective", "permitted")}
    more = {"inheritable": ["CAP_KILL"], "ambient": ["CAP_KILL", "CAP_CHOWN"]}
    oci.write("cat", "/proc/self/status", capabilities=sets | more)
    result = oci.call("run", oci.new_id())
    assert ambient(result.stdout) == KILL
    assert "can't raise ambient capability CAP_CHOWN: " in result.stderr
    assert "CAP_KILL" not in result.stderr


def test_config_may_have_another_name(oci: Runtime) -> None:
    (oci.bundle / "other.json").write_text(json.dumps(oci.spec("echo other")))
    for config in ("other.json", str(oci.bundle / "other.json")):
        assert oci.ok("run", "--config", config, oci.new_id()) == "other\n"
    result = oci.call("run", "-f", "none.json", oci.new_id())
    assert (result.returncode, f"{oci.bundle}/none.json not found" in result.stderr) == (1, True)


def test_a_pattern_stands_for_many_containers(oci: Runtime) -> None:
    names = [oci.sleeping() for _ in range(3)]
    pattern = f"^({names[0]}|{names[1]})$"
    oci.ok("kill", "--regex", pattern, "KILL")
    oci.ok("delete", "--force", "--regex", pattern)
    assert oci.ok("list", "--quiet").split() == [names[2]]
    assert oci.status(names[2]) == "running"
    assert "--regex: '('" in oci.call("delete", "--regex", "(").stderr


@pytest.mark.skipif(detect().kind is Kind.V2, reason="cgroup v2 has one hierarchy")
def test_exec_goes_below_the_cgroup_of_one_controller(oci: Runtime) -> None:
    name = oci.sleeping()
    pid = oci.state(name)["pid"]
    paths = dict(line.split(":")[1:] for line in Path(f"/proc/{pid}/cgroup").read_text().split())
    below = Path(f"/sys/fs/cgroup/memory{paths['memory']}/below")
    below.mkdir()
    oci.detached(
        "exec", "--cgroup", "memory:below", "--detach", "--pid-file", str(oci.directory / "pid"), name, "sleep", "9"
    )
    within = Path(f"/proc/{(oci.directory / 'pid').read_text()}/cgroup").read_text().split()
    assert {line.partition(":")[2] for line in within if line.endswith("/below")} == {f"memory:{paths['memory']}/below"}
    for cgroup, said in (
        ("memory:none", "adding pid to cgroup"),
        ("none:/", "unknown controller 'none'"),
        ("memory:../x", "bad sub cgroup path"),
    ):
        result = oci.call("exec", "--cgroup", cgroup, name, "true")
        assert (result.returncode, said in result.stderr) == (255, True), result.stderr


def test_an_empty_home_is_looked_up_and_no_path_is_added(oci: Runtime) -> None:
    (oci.bundle / "rootfs/etc").mkdir(exist_ok=True)
    (oci.bundle / "rootfs/etc/passwd").write_text("root:x:0:0::/home/of-root:/bin/sh\n")
    oci.write("/bin/env", "-", "/bin/sh", "-c", ":")
    oci.write_spec(oci.spec("env", "FOO=bar", env=["HOME=", "A=b"]))
    assert sorted(oci.ok("run", oci.new_id()).split()) == ["A=b", "FOO=bar", "HOME=/home/of-root"]


def test_lines_end_as_written_where_no_terminal_reads_them(oci: Runtime) -> None:
    oci.write("tty; echo end", terminal=True)
    master, slave = pty.openpty()
    try:
        result = subprocess.run(
            oci.words("run", oci.new_id()), cwd=oci.bundle, stdin=slave, capture_output=True, timeout=30, check=True
        )
    finally:
        os.close(master)
        os.close(slave)
    assert result.stdout == b"/dev/pts/0\nend\n"


@pytest.mark.parametrize("option", ["acl", "noacl"])
def test_a_tmpfs_takes_the_options_about_acls(oci: Runtime, option: str) -> None:
    spec = oci.spec("grep -c ' /mnt ' /proc/mounts")
    mount = {"destination": "/mnt", "type": "tmpfs", "source": "tmpfs", "options": [option]}
    oci.write_spec(spec | {"mounts": [*spec["mounts"], mount]})  # type: ignore[misc]
    assert oci.ok("run", oci.new_id()) == "1\n"


def test_a_directory_is_no_program(oci: Runtime) -> None:
    result = oci.call("exec", oci.sleeping(), "/bin")
    assert (result.returncode, ": is a directory" in result.stderr) == (255, True), result.stderr
    oci.write_spec(oci.spec("/bin", "x"))
    for words in (["run"], ["create"]):
        result = oci.call(*words, oci.new_id())
        assert (result.returncode, ": is a directory" in result.stderr) == (1, True), result.stderr


def test_a_pids_limit_of_zero_leaves_init_alone(oci: Runtime) -> None:
    name = oci.new_id()
    spec = oci.spec("sleep", "1000")
    oci.write_spec(spec | {"linux": spec["linux"] | {"resources": {"pids": {"limit": 0}}}})  # type: ignore[operator]
    oci.detached("run", "--detach", name)
    assert json.loads(oci.ok("events", "--stats", name))["data"]["pids"]["limit"] == 1
    oci.ok("update", "--pids-limit", "-1", name)
    assert "limit" not in json.loads(oci.ok("events", "--stats", name))["data"]["pids"]


def test_names_of_members_may_differ_in_case_as_go_reads_them(oci: Runtime) -> None:
    spec = oci.spec("hostname; echo $A")
    spec["HostName"] = spec.pop("hostname")
    spec["process"] |= {"ENV": ["A=wrong"], "env": ["A=right", "PATH=/bin"]}  # type: ignore[operator]
    oci.write_spec(spec)
    assert oci.ok("run", oci.new_id()) == "corral\nright\n"


@needs("ionice")
def test_an_idle_process_needs_no_io_priority(oci: Runtime) -> None:
    oci.write("sleep", "1000", ioPriority={"class": "IOPRIO_CLASS_IDLE"})
    name = oci.new_id()
    oci.detached("run", "--detach", name)
    words = ["ionice", "-p", str(oci.state(name)["pid"])]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "idle\n"


def test_two_domain_names_are_one_too_many(oci: Runtime) -> None:
    spec = oci.spec("cat /proc/sys/kernel/domainname") | {"domainname": "one"}
    members = spec["linux"]
    oci.write_spec(spec | {"linux": members | {"sysctl": {"kernel.domainname": "two"}}})  # type: ignore[operator]
    result = oci.call("run", oci.new_id())
    assert (result.returncode, "linux.sysctl.kernel.domainname" in result.stderr) == (1, True)
    oci.write_spec(spec | {"linux": members | {"sysctl": {"kernel.domainname": "one"}}})  # type: ignore[operator]
    assert oci.ok("run", oci.new_id()) == "one\n"


def test_nothing_of_a_hosts_device_can_be_executed(oci: Runtime) -> None:
    whole = [{"containerID": 0, "hostID": 0, "size": 2**32 - 1}]
    kinds = [{"type": kind} for kind in ("pid", "mount", "uts", "ipc", "network", "user")]
    seen = linux(oci, "cat /proc/self/mountinfo", namespaces=kinds, uidMappings=whole, gidMappings=whole, devices=[])
    [null] = [line.split() for line in seen.splitlines() if line.split()[4] == "/dev/null"]
    assert {"nosuid", "noexec"} <= set(null[5].split(","))


def test_spec_has_a_cgroup_namespace_on_cgroup_v2_alone(oci: Runtime, tmp_path: Path) -> None:
    for words in (["spec"], ["spec", "--rootless"]):
        (oci.bundle / "config.json").unlink(missing_ok=True)
        oci.ok(*words)
        kinds = [each["type"] for each in json.loads((oci.bundle / "config.json").read_text())["linux"]["namespaces"]]
        assert ("cgroup" in kinds) is (detect().kind is Kind.V2)


def test_a_log_in_json_is_as_compact_as_gos(oci: Runtime) -> None:
    result = oci.call("--log-format", "json", "state", "nobody")
    assert result.stderr.startswith('{"level":"error","msg":"')


@pytest.mark.skipif(detect().kind is Kind.V2, reason="cgroup v2 has all of these files")
def test_a_file_of_cgroup_v2_is_an_invalid_configuration_elsewhere(oci: Runtime) -> None:
    spec = oci.spec("true")
    oci.write_spec(spec | {"linux": spec["linux"] | {"resources": {"unified": {"memory.min": "131072"}}}})  # type: ignore[operator]
    result = oci.call("run", oci.new_id())
    assert (result.returncode, "invalid configuration: memory.min: " in result.stderr) == (1, True)


@needs("unshare")
def test_mounts_of_cgroups_are_no_peers_of_the_hosts(oci: Runtime) -> None:
    """They would be on every host that systemd has booted, whose mounts are shared."""
    oci.write("grep cgroup /proc/self/mountinfo")
    words = ["unshare", "--mount", "--propagation", "shared", *oci.words("run", oci.new_id())]
    seen = subprocess.run(words, cwd=oci.bundle, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    assert seen.stdout
    assert not [line for line in seen.stdout.splitlines() if {"shared", "master"} & {*line.replace(":", " ").split()}]


def test_a_root_that_is_asked_for_must_be_there_to_be_listed(oci: Runtime) -> None:
    result = oci.call("list")
    assert (result.returncode, f"no such directory: {oci.root}" in result.stderr) == (1, True)
    oci.root.mkdir()
    assert oci.ok("list", "--quiet") == ""


def test_a_path_that_is_masked_twice_is_covered_once(oci: Runtime) -> None:
    (oci.bundle / "rootfs/hidden").mkdir()
    assert linux(oci, "grep -c ' /hidden ' /proc/mounts", maskedPaths=["/hidden", "/hidden"]) == "1\n"


@contextlib.contextmanager
def parent(controller: str, name: str) -> Iterator[Path]:
    """A cgroup of v1 that somebody else made, for one of a container to lie in."""
    above = Path("/sys/fs/cgroup") / controller / f"{name}-above"
    above.mkdir()
    try:
        yield above
    finally:
        for hierarchy in detect().hierarchies:
            with contextlib.suppress(FileNotFoundError):
                (Path(hierarchy.mount_point) / above.name).rmdir()


@pytest.mark.skipif(not Path("/sys/fs/cgroup/cpuset").is_dir(), reason="there is no cpuset of cgroup v1")
def test_a_cpuset_that_somebody_made_and_left_empty_is_filled(oci: Runtime) -> None:
    name = oci.new_id()
    with parent("cpuset", name) as above:
        (above / "cpuset.cpus").write_text("\n")
        (above / "cpuset.mems").write_text("\n")
        assert linux(oci, "echo fine", cgroupsPath=f"/{above.name}/{name}") == "fine\n"
        assert (above / "cpuset.cpus").read_text() == (above.parent / "cpuset.cpus").read_text()


@pytest.mark.skipif(
    not Path("/sys/fs/cgroup/cpu/cpu.rt_runtime_us").exists(), reason="no groups of real-time processes"
)
def test_a_real_time_period_may_be_less_than_the_runtime_was(oci: Runtime) -> None:
    name = oci.new_id()
    spec = oci.spec("sleep", "1000")
    oci.write_spec(spec | {"linux": spec["linux"] | {"cgroupsPath": f"/{name}-above/{name}"}})  # type: ignore[operator]
    with parent("cpu", name) as above:
        (above / "cpu.rt_runtime_us").write_text("700000")
        oci.detached("run", "--detach", name)
        for period, runtime in ((900_001, 600_001), (10_000, 3_000), (100_000, 20_000)):
            oci.ok("update", "--cpu-rt-period", str(period), "--cpu-rt-runtime", str(runtime), name)
            found = [int((above / name / f"cpu.rt_{file}_us").read_text()) for file in ("period", "runtime")]
            assert found == [period, runtime]
        oci.ok("delete", "--force", name)


def test_an_access_of_devices_may_hold_an_a_that_says_nothing(oci: Runtime) -> None:
    rules = [{"allow": False, "access": "rwm"}, {"allow": True, "type": "c", "major": 1, "minor": 11, "access": "ra"}]
    assert linux(oci, "echo fine", resources={"devices": rules}) == "fine\n"


@pytest.mark.parametrize("own_users", [False, True], ids=["a-stone-waits", "the-runtime-waits"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT])
def test_a_container_that_is_not_started_ends_by_a_signal(oci: Runtime, number: int, own_users: bool) -> None:
    spec = oci.spec("sleep", "1000")
    if own_users:
        whole = [{"containerID": 0, "hostID": 0, "size": 2**32 - 1}]
        kinds = [{"type": kind} for kind in ("pid", "mount", "uts", "ipc", "network", "user")]
        spec["linux"] |= {"namespaces": kinds, "uidMappings": whole, "gidMappings": whole}  # type: ignore[operator]
    oci.write_spec(spec)
    name = oci.new_id()
    oci.detached("create", name)
    oci.ok("kill", name, str(signal.SIGUSR1.value))
    assert oci.status(name) == "created"
    oci.ok("kill", name, str(number))
    wait_until(lambda: oci.status(name) == "stopped")
