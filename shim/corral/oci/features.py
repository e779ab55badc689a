"""What the runtime core can do, as runtime-spec's features document. Source: OCI runtime-spec features.md."""

from corral.kernel.capabilities import NAMES
from corral.kernel.namespaces import Kind
from corral.kernel.seccomp import Architecture, rules
from corral.oci.mount_options import known
from corral.oci.spec import Action, Operator

OCI_VERSION_MIN, OCI_VERSION_MAX = "1.0.0", "1.2.0"
_NOT_YET = (Kind.USER, Kind.TIME)


def features_document() -> dict[str, object]:
    """The JSON object."""
    return {
        "ociVersionMin": OCI_VERSION_MIN,
        "ociVersionMax": OCI_VERSION_MAX,
        "hooks": [],
        "mountOptions": sorted(known()),
        "linux": {
            "namespaces": sorted(kind.value for kind in Kind if kind not in _NOT_YET),
            "capabilities": [f"CAP_{name}" for name in NAMES],
            "cgroup": {"v1": True, "v2": True, "systemd": False, "systemdUser": False, "rdma": True},
            "seccomp": {
                "enabled": True,
                "actions": [action.value for action in Action if action is not Action.NOTIFY],
                "operators": [operator.value for operator in Operator],
                "archs": sorted(f"SCMP_ARCH_{architecture.name}" for architecture in Architecture),
                "knownFlags": sorted(rules.FLAGS),
                "supportedFlags": sorted(rules.FLAGS),
            },
            "apparmor": {"enabled": False},
            "selinux": {"enabled": False},
            "intelRdt": {"enabled": False},
            "mountExtensions": {"idmap": {"enabled": False}},
        },
        "annotations": {},
    }
