"""Limits of every cgroup layout, proven by their effect.

It runs on v1 and hybrid on a host that mounts v1, on v2 on one that does not.
"""

import errno
import mmap
import os
import select
import selectors
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cgroups import (
    fresh_path,
    inside,
    layouts,
    layouts_without_v1_devices,
    parent,
    sleep,
    spin,
)
from support.requirements import needs

from corral.kernel.cgroup import (
    DEFAULT_RULES,
    UNLIMITED,
    Cgroup,
    CpuLimits,
    DeviceRule,
    Driver,
    HugetlbLimit,
    IoDeviceLimits,
    IoLimits,
    Kind,
    Layout,
    MemoryLimits,
    OomWatch,
    PidsLimits,
    Resources,
    hugepages,
    open_driver,
)

pytestmark = needs("root", "cgroup")
MIB = 1 << 20
LAYOUTS = layouts()
DEVICE_LAYOUTS = layouts_without_v1_devices()
KMSG = DeviceRule(allow=True, type="c", major=1, minor=11, access="r")


def memory(limit: int, swap: int | None = None) -> Resources:
    """A limit, and if nothing else is said no swap beyond it."""
    return Resources(memory=MemoryLimits(limit_bytes=limit, swap_bytes=limit if swap is None else swap))


def touch(size: int) -> mmap.mmap:
    """Use memory: one byte in every page of an anonymous mapping."""
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for at in range(0, size, mmap.PAGESIZE):
        area[at] = 1
    return area


# Memory


def test_more_memory_than_the_limit_is_an_oom_kill_that_is_counted(group: Cgroup) -> None:
    # Not with all the swap gone too: v1 kernels count failures of that limit nowhere.
    group.apply(memory(32 * MIB, 40 * MIB))
    with OomWatch.open(group.paths()) as watch:
        assert watch.count() == 0
        with inside(group, lambda _: touch(128 * MIB)) as child:
            assert os.WTERMSIG(child.wait()) == signal.SIGKILL
        assert watch.count() == 1
    stats = group.read().memory
    assert stats
    assert (stats.oom_kills, stats.limit_bytes) == (1, 32 * MIB)
    assert stats.limit_hits > 0


def test_memory_within_the_limit_is_not_killed_and_is_counted(group: Cgroup) -> None:
    group.apply(memory(128 * MIB))

    def body(say: int) -> None:
        area = touch(32 * MIB)
        os.write(say, b"x")
        time.sleep(60)
        area.close()

    with inside(group, body) as child:
        assert child.hear() == b"x"
        stats = group.read().memory
        assert stats
        assert 32 * MIB <= stats.anon_bytes <= stats.usage_bytes <= 128 * MIB
        assert stats.page_faults > 0


def test_an_oom_kill_is_known_after_its_cgroup_was_removed(group: Cgroup) -> None:
    group.apply(memory(32 * MIB))
    with OomWatch.open(group.paths()) as watch:
        with inside(group, lambda _: touch(128 * MIB)) as child:
            child.wait()
        watch.count()  # the kernel keeps nothing past removal: who watches looks when told, or before it
        group.remove()
        assert watch.count() == 1


def test_kills_of_a_neighbour_are_not_counted_once_a_cgroup_is_gone(cgroup_driver: Driver, group: Cgroup) -> None:
    hog, innocent = (cgroup_driver.create(f"{group.path}/{name}") for name in ("hog", "innocent"))
    group.apply(memory(32 * MIB))
    with innocent.watch_oom() as watch:
        with inside(innocent, sleep), inside(hog, lambda _: touch(128 * MIB)) as child:
            child.wait()
        innocent.remove()
        assert watch.count() == 0


def test_kills_of_those_that_were_at_its_place_are_counted_in_and_no_later_one_is_taken_for_them(
    cgroup_driver: Driver, group: Cgroup
) -> None:
    for known in range(3):
        group.apply(memory(32 * MIB))
        with group.watch_oom(known) as watch:
            assert watch.count() == known
        with inside(group, lambda _: touch(128 * MIB)) as child:  # while nobody watches
            child.wait()
        with OomWatch.open(group.paths(), since_creation=True, known=known) as watch:
            assert watch.known == known + 1
        group.remove()
        cgroup_driver.create(group.path)


def test_a_removal_without_an_oom_is_not_counted_as_one(group: Cgroup) -> None:
    with OomWatch.open(group.paths()) as watch:
        group.remove()
        assert watch.count() == 0
        time.sleep(0.05)
        assert watch.count() == 0


def test_an_oom_kill_in_a_cgroup_that_the_container_made_is_counted(cgroup_driver: Driver, group: Cgroup) -> None:
    nested = cgroup_driver.create(f"{group.path}/nested")
    group.apply(memory(32 * MIB))
    with OomWatch.open(group.paths()) as watch:
        with inside(nested, lambda _: touch(128 * MIB)) as child:
            child.wait()
        assert watch.count() == 1


