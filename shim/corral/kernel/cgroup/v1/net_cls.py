"""The v1 net_cls controller. v2 has none: there, packets are told apart by the path of their cgroup.

Source: kernel cgroup-v1/net_cls.rst; OCI config-linux "Network".
"""

from corral.kernel.cgroup.resources import NetworkMarks
from corral.kernel.cgroup.steps import Step, Write

CLASS = "net_cls.classid"


def plan(directory: str, wanted: NetworkMarks) -> list[Step]:
    """The write that gives packets their class."""
    return [Write(f"{directory}/{CLASS}", str(wanted.class_id))]
