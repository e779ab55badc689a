"""What systemd is told of a container: names, limits, annotations. Without a systemd."""

import subprocess
import sys

import pytest

from corral.kernel.cgroup.device_rules import DEFAULT_RULES
from corral.kernel.cgroup.resources import DeviceRule
from corral.kernel.cgroup.steps import Write
from corral.kernel.cgroup.systemd.names import (
    check_name,
    has_slice_of_its_own,
    scope_alone_in,
    slice_of_its_own,
    slice_path,
)
from corral.kernel.cgroup.systemd.properties import (
    INFINITY,
    bitmap,
    contents_of,
    device_properties,
    in_whole_percents,
    oom_policy,
    properties_of,
)
from corral.kernel.dbus.marshalling import Variant
from corral.runtime.annotations import annotated
from corral.runtime.errors import CommandError
from corral.runtime.units import names_of

NEW = 257


def told(contents: dict[str, str], version: int = NEW) -> dict[str, object]:
    """The properties, without their types, of files of a cgroup."""
    return {name: value.value for name, value in properties_of(contents, version)}


@pytest.mark.parametrize(
    ("cgroups_path", "user", "names"),
    [
        ("machine.slice:libpod:8f3a", False, ("machine.slice", "libpod-8f3a.scope")),
        ("kube-pod1.slice:cri-containerd:8f3a", False, ("kube-pod1.slice", "cri-containerd-8f3a.scope")),
        (":docker:8f3a", False, ("system.slice", "docker-8f3a.scope")),
        (":docker:8f3a", True, ("user.slice", "docker-8f3a.scope")),
        ("", False, ("system.slice", "corral-web.scope")),
        ("-.slice::web", False, ("-.slice", "-web.scope")),
    ],
)
def test_a_cgroups_path_names_a_slice_and_a_scope(cgroups_path, user, names):
    assert names_of(cgroups_path, "web", user=user) == names


@pytest.mark.parametrize("cgroups_path", ["/corral/web", "web", "a.slice:b", "a:b:c:d"])
def test_a_cgroups_path_of_another_form_is_refused_by_name(cgroups_path):
    with pytest.raises(CommandError, match=r'linux\.cgroupsPath: expected to be of format "slice:prefix:name"'):
        names_of(cgroups_path, "web", user=False)


def test_a_container_cant_be_a_slice():
    with pytest.raises(CommandError, match=r"linux\.cgroupsPath: 'web\.slice' is a slice"):
        names_of("a.slice:b:web.slice", "web", user=False)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("-.slice", ""),
        ("system.slice", "/system.slice"),
        ("a-b-c.slice", "/a.slice/a-b.slice/a-b-c.slice"),
    ],
)
def test_slices_are_nested_by_their_dashes(name, path):
    assert slice_path(name) == path


@pytest.mark.parametrize("scope", ["a.scope", "corral-0a-1b-web.scope", "a-_-.b.scope", "a.slice.scope", "a--b.scope"])
@pytest.mark.parametrize("within", ["-.slice", "corral.slice", "machine-web.slice"])
def test_a_scope_has_a_slice_that_no_other_has(scope, within):
    slice_ = slice_of_its_own(scope, within)
    above = slice_path(within)
    assert slice_path(slice_) == f"{above}/{slice_}"
    assert scope_alone_in(slice_) == scope
    assert has_slice_of_its_own(f"{above}/{slice_}/{scope}")
    assert has_slice_of_its_own(f"/sys/fs/cgroup{above}/{slice_}/{scope}")
    assert not has_slice_of_its_own(f"{above}/{slice_}/b.scope")
    assert not has_slice_of_its_own(f"{above}/{slice_}")
    assert not has_slice_of_its_own(f"{above}/{scope}")


@pytest.mark.parametrize("name", ["a", ".slice", "-a.slice", "a-.slice", "a--b.slice", "a/b.slice", "../a.slice", ""])
def test_what_is_not_a_slice_is_refused(name):
    with pytest.raises(ValueError, match="systemd"):
        slice_path(name)


@pytest.mark.parametrize("name", ["a/../b.scope", "a+b.scope", "a" * 250 + ".scope", "a b.scope", "é.scope"])
def test_what_is_not_a_unit_is_refused(name):
    with pytest.raises(ValueError, match="systemd unit"):
        check_name(name)


