"""exec into a container that has divided its v2 cgroup, as systemd in it does: no process is taken there any more."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.ocicommand import Runtime, runtime_in
from support.requirements import lacking, needs

from corral.kernel.cgroup import detect, hugepages

pytestmark = needs("root", "busybox", "cgroup")


@pytest.fixture
def oci(tmp_path: Path) -> Iterator[Runtime]:
    with runtime_in(tmp_path) as runtime:
        yield runtime


@pytest.fixture
def own(oci: Runtime) -> Path:
    """The v2 cgroup of a container, which may turn on a controller that is not for threads."""
    unified = None if lacking("cgroup") else detect().unified
    if unified is None or "hugetlb" not in unified.controllers or not hugepages.sizes():
        pytest.skip("needs the hugetlb controller on cgroup v2")
    name = oci.new_id()
    spec = oci.spec("sleep", "1000")
    spec["linux"]["resources"]["hugepageLimits"] = [  # type: ignore[index]
        {"pageSize": hugepages.sizes()[0], "limit": 2**30}
    ]
    oci.write_spec(spec)
    oci.detached("run", "--detach", name)
    return Path(f"{unified.mount_point}/corral-oci/{name}")


def divide(own: Path, inner: Path, pid: object) -> None:
    """As init may: move elsewhere, and give a controller to what is below."""
    inner.mkdir()
    (inner / "cgroup.procs").write_text(str(pid))
    (own / "cgroup.subtree_control").write_text("+hugetlb")


def pids(cgroup: Path) -> list[str]:
    return (cgroup / "cgroup.procs").read_text().split()


def test_it_joins_init_where_that_is_below_the_containers_cgroup(oci: Runtime, own: Path) -> None:
    divide(own, own / "init.scope", oci.state(own.name)["pid"])
    oci.detached("exec", "--detach", own.name, "sleep", "1000")
    assert len(pids(own / "init.scope")) == 2


def test_it_joins_init_nowhere_else(oci: Runtime, own: Path) -> None:
    outside = own.with_name(f"{own.name}-outside")
    pid = oci.state(own.name)["pid"]
    divide(own, outside, pid)
    try:
        refused = oci.call("exec", own.name, "true")
        assert refused.returncode == 255
        assert "busy" in refused.stderr
        assert pids(outside) == [str(pid)]
    finally:
        oci.ok("kill", own.name, "KILL")
        while pids(outside):
            pass
        outside.rmdir()


def test_it_joins_none_but_the_cgroup_that_is_asked_for(oci: Runtime, own: Path) -> None:
    divide(own, own / "init.scope", oci.state(own.name)["pid"])
    refused = oci.call("exec", "--cgroup", "/", own.name, "true")
    assert refused.returncode == 255
    assert "busy" in refused.stderr


def test_it_waits_for_no_init_that_is_frozen(oci: Runtime, own: Path) -> None:
    inner = own / "init.scope"
    divide(own, inner, oci.state(own.name)["pid"])
    (inner / "cgroup.freeze").write_text("1")
    while "frozen 1" not in (inner / "cgroup.events").read_text():
        pass
    refused = oci.call("exec", own.name, "true")
    assert refused.returncode == 255
    assert "paused" in refused.stderr
    assert len(pids(inner)) == 1
