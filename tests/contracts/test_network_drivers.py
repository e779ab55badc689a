"""What every network driver promises, by packets; the parents are links of namespaces that the tests make.

lan 10.77.0.1/24 on world --- port, the parent, on the host of the lab
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from pyroute2.iproute.linux import IPRoute
from support.netlab import (
    BRIDGE,
    HOST,
    OUTSIDE,
    READY,
    Calls,
    Lab,
    address,
    command,
    configure,
    eventually,
    holding,
    reaches,
    tcp_call,
    tcp_server,
)
from support.requirements import needs

from corral.api.network.v1 import network_pb2 as pb
from corral.api.types.v1 import types_pb2
from corral.kernel.netns import create_pinned, in_namespace, remove_pinned
from corral.rpc.errors import CorralError, FailedPrecondition, InvalidArgument

pytestmark = needs("root", "netns", "nft", "nsenter", "ip")
LAN, ROUTER, PARENT = "10.77.0.0/24", "10.77.0.1", "port"
NONE = pb.AttachRequest.MODE_NONE


@dataclass
class Driver:
    """A driver, and a network of it that can be had here, with who answers outside of it."""

    name: str
    options: dict[str, str]
    gateway: str
    beyond: str

    def request(self, name: str = "net", **fields: object) -> dict[str, object]:
        cidr = LAN if self.options.get("parent") else "10.231.32.0/24"
        return {"name": name, "driver": self.name, "options": self.options, "subnets": [pb.Subnet(cidr=cidr)], **fields}


DRIVERS = {
    "bridge": Driver("bridge", {}, "10.231.32.1", OUTSIDE),
    "macvlan": Driver("macvlan", {"parent": PARENT}, ROUTER, ROUTER),
    "ipvlan": Driver("ipvlan", {"parent": PARENT}, ROUTER, ROUTER),
    "ipvlan-l3": Driver("ipvlan", {"parent": PARENT, "ipvlan_mode": "l3"}, "", ROUTER),
}


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab() as made:
        lan = made.place.directory / "lan"
        create_pinned(lan)
        try:
            _wire(made, lan)
            yield made
        finally:
            remove_pinned(lan)


def _wire(lab: Lab, lan: Path) -> None:
    def cable() -> None:
        with IPRoute() as netlink, lab.host.open() as host:
            netlink.link("add", ifname="world", kind="veth", peer={"ifname": PARENT, "net_ns_fd": host.fileno()})
        configure("world", ROUTER)

    in_namespace(lan, cable)
    command(lab.host, "ip", "link", "set", PARENT, "up")


async def make(net: Calls, **fields: object) -> pb.Network:
    return await net.networks.Create(pb.CreateNetworkRequest(**fields))  # type: ignore[arg-type]


@pytest.fixture(params=DRIVERS)
async def driver(request: pytest.FixtureRequest, net: Calls) -> Driver:
    """With its network "net" made."""
    chosen = DRIVERS[request.param]
    try:
        await make(net, **chosen.request())
    except CorralError as e:
        if "this kernel has no ipvlan" not in str(e):
            raise
        pytest.skip("needs ipvlan")
    return chosen


async def test_endpoints_reach_each_other_and_what_lies_beyond(net: Calls, driver: Driver) -> None:
    a, b = await net.attach("a", "net"), await net.attach("b", "net")
    assert address(a) != address(b)
    assert eventually(lambda: reaches(a.netns_path, address(b), within_s=0.5))
    assert eventually(lambda: reaches(a.netns_path, driver.beyond, within_s=0.5))


async def test_the_same_call_again_gives_the_same_answer(net: Calls, driver: Driver) -> None:
    a = await net.attach("a", "net")
    assert await net.attach("a", "net") == a


async def test_a_detached_address_is_nobodys_even_while_the_namespace_is_held(net: Calls, driver: Driver) -> None:
    a, b = await net.attach("a", "net"), await net.attach("b", "net")
    with holding(a.netns_path):
        await net.detach("a")
        assert eventually(lambda: not reaches(b.netns_path, address(a), within_s=0.2))
    assert (await net.network("net")).subnets[0].used == 1


async def test_a_live_endpoint_is_connected_and_disconnected(net: Calls, driver: Driver) -> None:
    a, b = await net.attach("a", mode=NONE, networks=[]), await net.attach("b", "net")
    request = pb.ConnectRequest(endpoint_id="a", network=pb.NetworkAttachment(network="net"))
    connected = await net.endpoints.Connect(request)
    assert connected.netns_path == a.netns_path
    assert eventually(lambda: reaches(b.netns_path, address(connected), within_s=0.5))
    left = await net.endpoints.Disconnect(pb.DisconnectRequest(endpoint_id="a", network="net"))
    assert not left.interfaces
    assert [link["ifname"] for link in json.loads(command(a.netns_path, "ip", "-j", "link"))] == ["lo"]


async def test_endpoints_outlive_a_daemon_that_is_killed(lab: Lab, net: Calls, driver: Driver) -> None:
    a, b = await net.attach("a", "net"), await net.attach("b", "net")
    lab.corrald.kill9()
    assert eventually(lambda: reaches(a.netns_path, address(b), within_s=0.5))
    lab.corrald.start()
    async with lab.calls() as again:
        assert await again.attach("a", "net") == a
        assert eventually(lambda: reaches(a.netns_path, address(b), within_s=0.5))
        assert (await again.networks.Check(types_pb2.CheckRequest())).findings == []


async def test_a_network_leaves_nothing(lab: Lab, net: Calls) -> None:
    before = lab.links()
    for chosen in DRIVERS.values():
        with contextlib.suppress(FailedPrecondition):  # of a kernel that lacks it: that leaves nothing either
            await make(net, **chosen.request())
            await net.attach("a", "net")
            await net.detach("a")
            await net.remove("net")
    assert eventually(lambda: lab.links() == before), (before, lab.links())


# Macvlan and ipvlan


async def test_without_a_parent_containers_reach_one_another_only(lab: Lab, net: Calls) -> None:
    before = lab.links()
    made = await make(net, name="net", driver="macvlan")
    assert lab.links() == before, "the host takes no part in it"
    assert made.interface in lab.pins
    a, b = await net.attach("a", "net"), await net.attach("b", "net")
    assert eventually(lambda: reaches(a.netns_path, address(b), within_s=0.5))
    assert not reaches(a.netns_path, OUTSIDE, within_s=0.3)
    for name in ("a", "b"):
        await net.detach(name)
    await net.remove("net")
    assert made.interface not in lab.pins


async def test_a_network_without_a_parent_outlives_the_daemon_and_a_reboot(lab: Lab, net: Calls) -> None:
    made = await make(net, name="net", driver="macvlan")
    a = await net.attach("a", "net")
    for reboot in (False, True):
        lab.corrald.kill9()
        if reboot:
            remove_pinned(lab.place.state / "netns" / made.interface)
        lab.corrald.start()
        async with lab.calls() as again:
            b = await again.attach(f"b{reboot}", "net")
            if not reboot:
                assert reaches(a.netns_path, address(b))
            assert (await again.networks.Check(types_pb2.CheckRequest())).findings == []
            await again.detach(b.id)


async def test_a_network_whose_proof_was_cut_short_leaves_nothing_on_its_parent(lab: Lab, net: Calls) -> None:
    before = lab.links()
    lab.corrald.stop()
    lab.corrald.start(environment={"CORRAL_FAILPOINTS": "network.create.after_probe=kill@1"})
    async with lab.calls() as again:
        with pytest.raises(CorralError):
            await make(again, **DRIVERS["macvlan"].request())
    lab.corrald.kill9()
    lab.corrald.start()
    assert eventually(lambda: len(lab.pins) == READY)
    assert lab.links().keys() - {BRIDGE} == before.keys() - {BRIDGE}


async def make_on_vlan(net: Calls) -> str:
    """A network on a VLAN that is made with it, whose name is returned."""
    vlan = f"{PARENT}.7"
    subnets = [pb.Subnet(cidr="10.78.0.0/24")]
    try:
        await make(net, name="net", driver="macvlan", options={"parent": vlan}, subnets=subnets)
    except FailedPrecondition as e:
        if "this kernel has no VLANs" not in str(e):
            raise
        pytest.skip("needs 802.1Q")
    return vlan


def parent_settings(lab: Lab, name: str) -> list[str]:
    settings = [f"net.ipv6.conf.{name.replace('.', '/')}.{each}" for each in ("accept_ra", "disable_ipv6")]
    return command(lab.host, "sysctl", "-n", *settings).split()


async def test_a_vlan_that_is_made_goes_with_its_network_and_the_host_takes_no_part_in_it(lab: Lab, net: Calls) -> None:
    vlan = await make_on_vlan(net)
    assert parent_settings(lab, vlan) == ["0", "1"]
    await net.attach("a", "net")
    await net.detach("a")
    await net.remove("net")
    assert vlan not in lab.links()


async def test_frames_of_a_vlan_carry_its_tag(lab: Lab, net: Calls) -> None:
    await make_on_vlan(net)
    lan = lab.place.directory / "lan"
    command(lan, "ip", "link", "add", "link", "world", "name", "tagged", "type", "vlan", "id", "7")
    try:
        command(lan, "ip", "address", "add", "10.78.0.200/24", "dev", "tagged")
        command(lan, "ip", "link", "set", "tagged", "up")
        a, b = await net.attach("a", "net"), await net.attach("b", "net")
        assert eventually(lambda: reaches(a.netns_path, "10.78.0.200", within_s=0.5))
        assert reaches(lan, address(b))
        assert reaches(a.netns_path, address(b))
        command(lan, "ip", "link", "delete", "tagged")  # the same address, without a tag
        command(lan, "ip", "address", "add", "10.78.0.200/24", "dev", "world")
        command(a.netns_path, "ip", "neighbour", "flush", "all")
        assert not reaches(a.netns_path, "10.78.0.200", within_s=1)
    finally:
        command(lan, "sh", "-c", "ip link delete tagged; ip address delete 10.78.0.200/24 dev world; true")


async def test_a_vlan_that_another_made_meanwhile_is_not_removed_with_the_network(lab: Lab, net: Calls) -> None:
    vlan = await make_on_vlan(net)
    command(lab.host, "ip", "link", "delete", vlan)
    command(lab.host, "ip", "link", "add", "link", PARENT, "name", vlan, "type", "vlan", "id", "7")
    await net.attach("a", "net")
    await net.detach("a")
    await net.remove("net")
    assert vlan in lab.links()
    command(lab.host, "ip", "link", "delete", vlan)


@pytest.mark.parametrize(("mode", "talk"), [("bridge", True), ("private", False)])
async def test_macvlan_modes_are_the_kernels(net: Calls, mode: str, talk: bool) -> None:
    await make(net, **DRIVERS["macvlan"].request(options={"parent": PARENT, "macvlan_mode": mode}))
    a, b = await net.attach("a", "net"), await net.attach("b", "net")
    assert eventually(lambda: reaches(a.netns_path, ROUTER, within_s=0.5))
    assert reaches(a.netns_path, address(b), within_s=1) is talk
    [link] = json.loads(command(a.netns_path, "ip", "-j", "-d", "link", "show", "eth0"))
    assert link["linkinfo"]["info_data"]["mode"] == mode


async def test_passthru_is_for_one_container(net: Calls) -> None:
    await make(net, **DRIVERS["macvlan"].request(options={"parent": PARENT, "macvlan_mode": "passthru"}))
    a = await net.attach("a", "net")
    assert eventually(lambda: reaches(a.netns_path, ROUTER, within_s=0.5))
    with pytest.raises(CorralError):
        await net.attach("b", "net")
    assert await net.ids() == ["a"]


@pytest.mark.parametrize(
    ("driver_name", "options", "complaint"),
    [
        ("macvlan", {"parent": "nowhere0"}, "needs the link nowhere0"),
        ("macvlan", {"parent": "lo"}, "is no name for a network interface"),
        ("macvlan", {"parent": PARENT, "macvlan_mode": "l2"}, "macvlan_mode='l2' is not known"),
        ("macvlan", {"parent": PARENT, "ipvlan_mode": "l2"}, "has no option 'ipvlan_mode'"),
        ("ipvlan", {"parent": PARENT, "ipvlan_mode": "bridge"}, "ipvlan_mode='bridge' is not known"),
        ("macvlan", {"parent": f"{PARENT}.5000"}, "VLANs have numbers"),
        ("bridge", {"com.docker.network.bridge.enable_icc": "perhaps"}, "neither true nor false"),
        ("bridge", {"parent": PARENT}, "has no option 'parent'"),
        ("weave", {}, "there is no network driver 'weave'"),
    ],
)
async def test_what_cannot_be_is_refused_in_a_sentence(
    lab: Lab, net: Calls, driver_name: str, options: dict[str, str], complaint: str
) -> None:
    before = lab.links()
    with pytest.raises((FailedPrecondition, InvalidArgument), match=complaint):
        await make(net, name="net", driver=driver_name, options=options)
    assert "net" not in await net.network_names()
    assert lab.links() == before


async def test_a_parent_carries_one_network(net: Calls) -> None:
    await make(net, **DRIVERS["macvlan"].request())
    with pytest.raises(FailedPrecondition, match="port carries network 'net' already"):
        await make(net, name="other", driver="macvlan", options={"parent": PARENT})


async def test_no_port_of_the_host_is_published_into_a_macvlan_network(net: Calls) -> None:
    await make(net, **DRIVERS["macvlan"].request())
    with pytest.raises(InvalidArgument, match="in a bridge network with a way out"):
        await net.attach("a", "net", ports=[pb.PortMapping(container_port=7, host_port=8080)])


async def test_a_network_without_its_parent_says_so_and_works_again_when_it_is_back(lab: Lab, net: Calls) -> None:
    command(lab.host, "ip", "link", "add", "late", "type", "veth", "peer", "name", "later")
    try:
        await make(net, name="net", driver="macvlan", options={"parent": "late"})
        command(lab.host, "ip", "link", "delete", "late")
        with pytest.raises(FailedPrecondition, match="needs the link late"):
            await net.attach("a", "net")
        command(lab.host, "ip", "link", "add", "late", "type", "veth", "peer", "name", "later")
        await net.attach("a", "net")
    finally:
        command(lab.host, "ip", "link", "delete", "late")


async def test_a_link_that_went_with_its_parent_is_there_again_with_the_next_attach(lab: Lab, net: Calls) -> None:
    for _ in range(2):
        command(lab.host, "ip", "link", "add", "late", "type", "veth", "peer", "name", "later")
        try:
            if not await net.ids():
                await make(net, name="net", driver="macvlan", options={"parent": "late"})
            a = await net.attach("a", "net")
            [link] = json.loads(command(a.netns_path, "ip", "-j", "address", "show", "eth0"))
            assert [each["local"] for each in link["addr_info"]] == [address(a)]
            assert "UP" in link["flags"]
        finally:
            command(lab.host, "ip", "link", "delete", "late")
    with pytest.raises(FailedPrecondition, match="needs the link late"):
        await net.attach("a", "net")
    left = await net.endpoints.Disconnect(pb.DisconnectRequest(endpoint_id="a", network="net"))
    assert not left.interfaces


async def test_a_connect_to_macvlan_cut_short_leaves_no_link_in_the_container(lab: Lab, net: Calls) -> None:
    await make(net, **DRIVERS["macvlan"].request())
    a = await net.attach("a", mode=NONE, networks=[])
    lab.corrald.stop()
    lab.corrald.start(environment={"CORRAL_FAILPOINTS": "network.connect.before_request=kill@1"})
    request = pb.ConnectRequest(endpoint_id="a", network=pb.NetworkAttachment(network="net"))
    async with lab.calls() as again:
        with pytest.raises(CorralError):
            await again.endpoints.Connect(request)
    lab.corrald.kill9()
    lab.corrald.start()
    async with lab.calls() as again:
        assert eventually(lambda: "eth0" not in lab.links(Path(a.netns_path)))
        assert "eth0" in [each.name for each in (await again.endpoints.Connect(request)).interfaces]


# Options of the bridge


async def test_without_icc_containers_reach_the_world_and_not_one_another(lab: Lab, net: Calls) -> None:
    await make(net, **DRIVERS["bridge"].request(options={"com.docker.network.bridge.enable_icc": "false"}))
    a, b = await net.attach("a", "net"), await net.attach("b", "net")
    assert reaches(a.netns_path, OUTSIDE)
    assert not reaches(a.netns_path, address(b), within_s=0.5)
    # Nor by way of the host.
    command(a.netns_path, "ip", "route", "add", f"{address(b)}/32", "via", "10.231.32.1")
    assert not reaches(a.netns_path, address(b), within_s=0.5)
    bridge = (await net.network("net")).interface
    command(lab.host, "ip", "link", "delete", bridge)
    assert eventually(lambda: reaches(a.netns_path, OUTSIDE, within_s=0.3))
    assert not reaches(a.netns_path, address(b), within_s=0.5)


async def test_without_masquerade_the_world_sees_the_containers_own_address(lab: Lab, net: Calls) -> None:
    options = {"com.docker.network.bridge.enable_ip_masquerade": "false"}
    await make(net, name="net", options=options, subnets=[pb.Subnet(cidr="10.231.33.0/24")])
    a = await net.attach("a", "net")
    assert not reaches(a.netns_path, OUTSIDE, within_s=0.5)
    command(lab.outside, "ip", "route", "add", "10.231.33.0/24", "via", HOST)
    try:
        assert reaches(a.netns_path, OUTSIDE)
    finally:
        command(lab.outside, "ip", "route", "delete", "10.231.33.0/24")


async def test_ipv6_is_had_for_the_asking(net: Calls) -> None:
    made = await make(net, name="net", ipv6=True)
    assert [":" in subnet.cidr for subnet in made.subnets] == [False, True]
    a, b = await net.attach("a", "net"), await net.attach("b", "net")
    theirs = b.interfaces[0].ipv6_address.partition("/")[0]
    with tcp_server(b.netns_path, theirs):
        assert tcp_call(a.netns_path, theirs) == a.interfaces[0].ipv6_address.partition("/")[0]


async def test_a_name_and_an_mtu_may_come_as_dockers_options(lab: Lab, net: Calls) -> None:
    options = {"com.docker.network.bridge.name": "crltnamed", "com.docker.network.driver.mtu": "1300"}
    made = await make(net, name="net", options=options)
    assert (made.interface, made.mtu) == ("crltnamed", 1300)
    [link] = json.loads(command(lab.host, "ip", "-j", "link", "show", "crltnamed"))
    assert link["mtu"] == 1300
    assert BRIDGE != "crltnamed"
