"""What every cgroup layout promises alike, beside its limits: being made, frozen, signalled and removed.

It runs on v1 and hybrid on a host that mounts v1, on v2 on one that does not.
"""

import errno
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from support.cgroups import (
    Child,
    eventually,
    fresh_path,
    inside,
    parent,
    sleep,
)
from support.requirements import needs

from corral.kernel.cgroup import (
    DEFAULT_RULES,
    Cgroup,
    CpuLimits,
    DeviceRule,
    Driver,
    HugetlbLimit,
    IoDeviceLimits,
    IoLimits,
    Kind,
    MemoryLimits,
    PidsLimits,
    Resources,
    hugepages,
    join,
)
from corral.kernel.cgroup.v1 import freezer as freezer_v1
from corral.kernel.cgroup.v2 import freezer as freezer_v2

pytestmark = needs("root", "cgroup")
MIB = 1 << 20


# Life


def test_a_process_born_in_a_cgroup_is_in_it_in_every_hierarchy(group: Cgroup) -> None:
    with inside(group, sleep) as child:
        lines = Path(f"/proc/{child.pid}/cgroup").read_text().splitlines()
        assert sum(line.endswith(f":{group.path}") for line in lines) == len(group.paths())
        assert group.pids() == [child.pid]


def test_a_process_can_be_moved_into_a_cgroup_from_outside(cgroup_driver: Driver, group: Cgroup) -> None:
    other = cgroup_driver.create(fresh_path())
    with inside(other, sleep) as child:
        join(group.paths(), child.pid)
        assert (other.pids(), group.pids()) == ([], [child.pid])


def test_controllers_that_a_cgroup_with_processes_cannot_share_out_are_left_off_where_nothing_takes_them(
    cgroup_driver: Driver, group: Cgroup
) -> None:
    """As in a container, whose root cgroup has processes. Source: kernel cgroup-v2.rst "No Internal Process"."""
    lenient = Driver(cgroup_driver.layout, lenient=True)
    unified = cgroup_driver.layout.unified
    here = frozenset() if unified is None else unified.controllers
    wanted = Resources(hugetlb=(HugetlbLimit("2MB", 0),))
    with inside(group, sleep):
        if here & {"memory", "hugetlb"}:
            with pytest.raises(OSError, match="processes live in this cgroup") as failed:
                cgroup_driver.create(f"{group.path}/strict", wanted)
            assert failed.value.errno == errno.EBUSY
        with pytest.raises(OSError, match="hugetlb") as failed:
            lenient.create(f"{group.path}/limited", wanted)
        assert failed.value.errno == errno.EOPNOTSUPP
        free = lenient.create(f"{group.path}/free")
        assert free.exists()
        free.remove()


def test_a_name_is_taken_once(cgroup_driver: Driver, group: Cgroup) -> None:
    with pytest.raises(FileExistsError):
        cgroup_driver.create(group.path)
    assert group.exists()


@pytest.mark.parametrize("path", ["", "/", "x", "/a/../b", "/a//b", "/a/", "/./a"])
def test_a_path_that_is_not_plain_and_absolute_is_refused(cgroup_driver: Driver, path: str) -> None:
    with pytest.raises(OSError, match="must be absolute"):
        cgroup_driver.create(path)


def test_a_cgroup_with_a_limit_that_is_refused_is_not_made(cgroup_driver: Driver) -> None:
    path = fresh_path()
    with pytest.raises(OSError, match="'9999'"):
        cgroup_driver.create(path, Resources(cpu=CpuLimits(cpus="9999")))
    assert not cgroup_driver.open(path).exists()


def test_the_second_with_the_same_limits_has_them_all_and_is_refused_as_the_first_would_be(
    cgroup_driver: Driver, group: Cgroup
) -> None:
    wanted = Resources(
        cpu=CpuLimits(shares=512, quota_us=50_000, period_us=100_000),
        memory=MemoryLimits(limit_bytes=32 * MIB, swap_bytes=32 * MIB),
        pids=PidsLimits(50),
        devices=DEFAULT_RULES,
    )
    first, second = (cgroup_driver.create(f"{group.path}/{name}", wanted) for name in ("first", "second"))
    assert _limit_files(first) == _limit_files(second) != _limit_files(group)
    second.remove()
    first.remove()
    less = cgroup_driver.create(fresh_path(), Resources(cpu=CpuLimits(quota_us=10_000)))
    if cgroup_driver.layout.of("cpu").version == 1:  # type: ignore[union-attr]  # v2 takes what is above the parent's
        with pytest.raises(OSError, match=r"cannot write '50000'.*cpu\.cfs_quota_us"):
            cgroup_driver.create(f"{less.path}/third", wanted)
        assert cgroup_driver.list(less.path) == set()


