"""linux.resources.network: the class and the priorities of packets, which only controllers of cgroup v1 know."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.ocicommand import Runtime, runtime_in, wait_until
from support.requirements import needs

from corral.kernel.cgroup import detect

pytestmark = needs("root", "busybox", "cgroup", "unshare")

IFACE = "lo"


@pytest.fixture
def oci(tmp_path: Path) -> Iterator[Runtime]:
    with runtime_in(tmp_path) as runtime:
        yield runtime


def write(oci: Runtime, network: dict[str, object]) -> None:
    spec = oci.spec("sleep", "1000")
    linux = spec["linux"]
    assert isinstance(linux, dict)
    linux["resources"]["network"] = network
    spec["mounts"] = [each for each in spec["mounts"] if each["type"] != "cgroup"]  # type: ignore[attr-defined]
    oci.write_spec(spec)


def with_controllers(oci: Runtime, *commands: str) -> str:
    """What commands say where the controllers are mounted, which is nowhere but for them."""
    place = oci.directory / "net"
    place.mkdir(exist_ok=True)
    mount = f"mount -t cgroup -o net_cls,net_prio corral {place} || exit 77"
    clean = "rmdir $net/corral-oci 2> /dev/null; true"
    script = f"oci='{' '.join(oci.words())}'; net={place}; {mount}; {'; '.join(commands)}; {clean}"
    result = subprocess.run(
        ["unshare", "-m", "sh", "-c", script], cwd=oci.bundle, capture_output=True, text=True, check=False, timeout=60
    )
    end_hierarchy(place)
    if result.returncode == 77:
        pytest.skip("needs the cgroup v1 controllers net_cls and net_prio")
    return result.stdout + result.stderr


def end_hierarchy(place: Path) -> None:
    """A hierarchy whose cgroups are not quite gone when it is unmounted stays, and containerd's shim finds no mount of
    it: it ends with a later mount.
    """
    script = f"mount -t cgroup -o net_cls,net_prio corral {place}; rmdir {place}/corral-oci 2> /dev/null"

    def has_ended() -> bool:
        if "net_cls" not in Path("/proc/self/cgroup").read_text():
            return True
        subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True, check=False)
        return False

    wait_until(has_ended)


def test_the_class_and_the_priorities_are_those_asked_for(oci: Runtime) -> None:
    name = oci.new_id()
    write(oci, {"classID": 0x10002, "priorities": [{"name": IFACE, "priority": 5}]})
    (oci.directory / "more").write_text(json.dumps({"network": {"priorities": [{"name": IFACE, "priority": 6}]}}))
    (oci.directory / "bad").write_text(
        json.dumps({"network": {"classID": 1, "priorities": [{"name": IFACE, "priority": 7}, {"name": "none0"}]}})
    )
    own = f"$net/corral-oci/{name}"
    look = f"cat {own}/net_cls.classid; grep '^{IFACE} ' {own}/net_prio.ifpriomap; wc -l < {own}/tasks"
    output = with_controllers(
        oci,
        f"$oci create {name} < /dev/null > $net/../log 2>&1 || cat $net/../log",
        look,
        f"$oci update --resources {oci.directory}/more {name}",
        look,
        f"$oci update --resources {oci.directory}/bad {name}",
        f"$oci delete --force {name}",
    )
    lines = output.splitlines()
    assert lines[:6] == ["65538", f"{IFACE} 5", "1", "65538", f"{IFACE} 6", "1"], output
    assert "priorities[1].priority: missing" in lines[6]


def test_an_interface_that_the_host_lacks_is_refused_by_name(oci: Runtime) -> None:
    write(oci, {"priorities": [{"name": "none0", "priority": 5}]})
    assert "the host has no network interface 'none0'" in with_controllers(oci, f"$oci create {oci.new_id()}")


@pytest.mark.parametrize(
    ("network", "controller"),
    [({"classID": 1}, "net_cls"), ({"priorities": [{"name": IFACE, "priority": 1}]}, "net_prio")],
)
def test_they_are_refused_by_name_where_their_controller_is_not_mounted(
    oci: Runtime, network: dict[str, object], controller: str
) -> None:
    if detect().of(controller) is not None:
        pytest.skip(f"needs a host without the cgroup controller {controller}")
    write(oci, network)
    result = oci.call("create", oci.new_id())
    assert result.returncode == 1
    assert controller in result.stderr
    assert oci.ok("list", "-q") == ""


def test_class_0_is_none(oci: Runtime) -> None:
    name = oci.new_id()
    write(oci, {"classID": 0, "priorities": []})
    oci.detached("create", name)
