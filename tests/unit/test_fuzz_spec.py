"""config.json from anybody: a specification, or one sentence that says where it is wrong. Nothing else, ever."""

import json
import math
import re

import pytest
from hypothesis import given
from support.fuzz import fuzz, json_of, junk, one_member, refusal

from corral.oci import blueprint
from corral.oci.limits import changes_of
from corral.oci.program import warnings_of
from corral.oci.spec import Linux, Process, Resources, Spec

PATH = re.compile(r"(config\.json|[a-zA-Z]+)([.\[].*)?: ", re.DOTALL)
"""What a refusal begins with."""

MINIMAL = {"ociVersion": "1.2.0", "root": {"path": "rootfs"}, "process": {"cwd": "/", "args": ["sh"]}}
NAMESPACES = [{"type": "mount"}, {"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}]


def decoded(value: object) -> Spec | None:
    found: list[Spec] = []
    check(refusal(ValueError, lambda: found.append(Spec.from_json(value))))
    return found[0] if found else None


def check(error: ValueError | None) -> None:
    """A refusal begins with a path, and is a sentence of ours."""
    if error is not None:
        assert type(error) is ValueError, repr(error)
        assert PATH.match(str(error)), str(error)


@fuzz(200)
@given(junk)
def test_anything_that_is_json(value: object):
    decoded(value)


@fuzz(250)
@given(json_of(Spec))
def test_what_looks_like_a_specification(value: object):
    decoded(value)


@fuzz(300)
@given(one_member(Spec), one_member(Process), one_member(Linux))
def test_a_specification_survives_being_written_and_read(top: dict, process: dict, linux: dict):
    spec = decoded(MINIMAL | {"process": MINIMAL["process"] | process, "linux": linux} | top)
    if spec is not None:
        assert Spec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@fuzz(600)
@given(one_member(Spec, wrong=0.01), one_member(Process, wrong=0.01), one_member(Linux, wrong=0.01))
def test_what_is_understood_is_planned_or_refused(top: dict, process: dict, linux: dict):
    """All that is computed before a process is made."""
    spec = decoded(
        {"hostname": "box"}
        | MINIMAL
        | {name: value for name, value in top.items() if name not in ("ociVersion", "process", "linux")}
        | {"process": MINIMAL["process"] | process, "linux": {"namespaces": NAMESPACES} | linux}
    )
    if spec is None:
        return

    def plan() -> None:
        planned = blueprint.plan_of(spec, bundle="/nowhere", rootfs=(), user=None, cgroups=[], console_size=None)
        assert all(step.describe() for step in planned.steps)

    check(refusal(ValueError, plan))


@fuzz(200)
@given(json_of(Process))
def test_a_process_of_exec(value: object):
    error = refusal(ValueError, lambda: Process.from_json(value))
    check(error)
    assert error is None or str(error).startswith("process")


@fuzz(200)
@given(one_member(Resources) | json_of(Resources, wrong=0))
def test_limits_are_changes_or_refused(value: dict):
    spec = decoded(MINIMAL | {"linux": {"resources": value}})
    if spec is not None and spec.linux.resources is not None:
        resources = spec.linux.resources
        check(refusal(ValueError, lambda: changes_of(resources)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.0, 1e400, 10**400])
def test_numbers_that_are_none(value: object):
    with pytest.raises(ValueError, match=r"^process\.user\.uid: "):
        Spec.from_json(MINIMAL | {"process": {"cwd": "/", "args": ["sh"], "user": {"uid": value}}})


@pytest.mark.parametrize(
    ("member", "where"),
    [
        ({"hostname": "\ud800"}, "hostname"),
        ({"process": {"cwd": "/", "args": ["sh", "\udbff"]}}, r"process\.args\[1\]"),
        ({"annotations": {"\ud800": ""}}, r"annotations\.\ud800"),
        ({"linux": {"netDevices": {"\ud800": {}}}}, r"linux\.netDevices\.\ud800"),
    ],
)
def test_half_a_character_is_refused_where_it_stands(member: dict, where: str):
    """It has no bytes that the kernel could be given. What stands for a byte that is no UTF-8 has."""
    with pytest.raises(ValueError, match=rf"^{where}: holds half a character"):
        Spec.from_json(MINIMAL | member)
    assert Spec.from_json(MINIMAL | {"hostname": "\udcff"}).hostname == "\udcff"


def test_a_device_whose_name_is_no_utf_8_is_measured_in_bytes():
    spec = Spec.from_json(MINIMAL | {"linux": {"namespaces": NAMESPACES, "netDevices": {"\udcff" * 16: {}}}})
    with pytest.raises(ValueError, match=r"^linux\.netDevices"):
        blueprint.plan_of(spec, bundle="/nowhere", rootfs=(), user=None, cgroups=[], console_size=None)


@pytest.mark.parametrize("name", ["bounding", "effective", "permitted", "inheritable", "ambient"])
def test_an_unknown_capability_is_ignored_with_a_warning(name: str):
    process = MINIMAL["process"] | {"capabilities": {name: ["CAP_KILL", "CAP_FLY"]}}
    spec = Spec.from_json(MINIMAL | {"process": process, "linux": {"namespaces": NAMESPACES}})
    blueprint.plan_of(spec, bundle="/nowhere", rootfs=(), user=None, cgroups=[], console_size=None)
    unknown, *others = warnings_of(spec.process)
    assert unknown == "process.capabilities: 'CAP_FLY': unknown, and ignored"
    assert bool(others) is (name == "ambient"), "that alone is not enough to be ambient"


def test_a_document_that_is_deep():
    value: object = 1
    for _ in range(100_000):
        value = [value]
    with pytest.raises(ValueError, match=r"^mounts\[0\]: must be an object"):
        Spec.from_json(MINIMAL | {"mounts": value})
