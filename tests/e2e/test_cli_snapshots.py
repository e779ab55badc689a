"""`corral snapshot`."""

import json

from support.corrald import Corrald
from support.requirements import needs

from corral.images.drivers.places import kernel_has
from corral.kernel.device_mapper import why_none

pytestmark = needs("root", "overlayfs", "busybox", "netns")


def test_a_container_has_a_tree_on_the_layers_of_its_image(box: Corrald, name: str) -> None:
    box.corral("create", "--name", name, "--network", "none", "busybox", check=True)
    key = json.loads(box.corral("inspect", name, check=True).stdout)[0]["snapshot_key"]
    listed = box.corral("snapshot", "ls", check=True).stdout.decode()
    [line] = [line for line in listed.splitlines() if line.startswith(key[:12])]
    parent = line.split()[1]
    assert line.split()[2:4] == ["active", "overlayfs"]
    [base] = [line for line in listed.splitlines() if line.startswith(parent)]
    assert "committed" in base
    facts = json.loads(box.corral("snapshot", "inspect", key, check=True).stdout)[0]
    assert facts["parent"].startswith(f"sha256:{parent}")
    [mount] = json.loads(box.corral("snapshot", "mounts", key, check=True).stdout)
    assert mount["type"] == "overlay"
    assert box.corral("snapshot", "usage", key, check=True).stdout.decode().splitlines()[1].split() == [key, "0B", "0"]
    refused = box.corral("snapshot", "rm", facts["parent"])
    assert refused.returncode == 1
    assert "no snapshot" in refused.stderr.decode() or "lies on it" in refused.stderr.decode()


def test_drivers_are_told_with_the_reason_why_one_cannot_run(box: Corrald) -> None:
    drivers = [json.loads(line) for line in box.corral("snapshot", "drivers", "--format", "json").stdout.splitlines()]
    by_name = {driver["name"]: driver for driver in drivers}
    assert by_name["overlayfs"] == {"name": "overlayfs", "usable": True, "reason": "", "is_default": True}
    assert by_name["native"]["usable"]
    assert not by_name["btrfs"]["usable"]
    assert by_name["aufs"]["usable"] == kernel_has("aufs")
    assert kernel_has("aufs") or by_name["aufs"]["reason"].startswith("this kernel has no aufs: ")
    if reason := why_none("thin-pool"):
        assert not by_name["devicemapper"]["usable"]
        assert by_name["devicemapper"]["reason"].startswith(reason)
        assert "/dev/mapper/control" in reason or "no target thin-pool" in reason
    table = box.corral("snapshot", "drivers", check=True).stdout.decode()
    assert "does not lie on btrfs but on" in table
