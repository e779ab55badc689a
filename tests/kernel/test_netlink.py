"""The network leaf's netlink against the kernel, checked with iproute2."""

import contextlib
import errno
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from support.requirements import needs

from corral.kernel.netns import create_pinned, in_namespace, remove_pinned
from corral.network.links import BridgePlan, InterfacePlan, Owner, Route
from corral.network.netlink import Netlink

pytestmark = needs("root", "netns", "nsenter", "ip")
OWNER = Owner("crlborn", "whose it is")
BRIDGE_ADDRESSES = [(ip_address("10.231.0.1"), 24), (ip_address("fd00::1"), 64)]
BRIDGE = BridgePlan("br0", "02:00:00:00:00:07", 1400, BRIDGE_ADDRESSES, OWNER)
VETH = InterfacePlan(
    name="eth0",
    host_name="v0",
    bridge="br0",
    mac="02:00:00:00:00:08",
    mtu=1400,
    addresses=[(ip_address("10.231.0.2"), 24), (ip_address("fd00::2"), 64)],
    gateways=[ip_address("10.231.0.1"), ip_address("fd00::1")],
)


@pytest.fixture
def spaces() -> Iterator[tuple[Path, Path]]:
    """Two network namespaces."""
    paths = Path(f"/tmp/corral-nl1-{os.getpid()}"), Path(f"/tmp/corral-nl2-{os.getpid()}")
    for path in paths:
        create_pinned(path)
    yield paths
    for path in paths:
        remove_pinned(path)


def speak[T](path: Path, work: Callable[[Netlink], T]) -> T:
    """Run work with a Netlink inside a namespace."""

    def inside() -> T:
        with contextlib.closing(Netlink()) as netlink:
            return work(netlink)

    return in_namespace(path, inside)


def ip(path: Path, *arguments: str) -> list[dict[str, object]]:
    result = subprocess.run(["nsenter", f"--net={path}", "ip", "-j", "-d", *arguments], capture_output=True, check=True)
    return list(json.loads(result.stdout or b"[]"))


def plug(here: Path, there: Path) -> None:
    """A bridge in the one namespace, plugged into it an interface of the other."""

    def work(netlink: Netlink) -> None:
        netlink.ensure_bridge(BRIDGE)
        netlink.plug(VETH, there)

    speak(here, work)


def plugged(spaces: tuple[Path, Path]) -> tuple[Path, Path]:
    """Likewise, and configured."""
    here, there = spaces
    plug(here, there)
    Netlink.configure_inside(there, [VETH])
    return spaces


def test_a_bridge_and_a_veth_pair_across_namespaces(spaces: tuple[Path, Path]) -> None:
    here, there = plugged(spaces)
    [bridge] = ip(here, "link", "show", "br0")
    assert (bridge["address"], bridge["mtu"], bridge["linkinfo"]["info_kind"]) == (BRIDGE.mac, 1400, "bridge")  # type: ignore[index]
    [veth] = ip(here, "link", "show", "v0")
    assert (veth["master"], veth["mtu"], "UP" in veth["flags"]) == ("br0", 1400, True)  # type: ignore[operator]
    [peer] = ip(there, "link", "show", "eth0")
    assert (peer["address"], peer["mtu"], "UP" in peer["flags"]) == (VETH.mac, 1400, True)  # type: ignore[operator]


def test_the_inner_end_has_its_addresses_and_default_routes_at_once(spaces: tuple[Path, Path]) -> None:
    _, there = plugged(spaces)
    [shown] = ip(there, "addr", "show", "eth0")
    held = {(one["local"], one["prefixlen"]): one for one in shown["addr_info"]}  # type: ignore[attr-defined]
    assert {("10.231.0.2", 24), ("fd00::2", 64)} <= held.keys()
    assert "tentative" not in held["fd00::2", 64]
    [four] = ip(there, "route", "show", "default")
    assert (four["gateway"], four["dev"]) == ("10.231.0.1", "eth0")
    [six] = ip(there, "-6", "route", "show", "default")
    assert six["gateway"] == "fd00::1"


def test_what_is_there_is_listed(spaces: tuple[Path, Path]) -> None:
    here, _ = plugged(spaces)
    assert speak(here, lambda netlink: netlink.links("veth")) == [("v0", "br0")]
    assert speak(here, lambda netlink: netlink.links("bridge")) == [("br0", "")]
    found = speak(here, Netlink.routes)
    assert Route(ip_network("10.231.0.0/24"), "br0") in found
    assert Route(ip_network("fd00::/64"), "br0") in found
    assert all(not route.subnet.is_link_local and route.subnet.prefixlen for route in found)


