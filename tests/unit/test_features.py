"""The features document says what config.json may ask for, and no more."""

import json

import pytest

from corral.kernel.dbus.marshalling import Variant
from corral.kernel.namespaces import Kind
from corral.oci import defaults
from corral.oci.blueprint import plan_of
from corral.oci.features import features_document
from corral.oci.seccomp import filter_of
from corral.oci.spec import Spec
from corral.oci.support import check_spec
from corral.runtime.annotations import ANNOTATION, annotated

FEATURES = json.loads(json.dumps(features_document()))


def spec_with(**linux: object) -> Spec:
    namespaces = [{"type": "mount"}, {"type": "uts"}]
    process = {"cwd": "/", "args": ["sh"]}
    return Spec.from_json(
        {
            "ociVersion": FEATURES["ociVersionMax"],
            "process": process,
            "root": {"path": "rootfs"},
            "linux": {"namespaces": namespaces} | linux,
        }
    )


def test_names_every_hook_point():
    hooks = {name: [{"path": "/bin/true"}] for name in FEATURES["hooks"]}
    spec = Spec.from_json({"ociVersion": FEATURES["ociVersionMin"], "hooks": hooks})
    assert all(getattr(spec.hooks, name) for name in spec.hooks.__dataclass_fields__)


@pytest.mark.parametrize("name", FEATURES["linux"]["namespaces"])
def test_what_is_listed_of_namespaces_is_known(name):
    assert Kind(name)


@pytest.mark.parametrize("action", FEATURES["linux"]["seccomp"]["actions"])
@pytest.mark.parametrize("operator", FEATURES["linux"]["seccomp"]["operators"])
def test_what_is_listed_of_seccomp_is_honoured(action, operator):
    seccomp = FEATURES["linux"]["seccomp"]
    rule = {"names": ["mkdir"], "action": action, "args": [{"index": 0, "value": 1, "op": operator}]}
    profile = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": seccomp["archs"],
        "flags": seccomp["supportedFlags"],
        "listenerPath": "/run/listener",
        "syscalls": [rule],
    }
    assert filter_of(spec_with(seccomp=profile).linux.seccomp).instructions


@pytest.mark.parametrize("mode", FEATURES["linux"]["memoryPolicy"]["modes"])
def test_what_is_listed_of_memory_policies_is_honoured(mode):
    nodes = "" if mode in ("MPOL_DEFAULT", "MPOL_LOCAL") else "0"
    policy = {"mode": mode, "nodes": nodes, "flags": FEATURES["linux"]["memoryPolicy"]["flags"]}
    spec = spec_with(memoryPolicy=policy)
    plan = plan_of(spec, bundle="/", rootfs=(), user=None, cgroups=(), console_size=None)
    assert plan.program.allotment is not None


def test_what_is_not_there_is_refused():
    assert FEATURES["linux"]["intelRdt"] == {"enabled": False}
    with pytest.raises(ValueError, match=r"^linux\.intelRdt: "):
        check_spec(spec_with(intelRdt={"closID": "guaranteed"}))


def test_the_default_capabilities_are_known():
    assert set(defaults.CAPABILITIES) <= set(FEATURES["linux"]["capabilities"])


def test_annotations_change_properties_of_systemd_units_and_nothing_else():
    assert FEATURES["potentiallyUnsafeConfigAnnotations"] == [ANNOTATION]
    assert annotated({f"{ANNOTATION}KillSignal": "37", "bundle": "/elsewhere"}) == [("KillSignal", Variant("i", 37))]
