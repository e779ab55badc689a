"""The stand-in for dataclasses does what the standard module does, for what the core uses of it."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from corral.runtime.standins import dataclasses as records

REPO = Path(__file__).resolve().parents[2]
SOURCE = '''
@dataclass(frozen=True, slots=True, order=True)
class Point:
    """A point."""
    x: int
    y: int = 2
    def norm(self):
        return self.x + self.y

@dataclass(slots=True)
class Box:
    corner: Point
    names: list = field(default_factory=list)
    label: str = field(default="box")
    @property
    def area(self):
        return self.corner.norm()

@dataclass(frozen=True, slots=True)
class Named(Point):
    name: str = "p"
    def norm(self):
        return self.x + self.y + 1
'''


RICH = {
    "ociVersion": "1.2.0",
    "process": {
        "cwd": "/", "args": ["a"], "consoleSize": {"height": 1, "width": 2}, "oomScoreAdj": -5, "ioPriority": None,
        "user": {"uid": 1, "umask": 18, "additionalGids": [3, 4]},
        "scheduler": {"policy": "SCHED_BATCH", "flags": ["SCHED_FLAG_RESET_ON_FORK"]},
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 1, "hard": 2**64 - 1}],
    },
    "annotations": {"a": "b"},
    "hooks": {"poststop": [{"path": "/bin/true", "args": ["true"], "timeout": 3}]},
    "linux": {
        "sysctl": {"net.ipv4.ip_forward": "1"},
        "namespaces": [{"type": "network", "path": "/proc/1/ns/net"}],
        "uidMappings": [{"containerID": 0, "hostID": 1000, "size": 1}],
        "devices": [{"path": "/dev/x", "type": "c", "major": 1, "minor": 3, "fileMode": 438}],
        "resources": {
            "devices": [{"allow": True, "type": "c", "major": 1, "access": "rw"}],
            "memory": {"limit": 2**30, "swap": -1}, "cpu": {"shares": 100, "cpus": "0"}, "unified": {"a.b": "c"},
            "blockIO": {"throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 1}]},
        },
        "seccomp": {
            "defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [
                {"names": ["read"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 1, "value": 2, "op": "SCMP_CMP_EQ"}]}
            ],
        },
    },
}  # fmt: skip
"""Something of every kind that an annotation can tell."""
WRONG = [
    {"root": {}},
    {"process": {"cwd": "/", "user": {"uid": -1}}},
    {"process": {"cwd": "/", "user": {"umask": "x"}}},
    {"process": {"cwd": "/", "scheduler": {"policy": "SCHED_NONE"}}},
    {"linux": {"namespaces": [{"type": "none"}]}},
    {"linux": {"sysctl": {"a": 1}}},
]


@pytest.fixture(params=[dataclasses, records], ids=["standard", "ours"])
def classes(request: pytest.FixtureRequest) -> dict[str, type]:
    """The classes above, made by one of the two modules; each test must hold for both."""
    module: ModuleType = request.param
    names: dict[str, object] = {"dataclass": module.dataclass, "field": module.field, "module": module}
    names["__name__"] = "sample"
    exec(SOURCE, names)
    return names  # type: ignore[return-value]


def test_arguments_defaults_and_factories(classes) -> None:
    point, box = classes["Point"], classes["Box"]
    assert (point(1).x, point(1).y, point(1, y=5).y, point(x=3).norm()) == (1, 2, 5, 5)
    assert box(point(1)).names == []
    assert box(point(1)).names is not box(point(1)).names
    assert (box(point(1)).label, box(point(1)).area) == ("box", 3)
    for wrong in ({}, {"x": 1, "z": 2}):
        with pytest.raises(TypeError):
            point(**wrong)
    with pytest.raises(TypeError):
        point(1, x=1)
    with pytest.raises(TypeError):
        point(1, 2, 3)


def test_an_argument_that_nobody_knows_is_refused(classes) -> None:
    with pytest.raises(TypeError, match="eqq"):

        @classes["dataclass"](eqq=False)
        class _Wrong:
            x: int


def test_frozen_ones_are_so_and_can_be_keys(classes) -> None:
    point = classes["Point"](1)
    with pytest.raises(AttributeError):
        point.x = 2
    with pytest.raises(AttributeError):
        del point.x
    assert {point: 1}[classes["Point"](1)] == 1
    with pytest.raises(TypeError):
        hash(classes["Box"](point))


def test_equality_order_and_text(classes) -> None:
    point, named = classes["Point"], classes["Named"]
    assert point(1) == point(1, 2) != point(2)
    assert point(1) != named(1)
    assert sorted([point(2), point(1, 3), point(1)]) == [point(1), point(1, 3), point(2)]
    assert repr(point(1)) == "Point(x=1, y=2)"


def test_inheritance(classes) -> None:
    named = classes["Named"](1, name="n")
    assert (named.x, named.y, named.name, named.norm()) == (1, 2, "n", 4)


def test_replace_and_fields(classes) -> None:
    module = classes["module"]
    point = classes["Point"](1)
    assert module.replace(point, y=9) == classes["Point"](1, 9)
    assert [f.name for f in module.fields(point)] == ["x", "y"]
    assert module.fields(classes["Box"])[1].default is module.MISSING
    assert module.is_dataclass(point)
    assert module.is_dataclass(classes["Box"])
    assert not module.is_dataclass(3)


def test_the_core_reads_and_writes_a_specification_the_same_with_ours() -> None:
    program = (
        "import sys, json; sys.path.insert(0, sys.argv[1])\n"
        "if sys.argv[2] == 'ours':\n"
        "    from corral.runtime import standins; standins.install()\n"
        "from corral.oci.spec import Spec\n"
        "from corral.runtime.template import default_spec, rootless_spec\n"
        "for value in (default_spec(), rootless_spec(1, 2), json.loads(sys.argv[3])):\n"
        "    spec = Spec.from_json(value); print(spec); print(json.dumps(spec.to_json()))\n"
        "for wrong in json.loads(sys.argv[4]):\n"
        "    try:\n        Spec.from_json({'ociVersion': '1.0.0', **wrong})\n"
        "    except ValueError as e:\n        print(e)\n"
        "print('inspect' in sys.modules, 'standins' in sys.modules['typing'].__file__, file=sys.stderr)\n"
    )
    results = [
        subprocess.run(
            [sys.executable, "-IS", "-c", program, str(REPO / "shim"), which, json.dumps(RICH), json.dumps(WRONG)],
            capture_output=True, text=True, check=True,
        )
        for which in ("standard", "ours")
    ]  # fmt: skip
    assert results[0].stdout == results[1].stdout
    assert results[1].stderr == "False True\n"