def test_kills_in_a_sub_cgroup_that_was_removed_hide_no_later_one(cgroup_driver: Driver, group: Cgroup) -> None:
    nested, other = (cgroup_driver.create(f"{group.path}/{name}") for name in ("nested", "other"))
    group.apply(memory(32 * MIB))
    with OomWatch.open(group.paths()) as watch:
        for kills, place in ((1, nested), (2, nested), (3, other), (4, other)):
            with inside(place, lambda _: touch(128 * MIB)) as child:
                child.wait()
            assert watch.count() == kills
            if kills == 2:
                stats = group.read().memory
                assert stats
                assert stats.oom_kills == 2
                nested.remove()
                assert watch.count() == 2


def test_kills_before_a_watch_was_opened_count_only_since_creation(group: Cgroup) -> None:
    group.apply(memory(32 * MIB))
    for ran_before in (0, 1):
        with (
            OomWatch.open(group.paths()) as now,
            OomWatch.open(group.paths(), since_creation=True) as ever,
        ):
            assert (now.count(), ever.count()) == (0, ran_before)
            with inside(group, lambda _: touch(128 * MIB)) as child:
                child.wait()
            assert (now.count(), ever.count()) == (1, ran_before + 1)


def test_a_watch_of_a_cgroup_that_is_gone_is_quiet_once_that_was_looked_at(group: Cgroup) -> None:
    with group.watch_oom() as watch:
        group.remove()
        assert watch.count() == 0
        select.select([watch], [], [], 0.5)  # v1 tells of the removal, a moment later
        assert watch.count() == 0
        assert not watch.has_news()


def test_a_watch_wakes_a_selector_at_an_oom(group: Cgroup) -> None:
    group.apply(memory(32 * MIB))
    with OomWatch.open(group.paths()) as watch, selectors.DefaultSelector() as selector:
        selector.register(watch, selectors.EVENT_READ)
        assert selector.select(0) == []
        with inside(group, lambda _: touch(128 * MIB)) as child:
            assert selector.select(10)
            child.wait()
        assert watch.count() == 1
        assert selector.select(0) == []


def test_less_memory_than_is_used_is_refused_where_that_is_asked_for_and_nobody_is_killed(group: Cgroup) -> None:
    group.apply(memory(128 * MIB, 128 * MIB))

    def body(say: int) -> None:
        area = touch(32 * MIB)
        os.write(say, b"x")
        time.sleep(3600)
        area.close()

    with inside(group, body) as child:
        assert child.hear() == b"x"
        for limit in (8 * MIB, 0):
            change = MemoryLimits(limit_bytes=limit, swap_bytes=limit, check_before_update=True)
            with pytest.raises(OSError, match=r"memory\.(max|limit_in_bytes|memsw)") as caught:
                group.apply(Resources(cpu=CpuLimits(shares=300), pids=PidsLimits(7), memory=change))
            assert caught.value.errno == errno.EBUSY
        assert child.alive()
        stats = group.read()
        assert stats.memory is not None
        assert stats.pids is not None
        assert (stats.memory.limit_bytes, stats.pids.limit) == (128 * MIB, UNLIMITED)
        group.apply(Resources(memory=MemoryLimits(limit_bytes=64 * MIB, check_before_update=True)))
        assert child.alive()


def test_memory_and_swap_limits_rise_and_fall_together(group: Cgroup) -> None:
    for limit, swap in ((64, 64), (128, 256), (32, 32), (512, 512), (16, 1024), (8, 16)):
        group.apply(memory(limit * MIB, swap * MIB))
        stats = group.read().memory
        assert stats
        assert stats.limit_bytes == limit * MIB
    group.apply(memory(UNLIMITED))
    stats = group.read().memory
    assert stats
    assert stats.limit_bytes == UNLIMITED


def test_less_swap_than_memory_is_refused(group: Cgroup) -> None:
    with pytest.raises(OSError, match=r"memory\+swap limit") as caught:
        group.apply(memory(64 * MIB, 32 * MIB))
    assert caught.value.errno == errno.EINVAL


# Processor


def test_a_quota_limits_the_cpu_time_used(group: Cgroup) -> None:
    group.apply(Resources(cpu=CpuLimits(quota_us=20_000, period_us=100_000)))
    with inside(group, lambda _: spin(1.0)) as child:
        status, used_s = child.end()
    assert status == 0
    assert used_s < 0.4
    stats = group.read().cpu
    assert stats
    assert stats.throttled_periods > 0
    assert stats.throttled_ns > 0
    assert abs(stats.usage_ns / 1e9 - used_s) < 0.2


