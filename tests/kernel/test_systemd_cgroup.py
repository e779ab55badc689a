"""corral-oci --systemd-cgroup, where systemd is pid 1: containers are its scopes, and it keeps to their limits."""

import contextlib
import json
import os
import pwd
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from support.ocicommand import COMMAND, Runtime, wait_until
from support.requirements import needs
from support.rootless import users_directory
from support.tasks import make_rootfs

pytestmark = [needs("root", "busybox", "systemd"), pytest.mark.timeout(600)]

ROOT = Path("/sys/fs/cgroup")
SLICE = "corraltest-web.slice"
INSIDE = ROOT / "corraltest.slice" / SLICE
TOP_SLICE = "corraltest.slice"
LIMITS = {
    "memory": {"limit": 64 << 20, "swap": 128 << 20},
    "cpu": {"quota": 33_333, "period": 100_000, "shares": 512, "cpus": "0", "burst": 1000},
    "pids": {"limit": 1},
}
UNTOLD = {"memory.oom.group": "1"}
"""What systemd has no property for once a unit is there."""
PROC = [{"destination": "/proc", "type": "proc", "source": "proc"}]
PROPERTY = "org.systemd.property"
SLOW_S = 120
"""A command may take a while where the processor is emulated."""


class UnderSystemd(Runtime):
    """The command with the flag; containers of their own names in the slice of this test."""

    def words(self, *words: str) -> list[str]:
        command, *rest = super().words(*words)
        return [command, "--systemd-cgroup", *rest]

    def call(self, *words: str, **options: object) -> "subprocess.CompletedProcess[str]":
        return super().call(*words, **{"timeout": SLOW_S} | options)

    def spec_of(self, name: str, *args: str, resources: Mapping[str, object] = {}, **members: object):
        spec = self.spec(*args)
        spec["linux"]["cgroupsPath"] = f"{SLICE}:test:{name}"
        spec["linux"]["resources"] |= resources
        return spec | members

    def sleeping(self, resources: Mapping[str, object] = {}, **members: object) -> str:
        name = self.new_id()
        self.write_spec(self.spec_of(name, "sleep", "1000", resources=resources, **members))
        self.detached("run", "--detach", name)
        return name


@pytest.fixture
def oci(tmp_path: Path) -> Iterator[UnderSystemd]:
    runtime = UnderSystemd(tmp_path)
    make_rootfs(runtime.bundle / "rootfs")
    try:
        yield runtime
    finally:
        runtime.close()
        systemctl("stop", TOP_SLICE)


def systemctl(*words: str) -> str:
    return subprocess.run(["systemctl", *words], capture_output=True, text=True, check=False).stdout.strip()


def unit(name: str) -> str:
    return f"test-{name}.scope"


def shown(name: str, *properties: str) -> dict[str, str]:
    lines = systemctl("show", unit(name), "--property", ",".join(properties)).splitlines()
    return dict(line.split("=", 1) for line in lines)


def written(name: str, *files: str) -> dict[str, str]:
    return {file: (INSIDE / unit(name) / file).read_text().strip() for file in files}


def is_left(name: str) -> bool:
    """Whether systemd knows the scope, or there is a cgroup of it."""
    return shown(name, "LoadState")["LoadState"] != "not-found" or (INSIDE / unit(name)).exists()


