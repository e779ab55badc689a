"""Values as OCI has them, as the kernel's files have them, and back."""

import errno
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.kernel.cgroup import UNLIMITED, CpuLimits, MemoryLimits, files
from corral.kernel.cgroup.convert import cpu_weight, io_weight, swap_max
from corral.kernel.cgroup.driver import ancestors
from corral.kernel.cgroup.v1 import cpu as cpu_v1
from corral.kernel.cgroup.v2 import memory
from corral.kernel.cgroup.v2.pressure import parse


@pytest.mark.parametrize(
    ("shares", "weight"),
    # 2000 and 170 are those of runc issue 4896.
    [(0, 1), (2, 1), (4, 2), (8, 3), (1024, 100), (2000, 170), (262144, 10000), (262145, 10000)],
)
def test_shares_become_the_weight_that_runc_gives_them(shares: int, weight: int) -> None:
    assert cpu_weight(shares) == weight


@given(st.integers(2, 262143))
def test_more_shares_never_weigh_less(shares: int) -> None:
    assert 1 <= cpu_weight(shares) <= cpu_weight(shares + 1) <= 10000


@given(st.integers(10, 1000))
def test_io_weights_stay_in_the_range_of_the_kernel(weight: int) -> None:
    assert 1 <= io_weight(weight) <= 10000


@pytest.mark.parametrize(
    ("both", "memory", "swap"),
    [
        (300, 100, 200),
        (100, 100, 0),
        (UNLIMITED, 100, UNLIMITED),
        (300, UNLIMITED, 300),
        (UNLIMITED, UNLIMITED, UNLIMITED),
    ],
)
def test_swap_on_v2_is_what_remains_beside_memory(both: int, memory: int, swap: int) -> None:
    assert swap_max(both, memory) == swap


def test_more_memory_than_memory_and_swap_is_refused() -> None:
    with pytest.raises(ValueError, match="below the memory limit"):
        swap_max(50, 100)


@pytest.mark.parametrize(
    ("text", "value"),
    # LONG_MAX rounded down to pages of 4 and of 64 KiB.
    [("max", -1), ("9223372036854771712", -1), ("9223372036854710272", -1), ("-1", -1), ("4096", 4096)],
)
def test_every_spelling_of_no_limit_is_one_value(text: str, value: int) -> None:
    assert files.number(text) == value


def test_flat_files_are_parsed_and_lines_without_a_value_skipped() -> None:
    assert files.flat_keyed("low 0\nmax 3\noom_kill_disable 0\n\nodd\n") == {"low": 0, "max": 3, "oom_kill_disable": 0}


def test_nested_files_are_parsed_in_order() -> None:
    text = "8:16 rbytes=1459200 wbytes=0\n8:0 rbytes=90 wbytes=2"
    assert list(files.nested_keyed(text)) == [
        ("8:16", {"rbytes": "1459200", "wbytes": "0"}),
        ("8:0", {"rbytes": "90", "wbytes": "2"}),
    ]


def test_pressure_without_a_full_line_reads_as_none_of_it() -> None:
    pressure = parse(b"some avg10=0.12 avg60=3.40 avg300=5.00 total=678")
    assert (pressure.some_avg10, pressure.some_avg300, pressure.some_total_us) == (0.12, 5.0, 678)
    assert pressure.full_total_us == 0


def test_the_ancestors_of_a_path_start_at_the_root() -> None:
    assert ancestors("/corral") == [""]
    assert ancestors("/corral/default/web") == ["", "/corral", "/corral/default"]


def test_a_refused_write_names_file_and_value(tmp_path) -> None:
    with pytest.raises(OSError, match=r"cannot write '42'.*nothing/memory.max"):
        files.write(f"{tmp_path}/nothing/memory.max", "42")


def test_a_kernel_that_takes_back_no_memory_by_request_has_room_where_the_page_cache_is(tmp_path: Path) -> None:
    (tmp_path / "memory.current").write_text("1000\n")  # there is no memory.reclaim before Linux 5.19
    (tmp_path / "memory.stat").write_text("anon 300\nfile 700\ninactive_file 400\nactive_file 200\nunevictable 100\n")
    assert memory.plan(str(tmp_path), MemoryLimits(limit_bytes=400, check_before_update=True))
    with pytest.raises(OSError, match="400 bytes are in use") as caught:
        memory.plan(str(tmp_path), MemoryLimits(limit_bytes=399, check_before_update=True))
    assert caught.value.errno == errno.EBUSY


def test_cpu_time_of_a_cgroup_that_was_just_made_is_planned_without_a_look_at_it() -> None:
    wanted = CpuLimits(shares=512, quota_us=50_000, period_us=200_000, burst_us=1000, idle=0)
    writes = [step.describe() for step in cpu_v1.plan("/nowhere", wanted, fresh=True)]
    assert writes == [
        "echo '0' > /nowhere/cpu.idle",
        "echo '512' > /nowhere/cpu.shares",
        "echo '200000' > /nowhere/cpu.cfs_period_us",
        "echo '50000' > /nowhere/cpu.cfs_quota_us",
        "echo '1000' > /nowhere/cpu.cfs_burst_us",
    ]
    with pytest.raises(FileNotFoundError):
        cpu_v1.plan("/nowhere", wanted)