def test_a_quota_can_be_changed_with_its_period_in_any_order(group: Cgroup) -> None:
    steps = ((50_000, 100_000, 0), (900_000, 1_000_000, 800_000), (1_000, 1_000, 1_000), (-1, 50_000, 0))
    for quota, period, burst in steps:
        group.apply(Resources(cpu=CpuLimits(quota_us=quota, period_us=period, burst_us=burst)))
        assert bandwidth(group) == (quota, period)
    group.apply(Resources(cpu=CpuLimits(quota_us=10_000)))
    assert bandwidth(group) == (10_000, 50_000)
    group.apply(Resources(cpu=CpuLimits(period_us=20_000)))
    assert bandwidth(group) == (10_000, 20_000)


def bandwidth(group: Cgroup) -> tuple[int, int]:
    """(quota, period), read from the kernel."""
    for path in group.paths():
        if (path / "cpu.max").exists():
            quota, period = (path / "cpu.max").read_text().split()
            return -1 if quota == "max" else int(quota), int(period)
        if (path / "cpu.cfs_quota_us").exists():
            return int((path / "cpu.cfs_quota_us").read_text()), int((path / "cpu.cfs_period_us").read_text())
    raise AssertionError("no cpu controller")


def test_shares_divide_a_processor_that_two_groups_want(cgroup_driver: Driver) -> None:
    few, many = (
        cgroup_driver.create(fresh_path(), Resources(cpu=CpuLimits(shares=shares, cpus="0"))) for shares in (256, 4096)
    )
    # Neither is ever alone while it is measured.
    with inside(few, lambda _: spin(60)), inside(many, lambda _: spin(60)):
        before = used_ns(few), used_ns(many)
        time.sleep(1.5)
        little, much = used_ns(few) - before[0], used_ns(many) - before[1]
    assert much > 3 * little


def used_ns(group: Cgroup) -> int:
    stats = group.read().cpu
    assert stats
    return stats.usage_ns


def test_a_process_runs_only_on_the_cpus_of_its_group(group: Cgroup) -> None:
    group.apply(Resources(cpu=CpuLimits(cpus="0", mems="0")))
    with inside(group, sleep) as child:
        assert os.sched_getaffinity(child.pid) == {0}


# Processes


def test_a_fork_beyond_the_pids_limit_is_refused(group: Cgroup) -> None:
    group.apply(Resources(pids=PidsLimits(3)))

    def body(say: int) -> None:
        for _ in range(2):
            if os.fork() == 0:
                time.sleep(60)
        try:
            os.fork()
        except BlockingIOError:
            os.write(say, b"refused")
        time.sleep(60)

    with inside(group, body) as child:
        assert child.hear(7) == b"refused"
        stats = group.read().pids
        assert stats
        assert (stats.current, stats.limit) == (3, 3)
        group.kill()


def test_a_pids_limit_can_be_lifted(group: Cgroup) -> None:
    group.apply(Resources(pids=PidsLimits(3)))
    group.apply(Resources(pids=PidsLimits(UNLIMITED)))
    stats = group.read().pids
    assert stats
    assert stats.limit == UNLIMITED


# Devices


@pytest.fixture(params=[*LAYOUTS, *DEVICE_LAYOUTS])
def devices(request: pytest.FixtureRequest) -> Iterator[Cgroup]:
    """A cgroup, also one whose devices are in the hands of a v2 program on a host that has v1 for it."""
    driver = open_driver((LAYOUTS | DEVICE_LAYOUTS)[request.param])
    group = driver.create(fresh_path())
    yield group
    group.remove()
    driver.prune(f"{parent()}/ns")


def test_only_allowed_devices_can_be_opened(devices: Cgroup) -> None:
    devices.apply(Resources(devices=DEFAULT_RULES))
    assert opens(devices, "/dev/null") == 0
    assert opens(devices, "/dev/zero") == 0
    assert opens(devices, "/dev/kmsg") == errno.EPERM


def test_device_rules_can_be_changed_while_a_process_runs(devices: Cgroup) -> None:
    devices.apply(Resources(devices=DEFAULT_RULES))
    devices.apply(Resources(devices=(*DEFAULT_RULES, KMSG)))
    assert opens(devices, "/dev/kmsg") == 0
    assert opens(devices, "/dev/kmsg", os.O_WRONLY) == errno.EPERM
    devices.apply(Resources(devices=DEFAULT_RULES))
    assert opens(devices, "/dev/kmsg") == errno.EPERM
    devices.apply(Resources(devices=(DeviceRule(allow=True),)))
    assert opens(devices, "/dev/kmsg") == 0
    devices.apply(Resources(devices=(DeviceRule(allow=True), DeviceRule(allow=False, type="c", major=1, minor=11))))
    assert opens(devices, "/dev/kmsg") == errno.EPERM
    assert opens(devices, "/dev/null") == 0


