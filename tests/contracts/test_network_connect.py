"""Endpoints that stand put into networks and taken out, by the packets they send; and what a kill on the way leaves."""

import os
from pathlib import Path

import pytest
from support.netlab import (
    GATEWAY,
    HOST,
    OUTSIDE,
    Calls,
    Lab,
    address,
    command,
    eventually,
    lines,
    reaches,
    tcp_call,
    tcp_server,
    text,
)
from support.requirements import needs

from corral.api.network.v1 import network_pb2 as pb
from corral.api.types.v1.types_pb2 import EventsRequest
from corral.rpc.errors import AlreadyExists, CorralError, FailedPrecondition, InvalidArgument, NotFound

pytestmark = needs("root", "netns", "nft", "nsenter", "ip")
NONE, IN_HOST = pb.AttachRequest.MODE_NONE, pb.AttachRequest.MODE_HOST


async def connect(net: Calls, name: str, network: str, **fields: object) -> pb.Endpoint:
    attachment = pb.NetworkAttachment(network=network, **fields)  # type: ignore[arg-type]
    return await net.endpoints.Connect(pb.ConnectRequest(endpoint_id=name, network=attachment))


async def disconnect(net: Calls, name: str, network: str) -> pb.Endpoint:
    return await net.endpoints.Disconnect(pb.DisconnectRequest(endpoint_id=name, network=network))


def networks(endpoint: pb.Endpoint) -> list[tuple[str, str]]:
    return [(interface.network, interface.name) for interface in endpoint.interfaces]


def default_route(endpoint: pb.Endpoint) -> str:
    return command(endpoint.netns_path, "ip", "route", "show", "default").strip()


def ip(interface: pb.Interface) -> str:
    return interface.ipv4_address.split("/")[0]


def append(path: str, words: str) -> None:
    with Path(path).open("a") as file:
        file.write(words)


async def topics(net: Calls, name: str) -> list[str]:
    events = net.networks.Events(EventsRequest(after=0, no_follow=True))
    return [event.topic async for response in events for event in response.events if event.subject == name]


async def test_a_live_endpoint_comes_into_a_network_and_goes_again(lab: Lab, net: Calls) -> None:
    await net.create("one")
    other = await net.attach("b", "one")
    first = await net.attach("a")
    assert not reaches(first.netns_path, address(other))
    connected = await connect(net, "a", "one")
    assert networks(connected) == [("bridge", "eth0"), ("one", "eth1")]
    assert connected.netns_path == first.netns_path
    assert reaches(first.netns_path, address(other))
    assert reaches(first.netns_path, OUTSIDE)
    assert default_route(first).startswith(f"default via {GATEWAY} dev eth0")
    assert await net.get("a") == connected
    left = await disconnect(net, "a", "one")
    assert left == first
    assert not reaches(first.netns_path, address(other))
    assert "eth1" not in command(first.netns_path, "ip", "link")
    assert {"endpoint.connected", "endpoint.disconnected"} <= set(await topics(net, "a"))


async def test_the_same_call_again_gives_the_same_answer_and_another_is_refused(lab: Lab, net: Calls) -> None:
    await net.create("one", "10.232.5.0/24")
    await net.attach("a")
    connected = await connect(net, "a", "one", ipv4_address="10.232.5.77", aliases=["x"])
    assert ip(connected.interfaces[1]) == "10.232.5.77"
    assert await connect(net, "a", "one", ipv4_address="10.232.5.77") == connected
    with pytest.raises(AlreadyExists, match="disconnect it first"):
        await connect(net, "a", "one", ipv4_address="10.232.5.78")
    assert await net.get("a") == connected


async def test_the_way_out_moves_to_the_network_that_is_left(lab: Lab, net: Calls) -> None:
    made = await net.create("one")
    await net.attach("a")
    await connect(net, "a", "one")
    left = await disconnect(net, "a", "bridge")
    assert networks(left) == [("one", "eth1")]
    assert default_route(left).startswith(f"default via {made.subnets[0].gateway} dev eth1")
    assert reaches(left.netns_path, OUTSIDE)
    back = await connect(net, "a", "bridge")
    assert networks(back) == [("one", "eth1"), ("bridge", "eth0")]
    assert default_route(back).startswith(f"default via {made.subnets[0].gateway} dev eth1")


