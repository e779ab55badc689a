"""Which hierarchies a mountinfo text describes."""

import pytest

from corral.kernel.cgroup.layout import Kind, parse

V2_ONLY = "25 1 0:22 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate"
DEBIAN_10 = """\
30 25 0:26 / /sys/fs/cgroup ro,nosuid,nodev,noexec shared:9 - tmpfs tmpfs ro,mode=755
31 30 0:27 / /sys/fs/cgroup/unified rw,nosuid,nodev,noexec,relatime shared:10 - cgroup2 cgroup2 rw
32 30 0:28 / /sys/fs/cgroup/systemd rw,nosuid,nodev,noexec,relatime shared:11 - cgroup cgroup rw,xattr,name=systemd
33 30 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid,nodev,noexec,relatime shared:15 - cgroup cgroup rw,cpu,cpuacct
34 30 0:30 / /sys/fs/cgroup/memory rw,nosuid,nodev,noexec,relatime shared:16 - cgroup cgroup rw,memory
"""


def v2_has(*names: str):
    return lambda _: frozenset(names)


def test_one_cgroup2_mount_is_a_v2_host() -> None:
    layout = parse(V2_ONLY, v2_has("cpu", "io", "memory"))
    assert layout.kind is Kind.V2
    assert layout.unified is not None
    for name in ("cpu", "memory", "io", "blkio", "cpuacct"):
        assert layout.of(name) is layout.unified
    assert layout.of("pids") is None
    assert layout.unified.nsdelegate
    without = parse(V2_ONLY.replace("nsdelegate", "memory_recursiveprot"), v2_has()).unified
    assert without is not None
    assert not without.nsdelegate


def test_v1_mounts_with_a_cgroup2_mount_are_a_hybrid_host() -> None:
    layout = parse(DEBIAN_10, v2_has("hugetlb"))
    assert layout.kind is Kind.HYBRID
    cpu = layout.of("cpu")
    assert cpu is not None
    assert cpu is layout.of("cpuacct")
    assert (cpu.version, cpu.mount_point) == (1, "/sys/fs/cgroup/cpu,cpuacct")
    assert layout.of("hugetlb") is layout.unified
    assert [h.name for h in layout.hierarchies if not h.controllers] == ["systemd"]


def test_v1_mounts_alone_are_a_v1_host() -> None:
    text = "\n".join(line for line in DEBIAN_10.splitlines() if "cgroup2" not in line)
    layout = parse(text, v2_has())
    assert layout.kind is Kind.V1
    assert layout.unified is None


def test_a_named_v1_hierarchy_beside_cgroup2_does_not_make_a_host_hybrid() -> None:
    text = "\n".join(line for line in DEBIAN_10.splitlines() if "cgroup2" in line or "systemd" in line)
    assert parse(text, v2_has("memory")).kind is Kind.V2


def test_of_two_mounts_of_a_hierarchy_the_writable_one_of_the_whole_tree_is_used() -> None:
    text = """\
40 1 0:30 / /read-only ro - cgroup cgroup rw,memory
41 1 0:30 /part /part rw - cgroup cgroup rw,memory
42 1 0:30 / /whole rw - cgroup cgroup rw,memory
43 1 0:30 / /late rw - cgroup cgroup rw,memory
"""
    [hierarchy] = parse(text, v2_has()).hierarchies
    assert hierarchy.mount_point == "/whole"


@pytest.mark.parametrize(("options", "super_options"), [("ro,nosuid", "rw,memory"), ("rw", "ro,memory")])
def test_a_read_only_mount_is_known_as_one(options: str, super_options: str) -> None:
    [hierarchy] = parse(f"40 1 0:30 / /m {options} - cgroup cgroup {super_options}", v2_has()).hierarchies
    assert hierarchy.read_only


def test_a_mount_point_with_a_space_is_unescaped() -> None:
    [hierarchy] = parse(r"40 1 0:30 / /my\040cgroups rw - cgroup cgroup rw,pids", v2_has()).hierarchies
    assert hierarchy.mount_point == "/my cgroups"


def test_other_file_systems_and_broken_lines_are_ignored() -> None:
    assert parse("1 2 3\n\n22 1 0:1 / / rw - ext4 /dev/sda rw\n", v2_has()).hierarchies == ()
