"""Endpoints over gRPC, by the packets they send: a corrald in a network namespace that plays the host."""

from pathlib import Path

import pytest
from support.netlab import (
    BRIDGE,
    GATEWAY,
    HOST,
    OUTSIDE,
    Calls,
    Lab,
    address,
    command,
    eventually,
    exists,
    holding,
    lines,
    permissions,
    reaches,
    tcp_call,
    tcp_server,
    text,
)
from support.requirements import needs

from corral.api.network.v1 import network_pb2 as pb
from corral.kernel.netns import create_pinned, remove_pinned
from corral.rpc.context import in_namespace
from corral.rpc.errors import (
    AlreadyExists,
    CorralError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)

pytestmark = needs("root", "netns", "nft", "nsenter", "ip")
Attachment = pb.NetworkAttachment
NONE, IN_HOST = pb.AttachRequest.MODE_NONE, pb.AttachRequest.MODE_HOST
IN_CONTAINER, IN_PATH = pb.AttachRequest.MODE_CONTAINER, pb.AttachRequest.MODE_PATH


async def test_an_endpoint_has_an_address_a_route_and_a_loopback(net: Calls) -> None:
    endpoint = await net.attach("a")
    [interface] = endpoint.interfaces
    assert (interface.network, interface.name, interface.ipv4_gateway) == ("bridge", "eth0", GATEWAY)
    assert interface.ipv4_address.startswith("10.231.0.")
    assert interface.ipv4_address.endswith("/20")
    assert interface.mac_address == "0a:58:" + ":".join(f"{int(n):02x}" for n in address(endpoint).split("."))
    shown = command(endpoint.netns_path, "ip", "addr", "show", "eth0")
    assert interface.mac_address in shown
    assert "inet6" not in shown
    assert command(endpoint.netns_path, "ip", "route", "show", "default").startswith(f"default via {GATEWAY}")
    assert reaches(endpoint.netns_path, "127.0.0.1")
    assert reaches(endpoint.netns_path, GATEWAY)


async def test_two_endpoints_of_one_network_reach_each_other(net: Calls) -> None:
    a, b = await net.attach("a"), await net.attach("b")
    assert reaches(a.netns_path, address(b))
    with tcp_server(b.netns_path, address(b)):
        assert tcp_call(a.netns_path, address(b)) == address(a)


async def test_the_outside_sees_the_hosts_address_only(lab: Lab, net: Calls) -> None:
    a = await net.attach("a")
    with tcp_server(lab.outside, OUTSIDE) as came:
        assert tcp_call(a.netns_path, OUTSIDE) == HOST
    assert came == [HOST]


async def test_the_outside_cannot_call_an_endpoint_though_it_knows_the_way(lab: Lab, net: Calls) -> None:
    a = await net.attach("a")
    command(lab.outside, "ip", "route", "add", "10.231.0.0/16", "via", HOST)
    try:
        with tcp_server(a.netns_path, address(a)) as came, pytest.raises(OSError, match="timed out"):
            tcp_call(lab.outside, address(a))
        assert came == []
    finally:
        command(lab.outside, "ip", "route", "del", "10.231.0.0/16")


async def test_endpoints_of_two_networks_do_not_reach_each_other(net: Calls) -> None:
    await net.create("one")
    await net.create("two")
    a, b, c = await net.attach("a", "one"), await net.attach("b", "two"), await net.attach("c", "one")
    assert reaches(a.netns_path, address(c))
    assert not reaches(a.netns_path, address(b), within_s=0.5)
    assert reaches(a.netns_path, OUTSIDE)


async def test_an_internal_network_has_no_way_out(lab: Lab, net: Calls) -> None:
    await net.create("inside", internal=True)
    a, b = await net.attach("a", "inside"), await net.attach("b", "inside")
    assert reaches(a.netns_path, address(b))
    assert not reaches(a.netns_path, OUTSIDE, within_s=0.5)
    assert a.interfaces[0].ipv4_gateway == ""
    # Not even with a route of its own making.
    gateway = (await net.network("inside")).subnets[0].gateway
    command(a.netns_path, "ip", "route", "add", "default", "via", gateway)
    assert not reaches(a.netns_path, OUTSIDE, within_s=0.5)


