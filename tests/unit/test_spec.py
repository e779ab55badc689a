"""config.json as typed values: what is refused, and with which path."""

import contextlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.kernel.namespaces import Kind
from corral.oci.decode import decode, encode, json_name
from corral.oci.limits import changes_of
from corral.oci.resources import Memory
from corral.oci.spec import Capabilities, Device, DeviceType, Linux, Mount, Namespace, Process, Seccomp, Spec
from corral.oci.validity import LARGEST_NUMBER, number_set

MINIMAL = {"ociVersion": "1.2.0", "process": {"cwd": "/", "args": ["sh"]}}


def with_member(path: str, value: object) -> dict[str, object]:
    """MINIMAL, with the member at a dotted path replaced."""
    spec = json.loads(json.dumps(MINIMAL))
    *parents, last = path.split(".")
    at = spec
    for parent in parents:
        at = at.setdefault(parent, {})
    at[last] = value
    return spec


def test_absent_and_null_are_the_same():
    assert Spec.from_json(with_member("linux", None)) == Spec.from_json(MINIMAL)
    assert Spec.from_json(with_member("process.capabilities", None)).process.capabilities is None


def test_unknown_members_are_ignored():
    spec = with_member("process.someday", {"x": 1}) | {"vm": {}, "windows": []}
    assert Spec.from_json(spec) == Spec.from_json(MINIMAL)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("ociVersion", None, "ociVersion: missing"),
        ("ociVersion", "2.0.0", "ociVersion: '2.0.0'"),
        ("ociVersion", 1, "ociVersion: must be a string, not int"),
        ("process.cwd", "tmp", "process.cwd: 'tmp' is not an absolute path"),
        ("process.cwd", None, "process.cwd: missing"),
        ("process.args", [], "process.args: names no program"),
        ("process.args", [""], "process.args: names no program"),
        ("process.args", "sh", "process.args: must be an array, not str"),
        ("process.args", ["a", 1], r"process.args\[1\]: must be a string, not int"),
        ("process.args", ["a\0b"], r"process.args\[0\]: holds a NUL character"),
        ("process.env", ["A"], r"process.env\[0\]: 'A' is not NAME=VALUE"),
        ("process.env", ["=x"], r"process.env\[0\]"),
        ("process.terminal", "yes", "process.terminal: must be true or false"),
        ("process.user.uid", -1, "process.user.uid: -1 is not between 0"),
        ("process.user.uid", 2**32 - 1, "process.user.uid: 4294967295 is not between"),
        ("process.user.uid", 2**32, "process.user.uid"),
        ("process.user.uid", True, "process.user.uid: must be an integer, not bool"),
        ("process.user.uid", 0.0, "process.user.uid: must be an integer, not float"),
        ("process.user.additionalGids", [1, -1], r"process.user.additionalGids\[1\]"),
        ("process.oomScoreAdj", 1001, "process.oomScoreAdj"),
        ("process.consoleSize", {"height": 70000, "width": 1}, "process.consoleSize.height"),
        ("process.rlimits", [{"type": "RLIMIT_CORE", "hard": 1}], r"process.rlimits\[0\].soft: missing"),
        ("process.rlimits", [{"type": "RLIMIT_CORE", "hard": 1, "soft": 2}], r"process.rlimits\[0\]: the soft limit 2"),
        ("mounts", [{"type": "tmpfs"}], r"mounts\[0\].destination: missing"),
        ("linux.namespaces", [{"type": "disk"}], r"linux.namespaces\[0\].type: 'disk' is none of"),
        ("linux.namespaces", [{"type": "pid"}, {"type": "pid"}], "linux.namespaces: one type is given twice"),
        ("linux.sysctl", {"a": 1}, "linux.sysctl.a: must be a string"),
        ("linux.seccomp", {"defaultAction": "ALLOW"}, "linux.seccomp.defaultAction: 'ALLOW' is none of"),
        ("annotations", [], "annotations: must be an object, not list"),
        ("process.scheduler", {}, "process.scheduler.policy: missing"),
        ("process.scheduler", {"policy": "SCHED_FAIR"}, "process.scheduler.policy: 'SCHED_FAIR' is none of"),
        ("process.scheduler", {"policy": "SCHED_BATCH", "nice": 20}, "process.scheduler.nice: 20 is not between"),
        ("process.scheduler", {"policy": "SCHED_OTHER", "priority": 1}, "process.scheduler.priority: SCHED_OTHER has"),
        ("process.scheduler", {"policy": "SCHED_RR", "runtime": 1}, "process.scheduler.runtime: SCHED_RR has none"),
        ("process.scheduler", {"policy": "SCHED_RR", "flags": ["X"]}, r"process.scheduler.flags\[0\]: 'X' is none of"),
        ("process.ioPriority", {"class": "IOPRIO_CLASS_BE", "priority": 8}, "process.ioPriority.priority: 8 is not"),
        ("process.ioPriority", {"priority": 1}, "process.ioPriority.class: missing"),
        ("process.execCPUAffinity", {"initial": "0-"}, "process.execCPUAffinity.initial: '0-' is not a list"),
        ("process.execCPUAffinity", {"final": "3-1"}, "process.execCPUAffinity.final: '3-1' is not a range"),
        ("linux.memoryPolicy", {"mode": "MPOL_LOCAL", "nodes": "0"}, "linux.memoryPolicy.nodes: MPOL_LOCAL takes none"),
        ("linux.memoryPolicy", {"mode": "MPOL_BIND"}, "linux.memoryPolicy.nodes: MPOL_BIND needs at least one"),
        ("linux.memoryPolicy", {"mode": "MPOL_BIND", "nodes": "99999"}, "linux.memoryPolicy.nodes: '99999' is not"),
        ("linux.memoryPolicy", {"mode": "MPOL_BIND", "flags": ["A"]}, r"linux.memoryPolicy.flags\[0\]: 'A' is none of"),
        ("linux.personality", {"domain": "BSD"}, "linux.personality.domain: 'BSD' is none of"),
        (
            "linux.personality",
            {"domain": "LINUX", "flags": ["F"]},
            r"linux.personality.flags\[0\]: there is no flag 'F'",
        ),
        ("hooks", {"prestart": [{}]}, r"hooks.prestart\[0\].path: missing"),
        (
            "hooks",
            {"poststart": [{"path": "/x", "env": ["A"]}]},
            r"hooks.poststart\[0\].env\[0\]: 'A' is not NAME=VALUE",
        ),
        ("hooks", {"poststop": [{"path": "bin/x"}]}, r"hooks.poststop\[0\].path: 'bin/x' is not an absolute path"),
        ("hooks", {"createRuntime": [{"path": "/x", "timeout": 0}]}, r"hooks.createRuntime\[0\].timeout: 0 is not"),
        (
            "linux.seccomp",
            {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": [], "action": "SCMP_ACT_LOG"}]},
            r"linux.seccomp.syscalls\[0\].names: names no system call",
        ),
        (
            "linux.seccomp",
            {"defaultAction": "SCMP_ACT_ALLOW", "listenerMetadata": "x"},
            "linux.seccomp.listenerMetadata: must not be set",
        ),
    ],
)
def test_what_is_wrong_is_named(path, value, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Spec.from_json(with_member(path, value))


@pytest.mark.parametrize("value", [None, [], "x", 3])
def test_what_is_no_object_is_refused(value):
    with pytest.raises(ValueError, match=r"config\.json: must be an object"):
        Spec.from_json(value)


def test_values_arrive():
    spec = Spec.from_json(
        with_member("linux.namespaces", [{"type": "network", "path": "/run/n"}, {"type": "mount"}])
        | {"mounts": [{"destination": "/a", "type": "bind", "source": "/b", "options": ["ro"]}]}
    )
    assert spec.linux.namespaces == (Namespace(Kind.NETWORK, "/run/n"), Namespace(Kind.MOUNT))
    assert spec.mounts == (Mount("/a", "bind", "/b", ("ro",)),)


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("oci_version", "ociVersion"),
        ("additional_gids", "additionalGids"),
        ("oom_score_adj", "oomScoreAdj"),
        ("disable_oom_killer", "disableOOMKiller"),
        ("container_id", "containerID"),
        ("value_two", "valueTwo"),
        ("errno_ret", "errnoRet"),
        ("no_new_privileges", "noNewPrivileges"),
    ],
)
def test_names_are_those_of_the_specification(field, name):
    assert json_name(field) == name


