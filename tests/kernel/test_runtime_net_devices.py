"""linux.netDevices: devices of the host move into the container, names and addresses kept or changed as asked."""

import os
import re
import secrets
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.requirements import needs

from corral.kernel import netns
from corral.kernel.namespaces import Kind
from corral.oci.runtime import ExecFailed
from corral.oci.spec import IdMapping, Namespace, NetDevice

pytestmark = needs("root", "overlayfs", "busybox", "netns", "ip")


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def exists(name: str) -> bool:
    return Path("/sys/class/net", name).exists()


@pytest.fixture
def veth() -> Iterator[tuple[str, str]]:
    """Two ends of a cable on the host; the first is to be moved."""
    tag = secrets.token_hex(3)
    ends = f"ct{tag}a", f"ct{tag}b"
    ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
    yield ends
    for end in ends:  # which may just be going, with the namespace of the other
        subprocess.run(["ip", "link", "del", end], check=False, capture_output=True)


def with_devices(spec, **devices: str):
    return replace(spec, linux=replace(spec.linux, net_devices={k: NetDevice(v) for k, v in devices.items()}))


class TestMoving:
    def test_a_device_keeps_its_name_addresses_and_mtu_and_is_up(self, lab, veth):
        end, peer = veth
        ip("link", "set", end, "mtu", "1400", "address", "02:11:22:33:44:55", "up")
        ip("link", "set", peer, "up")
        ip("address", "add", "198.51.100.7/24", "dev", end)
        ip("address", "add", "198.51.100.8/32", "dev", end)
        ip("address", "add", "2001:db8:77::7/64", "dev", end, "nodad")
        seen = lab.run_spec(with_devices(lab.spec(f"ip addr show {end}; ip route"), **{end: ""})).output
        assert "mtu 1400" in seen
        assert "02:11:22:33:44:55" in seen
        assert re.search(r"<[A-Z,_]*\bUP\b", seen)
        for address in ("198.51.100.7/24", "198.51.100.8/32", "2001:db8:77::7/64"):
            assert f" {address} scope global" in seen or f" {address} brd" in seen
        assert "198.51.100.0/24 dev" in seen

    def test_however_many_addresses_it_has(self, lab, veth):
        """More of them than fit into one message, or all messages, that a socket takes at a time."""
        end, count = veth[0], 3000
        commands = [f"address add 2001:db8:77::{n:x}/64 dev {end} nodad" for n in range(1, count + 1)]
        subprocess.run(["ip", "-batch", "-"], check=True, input="\n".join(commands), text=True)
        spec = with_devices(lab.spec(f"ip -6 addr show {end} | grep -c 2001:db8:77"), **{end: ""})
        assert lab.run_spec(spec).output == f"{count}\n"

    def test_it_is_gone_from_the_host(self, lab, veth):
        container = lab.create(with_devices(lab.spec("sleep", "60"), **{veth[0]: ""}))
        container.start()
        assert not exists(veth[0])
        assert exists(veth[1])

    def test_link_local_and_dynamic_addresses_stay_behind(self, lab, veth):
        end, _ = veth
        ip("link", "set", end, "up")
        ip("address", "add", "169.254.9.9/16", "dev", end, "scope", "link")
        ip("address", "add", "198.51.100.9/24", "dev", end, "valid_lft", "500", "preferred_lft", "500")
        seen = lab.run_spec(with_devices(lab.spec(f"ip addr show {end}"), **{end: ""})).output
        assert "169.254.9.9" not in seen
        assert "198.51.100.9" not in seen

    def test_a_new_name(self, lab, veth):
        ip("address", "add", "198.51.100.7/24", "dev", veth[0])
        seen = lab.run_spec(with_devices(lab.spec("ip addr show inner0"), **{veth[0]: "inner0"})).output
        assert "198.51.100.7/24" in seen

    def test_a_name_that_the_kernel_numbers(self, lab, veth):
        ip("address", "add", "198.51.100.7/24", "dev", veth[0])
        ip("address", "add", "198.51.100.8/24", "dev", veth[1])
        devices = {veth[0]: "eth%d", veth[1]: "eth%d"}
        seen = lab.run_spec(with_devices(lab.spec("ip -o addr show"), **devices)).output
        assert re.search(r"eth0\s.*198\.51\.100\.7/24", seen)
        assert re.search(r"eth1\s.*198\.51\.100\.8/24", seen)

    def test_into_a_network_that_is_joined(self, lab, veth):
        path = lab.directory / "netns"
        netns.create_pinned(path)
        try:
            spec = with_devices(lab.spec(f"ip link show {veth[0]}"), **{veth[0]: ""})
            kinds = tuple(Namespace(n.type, str(path)) if n.type is Kind.NETWORK else n for n in spec.linux.namespaces)
            seen = lab.run_spec(replace(spec, linux=replace(spec.linux, namespaces=kinds))).output
            assert veth[0] in seen
        finally:
            netns.remove_pinned(path)

    def test_into_a_user_namespace(self, lab, veth):
        os.chown(lab.upper, 300000, 300000)
        ip("address", "add", "198.51.100.7/24", "dev", veth[0])
        spec = with_devices(lab.spec("ip addr show inner0"), **{veth[0]: "inner0"})
        mapping = (IdMapping(0, 300000, 65536),)
        kinds = (*spec.linux.namespaces, Namespace(Kind.USER))
        linux = replace(spec.linux, namespaces=kinds, uid_mappings=mapping, gid_mappings=mapping)
        assert "198.51.100.7/24" in lab.run_spec(replace(spec, linux=linux)).output


class TestRefused:
    def test_one_that_the_host_has_not(self, lab):
        with pytest.raises(ExecFailed, match=r"^linux\.netDevices\.nowhere0: the host has no such"):
            lab.create(with_devices(lab.spec("true"), nowhere0=""))

    def test_a_name_that_is_taken_and_then_nothing_was_moved(self, lab, veth):
        with pytest.raises(
            ExecFailed, match=rf"^linux\.netDevices\.{veth[0]}: the container has a device 'lo' already"
        ):
            lab.create(with_devices(lab.spec("true"), **{veth[1]: "fine0", veth[0]: "lo"}))
        assert exists(veth[0])
        assert exists(veth[1])

    def test_one_that_can_not_leave(self, lab):
        with pytest.raises(ExecFailed, match=r"^linux\.netDevices\.lo: it can't be moved"):
            lab.create(with_devices(lab.spec("true"), lo="lo1"))
