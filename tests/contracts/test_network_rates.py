"""What containers may receive and send, by how much comes through; and their further routes, by packets."""

import contextlib
import json
import socket
import threading
import time
from pathlib import Path

import pytest
from support.netlab import OUTSIDE, Calls, Lab, address, command, eventually, reaches
from support.requirements import needs

from corral.api.network.v1 import network_pb2 as pb
from corral.kernel.netns import in_namespace
from corral.rpc.errors import CorralError, InvalidArgument

pytestmark = needs("root", "netns", "nft", "nsenter", "ip", "tc")
SECONDS = 1.5
SLOW, FAST = 8_000_000, 40_000_000


def flood(source: str | Path, sink: str | Path, target: str, number: int = 9000) -> float:
    """Bits per second that come through from one namespace to an address of another."""
    listener = in_namespace(Path(sink), lambda: socket.create_server((target, number)))
    came = 0

    def receive() -> None:
        nonlocal came
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(1 << 16):
                came += len(data)

    thread = threading.Thread(target=receive, daemon=True)
    thread.start()
    caller = in_namespace(Path(source), lambda: socket.create_connection((target, number), 3))
    begun, chunk = time.monotonic(), bytes(1 << 14)
    caller.settimeout(0.2)
    with caller:
        while time.monotonic() < begun + SECONDS:
            with contextlib.suppress(TimeoutError):
                caller.send(chunk)
        seen, took = came, time.monotonic() - begun
        listener.close()
    thread.join(10)
    return seen * 8 / took


async def limited(net: Calls, name: str, network: str = "bridge", **fields: object) -> pb.Endpoint:
    return await net.attach(name, networks=[pb.NetworkAttachment(network=network, **fields)])  # type: ignore[arg-type]


def is_about(measured: float, rate: float) -> bool:
    return 0.5 * rate < measured < 1.3 * rate


async def test_each_way_has_a_limit_of_its_own(lab: Lab, net: Calls) -> None:
    a = await limited(net, "a", receive_bps=FAST, send_bps=SLOW)
    sent = flood(a.netns_path, lab.outside, OUTSIDE)
    assert is_about(sent, SLOW), sent
    b = await net.attach("b")
    received = flood(b.netns_path, a.netns_path, address(a), 9001)
    assert is_about(received, FAST), received


async def test_who_is_not_limited_is_not(lab: Lab, net: Calls) -> None:
    await limited(net, "a", receive_bps=SLOW, send_bps=SLOW)
    b = await net.attach("b")
    assert flood(b.netns_path, lab.outside, OUTSIDE, 9002) > 2 * FAST


async def test_a_limit_outlives_its_pair(lab: Lab, net: Calls) -> None:
    a = await limited(net, "a", receive_bps=FAST, send_bps=SLOW)
    command(lab.host, "ip", "link", "delete", a.interfaces[0].host_name)
    assert eventually(lambda: reaches(a.netns_path, OUTSIDE, within_s=0.3))
    for where, link in ((lab.host, a.interfaces[0].host_name), (a.netns_path, "eth0")):
        [qdisc] = json.loads(command(where, "tc", "-j", "qdisc", "show", "dev", link))
        assert qdisc["kind"] == "tbf"


def limits(where: str | Path, link: str) -> str:
    return command(where, "tc", "qdisc", "show", "dev", link)


async def test_a_limit_is_changed_and_lifted_while_calls_go_on(lab: Lab, net: Calls) -> None:
    first = await limited(net, "a", receive_bps=FAST, send_bps=SLOW)
    assert await limited(net, "a", receive_bps=FAST, send_bps=SLOW) == first
    before = first.interfaces[0].host_name, command(first.netns_path, "ip", "-o", "link")
    again = await limited(net, "a", receive_bps=SLOW, send_bps=FAST)
    assert (again.interfaces[0].receive_bps, again.interfaces[0].send_bps) == (SLOW, FAST)
    sent = flood(again.netns_path, lab.outside, OUTSIDE, 9003)
    assert is_about(sent, FAST), sent
    assert f"rate {SLOW // 1_000_000}Mbit" in limits(lab.host, again.interfaces[0].host_name)
    lifted = await limited(net, "a")
    assert (lifted.interfaces[0].receive_bps, lifted.interfaces[0].send_bps) == (0, 0)
    assert "tbf" not in limits(lab.host, lifted.interfaces[0].host_name) + limits(lifted.netns_path, "eth0")
    after = lifted.interfaces[0].host_name, command(first.netns_path, "ip", "-o", "link")
    assert after == (before[0], before[1].replace("qdisc tbf", "qdisc noqueue"))  # the same pair, never down