def test_the_files_of_v2_have_properties():
    contents = {
        "memory.max": "67108864",
        "memory.high": "max",
        "memory.low": "1048576",
        "memory.min": "0",
        "memory.swap.max": "max",
        "cpu.max": "50000 100000",
        "cpu.weight": "59",
        "cpuset.cpus": "0-1,3",
        "cpuset.mems": "0",
        "pids.max": "10",
        "io.weight": "default 500\n8:0 100",
    }
    assert told(contents) == {
        "MemoryMax": 67108864,
        "MemoryHigh": INFINITY,
        "MemoryLow": 1048576,
        "MemoryMin": 0,
        "MemorySwapMax": INFINITY,
        "CPUQuotaPeriodUSec": 100000,
        "CPUQuotaPerSecUSec": 500000,
        "CPUWeight": 59,
        "AllowedCPUs": b"\x0b",
        "AllowedMemoryNodes": b"\x01",
        "TasksMax": 10,
        "IOWeight": 500,
    }
    assert told({"io.bfq.weight": "1000"}) == {"IOWeight": 10000}


def test_the_files_of_v1_have_properties():
    contents = {
        "memory.limit_in_bytes": "9223372036854771712",
        "cpu.shares": "512",
        "cpu.cfs_period_us": "50000",
        "cpu.cfs_quota_us": "25000",
        "blkio.bfq.weight": "default 500\n8:0 100",
        "pids.max": "max",
    }
    assert told(contents) == {
        "MemoryLimit": INFINITY,
        "CPUShares": 512,
        "CPUQuotaPeriodUSec": 50000,
        "CPUQuotaPerSecUSec": 500000,
        "BlockIOWeight": 500,
        "TasksMax": INFINITY,
    }


def test_what_was_written_is_told_as_the_kernel_has_it_and_nothing_else(tmp_path):
    for name, content in {"pids.max": "5\n", "cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"}.items():
        (tmp_path / name).write_text(content)
    written = ("pids.max", "05"), ("cpu.cfs_quota_us", "-1"), ("hugetlb.2MB.max", "0"), ("io.max", "8:0 rbps=100")
    assert contents_of([Write(f"{tmp_path}/{name}", value) for name, value in written]) == {
        "pids.max": "5", "cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000",
    }  # fmt: skip


def test_no_limit_of_cpu_time_is_infinite_and_no_process_at_all_is_one():
    assert told({"cpu.max": "max 100000", "pids.max": "0"}) == {
        "CPUQuotaPeriodUSec": 100000,
        "CPUQuotaPerSecUSec": INFINITY,
        "TasksMax": 1,
    }


def test_an_idle_group_has_a_weight_of_zero():
    assert told({"cpu.idle": "1", "cpu.weight": "59"}) == {"CPUWeight": 0}
    assert told({"cpu.idle": "0", "cpu.weight": "59"}) == {"CPUWeight": 59}
    assert (
        told({"cpu.idle": "1", "cpu.weight": "0"}, version=251) == told({"cpu.idle": "1", "cpu.shares": "3"}, 251) == {}
    )


def test_an_older_systemd_is_told_what_it_knows():
    contents = {"cpu.max": "50000 100000", "cpuset.cpus": "0", "cpu.idle": "1"}
    assert told(contents, version=241) == {"CPUQuotaPerSecUSec": 500000}
    assert set(told(contents, version=244)) == {"CPUQuotaPerSecUSec", "CPUQuotaPeriodUSec", "AllowedCPUs"}
    assert oom_policy("1", 252) == []
    assert oom_policy("1", 253) == [("OOMPolicy", Variant("s", "kill"))]


@pytest.mark.parametrize(
    ("written", "rounded"),
    [("33333 100000", "34000 100000"), ("50000 100000", "50000 100000"), ("max 100000", "max 100000"),
     ("1", "1000 100000"), ("4000 33333", "4333 33333"),
     ("much 100000", "much 100000"), ("5 0", "5 0")],
)  # fmt: skip
def test_a_quota_is_rounded_up_to_a_whole_percent_as_systemd_keeps_it(written, rounded):
    (step,) = in_whole_percents([Write("/a/cpu.max", written)])
    assert (step.value if " " in step.value else f"{step.value} 100000") == rounded
    (again,) = in_whole_percents([step])
    assert again == step


def test_a_quota_of_v1_is_rounded_by_the_period_that_is_set(tmp_path):
    (tmp_path / "cpu.cfs_period_us").write_text("50000\n")
    (step, none) = in_whole_percents(
        [Write(f"{tmp_path}/cpu.cfs_quota_us", "12345"), Write(f"{tmp_path}/cpu.cfs_quota_us", "-1")]
    )
    assert (step.value, none.value) == ("12500", "-1")


@pytest.mark.parametrize("numbers", ["3-1", "a", "-1"])
def test_what_is_no_list_of_numbers_is_refused(numbers):
    with pytest.raises(ValueError, match=r"range|invalid"):
        bitmap(numbers)