async def test_from_none_to_a_network_and_back(lab: Lab, net: Calls) -> None:
    alone = await net.attach("a", mode=NONE)
    connected = await connect(net, "a", "bridge")
    assert connected.mode == pb.AttachRequest.MODE_NETWORKS
    assert reaches(alone.netns_path, OUTSIDE)
    left = await disconnect(net, "a", "bridge")
    assert left == alone
    assert not reaches(alone.netns_path, GATEWAY)
    assert await net.attach("a", mode=NONE) == alone


async def test_hosts_has_its_lines_and_keeps_what_the_container_wrote(lab: Lab, net: Calls) -> None:
    await net.create("one")
    first = await net.attach("a", hostname="alpha")
    append(first.hosts_path, "192.0.2.1 mine\n")
    mounted = os.open(first.hosts_path, os.O_RDONLY)
    connected = await connect(net, "a", "one")
    line = f"{ip(connected.interfaces[1])}\talpha"
    assert f"{line}\n" in os.read(mounted, 4096).decode()  # the very file, as a container has it mounted
    os.close(mounted)
    await disconnect(net, "a", "one")
    left = lines(first.hosts_path)
    assert line not in left
    assert "192.0.2.1 mine" in left
    assert f"{address(first)}\talpha" in left


async def test_names_of_a_network_are_asked_for_there_once_it_is_connected(lab: Lab, net: Calls) -> None:
    made = await net.create("one")
    first = await net.attach("a")
    before = text(first.resolv_conf_path)
    await connect(net, "a", "one")
    assert f"nameserver {made.subnets[0].gateway}\n" in text(first.resolv_conf_path)
    await disconnect(net, "a", "one")
    assert text(first.resolv_conf_path) == before


async def test_published_ports_follow_and_are_not_left_leading_nowhere(lab: Lab, net: Calls) -> None:
    await net.create("one")
    await net.create("dark", internal=True)
    endpoint = await net.attach("a", ports=[pb.PortMapping(container_port=80, host_port=8080)])
    await connect(net, "a", "dark")
    with pytest.raises(FailedPrecondition, match="connect it to another network with a way out first"):
        await disconnect(net, "a", "bridge")
    await connect(net, "a", "one")
    await disconnect(net, "a", "bridge")
    with tcp_server(endpoint.netns_path, "0.0.0.0", 80):
        assert tcp_call(lab.outside, HOST, 8080) == OUTSIDE


async def test_what_cannot_be_is_refused_and_changes_nothing(lab: Lab, net: Calls) -> None:
    await net.create("one", "10.232.6.0/24")
    await net.attach("b", "one")
    first = await net.attach("a")
    links = lab.veths()
    taken = address(await net.get("b"))
    with pytest.raises(FailedPrecondition, match="is taken"):
        await connect(net, "a", "one", ipv4_address=taken)
    with pytest.raises(InvalidArgument, match="in no IPv4 subnet"):
        await connect(net, "a", "one", ipv4_address="10.1.1.1")
    with pytest.raises(NotFound, match="nowhere"):
        await connect(net, "a", "nowhere")
    with pytest.raises(InvalidArgument, match="mode of its own"):
        await connect(net, "a", "host")
    with pytest.raises(NotFound, match="not in network 'one'"):
        await disconnect(net, "a", "one")
    with pytest.raises(NotFound, match="no endpoint 'x'"):
        await connect(net, "x", "one")
    await net.attach("h", mode=IN_HOST)
    with pytest.raises(FailedPrecondition, match="no network of its own"):
        await connect(net, "h", "one")
    assert await net.get("a") == first
    assert lab.veths() == links
    assert (await net.network("one")).subnets[0].used == 1


