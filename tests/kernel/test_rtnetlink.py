"""Links, addresses and routes through our own netlink, checked with iproute2."""

import errno
import json
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from support.requirements import needs

from corral.kernel import rtnetlink
from corral.kernel.netlink import Message, Socket, attribute, attributes, nested
from corral.kernel.netns import create_pinned, in_namespace, remove_pinned

pytestmark = needs("root", "netns", "nsenter", "ip")
MAC = "02:00:00:00:00:07"


@pytest.fixture
def spaces() -> Iterator[tuple[Path, Path]]:
    """Two network namespaces."""
    paths = Path(f"/tmp/corral-nl1-{os.getpid()}"), Path(f"/tmp/corral-nl2-{os.getpid()}")
    for path in paths:
        create_pinned(path)
    yield paths
    for path in paths:
        remove_pinned(path)


def speak[T](path: Path, work: Callable[[Socket], T]) -> T:
    """Run work with a socket inside a namespace."""

    def inside() -> T:
        with Socket(rtnetlink.NETLINK_ROUTE) as netlink:
            return work(netlink)

    return in_namespace(path, inside)


def ip(path: Path, *arguments: str) -> list[dict[str, object]]:
    result = subprocess.run(["nsenter", f"--net={path}", "ip", "-j", "-d", *arguments], capture_output=True, check=True)
    return list(json.loads(result.stdout or b"[]"))


def bridge_and_veth(netlink: Socket, other: Path) -> None:
    netlink.request(rtnetlink.new_bridge("br0", mac=MAC, mtu=1400))
    with other.open() as file:
        netlink.request(
            rtnetlink.new_veth(
                "v0",
                master=socket.if_nametoindex("br0"),
                mtu=1400,
                peer="eth0",
                peer_netns=file.fileno(),
                peer_mac="02:00:00:00:00:08",
            )
        )


def test_a_bridge_and_a_veth_pair_across_namespaces(spaces: tuple[Path, Path]) -> None:
    here, there = spaces
    speak(here, lambda netlink: bridge_and_veth(netlink, there))
    [bridge] = ip(here, "link", "show", "br0")
    assert (bridge["address"], bridge["mtu"], bridge["linkinfo"]["info_kind"]) == (MAC, 1400, "bridge")  # type: ignore[index]
    [veth] = ip(here, "link", "show", "v0")
    assert (veth["master"], veth["mtu"]) == ("br0", 1400)
    assert "UP" in veth["flags"]  # type: ignore[operator]
    [peer] = ip(there, "link", "show", "eth0")
    assert (peer["address"], peer["mtu"]) == ("02:00:00:00:00:08", 1400)
    assert "UP" not in peer["flags"]  # type: ignore[operator]


def test_links_are_listed_with_kind_and_master(spaces: tuple[Path, Path]) -> None:
    here, there = spaces

    def work(netlink: Socket) -> tuple[list[rtnetlink.Link], list[rtnetlink.Link], int]:
        bridge_and_veth(netlink, there)
        return rtnetlink.links(netlink), rtnetlink.links(netlink, "veth"), socket.if_nametoindex("br0")

    everything, veths, bridge = speak(here, work)
    kinds = {link.name: link.kind for link in everything}
    assert (kinds["lo"], kinds["br0"], kinds["v0"]) == ("", "bridge", "veth")
    assert [(link.name, link.master, link.mtu) for link in veths] == [("v0", bridge, 1400)]


