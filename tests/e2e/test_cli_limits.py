"""Limits by their flags: on run, on update while the container runs, in inspect, and in the kernel's files."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from support.cli import ok
from support.corrald import Corrald
from support.requirements import needs

from corral.kernel.cgroup import detect, hugepages, open_driver

pytestmark = needs("root", "overlayfs", "busybox", "netns", "cgroup1")

RUN = ("run", "-d", "--network", "none")


@pytest.fixture(scope="module")
def box(busybox_archive: Path) -> Iterator[Corrald]:
    with Corrald() as daemon:
        daemon.start()
        daemon.corral("image", "import", str(busybox_archive), "--as", "busybox", check=True)
        yield daemon


def resources(box: Corrald, name: str) -> Mapping[str, Mapping[str, object]]:
    """As inspect tells them."""
    [container] = json.loads(ok(box, "inspect", name))
    found: Mapping[str, Mapping[str, object]] = container["config"]["resources"]
    return found


def kernel(box: Corrald, name: str, controller: str, *files: str) -> tuple[str, ...]:
    """What the kernel has in the container's files."""
    [container] = json.loads(ok(box, "inspect", name))
    hierarchy = detect().of(controller)
    assert hierarchy is not None
    path = Path(f"{hierarchy.mount_point}{box.place.cgroup_parent}/default/{container['id']}")
    return tuple((path / file).read_text().strip() for file in files)


CPU = ("cpu.cfs_quota_us", "cpu.cfs_burst_us")
MEMORY = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.soft_limit_in_bytes", "memory.swappiness")


def test_limits_of_cpu_time_are_set_and_changed_while_it_runs(box: Corrald, name: str) -> None:
    flags = ("--cpus", "0.5", "--cpu-burst", "5000", "--cpuset-cpus", "0", "--cpuset-mems", "0", "--cpu-shares", "300")
    ok(box, *RUN, "--name", name, *flags, "busybox", "sleep", "1000")
    assert kernel(box, name, "cpu", *CPU, "cpu.shares") == ("50000", "5000", "300")
    assert kernel(box, name, "cpuset", "cpuset.cpus", "cpuset.mems") == ("0", "0")
    ok(box, "update", "--cpu-burst", "0", "--cpu-idle", name)
    assert kernel(box, name, "cpu", *CPU, "cpu.idle") == ("50000", "0", "1")
    assert (resources(box, name)["cpu"]["idle"], resources(box, name)["cpu"]["shares"]) == (1, 300)
    ok(box, "update", "--no-cpu-idle", "--cpus", "0.25", name)
    assert kernel(box, name, "cpu", "cpu.idle", "cpu.cfs_quota_us", "cpu.shares") == ("0", "25000", "300")


RT = ("cpu.rt_runtime_us", "cpu.rt_period_us")
SLEEPING = ("busybox", "sleep", "1000")


def test_real_time_scheduling_is_for_who_was_given_time_for_it(box: Corrald, name: str) -> None:
    fifo = os.SCHED_FIFO, os.sched_param(1)
    ok(box, *RUN, "--name", name, *SLEEPING)
    if not Path(f"{_cpu_hierarchy()}/{RT[0]}").exists():  # CONFIG_RT_GROUP_SCHED
        refused = box.corral("update", "--cpu-rt-runtime", "20000", name)
        assert b"cannot set cpu.rt_runtime_us: this kernel does not have it" in refused.stderr
        return
    with pytest.raises(PermissionError):
        os.sched_setscheduler(_pid(box, name), *fifo)
    ok(box, "update", "--cpu-rt-runtime", "20000", name)
    os.sched_setscheduler(_pid(box, name), *fifo)
    beside = f"{name}-2"
    try:
        ok(box, *RUN, "--name", beside, "--cpu-rt-runtime", "50000", "--cpu-rt-period", "500000", *SLEEPING)
        assert kernel(box, beside, "cpu", *RT) == ("50000", "500000")
        os.sched_setscheduler(_pid(box, beside), *fifo)
        refused = box.corral("update", "--cpu-rt-runtime", "499000", "--cpu-shares", "300", beside)
        assert b"there is not so much real-time CPU time left" in refused.stderr
        assert kernel(box, beside, "cpu", *RT, "cpu.shares") == ("50000", "500000", "1024")
        assert resources(box, beside)["cpu"]["realtime_runtime_us"] == 50000
    finally:
        box.corral("rm", "-f", beside)
    ok(box, "update", "--cpu-rt-runtime", "30000", name)
    assert kernel(box, name, "cpu", *RT) == ("30000", "1000000")


