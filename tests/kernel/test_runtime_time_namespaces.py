"""Time namespaces: new ones with offsets, and joined ones."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
from support.requirements import needs

from corral.kernel.namespaces import Kind
from corral.oci.spec import IdMapping, Namespace, TimeOffset

pytestmark = needs("root", "overlayfs", "busybox", "timens")

DAY_S = 86400
UPTIME = "cut -d. -f1 /proc/uptime"


def with_time(spec, path: str = "", **offsets: TimeOffset):
    namespaces = (*spec.linux.namespaces, Namespace(Kind.TIME, path))
    return replace(spec, linux=replace(spec.linux, namespaces=namespaces, time_offsets=offsets))


def uptime_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def test_the_clocks_are_ahead_by_the_offsets(lab):
    spec = with_time(lab.spec("sleep", "60"), boottime=TimeOffset(100 * DAY_S), monotonic=TimeOffset(5, 7))
    container = lab.create(spec)
    container.start()
    assert Path(f"/proc/{container.init.pid}/timens_offsets").read_text().split() == [
        *("monotonic", "5", "7"),
        *("boottime", str(100 * DAY_S), "0"),
    ]
    inside = int(lab.exec(container, UPTIME).output)
    assert abs(inside - uptime_s() - 100 * DAY_S) < 5
    assert int(lab.exec(container, "cut -d. -f1 /proc/uptime").output) >= inside


def test_init_itself_is_inside(lab):
    spec = with_time(lab.spec(UPTIME), boottime=TimeOffset(100 * DAY_S))
    assert abs(int(lab.run_spec(spec).output) - uptime_s() - 100 * DAY_S) < 5


def test_without_offsets_it_is_the_containers_own_all_the_same(lab):
    container = lab.create(with_time(lab.spec("sleep", "60")))
    container.start()
    own = Path(f"/proc/{container.init.pid}/ns/time").readlink()
    assert own != Path("/proc/self/ns/time").readlink()
    assert lab.exec(container, "readlink", "/proc/self/ns/time").output.strip() == str(own)


def test_the_hosts_clocks_are_left_alone(lab):
    before = uptime_s()
    lab.create(with_time(lab.spec("true"), boottime=TimeOffset(100 * DAY_S)))
    assert uptime_s() - before < 10


def test_one_by_path_is_joined(lab):
    first = lab.create(with_time(lab.spec("sleep", "60"), boottime=TimeOffset(50 * DAY_S)))
    first.start()
    spec = with_time(lab.spec(UPTIME), path=f"/proc/{first.init.pid}/ns/time")
    for name in ("upper2", "work2"):
        (lab.directory / name).mkdir()
    rootfs = [replace(lab.rootfs()[0], options=(
        f"lowerdir={lab.busybox}", f"upperdir={lab.directory}/upper2", f"workdir={lab.directory}/work2"
    ))]  # fmt: skip
    assert abs(int(lab.run_spec(spec, rootfs=rootfs).output) - uptime_s() - 50 * DAY_S) < 5


def test_a_clock_below_zero_is_refused(lab):
    with pytest.raises(ValueError, match=r"^linux\.timeOffsets: set the boottime clock off"):
        lab.create(with_time(lab.spec("true"), boottime=TimeOffset(-(2**40))))


def test_together_with_a_user_namespace(lab):
    import os

    os.chown(lab.upper, 300000, 300000)
    spec = with_time(lab.spec(UPTIME), boottime=TimeOffset(100 * DAY_S))
    mapping = (IdMapping(0, 300000, 65536),)
    namespaces = (*spec.linux.namespaces, Namespace(Kind.USER))
    linux = replace(spec.linux, namespaces=namespaces, uid_mappings=mapping, gid_mappings=mapping)
    assert abs(int(lab.run_spec(replace(spec, linux=linux)).output) - uptime_s() - 100 * DAY_S) < 5
