"""What a shim is asked for, in its own terms."""

from corral.shim.requests import Create


def test_a_cgroup_has_one_name() -> None:
    """By which whoever is below it is known."""
    fields = {"rootfs": [], "log": {"driver": "none"}, "cgroup": {"paths": ["/sys/fs/cgroup//cpu/x/", "/y/./z"]}}
    assert Create.parse(fields).cgroup_paths == ("/sys/fs/cgroup/cpu/x", "/y/z")