def test_the_default_mtu_is_that_of_the_way_out(spaces: tuple[Path, Path]) -> None:
    here, there = plugged(spaces)
    assert speak(here, Netlink.default_mtu) == 1500, "no way out"
    assert speak(there, Netlink.default_mtu) == 1400


def test_a_bridge_is_mended(spaces: tuple[Path, Path]) -> None:
    here, _ = spaces
    assert speak(here, lambda netlink: netlink.ensure_bridge(replace(BRIDGE, addresses=[])))
    subprocess.run(["nsenter", f"--net={here}", "ip", "link", "set", "br0", "down"], check=True)
    assert not speak(here, lambda netlink: netlink.ensure_bridge(BRIDGE))
    assert not speak(here, lambda netlink: netlink.ensure_bridge(BRIDGE)), "twice is as good as once"
    [shown] = ip(here, "addr", "show", "br0")
    assert "UP" in shown["flags"]  # type: ignore[operator]
    assert {"10.231.0.1", "fd00::1"} <= {one["local"] for one in shown["addr_info"]}  # type: ignore[attr-defined]


def test_an_unplugged_pair_is_off_the_bridge_and_down_and_can_be_put_back(spaces: tuple[Path, Path]) -> None:
    here, _ = plugged(spaces)
    assert speak(here, lambda netlink: netlink.unplug("v0"))
    [veth] = ip(here, "link", "show", "v0")
    assert ("master" in veth, "UP" in veth["flags"]) == (False, False)  # type: ignore[operator]
    speak(here, lambda netlink: netlink.enslave("v0", "br0"))
    [veth] = ip(here, "link", "show", "v0")
    assert (veth["master"], "UP" in veth["flags"]) == ("br0", True)  # type: ignore[operator]


def test_taking_away_what_is_gone_is_no_error(spaces: tuple[Path, Path]) -> None:
    here, _ = plugged(spaces)
    assert speak(here, lambda netlink: (netlink.delete_link("v0"), netlink.delete_link("v0"))) == (True, False)
    assert not speak(here, lambda netlink: netlink.unplug("v0"))


def test_an_error_names_the_request_and_says_why(spaces: tuple[Path, Path]) -> None:
    here, there = plugged(spaces)
    with pytest.raises(OSError, match="netlink: add veth v0 to br0: File exists") as refused:
        speak(here, lambda netlink: netlink.plug(VETH, there))
    assert refused.value.errno == errno.EEXIST
    with pytest.raises(OSError, match="br9") as refused:
        speak(here, lambda netlink: netlink.plug(replace(VETH, host_name="v1", bridge="br9"), there))
    assert refused.value.errno == errno.ENODEV


def test_of_several_requests_the_first_failure_is_told_in_the_kernels_own_words(spaces: tuple[Path, Path]) -> None:
    here, there = spaces
    plug(here, there)
    strange = replace(VETH, gateways=[ip_address("10.99.0.1"), ip_address("fd99::1")])
    with pytest.raises(OSError, match=r"set default route via 10\.99\.0\.1: Network is unreachable \(.+\)") as refused:
        Netlink.configure_inside(there, [strange])
    assert refused.value.errno == errno.ENETUNREACH
    [peer] = ip(there, "link", "show", "eth0")
    assert "UP" in peer["flags"]  # type: ignore[operator]


def test_after_a_failure_the_socket_is_as_good_as_before(spaces: tuple[Path, Path]) -> None:
    here, there = spaces

    def work(netlink: Netlink) -> list[tuple[str, str]]:
        netlink.ensure_bridge(BRIDGE)
        netlink.plug(VETH, there)
        for _ in range(3):
            with pytest.raises(OSError, match="File exists"):
                netlink.plug(VETH, there)
        return netlink.links("veth")

    assert speak(here, work) == [("v0", "br0")]


def test_a_list_of_a_thousand_is_read_to_its_end(spaces: tuple[Path, Path]) -> None:
    here, _ = spaces
    batch = "".join(f"route add unreachable {ip_address(0x0B000000 + number)}\n" for number in range(1000))
    batch += "".join(f"route add {ip_address(0x0AE70000 + number)} dev br0\n" for number in range(1000))
    speak(here, lambda netlink: netlink.ensure_bridge(replace(BRIDGE, addresses=[])))
    subprocess.run(["nsenter", f"--net={here}", "ip", "-batch", "-"], input=batch.encode(), check=True)
    found = [route for route in speak(here, Netlink.routes) if route.subnet.version == 4]
    assert len(found) == 1000
    assert {route.interface for route in found} == {"br0"}