def _limit_files(group: Cgroup) -> dict[str, str]:
    names = ("cpu.shares", "cpu.cfs_quota_us", "cpu.cfs_period_us", "cpu.weight", "cpu.max", "memory.limit_in_bytes")
    names += ("memory.memsw.limit_in_bytes", "memory.max", "memory.swap.max", "pids.max", "devices.list")
    files = [path / name for path in group.paths() for name in names]
    return {file.name: file.read_text() for file in files if file.exists()}


def test_a_cgroup_whose_making_is_interrupted_is_not_made(cgroup_driver: Driver) -> None:
    class CtrlC(Resources):
        def __getattribute__(self, name: str) -> object:
            raise KeyboardInterrupt

    path = fresh_path()
    with pytest.raises(KeyboardInterrupt):
        cgroup_driver.create(path, CtrlC())
    assert not any(each.exists() for each in cgroup_driver.open(path).paths())


def test_list_names_what_is_there_and_prune_removes_only_what_is_empty(cgroup_driver: Driver, group: Cgroup) -> None:
    assert cgroup_driver.list(f"{parent()}/ns") == {Path(group.path).name}
    cgroup_driver.prune(f"{parent()}/ns")
    assert group.exists()
    group.remove()
    cgroup_driver.prune(f"{parent()}/ns")
    assert cgroup_driver.list(parent()) == set()


def test_parents_pruned_meanwhile_are_made_again(cgroup_driver: Driver, group: Cgroup) -> None:
    group.remove()
    cgroup_driver.prune(f"{parent()}/ns")
    assert cgroup_driver.create(group.path).exists()


def test_a_parent_belongs_to_who_claimed_it_first_while_anything_is_below(cgroup_driver: Driver, group: Cgroup) -> None:
    assert cgroup_driver.claim(f"{parent()}/ns", "one") == "one"
    assert cgroup_driver.claim(f"{parent()}/ns", "two") == "one"
    group.remove()
    assert cgroup_driver.claim(f"{parent()}/ns", "two") == "two"


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


def test_no_signal_misses_a_process_that_always_leaves_its_place_to_a_child(group: Cgroup) -> None:
    """Who only lists and signals comes too late each time."""
    group.apply(Resources(pids=PidsLimits(64)))

    def relay(_: int) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        while not os.fork():
            pass
        os._exit(0)

    for _ in range(10):
        with inside(group, relay):
            assert eventually(lambda: bool(group.pids()))
            group.kill(signal.SIGTERM)
            assert eventually(lambda: group.pids() == [])


def tell_usr1(say: int) -> None:
    signal.signal(signal.SIGUSR1, lambda *_: os.write(say, b"u"))
    os.write(say, b"r")
    while True:
        time.sleep(60)


def test_a_process_cannot_kill_the_group_that_it_is_in(group: Cgroup) -> None:
    with inside(group, lambda _: group.kill()) as child:
        assert os.waitstatus_to_exitcode(child.wait()) == errno.EPERM


def test_remove_takes_processes_and_the_cgroups_made_inside_with_it(cgroup_driver: Driver, group: Cgroup) -> None:
    one, other = cgroup_driver.create(f"{group.path}/a/b/c"), cgroup_driver.create(f"{group.path}/a/d")
    with inside(one, sleep) as deep, inside(other, sleep) as high:
        group.remove()
        assert not group.exists()
        assert [os.WTERMSIG(child.wait()) for child in (deep, high)] == [signal.SIGKILL] * 2


def test_remove_takes_a_tree_that_is_deeper_than_paths_and_calls_may_be(group: Cgroup) -> None:
    with inside(group, sleep) as child:
        for directory in group.paths():
            at = os.open(directory, os.O_RDONLY)
            for _ in range(sys.getrecursionlimit() + 100 if directory == group.paths()[0] else 30):
                os.mkdir("d" * 200, dir_fd=at)
                below = os.open("d" * 200, os.O_RDONLY, dir_fd=at)
                os.close(at)
                at = below
            with open(f"/proc/self/fd/{at}/cgroup.procs", "w") as procs:
                procs.write(str(child.pid))
            os.close(at)
        assert group.pids() == [child.pid]
        group.remove()
        assert not group.exists()
        assert os.WTERMSIG(child.wait()) == signal.SIGKILL


def test_remove_takes_a_frozen_group(group: Cgroup) -> None:
    with inside(group, sleep) as child:
        group.freeze()
        group.remove()
        assert not group.exists()
        assert os.WTERMSIG(child.wait()) == signal.SIGKILL