@pytest.mark.parametrize(
    ("memory", "checked"),
    [({"limit": 5, "checkBeforeUpdate": True}, True), ({"limit": 5}, False), ({"checkBeforeUpdate": True}, False)],
)
def test_a_limit_of_memory_is_checked_against_what_is_used_if_config_json_says_so(memory, checked):
    resources = Spec.from_json(with_member("linux.resources.memory", memory)).linux.resources
    assert changes_of(resources).memory.check_before_update is checked


def test_encoding_leaves_out_defaults():
    process = Process(cwd="/", args=("sh",), capabilities=Capabilities(bounding=("CAP_KILL",)))
    assert encode(process) == {"cwd": "/", "args": ["sh"], "capabilities": {"bounding": ["CAP_KILL"]}}


def test_members_of_the_process_have_the_specifications_names():
    process = {
        "scheduler": {"policy": "SCHED_DEADLINE", "flags": ["SCHED_FLAG_RECLAIM"], "runtime": 1, "deadline": 2},
        "ioPriority": {"class": "IOPRIO_CLASS_IDLE", "priority": 7},
        "execCPUAffinity": {"initial": "0", "final": "0-1"},
        "commandLine": "for Windows",
        "user": {"username": "for Windows, too"},
    }
    spec = Spec.from_json(with_member("process", {"cwd": "/", "args": ["sh"]} | process))
    assert spec.process.scheduler.runtime == 1
    assert spec.process.io_priority.class_ == "IOPRIO_CLASS_IDLE"
    assert spec.process.exec_cpu_affinity.final == "0-1"
    assert Spec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@given(st.sets(st.integers(0, LARGEST_NUMBER), max_size=20))