def test_a_container_is_a_scope_whose_limits_outlive_a_reload(oci: UnderSystemd) -> None:
    annotations = {
        "org.systemd.property.TimeoutStopSec": "7",
        "org.systemd.property.CollectMode": "'inactive-or-failed'",
    }
    host_device = {"destination": "/dev/kmsg", "type": "bind", "source": "/dev/kmsg", "options": ["bind"]}
    mounts = [*oci.spec("true")["mounts"], host_device]  # type: ignore[misc]
    name = oci.sleeping(LIMITS | {"unified": UNTOLD}, annotations=annotations, mounts=mounts)
    told = {
        "Slice": SLICE, "Delegate": "yes", "DefaultDependencies": "no", "ActiveState": "active",
        "MemoryMax": str(64 << 20), "MemorySwapMax": str(64 << 20), "CPUWeight": "59", "CPUQuotaPerSecUSec": "340ms",
        "CPUQuotaPeriodUSec": "100ms", "TasksMax": "1", "AllowedCPUs": "0", "OOMPolicy": "kill",
        "TimeoutStopUSec": "7s", "CollectMode": "inactive-or-failed",
        "ControlGroup": f"/{TOP_SLICE}/{SLICE}/{unit(name)}",
    }  # fmt: skip
    assert shown(name, *told) == told
    limits = {
        "memory.max": str(64 << 20), "memory.swap.max": str(64 << 20), "cpu.weight": "59", "cpu.max": "34000 100000",
        "cpu.max.burst": "1000", "pids.max": "1", "cpuset.cpus": "0", **UNTOLD,
    }  # fmt: skip
    assert written(name, *limits) == limits
    assert written(name, "cgroup.procs") == {"cgroup.procs": str(oci.state(name)["pid"])}
    systemctl("daemon-reload")
    assert written(name, *limits) == limits
    oci.ok("update", "--pids-limit", "5", name)
    assert "not permitted" in oci.call("exec", name, "cat", "/dev/kmsg").stderr  # devices are as they were, too


def test_exec_is_in_the_scope_and_pause_stops_it(oci: UnderSystemd, tmp_path: Path) -> None:
    name = oci.sleeping()
    oci.detached("exec", "--detach", "--pid-file", str(tmp_path / "pid"), name, "sleep", "1000")
    pid = (tmp_path / "pid").read_text()
    assert Path(f"/proc/{pid}/cgroup").read_text().strip().endswith(f"/{SLICE}/{unit(name)}")
    oci.ok("pause", name)
    assert written(name, "cgroup.freeze") == {"cgroup.freeze": "1"}
    oci.ok("resume", name)
    oci.ok("kill", "--all", name, "9")
    wait_until(lambda: not is_left(name), SLOW_S)


def test_an_update_reaches_systemd_and_one_that_is_refused_changes_nothing(oci: UnderSystemd) -> None:
    name = oci.sleeping(LIMITS)
    oci.ok("update", "--memory", "32m", "--cpu-period", "50000", "--pids-limit", "20", name)
    assert shown(name, "MemoryMax", "CPUQuotaPeriodUSec", "CPUQuotaPerSecUSec", "TasksMax") == {
        "MemoryMax": str(32 << 20), "CPUQuotaPeriodUSec": "50ms", "CPUQuotaPerSecUSec": "680ms", "TasksMax": "20",
    }  # fmt: skip
    systemctl("daemon-reload")
    changed = {"memory.max": str(32 << 20), "cpu.max": "34000 50000", "pids.max": "20"}
    assert written(name, *changed) == changed
    refused = oci.call("update", "--memory", "16m", "--cpuset-cpus", "900", name)
    assert refused.returncode == 1
    assert shown(name, "MemoryMax") == {"MemoryMax": str(32 << 20)}
    assert written(name, *changed) == changed


def test_delete_leaves_no_scope_however_the_container_ended(oci: UnderSystemd) -> None:
    running, stopped = oci.sleeping(), oci.sleeping()
    failed = oci.sleeping(annotations={f"{PROPERTY}.TimeoutStopSec": "1"})
    systemctl("stop", unit(failed))  # which init does not heed
    oci.ok("kill", stopped, "9")
    wait_until(lambda: oci.status(stopped) == "stopped", SLOW_S)
    wait_until(lambda: shown(failed, "ActiveState") == {"ActiveState": "failed"}, SLOW_S)
    oci.ok("delete", stopped)
    oci.ok("delete", failed)
    oci.ok("delete", "--force", running)
    assert not any(map(is_left, (running, stopped, failed)))


