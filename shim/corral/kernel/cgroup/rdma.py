"""The rdma controller, the same in v1 and v2.

Source: kernel cgroup-v1/rdma.rst, cgroup-v2.rst "RDMA"; OCI config-linux "RDMA".
"""

from collections.abc import Sequence

from corral.kernel.cgroup import files
from corral.kernel.cgroup.resources import RdmaLimit
from corral.kernel.cgroup.steps import Step, Write

MAX = "rdma.max"


def plan(directory: str, wanted: Sequence[RdmaLimit]) -> list[Step]:
    """The writes that limit RDMA devices, one each."""
    return [_device(f"{directory}/{MAX}", each) for each in wanted]


def _device(path: str, wanted: RdmaLimit) -> Step:
    now = dict(files.nested_keyed(files.read(path))).get(wanted.device, {})
    keys = {"hca_handle": wanted.hca_handles, "hca_object": wanted.hca_objects}
    pairs = [f"{key}={value}" for key, value in keys.items() if value is not None]
    undo = [f"{key}={now.get(key, 'max')}" for key, value in keys.items() if value is not None]
    return Write(path, " ".join([wanted.device, *pairs]), undo=" ".join([wanted.device, *undo]))