@pytest.mark.parametrize("words", [(*RUN, *SLEEPING), ("update", "nobody")])
def test_a_limit_of_kernel_memory_is_refused_with_its_reason(box: Corrald, words: tuple[str, ...]) -> None:
    verb, *rest = words
    refused = box.corral(verb, "--kernel-memory", "64m", *rest)
    assert refused.returncode == (125 if verb == "run" else 1)
    assert b"no limit of its own since Linux 5.16: it counts towards --memory" in refused.stderr


def _pid(box: Corrald, name: str) -> int:
    [container] = json.loads(ok(box, "inspect", name))
    pid: int = container["pid"]
    return pid


def _cpu_hierarchy() -> str:
    hierarchy = detect().of("cpu")
    assert hierarchy is not None
    return hierarchy.mount_point


def test_an_idle_container_starts_again_and_has_its_shares_back_once_it_is_not(box: Corrald, name: str) -> None:
    ok(box, *RUN, "--name", name, "--cpu-shares", "512", "--cpu-idle", "busybox", "sleep", "1000")
    assert kernel(box, name, "cpu", "cpu.idle") == ("1",)
    ok(box, "update", "--no-cpu-idle", name)
    assert kernel(box, name, "cpu", "cpu.idle", "cpu.shares") == ("0", "512")
    ok(box, "update", "--cpu-idle", name)
    refused = box.corral("update", "--cpu-shares", "700", name)
    assert refused.returncode != 0
    assert b"an idle cgroup has no CPU shares" in refused.stderr
    ok(box, "restart", "-t", "0", name)
    ok(box, "stop", "-t", "0", name)
    path = f"{box.place.cgroup_parent}/default/{json.loads(ok(box, 'inspect', name))[0]['id']}"
    box.stop()
    open_driver(detect()).open(path).remove()  # as a reboot does
    box.start()
    ok(box, "start", name)
    assert kernel(box, name, "cpu", "cpu.idle") == ("1",)
    ok(box, "update", "--no-cpu-idle", name)
    assert kernel(box, name, "cpu", "cpu.shares") == ("512",)


def test_limits_of_memory_are_set_and_changed_while_it_runs(box: Corrald, name: str) -> None:
    flags = ("-m", "64m", "--memory-swap", "96m", "--memory-reservation", "32m", "--memory-swappiness", "10")
    ok(box, *RUN, "--name", name, *flags, "--oom-kill-disable", "busybox", "sleep", "1000")
    assert kernel(box, name, "memory", *MEMORY) == (str(64 << 20), str(96 << 20), str(32 << 20), "10")
    assert kernel(box, name, "memory", "memory.oom_control")[0].splitlines()[0] == "oom_kill_disable 1"
    more = ("-m", "48m", "--memory-swap", "48m", "--memory-reservation", "16m", "--memory-swappiness", "0")
    ok(box, "update", *more, "--no-oom-kill-disable", name)
    assert kernel(box, name, "memory", *MEMORY) == (str(48 << 20), str(48 << 20), str(16 << 20), "0")
    assert kernel(box, name, "memory", "memory.oom_control")[0].splitlines()[0] == "oom_kill_disable 0"
    assert resources(box, name)["memory"] == {
        "limit_bytes": 48 << 20, "swap_bytes": 48 << 20, "reservation_bytes": 16 << 20, "swappiness": 0,
        "disable_oom_killer": False,
    }  # fmt: skip