async def test_a_change_that_a_kill_cut_short_is_made_by_the_same_call_again(lab: Lab, net: Calls) -> None:
    await limited(net, "a", send_bps=SLOW)
    lab.corrald.stop()
    lab.corrald.start(environment={"CORRAL_FAILPOINTS": "network.rates.after_change=kill@1"})
    with pytest.raises(CorralError):
        async with lab.calls() as calls:
            await limited(calls, "a")
    lab.corrald.kill9()
    lab.corrald.start()
    async with lab.calls() as calls:
        a = await limited(calls, "a")
        assert "tbf" not in limits(a.netns_path, "eth0")
        a = await limited(calls, "a", send_bps=FAST)
        assert f"rate {FAST // 1_000_000}Mbit" in limits(a.netns_path, "eth0")


def rated(send_bps: int, *networks: str, receive_bps: int = 0) -> list[pb.NetworkAttachment]:
    return [pb.NetworkAttachment(network=one, send_bps=send_bps, receive_bps=receive_bps) for one in networks]


async def test_limits_of_several_networks_are_changed_together_or_not_at_all(lab: Lab, net: Calls) -> None:
    await net.create("one", "10.231.102.0/24")
    await net.create("two", "10.231.103.0/24")
    await net.create("lan", driver="macvlan", subnets=[])
    a = await net.attach("a", networks=rated(SLOW, "one", "two", "lan"))
    with pytest.raises(InvalidArgument, match="cannot be limited"):  # of the last one
        await net.attach("a", networks=rated(FAST, "one", "two", "lan", receive_bps=FAST))
    assert "tbf" not in limits(lab.host, a.interfaces[0].host_name)
    with pytest.raises(InvalidArgument, match="cannot be limited"):  # of one that it is to be in
        await net.attach("a", networks=[*rated(FAST, "one", "two"), *rated(0, "lan", receive_bps=FAST)])
    lab.corrald.stop()
    lab.corrald.start(environment={"CORRAL_FAILPOINTS": "network.rates.after_change=error@2"})
    async with lab.calls() as calls:
        with pytest.raises(CorralError, match="after_change"):
            await calls.attach("a", networks=rated(FAST, "one", "two", "lan"))
        assert {one.send_bps for one in (await calls.get("a")).interfaces} == {SLOW}
    for name in ("eth0", "eth1", "eth2"):
        assert f"rate {SLOW // 1_000_000}Mbit" in limits(a.netns_path, name)
    lab.corrald.stop()
    lab.corrald.start()
    async with lab.calls() as calls:
        again = await calls.attach("a", networks=rated(FAST, "one", "two", "lan"))
        assert {one.send_bps for one in again.interfaces} == {FAST}
    for name in ("eth0", "eth1", "eth2"):
        assert f"rate {FAST // 1_000_000}Mbit" in limits(a.netns_path, name)


async def test_a_macvlan_network_limits_what_is_sent(net: Calls) -> None:
    await net.create("lan", driver="macvlan", subnets=[])
    with pytest.raises(InvalidArgument, match="cannot be limited"):
        await limited(net, "a", "lan", receive_bps=SLOW)
    await limited(net, "a", "lan")
    with pytest.raises(InvalidArgument, match="cannot be limited"):
        await limited(net, "a", "lan", receive_bps=SLOW)
    a, b = await limited(net, "a", "lan", send_bps=SLOW), await limited(net, "b", "lan")
    assert eventually(lambda: reaches(a.netns_path, address(b), within_s=0.3))
    sent = flood(a.netns_path, b.netns_path, address(b))
    assert is_about(sent, SLOW), sent


async def test_a_further_route_leads_by_a_container_that_routes(lab: Lab, net: Calls) -> None:
    await net.create("one", "10.231.100.0/24")
    await net.create("two", "10.231.101.0/24")
    router = await net.attach("router", "one", "two")
    in_namespace(Path(router.netns_path), lambda: Path("/proc/sys/net/ipv4/ip_forward").write_text("1"))
    ways = {
        "a": ("one", "10.231.101.0/24", address(router, 0)),
        "b": ("two", "10.231.100.0/24", address(router, 1)),
    }
    made = {}
    for name, (network, destination, gateway) in ways.items():
        routes = [pb.Route(destination=destination, gateway=gateway)]
        made[name] = await limited(net, name, network, routes=routes)
    assert reaches(made["a"].netns_path, address(made["b"]))
    assert reaches(made["a"].netns_path, OUTSIDE)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"send_bps": 10}, "is not between"),
        ({"routes": [pb.Route(destination="10.9.0.0", gateway="10.231.0.1")]}, "destination of a route"),
        ({"routes": [pb.Route(destination="10.9.0.0/16", gateway="fd00::1")]}, "is not an IPv4 address"),
        ({"routes": [pb.Route(destination="10.9.0.0/16", gateway="10.9.0.1")]}, "is not in network 'bridge'"),
    ],
)
async def test_what_cannot_be_is_refused_in_a_sentence(net: Calls, fields: dict[str, object], complaint: str) -> None:
    with pytest.raises(InvalidArgument, match=complaint):
        await limited(net, "a", **fields)
    assert await net.ids() == []