def test_a_list_of_numbers_is_read_as_a_set(numbers):
    assert number_set(",".join(map(str, sorted(numbers))), "x") == numbers


def test_a_list_of_numbers_may_hold_ranges():
    assert number_set("0-3, 7,2-4\n", "x") == {0, 1, 2, 3, 4, 7}


@given(st.text("0123456789-, x٣", max_size=12))
def test_a_list_of_numbers_is_a_set_or_a_sentence(text):
    with contextlib.suppress(ValueError):
        number_set(text, "x")


@given(
    st.builds(
        Linux,
        namespaces=st.lists(st.builds(Namespace, st.sampled_from(Kind), st.text("abc/", max_size=5))).map(tuple),
        devices=st.lists(
            st.builds(Device, st.text("/dev", min_size=1), st.sampled_from(DeviceType), st.integers(0, 255))
        ).map(tuple),
        sysctl=st.dictionaries(st.text("net.", min_size=1), st.text("01 ")),
        masked_paths=st.lists(st.text("/proc")).map(tuple),
    )
)
def test_encoding_and_decoding_are_inverse(linux):
    assert decode(Linux, json.loads(json.dumps(encode(linux)))) == linux


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=4),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["ociVersion", "process", "linux", "cwd", "args", "seccomp", "mounts", "user", "uid"]),
                inner,
                max_size=4,
            )
        ),
    )
)
def test_any_json_gives_a_specification_or_a_sentence(value):
    with contextlib.suppress(ValueError):
        Spec.from_json(value)


def test_memory_limits_may_be_unlimited():
    assert decode(Memory, {"limit": -1}).limit == -1


@pytest.mark.skipif(shutil.which("runc") is None, reason="needs the program runc")
def test_what_runc_writes_is_understood(tmp_path: Path):
    subprocess.run(["runc", "spec"], cwd=tmp_path, check=True)
    data = json.loads((tmp_path / "config.json").read_text())
    spec = Spec.from_json(data)
    assert spec.process.args == ("sh",)
    assert Spec.from_json(spec.to_json()) == spec


def test_a_profile_is_hashable():
    """Filters are cached by their profile."""
    profile = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_LOG"}]}
    assert hash(decode(Seccomp, profile)) == hash(decode(Seccomp, profile))