def test_addresses_and_routes_go_in_and_are_listed(spaces: tuple[Path, Path]) -> None:
    here, there = spaces
    speak(here, lambda netlink: bridge_and_veth(netlink, there))

    def work(netlink: Socket) -> tuple[list[tuple[rtnetlink.Address, int]], list[rtnetlink.Route]]:
        index = socket.if_nametoindex("eth0")
        netlink.request(
            rtnetlink.new_address(index, ip_address("10.231.0.2"), 24, what="first"),
            rtnetlink.new_address(index, ip_address("fd00::2"), 64, what="second"),
            rtnetlink.set_link(index, up=True, what="up"),
            rtnetlink.new_default_route(ip_address("10.231.0.1"), index),
            rtnetlink.new_default_route(ip_address("fd00::1"), index),
        )
        return rtnetlink.addresses(netlink, index), rtnetlink.routes(netlink)

    addresses, routes = speak(there, work)
    assert (ip_address("10.231.0.2"), 24) in addresses
    assert (ip_address("fd00::2"), 64) in addresses
    destinations = {route.destination for route in routes if route.kind == rtnetlink.RTN_UNICAST}
    assert {None, ip_network("10.231.0.0/24"), ip_network("fd00::/64")} <= destinations
    [default] = ip(there, "route", "show", "default")
    assert (default["gateway"], default["dev"]) == ("10.231.0.1", "eth0")
    [six] = ip(there, "-6", "route", "show", "default")
    assert six["gateway"] == "fd00::1"
    assert "tentative" not in json.dumps(ip(there, "addr", "show", "eth0")[0]["addr_info"][0])  # type: ignore[index]


def test_an_error_names_the_request_and_says_why(spaces: tuple[Path, Path]) -> None:
    here, _ = spaces

    def twice(netlink: Socket) -> None:
        netlink.request(rtnetlink.new_bridge("br0", mac=MAC, mtu=1500))
        netlink.request(rtnetlink.new_bridge("br0", mac=MAC, mtu=1500))

    with pytest.raises(OSError, match="netlink: add bridge br0: File exists") as refused:
        speak(here, twice)
    assert refused.value.errno == errno.EEXIST
    with pytest.raises(OSError, match=r"netlink: delete br9") as refused:
        speak(here, lambda netlink: netlink.request(rtnetlink.delete_link("br9")))
    assert refused.value.errno == errno.ENODEV


def test_of_a_batch_the_first_failure_is_told_and_the_rest_was_tried(spaces: tuple[Path, Path]) -> None:
    here, _ = spaces

    def batch(netlink: Socket) -> None:
        netlink.request(
            rtnetlink.new_bridge("br0", mac=MAC, mtu=1500),
            rtnetlink.delete_link("br8"),
            rtnetlink.delete_link("br9"),
            rtnetlink.new_bridge("br1", mac=MAC, mtu=1500),
        )

    with pytest.raises(OSError, match="br8"):
        speak(here, batch)
    assert {link["ifname"] for link in ip(here, "link", "show", "type", "bridge")} == {"br0", "br1"}


def test_the_kernels_own_words_come_with_the_error(spaces: tuple[Path, Path]) -> None:
    here, _ = spaces

    def work(netlink: Socket) -> None:
        index = socket.if_nametoindex("lo")
        netlink.request(rtnetlink.new_default_route(ip_address("10.231.0.1"), index))

    with pytest.raises(OSError, match=r"add default route via 10\.231\.0\.1: .* \(.+\)"):
        speak(here, work)


def test_a_list_of_a_thousand_is_read_to_its_end(spaces: tuple[Path, Path]) -> None:
    here, _ = spaces

    def work(netlink: Socket) -> int:
        index = socket.if_nametoindex("lo")
        netlink.request(
            *(
                rtnetlink.new_address(index, ip_address(0x0AE70000 + number), 32, what=f"address {number}")
                for number in range(1000)
            )
        )
        return len([one for one in rtnetlink.addresses(netlink, index) if one[0].version == 4])

    assert speak(here, work) == 1000


def test_attributes_come_back_as_they_went_in() -> None:
    data = attribute(3, b"eth0\0") + nested(18, attribute(1, b"veth"))
    read = attributes(data)
    assert read[3] == b"eth0\0"
    assert attributes(read[18]) == {1: b"veth"}
    assert attributes(b"\x00\x00") == {}
    assert attributes(b"\x02\x00\x01\x00") == {}, "a length that cannot be ends the list"


def test_nothing_asked_is_nothing_done(spaces: tuple[Path, Path]) -> None:
    speak(spaces[0], lambda netlink: netlink.request())


def test_a_request_the_kernel_does_not_know_is_an_error(spaces: tuple[Path, Path]) -> None:
    with pytest.raises(OSError, match="netlink: nonsense: Operation not supported"):
        speak(spaces[0], lambda netlink: netlink.request(Message(0xFFF0, bytes(16), "nonsense")))
