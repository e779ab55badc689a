"""Networks over gRPC: made, found, removed, and refused where they would harm the host."""

import asyncio

import pytest
from support.netlab import (
    BRIDGE,
    GATEWAY,
    OUTSIDE,
    SUBNET,
    Calls,
    Lab,
    address,
    command,
    lines,
    reaches,
    tcp_call,
    tcp_server,
)
from support.requirements import needs

from corral.api.network.v1 import network_pb2 as pb
from corral.api.types.v1 import types_pb2
from corral.rpc.context import in_namespace
from corral.rpc.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)

pytestmark = needs("root", "netns", "nft", "nsenter", "ip")


async def test_a_daemon_that_nobody_used_leaves_the_host_as_it_was() -> None:
    with Lab() as lab:
        assert set(lab.links()) == {"lo", "uplink"}
        assert lab.ruleset() == ""
        assert command(lab.host, "cat", "/proc/sys/net/ipv4/ip_forward").strip() == "0"


async def test_the_builtin_networks_are_listed_first(net: Calls) -> None:
    await net.create("mine")
    assert await net.network_names() == ["bridge", "host", "none", "mine"]
    default = await net.network("bridge")
    assert (default.builtin, default.interface, default.subnets[0].cidr) == (True, BRIDGE, SUBNET)
    assert default.subnets[0].gateway == GATEWAY


async def test_a_network_is_a_bridge_with_the_gateways_address(lab: Lab, net: Calls) -> None:
    made = await net.create(
        "mine", subnets=[pb.Subnet(cidr="10.231.200.0/24", gateway="10.231.200.254")], mtu=1400, labels={"a": "b"}
    )
    assert await net.network("mine") == made
    assert (made.driver, made.mtu, dict(made.labels), made.builtin) == ("bridge", 1400, {"a": "b"}, False)
    assert made.interface == f"crl{made.id[:12]}"
    shown = command(lab.host, "ip", "addr", "show", made.interface)
    assert "10.231.200.254/24" in shown
    assert "mtu 1400" in shown
    endpoint = await net.attach("a", "mine")
    assert reaches(endpoint.netns_path, "10.231.200.254")
    assert "mtu 1400" in command(endpoint.netns_path, "ip", "link", "show", "eth0")
    assert reaches(endpoint.netns_path, OUTSIDE)


async def test_a_network_is_found_by_name_id_and_the_beginning_of_the_id(net: Calls) -> None:
    made = await net.create("mine")
    for name in ("mine", made.id, made.id[:8]):
        assert (await net.network(name)).id == made.id
    for name in ("other", "0" * 12, ""):
        with pytest.raises(NotFound):
            await net.network(name)


async def test_remove_takes_bridge_and_rules_away(lab: Lab, net: Calls) -> None:
    made = await net.create("mine")
    assert made.interface in lab.ruleset()
    await net.remove("mine")
    assert made.interface not in lab.links()
    assert made.interface not in lab.ruleset()
    assert made.subnets[0].cidr not in lab.ruleset()
    with pytest.raises(NotFound):
        await net.remove("mine")


async def test_a_network_in_use_stays(net: Calls) -> None:
    await net.create("mine")
    endpoint = await net.attach("a", "mine")
    with pytest.raises(FailedPrecondition, match=r"used by 1 container \(a\): remove them first"):
        await net.remove("mine")
    assert reaches(endpoint.netns_path, endpoint.interfaces[0].ipv4_gateway)


@pytest.mark.parametrize("name", ["bridge", "host", "none"])
async def test_the_builtin_ones_stay_and_their_names_are_taken(net: Calls, name: str) -> None:
    with pytest.raises(FailedPrecondition, match="builtin"):
        await net.remove(name)
    with pytest.raises(AlreadyExists):
        await net.create(name)


async def test_a_taken_name_is_refused_per_namespace(net: Calls) -> None:
    await net.create("mine")
    with pytest.raises(AlreadyExists, match="'mine' already exists"):
        await net.create("mine")
    with in_namespace("other"):
        assert "mine" not in await net.network_names()
        await net.create("mine")


async def test_a_name_that_is_taken_is_told_before_the_subnet_that_is_too(net: Calls) -> None:
    await net.create("mine", "10.231.40.0/24")
    with pytest.raises(AlreadyExists, match="'mine' already exists"):
        await net.create("mine", "10.231.40.0/24")


async def test_a_subnet_that_overlaps_is_refused_and_what_it_overlaps_is_named(lab: Lab, net: Calls) -> None:
    await net.create("mine", "10.231.200.0/24")
    for cidr, owner in (
        ("10.231.200.128/25", r"network 'mine' \(10\.231\.200\.0/24\)"),
        ("10.0.0.0/8", r"network 'bridge'|network 'mine'"),
        ("203.0.113.0/25", r"a route of the host through uplink \(203\.0\.113\.0/24\)"),
    ):
        with pytest.raises(FailedPrecondition, match=owner):
            await net.create("late", cidr)
    command(lab.host, "ip", "route", "add", "10.231.210.0/24", "dev", "uplink", "table", "77")
    with pytest.raises(FailedPrecondition, match="a route of the host through uplink"):
        await net.create("late", "10.231.210.128/28")
    command(lab.host, "ip", "route", "del", "10.231.210.0/24", "table", "77")
    assert await net.network_names() == ["bridge", "host", "none", "mine"]


async def test_pools_give_subnets_that_overlap_nothing(lab: Lab, net: Calls) -> None:
    command(lab.host, "ip", "route", "add", "10.231.129.0/24", "dev", "uplink")
    await net.create("fixed", "10.231.130.0/25")
    made = [await net.create(name) for name in ("one", "two")]
    command(lab.host, "ip", "route", "del", "10.231.129.0/24")
    assert [network.subnets[0].cidr for network in made] == ["10.231.128.0/24", "10.231.131.0/24"]