async def test_the_same_call_again_gives_the_same_answer(lab: Lab, net: Calls) -> None:
    first = await net.attach("a", hostname="alpha")
    veths = lab.veths()
    assert await net.attach("a", hostname="alpha") == first
    assert lab.veths() <= veths  # others may be going, in the kernel's own time; none has come
    assert await net.get("a") == first


async def test_another_call_with_the_same_id_is_refused(net: Calls) -> None:
    first = await net.attach("a")
    with pytest.raises(AlreadyExists, match="detach it first"):
        await net.attach("a", hostname="other")
    assert await net.get("a") == first


async def test_detach_takes_everything_back(lab: Lab, net: Calls) -> None:
    endpoint = await net.attach("a")
    before = (await net.network("bridge")).subnets[0]
    await net.detach("a")
    assert not exists(endpoint.netns_path)
    assert not exists(endpoint.hosts_path.rpartition("/")[0])
    assert lab.links().get(endpoint.interfaces[0].host_name, "") == "", "it is off the bridge at once"
    assert lab.settled(), "and gone soon after"
    after = (await net.network("bridge")).subnets[0]
    assert (after.used, after.free) == (before.used - 1, before.free + 1)
    with pytest.raises(NotFound):
        await net.get("a")


async def test_detaching_what_is_not_there_is_no_error_unless_it_must_exist(net: Calls) -> None:
    await net.detach("nobody")
    with pytest.raises(NotFound, match="nobody"):
        await net.detach("nobody", must_exist=True)


async def test_a_link_ends_though_somebody_holds_the_namespace(lab: Lab, net: Calls) -> None:
    endpoint = await net.attach("a")
    peer = await net.attach("b")
    with holding(endpoint.netns_path) as held:
        await net.detach("a")
        assert not reaches(held, address(peer), within_s=0.3)
        assert eventually(lambda: len(lab.veths()) == 1)


async def test_a_freed_address_is_not_given_out_at_once(net: Calls) -> None:
    first = address(await net.attach("a"))
    await net.detach("a")
    assert address(await net.attach("a")) != first


async def test_a_full_network_refuses_the_next_and_keeps_the_others(net: Calls) -> None:
    await net.create("small", "10.231.240.0/29")
    held = {address(await net.attach(f"e{number}", "small")) for number in range(5)}
    assert len(held) == 5
    with pytest.raises(ResourceExhausted, match="no free address"):
        await net.attach("late", "small")
    subnet = (await net.network("small")).subnets[0]
    assert (subnet.used, subnet.free) == (5, 0)
    await net.detach("e2")
    assert address(await net.attach("late", "small")) in held


async def test_a_fixed_address_is_given_or_refused_with_the_reason(net: Calls) -> None:
    fixed = [Attachment(ipv4_address="10.231.9.9", mac_address="02:00:00:00:09:09")]
    endpoint = await net.attach("a", networks=fixed)
    assert address(endpoint) == "10.231.9.9"
    assert "02:00:00:00:09:09" in command(endpoint.netns_path, "ip", "link", "show", "eth0")
    with pytest.raises(FailedPrecondition, match=r"10\.231\.9\.9 is taken"):
        await net.attach("b", networks=fixed)
    with pytest.raises(FailedPrecondition, match="gateway"):
        await net.attach("b", networks=[Attachment(ipv4_address=GATEWAY)])
    with pytest.raises(InvalidArgument, match=r"in no IPv4 subnet of network 'bridge' \(10\.231\.0\.0/20\)"):
        await net.attach("b", networks=[Attachment(ipv4_address="10.231.99.9")])
    with pytest.raises(InvalidArgument, match="not an IP address"):
        await net.attach("b", networks=[Attachment(ipv4_address="10.231.9")])


async def test_the_network_and_broadcast_addresses_cannot_be_had(net: Calls) -> None:
    for number in ("10.231.0.0", "10.231.15.255"):
        with pytest.raises((FailedPrecondition, InvalidArgument), match="cannot be used"):
            await net.attach("a", networks=[Attachment(ipv4_address=number)])


