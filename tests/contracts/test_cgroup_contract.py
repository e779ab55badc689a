"""What every cgroup layout promises alike: v1 and hybrid on a host that mounts v1, v2 on one that does not."""

import errno
import mmap
import os
import selectors
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cgroups import (
    Child,
    eventually,
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
    MemoryLimits,
    OomWatch,
    PidsLimits,
    Resources,
    hugepages,
    join,
    open_driver,
)

pytestmark = needs("root", "cgroup")
MIB = 1 << 20
LAYOUTS = layouts()
DEVICE_LAYOUTS = layouts_without_v1_devices()
KMSG = DeviceRule(allow=True, type="c", major=1, minor=11, access="r")


@pytest.fixture(params=LAYOUTS)
def driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    driver = open_driver(LAYOUTS[request.param])
    yield driver
    for name in driver.list(f"{parent()}/ns"):
        driver.open(f"{parent()}/ns/{name}").remove()
    driver.prune(f"{parent()}/ns")
    assert driver.list(parent()) == set()


@pytest.fixture
def group(driver: Driver) -> Cgroup:
    return driver.create(fresh_path())


def memory(limit: int, swap: int | None = None) -> Resources:
    """A limit, and if nothing else is said no swap beyond it."""
    return Resources(memory=MemoryLimits(limit_bytes=limit, swap_bytes=limit if swap is None else swap))


def touch(size: int) -> mmap.mmap:
    """Use memory: one byte in every page of an anonymous mapping."""
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for at in range(0, size, mmap.PAGESIZE):
        area[at] = 1
    return area


# Life


def test_a_process_born_in_a_cgroup_is_in_it_in_every_hierarchy(group: Cgroup) -> None:
    with inside(group, sleep) as child:
        lines = Path(f"/proc/{child.pid}/cgroup").read_text().splitlines()
        assert sum(line.endswith(f":{group.path}") for line in lines) == len(group.paths())
        assert group.pids() == [child.pid]


def test_a_process_can_be_moved_into_a_cgroup_from_outside(driver: Driver, group: Cgroup) -> None:
    other = driver.create(fresh_path())
    with inside(other, sleep) as child:
        join(group.paths(), child.pid)
        assert (other.pids(), group.pids()) == ([], [child.pid])


def test_a_name_is_taken_once(driver: Driver, group: Cgroup) -> None:
    with pytest.raises(FileExistsError):
        driver.create(group.path)
    assert group.exists()


@pytest.mark.parametrize("path", ["", "/", "x", "/a/../b", "/a//b", "/a/", "/./a"])
def test_a_path_that_is_not_plain_and_absolute_is_refused(driver: Driver, path: str) -> None:
    with pytest.raises(OSError, match="must be absolute"):
        driver.create(path)


def test_a_cgroup_with_a_limit_that_is_refused_is_not_made(driver: Driver) -> None:
    path = fresh_path()
    with pytest.raises(OSError, match="'9999'"):
        driver.create(path, Resources(cpu=CpuLimits(cpus="9999")))
    assert not driver.open(path).exists()


def test_list_names_what_is_there_and_prune_removes_only_what_is_empty(driver: Driver, group: Cgroup) -> None:
    assert driver.list(f"{parent()}/ns") == {Path(group.path).name}
    driver.prune(f"{parent()}/ns")
    assert group.exists()
    group.remove()
    driver.prune(f"{parent()}/ns")
    assert driver.list(parent()) == set()


def test_parents_pruned_meanwhile_are_made_again(driver: Driver, group: Cgroup) -> None:
    group.remove()
    driver.prune(f"{parent()}/ns")
    assert driver.create(group.path).exists()


def test_a_parent_belongs_to_who_claimed_it_first_while_anything_is_below(driver: Driver, group: Cgroup) -> None:
    assert driver.claim(f"{parent()}/ns", "one") == "one"
    assert driver.claim(f"{parent()}/ns", "two") == "one"
    group.remove()
    assert driver.claim(f"{parent()}/ns", "two") == "two"


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


@pytest.mark.parametrize("look_before", [True, False])
def test_an_oom_kill_is_known_after_its_cgroup_was_removed(group: Cgroup, look_before: bool) -> None:
    group.apply(memory(32 * MIB))
    with OomWatch.open(group.paths()) as watch:
        with inside(group, lambda _: touch(128 * MIB)) as child:
            child.wait()
        if look_before or Path(group.paths()[0], "cgroup.controllers").exists():
            watch.count()  # v2 keeps nothing past removal: the watcher has to look when told, before it
        group.remove()
        assert watch.count() == 1


def test_a_removal_without_an_oom_is_not_counted_as_one(group: Cgroup) -> None:
    with OomWatch.open(group.paths()) as watch:
        group.remove()
        assert watch.count() == 0
        time.sleep(0.05)
        assert watch.count() == 0