@pytest.mark.parametrize("above", [(), (*DEFAULT_RULES, KMSG)])
def test_a_new_cgroup_has_the_rules_it_was_made_with_whatever_it_has_from_its_parent(
    devices: Cgroup, above: tuple[DeviceRule, ...]
) -> None:
    devices.apply(Resources(devices=above or None))
    driver = Driver(Layout(Kind.HYBRID, devices._hierarchies))
    below = driver.create(f"{devices.path}/below", Resources(devices=DEFAULT_RULES))
    try:
        assert opens(below, "/dev/kmsg") == errno.EPERM
        assert opens(below, "/dev/null") == 0
    finally:
        below.remove()
    if above:
        # Not in the parent itself: on v2 it takes no process while it gives controllers to those below.
        beside = driver.create(f"{devices.path}/beside")
        try:
            assert opens(beside, "/dev/kmsg") == 0
        finally:
            beside.remove()


def test_a_node_may_be_made_that_may_not_be_opened(devices: Cgroup, tmp_path: Path) -> None:
    devices.apply(Resources(devices=DEFAULT_RULES))
    node = tmp_path / "disk"
    with inside(devices, lambda _: os.mknod(node, 0o60600, os.makedev(7, 200))) as child:
        assert child.wait() == 0
    assert opens(devices, str(node)) == errno.EPERM


def opens(group: Cgroup, path: str, flags: int = os.O_RDONLY) -> int:
    """The errno of an open by a process of the group; 0 if it succeeds."""
    with inside(group, lambda _: os.open(path, flags | os.O_NONBLOCK)) as child:
        return os.waitstatus_to_exitcode(child.wait())


# Input and output


def test_reading_a_device_faster_than_its_limit_takes_longer(cgroup_driver: Driver, group: Cgroup) -> None:
    path = Path(os.environ.get("TMPDIR", "/var/tmp")) / f"corral-test-{os.getpid()}"
    device = whole_disk(path.parent)
    if device is None:
        pytest.skip("needs a temporary directory on a disk")
    path.write_bytes(os.urandom(MIB))
    try:
        with path.open("rb") as file:
            os.fsync(file.fileno())
        group.apply(Resources(io=IoLimits(devices=(IoDeviceLimits(*device, read_bytes_per_s=MIB // 2),))))
        began = time.monotonic()
        with inside(group, lambda _: read_direct(path)) as child:
            assert child.wait() == 0
        assert 1.0 < time.monotonic() - began < 20
        [io] = [each for each in group.read().io if (each.major, each.minor) == device]
        assert io.read_bytes >= MIB
        assert io.read_ops > 0
    finally:
        path.unlink()


def read_direct(path: Path) -> None:
    buffer = mmap.mmap(-1, 64 << 10)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    while os.readv(fd, [buffer]):
        pass


def whole_disk(directory: Path) -> tuple[int, int] | None:
    """The disk that a directory lies on; of a partition, the disk that it is part of."""
    device = directory.stat().st_dev
    entry = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    if not entry.exists():
        return None
    if (entry / "partition").exists():
        entry = entry.resolve().parent
    major, minor = (entry / "dev").read_text().split(":")
    return int(major), int(minor)


# Huge pages


def test_huge_pages_beyond_the_limit_are_refused(cgroup_driver: Driver, spare_huge_pages: str) -> None:
    wanted = Resources(hugetlb=(HugetlbLimit(spare_huge_pages, 0),))
    if cgroup_driver.layout.of("hugetlb") is None:
        with pytest.raises(OSError, match="no cgroup controller 'hugetlb'"):
            cgroup_driver.create(fresh_path(), wanted)
        return
    none, some = cgroup_driver.create(fresh_path(), wanted), cgroup_driver.create(fresh_path())
    cgroup_driver.enable(some.path, wanted)
    some.apply(Resources(hugetlb=(HugetlbLimit(spare_huge_pages, 2 * MIB),)))
    assert maps_a_huge_page(none) == errno.ENOMEM
    assert maps_a_huge_page(some) == 0
    [stats] = [each for each in none.read().hugetlb if each.page_size == spare_huge_pages]
    assert stats.usage_bytes == 0


def maps_a_huge_page(group: Cgroup) -> int:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000  # MAP_HUGETLB

    def body(_: int) -> None:
        mmap.mmap(-1, 2 * MIB, flags=flags)[0] = 1

    with inside(group, body) as child:
        return os.waitstatus_to_exitcode(child.wait())


@pytest.fixture
def spare_huge_pages() -> Iterator[str]:
    """Some huge pages that anybody may take."""
    pool = Path("/proc/sys/vm/nr_hugepages")
    if "2MB" not in hugepages.sizes():
        pytest.skip("needs huge pages of 2 MB in the kernel")
    before = pool.read_text()
    pool.write_text(str(int(before) + 4))
    yield "2MB"
    pool.write_text(before)