def test_a_create_that_is_killed_leaves_nothing_that_a_forced_delete_does_not_remove(oci: UnderSystemd) -> None:
    early, late = oci.new_id(), oci.new_id()
    oci.write_spec(oci.spec_of(early, "sleep", "1000"))
    with subprocess.Popen(oci.words("create", early), cwd=oci.bundle, stdout=subprocess.DEVNULL) as create:
        wait_until((INSIDE / unit(early)).exists, SLOW_S)
        create.kill()
    hooks = {"createRuntime": [{"path": "/bin/sh", "args": ["sh", "-c", "kill -9 $PPID"]}]}
    oci.write_spec(oci.spec_of(late, "sleep", "1000", hooks=hooks))
    subprocess.run(oci.words("create", late), cwd=oci.bundle, stdout=subprocess.DEVNULL, check=False)
    for name in (early, late):
        assert (oci.root / name).exists()
        oci.ok("delete", "--force", name)
        wait_until(lambda: not is_left(name), SLOW_S)  # noqa: B023 - it is over before the next
        assert not (oci.root / name).exists()
    name = oci.sleeping()
    left = json.loads((oci.root / name / "state.json").read_text()) | {"pid": 0, "cgroup_is_own": False}
    (oci.root / early).mkdir()
    (oci.root / early / "state.json").write_text(json.dumps(left))
    oci.ok("delete", "--force", early)  # which never came to making what is another's
    assert oci.status(name) == "running"
    assert shown(name, "ActiveState") == {"ActiveState": "active"}


def test_what_can_not_be_made_is_refused_and_leaves_nothing(oci: UnderSystemd) -> None:
    first = oci.sleeping()
    for changes, said in (
        ({"linux": oci.spec_of(first, "true")["linux"]}, "already"),  # loaded: it is the first one's
        ({"annotations": {f"{PROPERTY}.NoSuchThing": "5"}}, "NoSuchThing"),
        ({"annotations": {f"{PROPERTY}.TasksMax": "x"}}, f"annotations: '{PROPERTY}.TasksMax'"),
    ):
        name = oci.new_id()
        oci.write_spec(oci.spec_of(name, "true") | changes)
        result = oci.call("create", name)
        assert result.returncode == 1
        assert said in result.stderr
        assert not is_left(name)
        assert not (oci.root / name).exists()
    assert oci.status(first) == "running"


@pytest.fixture
def user() -> Iterator[pwd.struct_passwd]:
    """An ordinary user, whose own systemd runs meanwhile."""
    account = pwd.getpwnam("daemon")
    systemctl("start", f"user@{account.pw_uid}.service")
    try:
        yield account
    finally:
        systemctl("stop", f"user@{account.pw_uid}.service")


