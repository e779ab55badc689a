"""The state of a container as the specification writes it: what hooks and seccomp listeners are told.

Source: OCI runtime-spec runtime.md "State".
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from corral.oci import OCI_VERSION
from corral.oci.decode import JSON

CREATING, CREATED, RUNNING, STOPPED = "creating", "created", "running", "stopped"


@dataclass(frozen=True, slots=True)
class State:
    """Of which container, and where it is in its life; pid is as who is told sees it, 0 for none."""

    id: str
    bundle: str
    annotations: Mapping[str, str] = field(default_factory=dict)
    status: str = CREATING
    pid: int = 0

    def at(self, status: str, pid: int = 0) -> "State":
        """The same container, later."""
        return replace(self, status=status, pid=pid)

    def to_json(self) -> dict[str, JSON]:
        """The JSON object."""
        return {
            "ociVersion": OCI_VERSION,
            "id": self.id,
            "status": self.status,
            "pid": self.pid,
            "bundle": self.bundle,
            "annotations": dict(self.annotations),
        }
