"""The pids controller, the same in v1 and v2.

Source: kernel cgroup-v1/pids.rst, cgroup-v2.rst "PID"; OCI config-linux "PIDs".
"""

from corral.kernel.cgroup import files
from corral.kernel.cgroup.resources import PidsLimits
from corral.kernel.cgroup.stats import PidsStats
from corral.kernel.cgroup.steps import Step, Write, check_limit

MAX = "pids.max"
CURRENT = "pids.current"


def plan(directory: str, wanted: PidsLimits) -> list[Step]:
    """The write that limits a cgroup's processes and threads."""
    if wanted.limit is None:
        return []
    path = f"{directory}/{MAX}"
    check_limit(path, wanted.limit, what="the pids limit")
    return [Write(path, files.limit(wanted.limit))]


def limit(directory: str) -> int:
    """How many there may be."""
    return files.read_number(f"{directory}/{MAX}")


def read(directory: str) -> PidsStats:
    """How many there are and may be."""
    return PidsStats(files.read_count(f"{directory}/{CURRENT}"), files.read_number(f"{directory}/{MAX}"))