def test_devices_are_allowed_as_systemd_has_words_for_them():
    rules = (
        *DEFAULT_RULES,
        DeviceRule(allow=True, type="b", major=8, access="r"),
        DeviceRule(allow=True, type="c", minor=5),
    )
    *cleared, (name, allowed) = device_properties(rules)
    assert cleared == [("DevicePolicy", Variant("s", "strict")), ("DeviceAllow", Variant("a(ss)", []))]
    assert name == "DeviceAllow"
    assert {("char-*", "m"), ("block-*", "m"), ("/dev/char/1:3", "rwm"), ("char-136", "rwm"), ("block-8", "r")} <= set(
        allowed.value
    )
    assert all("5" not in path for path, access in allowed.value if path.startswith("char-"))


def test_all_devices_and_all_but_some():
    assert device_properties([]) == [("DeviceAllow", Variant("a(ss)", [])), ("DevicePolicy", Variant("s", "auto"))]
    denied = device_properties([DeviceRule(allow=False, type="c", major=1, minor=3)])
    assert denied[-1] == ("DeviceAllow", Variant("a(ss)", []))
    assert denied[0] == ("DevicePolicy", Variant("s", "strict"))


def test_annotations_set_properties():
    assert annotated(
        {
            "org.systemd.property.TimeoutStopUSec": "uint64 123456789",
            "org.systemd.property.TimeoutStopSec": "1.5",
            "org.systemd.property.CollectMode": "'inactive-or-failed'",
            "org.systemd.property.KillSignal": "37",
            "org.systemd.property.After": "['a.service']",
            "org.example.other": "not a value",
        }
    ) == [
        ("TimeoutStopUSec", Variant("t", 123456789)),
        ("TimeoutStopUSec", Variant("t", 1500000)),
        ("CollectMode", Variant("s", "inactive-or-failed")),
        ("KillSignal", Variant("i", 37)),
        ("After", Variant("as", ["a.service"])),
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [("A1", "5"), ("ab", "5"), ("", "5"), ("Kill-Signal", "5"), ("KillSignal", "x"), ("RuntimeMaxSec", "'5'")]
    + [("TimeoutStopSec", value) for value in ("inf", "nan", "-1", "1e300", "18446744073710", "true", "[1]", "<5>")]
    + [("Description", value) for value in ("{[1]: 2}", "{<1>: 2}", "[" * 5000, "<" * 5000, "uint64 " * 5000)],
)
def test_an_annotation_that_is_no_property_is_refused_by_name(key, value):
    with pytest.raises(CommandError, match=rf"annotations: 'org\.systemd\.property\.{key}'"):
        annotated({f"org.systemd.property.{key}": value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("Slice", "'a.slice'"), ("PIDs", "@au [1]"), ("Delegate", "false"), ("ControlGroup", "'/'")]
    + [(name, "[('/bin/sh', ['sh'], false)]") for name in ("ExecStart", "ExecStopPost", "ExecCondition")]
    + [(name, "'reboot-force'") for name in ("SuccessAction", "FailureAction", "StartLimitAction", "JobTimeoutAction")]
    + [(name, "['evil.service']") for name in ("Wants", "Requires", "BindsTo", "Conflicts", "OnFailure", "OnSuccess")]
    + [(name, "['evil.service']") for name in ("Upholds", "PropagatesStopTo", "RequiresMountsFor", "PartOf")]
    + [("DevicePolicy", "'auto'"), ("DeviceAllow", "@a(ss) [('/dev/sda', 'rwm')]"), ("IPAddressAllow", "[]")]
    + [("BPFProgram", "@a(ss) []"), ("User", "'root'"), ("Environment", "['A=B']"), ("ManagedOOMPreference", "'omit'")]
    + [("Sec", "5"), ("killsignal", "9"), ("KILLSIGNAL", "9"), ("AllowedCPUsSec", "1"), ("NotYetInvented", "1")],
)
def test_cve_2024_3154_a_property_that_does_more_than_limit_or_stop_is_refused_by_name(name, value):
    key = f"org.systemd.property.{name}"
    with pytest.raises(CommandError, match=rf"^annotations: '{key}': it is not for an annotation to set$"):
        annotated({key: value})


def test_who_does_not_ask_systemd_loads_nothing_of_it():
    loads = (
        "import sys; from corral.runtime import control, create, execute, making, remove, start; print(*sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", loads], capture_output=True, text=True, check=True)
    loaded = run.stdout.split()
    assert "corral.runtime.groups" in loaded
    assert not [name for name in loaded if "dbus" in name or "systemd" in name or name == "corral.runtime.units"]