async def test_the_attach_that_names_other_networks_makes_it_so(lab: Lab, net: Calls) -> None:
    await net.create("one")
    await net.create("two")
    first = await net.attach("a", "one", hostname="alpha")
    moved = await net.attach("a", "two", hostname="alpha")
    assert [name for name, _ in networks(moved)] == ["two"]
    assert moved.netns_path == first.netns_path
    assert await net.attach("a", "two", hostname="alpha") == moved
    with pytest.raises(AlreadyExists, match="detach it first"):
        await net.attach("a", "two", hostname="beta")


async def test_the_attach_that_names_a_network_in_another_way_connects_it_anew(lab: Lab, net: Calls) -> None:
    await net.create("side", "10.231.64.0/24")
    await net.attach("a", "bridge", "side")
    asked = [pb.NetworkAttachment(network="side", ipv4_address="10.231.64.77"), pb.NetworkAttachment(network="bridge")]
    again = await net.attach("a", networks=asked)
    assert [address(again, number) for number in (0, 1)].count("10.231.64.77") == 1
    assert reaches(again.netns_path, "10.231.64.1")
    assert reaches(lab.host, "10.231.64.77")
    assert await net.attach("a", networks=asked) == again


async def test_the_network_can_be_removed_once_nobody_is_in_there(lab: Lab, net: Calls) -> None:
    await net.create("one")
    await net.attach("a")
    await connect(net, "a", "one")
    with pytest.raises(FailedPrecondition):
        await net.remove("one")
    await disconnect(net, "a", "one")
    await net.remove("one")


CONNECTING = ["network.connect.after_row", "network.connect.after_plug", "network.connect.before_request"]


def interrupted(lab: Lab, failpoint: str) -> None:
    lab.corrald.stop()
    lab.corrald.start(environment={"CORRAL_FAILPOINTS": f"{failpoint}@1"})


@pytest.mark.parametrize("action", ["kill", "error"])
@pytest.mark.parametrize("point", CONNECTING)
async def test_a_connect_cut_short_never_was(lab: Lab, point: str, action: str) -> None:
    name = f"{point}-{action}"
    assert lab.settled()  # links of earlier tests go in the kernel's own time
    async with lab.calls() as net:
        await net.create("one")
        first = await net.attach(name)
        links, files = lab.veths(), (text(first.hosts_path), text(first.resolv_conf_path))
    interrupted(lab, f"{point}={action}")
    async with lab.calls() as net:
        with pytest.raises(CorralError):
            await connect(net, name, "one")
    if action == "kill":
        lab.corrald.kill9()
        lab.corrald.start()
    async with lab.calls() as net:
        assert eventually(lambda: lab.veths() == links)
        assert await net.get(name) == first
        assert (text(first.hosts_path), text(first.resolv_conf_path)) == files
        assert (await net.network("one")).subnets[0].used == 0
        assert "endpoint.connected" not in await topics(net, name)
        connected = await connect(net, name, "one")
        assert reaches(connected.netns_path, (await net.network("one")).subnets[0].gateway)
        await net.clear()


@pytest.mark.parametrize("point", ["network.disconnect.after_unplug", "network.disconnect.before_rows"])
async def test_a_disconnect_cut_short_is_still_connected(lab: Lab, point: str) -> None:
    async with lab.calls() as net:
        await net.create("one")
        other = await net.attach("b", "one")
        await net.attach("a")
        connected = await connect(net, "a", "one")
        files = (lines(connected.hosts_path), text(connected.resolv_conf_path))
    interrupted(lab, f"{point}=kill")
    async with lab.calls() as net:
        with pytest.raises(CorralError):
            await disconnect(net, "a", "one")
    lab.corrald.kill9()
    lab.corrald.start()
    async with lab.calls() as net:
        assert await net.get("a") == connected
        assert eventually(lambda: connected.interfaces[1].host_name in lab.veths())
        assert (lines(connected.hosts_path), text(connected.resolv_conf_path)) == files
        assert reaches(connected.netns_path, address(other))
        left = await disconnect(net, "a", "one")
        assert networks(left) == [("bridge", "eth0")]
        await net.clear()