async def test_several_networks_give_interfaces_in_order_and_one_default_route(net: Calls) -> None:
    await net.create("inside", internal=True)
    await net.create("open")
    wanted = [Attachment(network="inside"), Attachment(network="open", interface="up0"), Attachment(network="bridge")]
    endpoint = await net.attach("a", networks=wanted)
    assert [(one.network, one.name) for one in endpoint.interfaces] == [
        ("inside", "eth0"),
        ("open", "up0"),
        ("bridge", "eth1"),
    ]
    routes = command(endpoint.netns_path, "ip", "route", "show", "default").splitlines()
    assert len(routes) == 1
    assert "dev up0" in routes[0]
    for interface in endpoint.interfaces:
        assert interface.ipv4_address in command(endpoint.netns_path, "ip", "addr", "show", interface.name)


async def test_none_has_a_loopback_only(lab: Lab, net: Calls) -> None:
    endpoint = await net.attach("a", mode=NONE)
    assert set(lab.links(Path(endpoint.netns_path))) == {"lo"}
    assert reaches(endpoint.netns_path, "127.0.0.1")
    assert lines(endpoint.hosts_path)[-1] == "127.0.0.1\ta"


async def test_host_has_the_hosts_namespace_and_files(net: Calls) -> None:
    endpoint = await net.attach("a", mode=IN_HOST)
    assert endpoint.netns_path == ""
    assert text(endpoint.hosts_path) == text("/etc/hosts")
    assert endpoint.hosts_path != "/etc/hosts", "a copy: the container may write to it"


async def test_container_shares_namespace_and_files(net: Calls) -> None:
    a = await net.attach("a", hostname="alpha")
    b = await net.attach("b", mode=IN_CONTAINER, container_endpoint="a")
    c = await net.attach("c", mode=IN_CONTAINER, container_endpoint="b")
    for other in (b, c):
        assert (other.netns_path, other.hosts_path) == (a.netns_path, a.hosts_path)
    await net.detach("b")
    await net.detach("c")
    assert reaches(a.netns_path, GATEWAY)
    with pytest.raises(NotFound, match="nobody"):
        await net.attach("d", mode=IN_CONTAINER, container_endpoint="nobody")


async def test_path_joins_a_namespace_of_somebody_else(lab: Lab, net: Calls) -> None:
    path = lab.place.directory / "theirs"
    create_pinned(path)
    try:
        endpoint = await net.attach("a", mode=IN_PATH, netns_path=str(path))
        assert endpoint.netns_path == str(path)
        await net.detach("a")
        assert path.is_file(), "it is not ours to remove"
        with pytest.raises(NotFound, match="not a network namespace"):
            await net.attach("b", mode=IN_PATH, netns_path=endpoint.hosts_path)
    finally:
        remove_pinned(path)


async def test_the_files_say_what_was_asked_for(net: Calls) -> None:
    endpoint = await net.attach(
        "a",
        hostname="alpha",
        domainname="example.org",
        dns=pb.DnsOptions(servers=["9.9.9.9"], search=["example.org"], options=["ndots:2"]),
        extra_hosts=[
            pb.HostEntry(name="db", address="10.9.8.7"),
            pb.HostEntry(name="host.corral.internal", address="host-gateway"),
        ],
    )
    assert lines(endpoint.hosts_path)[-3:] == [
        f"{address(endpoint)}\talpha.example.org alpha",
        "10.9.8.7\tdb",
        f"{GATEWAY}\thost.corral.internal",
    ]
    assert lines(endpoint.resolv_conf_path) == ["nameserver 9.9.9.9", "search example.org", "options ndots:2"]
    assert lines(endpoint.hostname_path) == ["alpha"]
    for path in (endpoint.hosts_path, endpoint.resolv_conf_path, endpoint.hostname_path):
        assert permissions(path) == 0o644


