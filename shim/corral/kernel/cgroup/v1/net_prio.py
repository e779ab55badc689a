"""The v1 net_prio controller. v2 has none.

Source: kernel cgroup-v1/net_prio.rst; OCI config-linux "Network".
"""

from corral.kernel.cgroup import files
from corral.kernel.cgroup.resources import NetworkMarks
from corral.kernel.cgroup.steps import Step, Write, invalid

MAP = "net_prio.ifpriomap"


def plan(directory: str, wanted: NetworkMarks) -> list[Step]:
    """A write for each interface; the file shows all of them, and takes one at a time."""
    path = f"{directory}/{MAP}"
    now = files.flat_keyed(files.read(path))
    steps: list[Step] = []
    for name, priority in wanted.priorities:
        if name not in now:
            raise invalid(path, f"the host has no network interface {name!r}")
        steps.append(Write(path, f"{name} {priority}", undo=f"{name} {now[name]}"))
    return steps
