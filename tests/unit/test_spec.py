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
from corral.oci.spec import Capabilities, Device, DeviceType, Linux, Memory, Mount, Namespace, Process, Seccomp, Spec

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
        ("mounts", [{"type": "tmpfs"}], r"mounts\[0\].destination: missing"),
        ("linux.namespaces", [{"type": "disk"}], r"linux.namespaces\[0\].type: 'disk' is none of"),
        ("linux.namespaces", [{"type": "pid"}, {"type": "pid"}], "linux.namespaces: one type is given twice"),
        ("linux.sysctl", {"a": 1}, "linux.sysctl.a: must be a string"),
        ("linux.seccomp", {"defaultAction": "ALLOW"}, "linux.seccomp.defaultAction: 'ALLOW' is none of"),
        ("annotations", [], "annotations: must be an object, not list"),
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


def test_encoding_leaves_out_defaults():
    process = Process(cwd="/", args=("sh",), capabilities=Capabilities(bounding=("CAP_KILL",)))
    assert encode(process) == {"cwd": "/", "args": ["sh"], "capabilities": {"bounding": ["CAP_KILL"]}}


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