async def test_sysctls_are_those_of_the_namespace(lab: Lab, net: Calls) -> None:
    key = "net.ipv4.ip_unprivileged_port_start"
    before = command(lab.host, "cat", "/proc/sys/net/ipv4/ip_unprivileged_port_start")
    endpoint = await net.attach("a", sysctls={key: "42"})
    assert command(endpoint.netns_path, "cat", "/proc/sys/net/ipv4/ip_unprivileged_port_start").strip() == "42"
    assert command(lab.host, "cat", "/proc/sys/net/ipv4/ip_unprivileged_port_start") == before
    for name in ("kernel.panic", "net.ipv4", "net/../kernel/panic", "net.ipv4/../../kernel/panic"):
        with pytest.raises(InvalidArgument, match="not one of a network namespace"):
            await net.attach("b", sysctls={name: "1"})


async def test_an_attach_that_fails_leaves_nothing(lab: Lab, net: Calls) -> None:
    before = (await net.network("bridge")).subnets[0].used
    with pytest.raises(CorralError, match="no_such_parameter"):
        await net.attach("a", sysctls={"net.ipv4.no_such_parameter": "1"})
    assert await net.ids() == []
    assert lab.settled()
    assert (await net.network("bridge")).subnets[0].used == before
    assert not exists(lab.place.root / "network/endpoints/default/a")
    await net.attach("a")


@pytest.mark.parametrize(
    "fields",
    [
        {"hostname": "two words"},
        {"hostname": "a" * 65},
        {"hostname": "a\n10.0.0.1 evil"},
        {"domainname": "x y"},
        {"extra_hosts": [pb.HostEntry(name="a b", address="10.0.0.1")]},
        {"extra_hosts": [pb.HostEntry(name="a", address="nowhere")]},
        {"dns": pb.DnsOptions(servers=["8.8.8.8\nnameserver 6.6.6.6"])},
        {"dns": pb.DnsOptions(search=["a\nb"])},
        {"networks": [Attachment(network="no/such")]},
        {"networks": [Attachment(mac_address="ff:ff:ff:ff:ff:ff")]},
        {"networks": [Attachment(interface="lo")]},
        {"networks": [Attachment(interface="a/b")]},
        {"networks": [Attachment(), Attachment(network="bridge")]},
        {"networks": [Attachment(network="host")]},
        {"mode": NONE, "networks": [Attachment(network="bridge")]},
        {"mode": IN_CONTAINER},
        {"mode": IN_PATH},
        {"mode": IN_PATH, "netns_path": "relative"},
        {"mode": IN_HOST, "sysctls": {"net.ipv4.ip_forward": "0"}},
    ],
)
async def test_a_request_that_makes_no_sense_is_refused(net: Calls, fields: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument):
        await net.attach("a", **fields)
    assert await net.ids() == []


async def test_an_unknown_network_is_named(net: Calls) -> None:
    with pytest.raises(NotFound, match="there is no network 'nowhere'"):
        await net.attach("a", "nowhere")


async def test_the_same_id_in_two_namespaces_is_two_endpoints(net: Calls) -> None:
    mine = await net.attach("a")
    with in_namespace("other"):
        theirs = await net.attach("a")
        assert await net.ids() == ["a"]
        await net.detach("a")
    assert mine.netns_path != theirs.netns_path
    assert address(mine) != address(theirs)
    assert reaches(mine.netns_path, GATEWAY)
    assert await net.ids() == ["a"]


async def test_endpoints_are_listed_by_network_and_namespace(net: Calls) -> None:
    await net.create("one")
    await net.attach("a", "one")
    await net.attach("b")
    with in_namespace("other"):
        await net.attach("c")
    assert await net.ids() == ["a", "b"]
    assert await net.ids(network="one") == ["a"]
    assert await net.ids(all_namespaces=True) == ["a", "b", "c"]
    assert list((await net.network("one")).endpoints) == ["a"]


async def test_endpoints_hang_on_the_default_bridge(lab: Lab, net: Calls) -> None:
    endpoint = await net.attach("a")
    assert lab.links()[endpoint.interfaces[0].host_name] == BRIDGE