def test_an_oom_kill_in_a_cgroup_that_the_container_made_is_counted(driver: Driver, group: Cgroup) -> None:
    nested = driver.create(f"{group.path}/nested")
    group.apply(memory(32 * MIB))
    with OomWatch.open(group.paths()) as watch:
        with inside(nested, lambda _: touch(128 * MIB)) as child:
            child.wait()
        assert watch.count() == 1


def test_kills_before_a_watch_was_opened_count_only_since_creation(group: Cgroup) -> None:
    group.apply(memory(32 * MIB))
    for ran_before in (0, 1):
        with (
            OomWatch.open(group.paths()) as now,
            OomWatch.open(group.paths(), since_creation=True) as ever,
            inside(group, lambda _: touch(128 * MIB)) as child,
        ):
            assert (now.count(), ever.count()) == (0, ran_before)
            child.wait()
            assert (now.count(), ever.count()) == (1, ran_before + 1)


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


def test_shares_divide_a_processor_that_two_groups_want(driver: Driver) -> None:
    few, many = (
        driver.create(fresh_path(), Resources(cpu=CpuLimits(shares=shares, cpus="0"))) for shares in (256, 4096)
    )
    with inside(few, lambda _: spin(1.5)) as poor, inside(many, lambda _: spin(1.5)) as rich:
        (_, little), (_, much) = poor.end(), rich.end()
    assert much > 3 * little


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


def test_reading_a_device_faster_than_its_limit_takes_longer(driver: Driver, group: Cgroup) -> None:
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


def test_huge_pages_beyond_the_limit_are_refused(driver: Driver, spare_huge_pages: str) -> None:
    wanted = Resources(hugetlb=(HugetlbLimit(spare_huge_pages, 0),))
    if driver.layout.of("hugetlb") is None:
        with pytest.raises(OSError, match="no cgroup controller 'hugetlb'"):
            driver.create(fresh_path(), wanted)
        return
    none, some = driver.create(fresh_path(), wanted), driver.create(fresh_path())
    driver.enable(some.path, wanted)
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


# Freezing


def count_up(say: int) -> None:
    while True:
        os.write(say, b".")
        time.sleep(0.001)


def drain(child: Child) -> int:
    os.set_blocking(child.said, False)
    try:
        return len(os.read(child.said, MIB))
    except BlockingIOError:
        return 0


def test_a_frozen_process_makes_no_progress_until_it_is_thawed(group: Cgroup) -> None:
    with inside(group, count_up) as child:
        assert eventually(lambda: drain(child))
        group.freeze()
        assert group.is_frozen()
        drain(child)
        time.sleep(0.1)
        assert drain(child) == 0
        group.thaw()
        assert not group.is_frozen()
        assert eventually(lambda: drain(child))


def test_freezing_twice_and_thawing_twice_is_no_error(group: Cgroup) -> None:
    with inside(group, sleep):
        group.freeze()
        group.freeze()
        group.thaw()
        group.thaw()
        assert not group.is_frozen()


# Signals and removal


def test_kill_takes_everything_even_while_it_forks(group: Cgroup) -> None:
    group.apply(Resources(pids=PidsLimits(64)))

    def bomb(_: int) -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        while True:
            try:
                os.fork()
            except BlockingIOError:
                time.sleep(0.001)

    with inside(group, bomb) as child:
        assert eventually(lambda: len(group.pids()) > 30)
        group.kill()
        assert os.WTERMSIG(child.wait()) == signal.SIGKILL
        assert eventually(lambda: group.pids() == [])


def test_a_process_can_be_born_where_others_were_killed(group: Cgroup) -> None:
    for _ in range(2):
        with inside(group, sleep) as child:
            group.kill()
            assert os.WTERMSIG(child.wait()) == signal.SIGKILL


def test_kill_takes_a_frozen_process(group: Cgroup) -> None:
    with inside(group, sleep) as child:
        group.freeze()
        group.kill()
        assert os.WTERMSIG(child.wait()) == signal.SIGKILL


def test_another_signal_reaches_every_process_and_leaves_the_group_running(group: Cgroup) -> None:
    with inside(group, tell_usr1) as one, inside(group, tell_usr1) as other:
        assert [child.hear() for child in (one, other)] == [b"r"] * 2
        group.kill(signal.SIGUSR1)
        assert [child.hear() for child in (one, other)] == [b"u"] * 2
        assert not group.is_frozen()


def test_another_signal_waits_in_a_frozen_group_until_it_is_thawed(group: Cgroup) -> None:
    with inside(group, tell_usr1) as child:
        assert child.hear() == b"r"
        group.freeze()
        group.kill(signal.SIGUSR1)
        assert eventually(group.is_frozen)
        assert drain(child) == 0
        group.thaw()
        assert eventually(lambda: drain(child))


def tell_usr1(say: int) -> None:
    signal.signal(signal.SIGUSR1, lambda *_: os.write(say, b"u"))
    os.write(say, b"r")
    while True:
        time.sleep(60)