def test_a_cgroup_that_was_removed_as_it_is_looked_at_is_not_frozen_and_thawing_it_no_error(group: Cgroup) -> None:
    directories = group.directories
    group.remove()
    for directory in directories:
        for freezer in (freezer_v1, freezer_v2):
            assert not freezer.is_frozen(directory)
            freezer.thaw(directory)


def test_what_is_empty_is_removed_at_once_and_who_is_inside_is_left_alone(cgroup_driver: Driver, group: Cgroup) -> None:
    empty = cgroup_driver.create(fresh_path())
    assert empty.remove_empty()
    assert not empty.exists()
    with inside(group, sleep) as child:
        assert not group.remove_empty()
        assert group.pids() == [child.pid]
    eventually(group.remove_empty)


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


def test_an_idle_cgroup_is_made_with_its_shares(cgroup_driver: Driver) -> None:
    group = cgroup_driver.create(fresh_path(), Resources(cpu=CpuLimits(shares=512, idle=1)))
    try:
        group.apply(Resources(cpu=CpuLimits(shares=600, idle=1)))
        assert cpu_files(group)[0] == "1"
        with pytest.raises(OSError, match="an idle cgroup has no CPU shares"):
            group.apply(Resources(cpu=CpuLimits(shares=700)))
        group.apply(Resources(cpu=CpuLimits(shares=512, idle=0)))
        busy = cpu_files(group)
        group.apply(Resources(cpu=CpuLimits(shares=512)))
        assert cpu_files(group) == busy
    finally:
        group.remove()


@pytest.mark.parametrize(
    ("now", "change"),
    [({"idle": 0}, {"idle": 1}), ({"idle": 1}, {"idle": 0, "shares": 700}), ({"idle": 1}, {"idle": 0})],
)
def test_a_refused_limit_takes_idling_back_with_the_shares(
    group: Cgroup, now: dict[str, int], change: dict[str, int]
) -> None:
    group.apply(Resources(cpu=CpuLimits(shares=300, **now)))
    before = settings(group)
    with pytest.raises(OSError, match=r"cfs_quota_us|cpu\.max"):
        group.apply(Resources(cpu=CpuLimits(quota_us=5, **change)))
    assert settings(group) == before


def cpu_files(group: Cgroup) -> tuple[str, str]:
    """Whether it idles, and its shares or its weight."""
    [directory] = [path for path in group.paths() if (path / "cpu.idle").exists()]
    [weight] = [path for name in ("cpu.shares", "cpu.weight") if (path := directory / name).exists()]
    return (directory / "cpu.idle").read_text().strip(), weight.read_text().strip()


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


def test_a_limit_of_the_other_version_is_refused_as_unsupported(group: Cgroup, cgroup_driver: Driver) -> None:
    wanted = MemoryLimits(swappiness=10) if cgroup_driver.layout.kind is Kind.V2 else MemoryLimits(high_bytes=MIB)
    with pytest.raises(OSError, match="only") as caught:
        group.apply(Resources(memory=wanted))
    assert caught.value.errno == errno.EOPNOTSUPP


def test_raw_keys_are_set_on_v2_and_refused_elsewhere(group: Cgroup, cgroup_driver: Driver) -> None:
    wanted = Resources(unified={"memory.high": str(64 * MIB)})
    if cgroup_driver.layout.kind is Kind.V2:
        group.apply(wanted)
        assert Path(group.paths()[0], "memory.high").read_text().strip() == str(64 * MIB)
    else:
        with pytest.raises(OSError, match="not in cgroup v2"):
            group.apply(wanted)


def test_a_cgroup_is_not_made_threaded_by_a_raw_key_and_the_reason_is_told(group: Cgroup) -> None:
    with pytest.raises(OSError, match="threaded cgroup can have no limits of memory and I/O") as caught:
        group.apply(Resources(unified={"cgroup.type": "threaded"}))
    assert caught.value.errno == errno.EOPNOTSUPP


@needs("cgroup2")
def test_a_cgroup_that_was_divided_for_threads_is_read_frozen_killed_and_removed_like_any_other(group: Cgroup) -> None:
    [directory] = group.paths()

    def body(say: int) -> None:
        threads = directory / "threads"
        threads.mkdir()
        (threads / "cgroup.type").write_text("threaded")
        (threads / "cgroup.threads").write_text("0")
        os.write(say, b"x")
        time.sleep(3600)

    with inside(group, body) as child:
        assert child.hear() == b"x"
        assert group.pids() == [child.pid]
        group.freeze()
        assert group.is_frozen()
        group.thaw()
        group.kill(signal.SIGTERM)
        assert os.WTERMSIG(child.wait()) == signal.SIGTERM
    group.undivide()
    with inside(group, body) as child:
        assert child.hear() == b"x"
        group.remove()
        assert os.WTERMSIG(child.wait()) == signal.SIGKILL
    assert not group.exists()