async def test_empty_pools_say_what_to_do() -> None:
    with Lab(settings={"pools": ["10.231.128.0/25"], "pool_prefix": 26}) as lab:
        async with lab.calls() as net:
            await net.create("one")
            await net.create("two")
            with pytest.raises(ResourceExhausted, match="--subnet"):
                await net.create("three")


async def test_the_default_network_moves_where_a_route_is_in_its_way() -> None:
    with Lab(settings={"subnet": "203.0.113.0/24", "pools": ["203.0.0.0/16", "10.231.128.0/17"]}) as lab:
        async with lab.calls() as net:
            assert (await net.network("bridge")).subnets[0].cidr == "10.231.128.0/17"
            endpoint = await net.attach("a")
            assert reaches(endpoint.netns_path, OUTSIDE)


async def test_many_made_at_once_do_not_overlap(net: Calls) -> None:
    made = await asyncio.gather(*(net.create(f"n{number}") for number in range(12)))
    assert len({network.subnets[0].cidr for network in made}) == 12


async def test_range_and_reserved_addresses_bound_what_is_given_out(net: Calls) -> None:
    subnet = pb.Subnet(cidr="10.231.200.0/24", range="10.231.200.128/29", reserved=["10.231.200.130"])
    made = await net.create("mine", subnets=[subnet])
    assert (made.subnets[0].used, made.subnets[0].free) == (0, 7)
    held = {address(await net.attach(f"e{number}", "mine")) for number in range(7)}
    assert held == {f"10.231.200.{number}" for number in range(128, 136) if number != 130}
    with pytest.raises(ResourceExhausted):
        await net.attach("late", "mine")
    outside = [pb.NetworkAttachment(network="mine", ipv4_address="10.231.200.7")]
    assert address(await net.attach("fixed", networks=outside)) == "10.231.200.7"


async def test_an_interface_name_of_ones_own(lab: Lab, net: Calls) -> None:
    await net.create("mine", interface="crltmine")
    assert "crltmine" in lab.bridges()
    with pytest.raises(AlreadyExists, match="belongs to another network"):
        await net.create("two", interface="crltmine")
    with pytest.raises(FailedPrecondition, match="already has an interface uplink"):
        await net.create("three", interface="uplink")
    assert "uplink" in lab.links()
    assert await net.network_names() == ["bridge", "host", "none", "mine"]


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "a/b"},
        {"name": ""},
        {"subnets": [pb.Subnet(cidr="10.231.200.1/24")]},
        {"subnets": [pb.Subnet(cidr="10.231.200.0")]},
        {"subnets": [pb.Subnet(cidr="10.231.200.0/31")]},
        {"subnets": [pb.Subnet(cidr="127.0.5.0/24")]},
        {"subnets": [pb.Subnet(cidr="224.1.0.0/16")]},
        {"subnets": [pb.Subnet(cidr="0.0.0.0/0")]},
        {"subnets": [pb.Subnet(cidr="10.231.200.0/24", gateway="10.231.201.1")]},
        {"subnets": [pb.Subnet(cidr="10.231.200.0/24", gateway="10.231.200.255")]},
        {"subnets": [pb.Subnet(cidr="10.231.200.0/24", range="10.231.0.0/16")]},
        {"subnets": [pb.Subnet(cidr="10.231.200.0/24", reserved=["10.1.1.1"])]},
        {"interface": "a name that is long"},
        {"mtu": 10},
        {"mtu": 100_000},
    ],
)
async def test_nonsense_is_refused(net: Calls, fields: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument):
        await net.create(**{"name": "bad", **fields})  # type: ignore[arg-type]
    assert await net.network_names() == ["bridge", "host", "none"]


async def test_an_unknown_driver_is_refused_with_the_names_of_those_there_are(net: Calls) -> None:
    with pytest.raises(InvalidArgument, match="use bridge, macvlan, ipvlan"):
        await net.create("mine", driver="weave")


async def test_the_journal_tells_what_happened(net: Calls) -> None:
    async def events() -> list[tuple[str, str]]:
        answers = net.networks.Events(types_pb2.EventsRequest(no_follow=True))
        return [(event.topic, event.subject) async for answer in answers for event in answer.events]

    before = len(await events())
    await net.create("mine")
    await net.attach("a", "mine")
    await net.detach("a")
    await net.remove("mine")
    with pytest.raises(InvalidArgument):
        await net.create("bad", "10.0.0.0/33")
    assert (await events())[before:] == [
        ("network.created", "mine"),
        ("endpoint.attached", "a"),
        ("endpoint.detached", "a"),
        ("network.removed", "mine"),
    ]


async def test_a_network_of_both_ip_versions(lab: Lab, net: Calls) -> None:
    made = await net.create("both", "10.231.200.0/24", "fd00:231::/64", ipv6=True)
    assert made.ipv6
    a, b = await net.attach("a", "both"), await net.attach("b", "both")
    [interface] = a.interfaces
    assert (interface.ipv6_address, interface.ipv6_gateway) == ("fd00:231::2/64", "fd00:231::1")
    own, other = "fd00:231::2", b.interfaces[0].ipv6_address.partition("/")[0]
    with tcp_server(b.netns_path, other):
        assert tcp_call(a.netns_path, other) == own
    with tcp_server(lab.host, "fd00:231::1"):
        assert tcp_call(a.netns_path, "fd00:231::1") == own
    assert "default via fd00:231::1" in command(a.netns_path, "ip", "-6", "route")
    assert f"{own}\ta" in lines(a.hosts_path)
