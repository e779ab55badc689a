"""What the runtime core can do, as runtime-spec's features document.

It is about this code and not about this kernel. Source: OCI runtime-spec features.md, features-linux.md.
"""

from typing import get_args

from corral.kernel.capabilities import NAMES
from corral.kernel.namespaces import Kind
from corral.kernel.seccomp import rules
from corral.oci import OCI_VERSION
from corral.oci.decode import Choice
from corral.oci.mount_options import known
from corral.oci.scheduling import MemoryPolicyFlag, MemoryPolicyMode
from corral.oci.seccomp import KNOWN_ARCHITECTURES
from corral.oci.spec import HOOK_POINTS, Action, Operator


def features_document() -> dict[str, object]:
    """The JSON object."""
    return {
        "ociVersionMin": "1.0.0",
        "ociVersionMax": OCI_VERSION,
        "hooks": list(HOOK_POINTS.values()),
        "mountOptions": sorted(known()),
        "linux": {
            "namespaces": sorted(kind.value for kind in Kind),
            "capabilities": [f"CAP_{name}" for name in NAMES],
            "cgroup": {"v1": True, "v2": True, "systemd": True, "systemdUser": True, "rdma": True},
            "seccomp": {
                "enabled": True,
                "actions": [action.value for action in Action],
                "operators": [operator.value for operator in Operator],
                "archs": sorted(KNOWN_ARCHITECTURES),
                "knownFlags": sorted(rules.FLAGS),
                "supportedFlags": sorted(rules.FLAGS),
            },
            "apparmor": {"enabled": True},
            "selinux": {"enabled": True},
            "memoryPolicy": {"modes": _choices(MemoryPolicyMode), "flags": _choices(MemoryPolicyFlag)},
            "intelRdt": {"enabled": False},
            "mountExtensions": {"idmap": {"enabled": True}},
            "netDevices": {"enabled": True},
        },
        "annotations": {},
        "potentiallyUnsafeConfigAnnotations": ["org.systemd.property."],
    }


def _choices(kind: object) -> list[str]:
    """What a member of config.json may say, whose type is Annotated[str, Choice(…)]."""
    (choice,) = (each for each in get_args(kind) if isinstance(each, Choice))
    return list(choice.values)