@needs("cgroup2")
@pytest.mark.parametrize("parent_of_it", ["", "/threads"])
def test_no_cgroup_is_made_below_one_that_is_for_threads(cgroup_driver: Driver, parent_of_it: str) -> None:
    top = cgroup_driver.create(fresh_path())
    threads = top.paths()[0] / "threads"
    threads.mkdir()
    (threads / "cgroup.type").write_text("threaded")
    path = f"{top.path}{parent_of_it}/below"
    with pytest.raises(OSError, match="is for threads, so no process can begin in it") as caught:
        cgroup_driver.create(path, Resources())
    assert caught.value.errno == errno.EOPNOTSUPP
    assert not cgroup_driver.open(path).exists()


def test_a_raw_key_may_have_the_capitals_of_a_size_of_huge_pages(cgroup_driver: Driver) -> None:
    unified, key = cgroup_driver.layout.unified, f"hugetlb.{(*hugepages.sizes(), '2MB')[0]}.max"
    wanted = Resources(unified={key: str(1 << 30)})
    if unified is None or "hugetlb" not in unified.controllers:
        with pytest.raises(OSError, match=f"{key}: controller 'hugetlb' is not in cgroup v2"):
            cgroup_driver.create(fresh_path(), wanted)
        return
    group = cgroup_driver.create(fresh_path(), wanted)
    assert Path(f"{unified.mount_point}{group.path}/{key}").read_text() == f"{1 << 30}\n"


RAW = (("memory.zswap.max", "1048576"), ("memory.zswap.writeback", "0"), ("misc.max", ""), ("cpu.uclamp.max", "50.00"))


@needs("cgroup2")
@pytest.mark.parametrize(("name", "value"), RAW)
def test_what_has_no_limit_of_its_own_here_is_set_by_a_raw_key(cgroup_driver: Driver, name: str, value: str) -> None:
    group = cgroup_driver.create(fresh_path())
    wanted = Resources(unified={name: value})
    cgroup_driver.enable(group.path, wanted)
    file = group.paths()[0] / name
    if not file.exists():
        with pytest.raises(OSError, match=f"cannot set {name}: this kernel does not have it"):
            group.apply(wanted)
    elif value:
        group.apply(wanted)
        assert file.read_text() == f"{value}\n"


@needs("cgroup2")
def test_a_partition_of_cpus_that_comes_to_nothing_is_refused_with_the_kernels_reason(cgroup_driver: Driver) -> None:
    group = cgroup_driver.create(fresh_path(), Resources(cpu=CpuLimits(shares=300)))
    partition = group.paths()[0] / "cpuset.cpus.partition"
    for fresh in (False, True):
        with pytest.raises(OSError, match=r"cannot be the partition 'root': .") as caught:
            group.apply(Resources(cpu=CpuLimits(shares=500), unified={partition.name: "root"}), fresh=fresh)
        assert caught.value.errno == errno.EINVAL
        assert partition.read_text() == "member\n"
    group.apply(Resources(unified={partition.name: "member"}))


@needs("cgroup2")
def test_a_partition_of_cpus_is_had_below_one(cgroup_driver: Driver) -> None:
    top = cgroup_driver.create(f"/{fresh_path().rpartition('/')[2]}")
    try:
        both = {"cpuset.cpus": "1", "cpuset.cpus.partition": "root"}
        top.apply(Resources(unified=both))
        group = cgroup_driver.create(f"{top.path}/below", Resources(cpu=CpuLimits(cpus="1")))
        group.apply(Resources(unified={"cpuset.cpus.partition": "isolated"}))
        assert (group.paths()[0] / "cpuset.cpus.partition").read_text() == "isolated\n"
    finally:
        top.remove()


def test_a_divided_cgroup_takes_processes_again_once_nobody_is_inside(cgroup_driver: Driver, group: Cgroup) -> None:
    below = cgroup_driver.create(f"{group.path}/made/inside")
    cgroup_driver.enable(below.path, Resources(unified={"hugetlb.2MB.max": "max"}))
    with inside(below, sleep):
        group.undivide()
        assert below.exists()
    group.undivide()
    assert not below.exists()
    with inside(group, sleep) as child:
        assert group.pids() == [child.pid]


def test_a_reading_of_a_cgroup_that_is_gone_says_so(group: Cgroup) -> None:
    group.remove()
    with pytest.raises(FileNotFoundError):
        group.read()