@needs("setpriv")
def test_a_container_of_an_ordinary_user_is_a_scope_of_his_own_systemd(user: pwd.struct_passwd) -> None:
    uid = user.pw_uid
    with users_directory() as directory, contextlib.ExitStack() as undo:
        oci = UnderSystemd(directory)
        make_rootfs(oci.bundle / "rootfs")
        subprocess.run(["chown", "-R", f"{uid}:{uid}", str(directory)], check=True)
        prefix = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
        environment = {"PATH": os.environ["PATH"], "XDG_RUNTIME_DIR": f"/run/user/{uid}"}

        def call(*words: str) -> "subprocess.CompletedProcess[str]":
            return subprocess.run(
                [*prefix, *oci.words(*words)], cwd=oci.bundle, env=environment, stdin=subprocess.DEVNULL,
                capture_output=True, text=True, check=False, timeout=SLOW_S,
            )  # fmt: skip

        name = oci.new_id()
        own = f"/user.slice/user-{uid}.slice/user@{uid}.service/user.slice/corral-{name}.scope"
        mapping = {kind: [{"containerID": 0, "hostID": uid, "size": 1}] for kind in ("uidMappings", "gidMappings")}
        spec = oci.spec("cat /proc/self/cgroup; sleep 1000")
        namespaces = [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "user")]
        resources = {"memory": {"limit": 64 << 20}, "pids": {"limit": 10}}
        oci.write_spec(spec | {"linux": {"namespaces": namespaces, "resources": resources, **mapping}, "mounts": PROC})
        with (directory / "log").open("w") as log:
            run = undo.enter_context(
                subprocess.Popen(
                    [*prefix, *oci.words("run", name)], cwd=oci.bundle, env=environment, stdout=log, stderr=log
                )
            )
            undo.callback(lambda: call("delete", "--force", name))
            wait_until((ROOT / own[1:]).exists, SLOW_S)
            wait_until(lambda: call("state", name).returncode == 0, SLOW_S)
            wait_until(lambda: json.loads(call("state", name).stdout)["status"] == "running", SLOW_S)
        assert (ROOT / own[1:] / "memory.max").read_text().strip() == str(64 << 20)
        executed = call("exec", name, "cat", "/proc/1/cgroup", "/proc/self/cgroup")
        assert executed.stdout.split("\n")[:2] == [f"0::{own}"] * 2, executed.stderr
        assert call("update", "--pids-limit", "20", name).returncode == 0
        assert (ROOT / own[1:] / "pids.max").read_text().strip() == "20"
        result = call("delete", "--force", name)
        assert result.returncode == 0, result.stderr
        assert run.wait(SLOW_S) == 128 + 9
        wait_until(lambda: not (ROOT / own[1:]).exists(), SLOW_S)


@needs("podman", "conmon")
def test_podman_needs_no_flag_to_run_its_containers(tmp_path: Path, busybox_archive: Path) -> None:
    base = ["podman", "--root", f"{tmp_path}/root", "--runroot", f"{tmp_path}/run", "--tmpdir", f"{tmp_path}/tmp",
            "--network-config-dir", f"{tmp_path}/net", "--runtime", str(COMMAND)]  # fmt: skip

    def podman(*words: str) -> "subprocess.CompletedProcess[str]":
        with (tmp_path / "said").open("w+") as said:  # not a pipe, which a container that stays would hold
            options = {"stdin": subprocess.DEVNULL, "stdout": said, "stderr": subprocess.STDOUT, "timeout": SLOW_S}
            code = subprocess.run([*base, *words], cwd=tmp_path, check=False, **options).returncode  # type: ignore[call-overload]
            said.seek(0)
            return subprocess.CompletedProcess(words, code, said.read())

    def ok(*words: str) -> str:
        result = podman(*words)
        assert result.returncode == 0, result.stdout
        return result.stdout

    ok("load", "--quiet", "--input", str(busybox_archive))
    try:
        assert podman("run", "--rm", "--network", "none", "busybox", "sh", "-c", "echo out; exit 5").returncode == 5
        limits = ("--memory", "64m", "--pids-limit", "50", "--cpus", "0.5")
        name = ok("run", "--detach", "--network", "none", *limits, "busybox", "sleep", "1000").split()[-1]
        scope = f"libpod-{name}.scope"
        shown = systemctl("show", scope, "--property=Slice,MemoryMax,TasksMax,CPUQuotaPerSecUSec,ActiveState")
        assert set(shown.splitlines()) == {
            "Slice=machine.slice", "ActiveState=active",
            f"MemoryMax={64 << 20}", "TasksMax=50", "CPUQuotaPerSecUSec=500ms",
        }  # fmt: skip
        assert ok("exec", name, "cat", "/proc/self/cgroup").strip() == "0::/"
        ok("update", "--memory", "32m", name)
        assert systemctl("show", scope, "--property=MemoryMax") == f"MemoryMax={32 << 20}"
        ok("pause", name)
        ok("unpause", name)
        ok("stop", "--time", "0", name)
        ok("rm", name)
        assert systemctl("show", scope, "--property=LoadState") == "LoadState=not-found"
    finally:
        podman("rm", "--all", "--force", "--time", "0")
        podman("rmi", "--all", "--force")