def test_huge_pages_are_limited_and_changed_while_it_runs(box: Corrald, name: str) -> None:
    size = hugepages.sizes()[0]
    ok(box, *RUN, "--name", name, "--hugetlb", f"{size}=1g", "busybox", "sleep", "1000")
    assert kernel(box, name, "hugetlb", f"hugetlb.{size}.max") == (str(1 << 30),)
    ok(box, "update", "--hugetlb", f"{size}=0", name)
    assert kernel(box, name, "hugetlb", f"hugetlb.{size}.max") == ("0",)
    refused = box.corral("update", "--hugetlb", "3MB=1g", name)
    assert (refused.returncode, b"no huge pages of 3MB" in refused.stderr) == (1, True)


def test_a_device_rule_allows_a_node_that_is_made_inside_and_none_other(box: Corrald, name: str) -> None:
    script = "for n in 231 229; do mknod /tmp/$n c 10 $n && head -c 0 /tmp/$n; done; true </tmp/229 && echo opened"
    words = ("run", "--rm", "--network", "none", "--tmpfs", "/tmp:dev", "busybox", "sh", "-c", script)
    refused = box.corral(*words)
    assert b"opened" not in refused.stdout
    assert refused.stderr.count(b"Operation not permitted") >= 2
    allowed = box.corral(*words[:4], "--device-cgroup-rule", "c 10:229 rwm", *words[4:])
    assert allowed.stdout == b"opened\n", allowed.stderr
    assert b"/tmp/231" in allowed.stderr


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--memory-high", "32m"), "memory.high exists on cgroup v2 only"),
        (("--memory-min", "32m"), "memory.min exists on cgroup v2 only"),
        (("--oom-group",), "memory.oom.group exists on cgroup v2 only"),
        (("--rdma", "mlx5_0=hca_handle=2"), "no cgroup controller 'rdma'"),
        (("--cpu-shares", "1"), "CPU shares must lie between 2 and 262144"),
        (("--cpuset-cpus", "900"), "cpuset.cpus"),
        (("--cpu-burst", "90000000"), "cpu.cfs_burst_us"),
        (("--pids-limit", "-5"), "pids"),
        (("--blkio-weight", "5"), "weight"),
        (("--device-read-bps", "/dev/null:1m"), "no block device"),
        (("--cgroup-conf", "memory.high=1"), "not in cgroup v2 on this host"),
    ],
)
def test_an_update_that_is_refused_leaves_all_as_it_was(
    box: Corrald, name: str, flags: tuple[str, ...], sentence: str
) -> None:
    ok(box, *RUN, "--name", name, "-m", "64m", "--cpus", "0.5", "--cpuset-cpus", "0", "busybox", "sleep", "1000")
    before = resources(box, name), kernel(box, name, "memory", *MEMORY), kernel(box, name, "cpu", *CPU)
    refused = box.corral("update", "-m", "48m", "--cpus", "0.25", *flags, name)
    assert refused.returncode == 1
    assert sentence in refused.stderr.decode()
    assert len(refused.stderr.decode().splitlines()) == 1
    assert before == (resources(box, name), kernel(box, name, "memory", *MEMORY), kernel(box, name, "cpu", *CPU))


def test_limits_of_one_device_given_one_after_the_other_hold_both_and_after_a_restart(box: Corrald, name: str) -> None:
    [device] = [line.split()[:2] for line in Path("/proc/diskstats").read_text().splitlines()][:1]
    number = ":".join(device)
    ok(box, *RUN, "--name", name, "busybox", "sleep", "1000")
    for flag, value in (("--device-read-bps", "1m"), ("--device-write-bps", "2m"), ("--device-read-bps", "3m")):
        ok(box, "update", flag, f"{number}:{value}", name)
    limits = {
        "major": int(device[0]),
        "minor": int(device[1]),
        "read_bytes_per_s": 3 << 20,
        "write_bytes_per_s": 2 << 20,
    }

    def check() -> None:
        [told] = resources(box, name)["io"]["devices"]  # type: ignore[misc]
        assert told == limits
        files = ("blkio.throttle.read_bps_device", "blkio.throttle.write_bps_device")
        assert kernel(box, name, "blkio", *files) == (f"{number} {3 << 20}", f"{number} {2 << 20}")

    check()
    ok(box, "restart", "-t", "0", name)
    check()