def test_a_process_cannot_kill_the_group_that_it_is_in(group: Cgroup) -> None:
    with inside(group, lambda _: group.kill()) as child:
        assert os.waitstatus_to_exitcode(child.wait()) == errno.EPERM


def test_remove_takes_processes_and_the_cgroups_made_inside_with_it(driver: Driver, group: Cgroup) -> None:
    one, other = driver.create(f"{group.path}/a/b/c"), driver.create(f"{group.path}/a/d")
    with inside(one, sleep) as deep, inside(other, sleep) as high:
        group.remove()
        assert not group.exists()
        assert [os.WTERMSIG(child.wait()) for child in (deep, high)] == [signal.SIGKILL] * 2


def test_remove_takes_a_frozen_group(group: Cgroup) -> None:
    with inside(group, sleep) as child:
        group.freeze()
        group.remove()
        assert not group.exists()
        assert os.WTERMSIG(child.wait()) == signal.SIGKILL


def test_removing_what_is_gone_is_no_error(group: Cgroup) -> None:
    group.remove()
    group.remove()
    assert group.pids() == []


# Limits as a whole


def test_a_refused_limit_leaves_all_others_as_they_were(group: Cgroup) -> None:
    group.apply(
        Resources(
            cpu=CpuLimits(shares=512, quota_us=50_000, period_us=100_000, cpus="0"),
            memory=MemoryLimits(limit_bytes=64 * MIB, swap_bytes=128 * MIB, reservation_bytes=16 * MIB),
            pids=PidsLimits(50),
            devices=DEFAULT_RULES,
        )
    )
    before = settings(group)
    change = Resources(
        cpu=CpuLimits(shares=2048, quota_us=10_000, period_us=20_000, cpus="0"),
        memory=MemoryLimits(limit_bytes=32 * MIB, swap_bytes=32 * MIB, reservation_bytes=8 * MIB),
        pids=PidsLimits(10),
        # The kernel refuses this one: there is no such device.
        io=IoLimits(devices=(IoDeviceLimits(250, 250, read_bytes_per_s=MIB),)),
        devices=(DeviceRule(allow=False),),
    )
    with pytest.raises(OSError, match="250:250"):
        group.apply(change)
    assert settings(group) == before


def settings(group: Cgroup) -> dict[str, str]:
    """Every file that can be set, and what it holds."""
    found = {}
    for directory in group.paths():
        for file in directory.iterdir():
            if file.is_file() and file.stat().st_mode & 0o600 == 0o600 and "pressure" not in file.name:
                found[str(file)] = file.read_text()
        if (directory / "devices.list").exists():
            found["devices"] = "\n".join(sorted((directory / "devices.list").read_text().splitlines()))
    return found


def test_a_refusal_names_the_file_and_the_value(group: Cgroup) -> None:
    with pytest.raises(OSError, match="'9999'") as caught:
        group.apply(Resources(cpu=CpuLimits(cpus="9999")))
    assert str(caught.value.filename).endswith("cpuset.cpus")


@pytest.mark.parametrize(
    "wanted",
    [
        Resources(cpu=CpuLimits(shares=1)),
        Resources(cpu=CpuLimits(shares=262145)),
        Resources(memory=MemoryLimits(limit_bytes=-2)),
        Resources(pids=PidsLimits(-5)),
        Resources(io=IoLimits(weight=5)),
        Resources(devices=(DeviceRule(allow=True, type="x"),)),
        Resources(devices=(DeviceRule(allow=True, access="q"),)),
        Resources(unified={"cgroup.procs": "1"}),
        Resources(unified={"../memory.max": "1"}),
    ],
)
def test_a_value_that_no_kernel_takes_is_refused_as_invalid(group: Cgroup, wanted: Resources) -> None:
    before = settings(group)
    with pytest.raises(OSError, match=r"must|not") as caught:
        group.apply(wanted)
    assert caught.value.errno == errno.EINVAL
    assert settings(group) == before


def test_a_limit_of_the_other_version_is_refused_as_unsupported(group: Cgroup, driver: Driver) -> None:
    wanted = MemoryLimits(swappiness=10) if driver.layout.kind is Kind.V2 else MemoryLimits(high_bytes=MIB)
    with pytest.raises(OSError, match="only") as caught:
        group.apply(Resources(memory=wanted))
    assert caught.value.errno == errno.EOPNOTSUPP


def test_raw_keys_are_set_on_v2_and_refused_elsewhere(group: Cgroup, driver: Driver) -> None:
    wanted = Resources(unified={"memory.high": str(64 * MIB)})
    if driver.layout.kind is Kind.V2:
        group.apply(wanted)
        assert Path(group.paths()[0], "memory.high").read_text().strip() == str(64 * MIB)
    else:
        with pytest.raises(OSError, match="not in cgroup v2"):
            group.apply(wanted)


def test_a_reading_of_a_cgroup_that_is_gone_says_so(group: Cgroup) -> None:
    group.remove()
    with pytest.raises(FileNotFoundError):
        group.read()
