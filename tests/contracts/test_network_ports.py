"""Published ports, by the packets that come to them: from outside, the host, its loopback, the container itself."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.netlab import (
    BRIDGE,
    HOST,
    OUTSIDE,
    READY,
    TABLE,
    Calls,
    Lab,
    address,
    command,
    eventually,
    port,
    tcp_call,
    tcp_server,
)
from support.requirements import needs

from corral.api.network.v1 import network_pb2 as pb
from corral.kernel.netns import in_namespace
from corral.rpc.errors import AlreadyExists, InvalidArgument, NotFound, Unavailable

pytestmark = needs("root", "netns", "nft", "nsenter", "ip")
LOOPBACK = "127.0.0.1"
COUNTING = """add table ip strangers; add chain ip strangers c { type filter hook forward priority 0; }
add rule ip strangers c udp dport 8080 ct state new counter"""


@contextlib.contextmanager
def udp_echo(where: str | Path, own: str, number: int = 7) -> Iterator[None]:
    """Answers each datagram with the address it came from."""

    def bound() -> socket.socket:
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.bind((own, number))
        return made

    server = in_namespace(Path(where), bound)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while data := server.recvfrom(100):
                if data[0] == b"end":
                    return
                server.sendto(data[1][0].encode(), data[1])

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield
    finally:
        in_namespace(Path(where), lambda: udp_send(own, number, b"end"))
        thread.join(5)
        server.close()


@contextlib.contextmanager
def tcp_ticker(where: str | Path, own: str, number: int = 7) -> Iterator[None]:
    """Goes on talking to each caller: who speaks first after a change makes all the difference to the kernel."""
    listener = in_namespace(Path(where), lambda: socket.create_server((own, number)))

    def talk(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while True:
                connection.sendall(b".")
                time.sleep(0.005)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=talk, args=(listener.accept()[0],), daemon=True).start()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


@contextlib.contextmanager
def tcp_listener(where: str | Path, target: str, number: int) -> Iterator[Callable[[], bool]]:
    """One connection to a ticker; each call tells whether it goes on."""
    caller = in_namespace(Path(where), lambda: socket.create_connection((target, number), 3))

    def goes_on() -> bool:
        time.sleep(0.05)
        try:
            caller.settimeout(0)
            with contextlib.suppress(BlockingIOError):
                while caller.recv(1 << 16):  # what was on its way
                    pass
            caller.settimeout(1)
            return caller.recv(1) == b"."
        except OSError:
            return False

    with caller:
        assert goes_on()
        yield goes_on


def udp_send(target: str, number: int, data: bytes) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(data, (target, number))


def udp_call(where: str | Path, target: str, number: int) -> str:
    def call() -> str:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as caller:
            caller.settimeout(2)
            caller.connect((target, number))
            caller.send(b"?")
            return caller.recv(100).decode()

    return in_namespace(Path(where), call)


def udp_socket() -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.settimeout(2)
    return made


async def test_a_port_is_reached_from_everywhere_and_the_outside_is_seen_as_itself(lab: Lab, net: Calls) -> None:
    a = await net.attach("a", ports=[port()])
    assert [(p.host_ip, p.host_port, p.container_port, p.protocol) for p in a.ports] == [("", 8080, 7, "tcp")]
    with tcp_server(a.netns_path, address(a)):
        assert tcp_call(lab.outside, HOST, 8080) == OUTSIDE
        assert tcp_call(lab.host, HOST, 8080) == HOST
        gateway = a.interfaces[0].ipv4_gateway
        assert tcp_call(lab.host, LOOPBACK, 8080) == gateway
        assert tcp_call(a.netns_path, HOST, 8080) == gateway  # the container itself
        b = await net.attach("b")
        assert tcp_call(b.netns_path, HOST, 8080) == gateway
        assert tcp_call(b.netns_path, gateway, 8080) == gateway


async def test_udp_goes_the_same_ways(lab: Lab, net: Calls) -> None:
    a = await net.attach("a", ports=[port(protocol="udp")])
    with udp_echo(a.netns_path, address(a)):
        assert udp_call(lab.outside, HOST, 8080) == OUTSIDE
        assert udp_call(lab.host, LOOPBACK, 8080) == a.interfaces[0].ipv4_gateway
        with pytest.raises(OSError, match="refused"):
            tcp_call(lab.outside, HOST, 8080)


async def test_containers_of_other_networks_may_come_by_the_hosts_port_only(lab: Lab, net: Calls) -> None:
    await net.create("one")
    await net.create("two")
    a, b = await net.attach("a", "one", ports=[port()]), await net.attach("b", "two")
    with tcp_server(a.netns_path, address(a)):
        assert tcp_call(b.netns_path, HOST, 8080)
        with pytest.raises(OSError, match="timed out"):
            tcp_call(b.netns_path, address(a))


async def test_a_port_of_one_address_is_not_reached_by_another(lab: Lab, net: Calls) -> None:
    a = await net.attach("a", ports=[port(host_ip=LOOPBACK)])
    with tcp_server(a.netns_path, address(a)):
        assert tcp_call(lab.host, LOOPBACK, 8080)
        with pytest.raises(OSError, match="refused"):
            tcp_call(lab.outside, HOST, 8080)
    await net.attach("b", ports=[port(host_ip=HOST)])  # the other address is free


async def test_ipv6_ports_lead_to_ipv6_addresses(lab: Lab, net: Calls) -> None:
    await net.create("six", "10.231.64.0/24", "fd00:231::/64", ipv6=True)
    command(lab.host, "ip", "addr", "add", "fd00:99::1/64", "dev", "uplink", "nodad")
    command(lab.outside, "ip", "addr", "add", "fd00:99::2/64", "dev", "world", "nodad")
    try:
        a = await net.attach("a", "six", ports=[port()])
        own = a.interfaces[0].ipv6_address.partition("/")[0]
        with tcp_server(a.netns_path, own):
            assert tcp_call(lab.outside, "fd00:99::1", 8080) == "fd00:99::2"
            assert tcp_call(lab.host, "fd00:99::1", 8080)
        with tcp_server(a.netns_path, address(a)):
            assert tcp_call(lab.outside, HOST, 8080) == OUTSIDE
    finally:
        command(lab.host, "ip", "addr", "del", "fd00:99::1/64", "dev", "uplink")
        command(lab.outside, "ip", "addr", "del", "fd00:99::2/64", "dev", "world")


async def test_a_port_that_nobody_named_is_chosen_and_stays(lab: Lab, net: Calls) -> None:
    a = await net.attach("a", ports=[port(host=0), port(inside=8, host=0)])
    first, second = (p.host_port for p in a.ports)
    assert first
    assert second
    assert first != second
    assert (await net.attach("a", ports=[port(host=0), port(inside=8, host=0)])).ports == a.ports
    by_container = {p.container_port: p.host_port for p in a.ports}
    with tcp_server(a.netns_path, address(a)):
        assert tcp_call(lab.outside, HOST, by_container[7]) == OUTSIDE


async def test_a_port_that_is_taken_is_refused_and_nothing_is_left(lab: Lab, net: Calls) -> None:
    await net.attach("a", ports=[port()])
    with pytest.raises(AlreadyExists, match="8080/tcp of the host is published by container a already"):
        await net.attach("b", ports=[port(host=8081), port()])
    with pytest.raises(AlreadyExists, match="container a already"):
        await net.attach("b", ports=[port(host_ip=HOST)])
    program = in_namespace(lab.host, lambda: socket.create_server(("0.0.0.0", 8082)))
    try:
        with pytest.raises(AlreadyExists, match="8082/tcp of the host is in use by another program"):
            await net.attach("b", ports=[port(host=8081), port(host=8082)])
    finally:
        program.close()
    assert await net.ids() == ["a"]
    assert eventually(lambda: len(lab.pins) == 1 + READY), lab.pins
    await net.attach("b", ports=[port(host=8081), port(host=8082), port(protocol="udp")])


async def test_a_published_port_is_not_to_be_had_by_programs_of_the_host(lab: Lab, net: Calls) -> None:
    await net.attach("a", ports=[port()])
    with pytest.raises(OSError, match="in use"):
        in_namespace(lab.host, lambda: socket.create_server(("0.0.0.0", 8080)))
    await net.detach("a")
    in_namespace(lab.host, lambda: socket.create_server(("0.0.0.0", 8080))).close()
    assert "8080" not in lab.ruleset()


async def test_the_hosts_loopback_services_are_closed_to_containers(lab: Lab, net: Calls) -> None:
    """CVE-2020-8558's class: with route_localnet a neighbour could send to 127.0.0.1."""
    a = await net.attach("a", ports=[port()])
    command(a.netns_path, "sysctl", "-qw", "net.ipv4.conf.all.route_localnet=1")
    command(a.netns_path, "ip", "route", "add", "127.0.0.9/32", "via", a.interfaces[0].ipv4_gateway, "dev", "eth0")
    command(a.netns_path, "ip", "route", "del", "local", "127.0.0.0/8", "dev", "lo", "table", "local")
    with tcp_server(lab.host, "127.0.0.9", 9) as came, pytest.raises(OSError, match="timed out"):
        in_namespace(Path(a.netns_path), lambda: _from(address(a), "127.0.0.9", 9))
    assert came == []


def _from(own: str, target: str, number: int) -> None:
    socket.create_connection((target, number), 1.0, source_address=(own, 0)).close()


async def test_a_port_of_the_loopback_is_closed_to_neighbours_who_send_there(lab: Lab, net: Calls) -> None:
    a = await net.attach("a", ports=[port(host_ip=LOOPBACK)])
    command(lab.outside, "sysctl", "-qw", "net.ipv4.conf.all.route_localnet=1")
    command(lab.outside, "ip", "route", "add", "127.0.0.0/8", "via", HOST, "dev", "world", "table", "9")
    command(lab.outside, "ip", "rule", "add", "to", LOOPBACK, "table", "9", "priority", "0")
    command(lab.outside, "ip", "rule", "del", "priority", "0", "table", "local")
    try:
        with tcp_server(a.netns_path, address(a)) as came:
            with pytest.raises(OSError, match="timed out"):
                in_namespace(lab.outside, lambda: _from(OUTSIDE, LOOPBACK, 8080))
            assert came == []
            assert tcp_call(lab.host, LOOPBACK, 8080)
    finally:
        command(lab.outside, "ip", "rule", "add", "priority", "0", "table", "local")
        command(lab.outside, "ip", "rule", "del", "to", LOOPBACK, "table", "9")


async def test_a_flow_of_datagrams_goes_where_its_port_leads_now(lab: Lab, net: Calls) -> None:
    a = await net.attach("a", ports=[port(protocol="udp")])

    def socket_of_one_flow() -> socket.socket:
        caller = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        caller.settimeout(1)
        caller.connect((HOST, 8080))
        return caller

    with (
        contextlib.closing(in_namespace(lab.outside, socket_of_one_flow)) as caller,
        udp_echo(a.netns_path, address(a)),
    ):

        def answered() -> bool:
            try:
                caller.send(b"?")
                return caller.recv(100) == OUTSIDE.encode()
            except OSError:
                return False

        assert answered()
        await net.endpoints.Unpublish(pb.UnpublishRequest(endpoint_id="a"))
        assert not answered()
        await net.endpoints.Publish(pb.PublishRequest(endpoint_id="a", ports=[port(protocol="udp")]))
        assert answered()


async def test_ports_that_come_and_go_cut_no_connection_to_a_server_elsewhere_of_that_number(
    lab: Lab, net: Calls
) -> None:
    a = await net.attach("a")
    await net.attach("b")
    with tcp_ticker(lab.outside, OUTSIDE, 8080), tcp_listener(a.netns_path, OUTSIDE, 8080) as goes_on:
        await net.endpoints.Publish(pb.PublishRequest(endpoint_id="b", ports=[port()]))
        assert goes_on()
        await net.endpoints.Unpublish(pb.UnpublishRequest(endpoint_id="b"))
        assert goes_on()


async def test_ports_that_come_and_go_leave_datagrams_to_a_server_elsewhere_alone(lab: Lab, net: Calls) -> None:
    a = await net.attach("a")
    await net.attach("b")
    ports = [port(protocol="udp")]
    command(lab.host, "nft", COUNTING)
    try:
        with udp_echo(lab.outside, OUTSIDE, 8080), in_namespace(Path(a.netns_path), udp_socket) as caller:
            caller.connect((OUTSIDE, 8080))

            def answered() -> bool:
                caller.send(b"?")
                return bool(caller.recv(100))

            assert answered()
            await net.endpoints.Publish(pb.PublishRequest(endpoint_id="b", ports=ports))
            assert answered()
            await net.endpoints.Unpublish(pb.UnpublishRequest(endpoint_id="b", ports=ports))
            assert answered()
        assert "counter packets 1 " in command(lab.host, "nft", "list", "table", "ip", "strangers")
    finally:
        command(lab.host, "nft", "delete", "table", "ip", "strangers")


async def test_a_port_that_is_withdrawn_cuts_what_came_by_it_and_nothing_else(lab: Lab, net: Calls) -> None:
    ports = [port(), port(host=8081), port(host=8082, host_ip=HOST), port(host=8082, host_ip=LOOPBACK)]
    a = await net.attach("a", ports=ports)
    with (
        tcp_ticker(a.netns_path, address(a)),
        tcp_listener(lab.outside, HOST, 8080) as one,
        tcp_listener(lab.outside, HOST, 8081) as other,
        tcp_listener(lab.outside, HOST, 8082) as by_address,
        tcp_listener(lab.host, LOOPBACK, 8082) as by_loopback,
        tcp_listener(lab.host, address(a), 7) as direct,
    ):
        gone = [ports[0], ports[3]]
        await net.endpoints.Unpublish(pb.UnpublishRequest(endpoint_id="a", ports=gone))
        assert not one()
        assert other()
        assert by_address()
        assert not by_loopback()
        assert direct()


async def test_what_a_server_of_the_host_has_left_behind_is_no_use_of_its_port(lab: Lab, net: Calls) -> None:
    with tcp_server(lab.host, HOST, 8080):
        assert tcp_call(lab.outside, HOST, 8080)  # the server hangs up first, and its end lingers
    await net.attach("a", ports=[port()])


async def test_ports_of_a_live_endpoint_come_and_go(lab: Lab, net: Calls) -> None:
    a = await net.attach("a")
    with tcp_server(a.netns_path, address(a)):
        published = await net.endpoints.Publish(pb.PublishRequest(endpoint_id="a", ports=[port(), port(host=8081)]))
        assert {p.host_port for p in published.ports} == {8080, 8081}
        assert tcp_call(lab.outside, HOST, 8081) == OUTSIDE
        again = await net.endpoints.Publish(pb.PublishRequest(endpoint_id="a", ports=[port()]))
        assert len(again.ports) == 2
        left = await net.endpoints.Unpublish(pb.UnpublishRequest(endpoint_id="a", ports=[port(host=8081)]))
        assert [p.host_port for p in left.ports] == [8080]
        with pytest.raises(OSError, match="refused"):
            tcp_call(lab.outside, HOST, 8081)
        assert tcp_call(lab.outside, HOST, 8080) == OUTSIDE
        assert not (await net.endpoints.Unpublish(pb.UnpublishRequest(endpoint_id="a"))).ports
    with pytest.raises(NotFound):
        await net.endpoints.Publish(pb.PublishRequest(endpoint_id="b", ports=[port()]))


async def test_what_was_withdrawn_is_published_by_the_same_attach(lab: Lab, net: Calls) -> None:
    a = await net.attach("a", ports=[port(host=0)])
    await net.endpoints.Unpublish(pb.UnpublishRequest(endpoint_id="a"))
    await net.attach("b", ports=[port()])
    again = await net.attach("a", ports=a.ports)
    assert again.ports == a.ports
    assert again.interfaces == a.interfaces


async def test_ports_outlive_kill_9_and_are_held_again(lab: Lab, net: Calls) -> None:
    a = await net.attach("a", ports=[port(), port(host=8081, host_ip=HOST)])
    with tcp_server(a.netns_path, address(a)):
        lab.corrald.kill9()
        assert tcp_call(lab.outside, HOST, 8080) == OUTSIDE
        command(lab.host, "nft", "delete", "table", "inet", TABLE)
        lab.corrald.start()
        assert await net.get("a") == a

        def answers() -> bool:
            with contextlib.suppress(OSError):
                return tcp_call(lab.outside, HOST, 8080) == tcp_call(lab.outside, HOST, 8081) == OUTSIDE
            return False

        assert eventually(answers)

    def is_held() -> bool:
        try:
            in_namespace(lab.host, lambda: socket.create_server(("0.0.0.0", 8080))).close()
        except OSError:
            return True
        return False

    assert eventually(is_held)


@pytest.mark.parametrize(
    "point", ["network.publish.before_rules", "network.publish.after_rows", "network.withdraw.after_rules"]
)
async def test_a_kill_on_the_way_leaves_no_port_half_published(lab: Lab, point: str) -> None:
    async with lab.calls() as net:
        await net.attach("a", ports=[port()] if "withdraw" in point else [])
    lab.corrald.restart_with({"CORRAL_FAILPOINTS": f"{point}=kill"})
    async with lab.calls() as net:
        call = net.endpoints.Unpublish if "withdraw" in point else net.endpoints.Publish
        kind = pb.UnpublishRequest if "withdraw" in point else pb.PublishRequest
        with pytest.raises(Unavailable):
            await call(kind(endpoint_id="a", ports=[port()]))  # type: ignore[arg-type]
    lab.corrald.revive()
    async with lab.calls() as net:
        known = {p.host_port for p in (await net.get("a")).ports}
        assert eventually(lambda: (8080 in known) == ("8080" in lab.ruleset()))
        await net.detach("a")
        assert "8080" not in lab.ruleset()


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"mode": pb.AttachRequest.MODE_NONE, "ports": [port()]}, "mode none"),
        ({"mode": pb.AttachRequest.MODE_HOST, "ports": [port()]}, "mode host"),
        ({"ports": [port(), port(inside=9)]}, "named twice"),
        ({"ports": [port(protocol="icmp")]}, "no protocol"),
        ({"ports": [port(inside=0)]}, "1 to 65535"),
        ({"ports": [port(host_ip="192.0.2.77")]}, "no address of this host"),
    ],
)
async def test_what_cannot_be_published_is_refused_and_leaves_nothing(
    lab: Lab, net: Calls, fields: dict[str, object], word: str
) -> None:
    with pytest.raises(InvalidArgument, match=word):
        await net.attach("a", **fields)
    assert await net.ids() == []
    assert eventually(lambda: len(lab.pins) == READY), lab.pins
    assert "8080" not in lab.ruleset()


async def test_an_internal_network_publishes_nothing(lab: Lab, net: Calls) -> None:
    await net.create("inside", internal=True)
    with pytest.raises(InvalidArgument, match="a way out"):
        await net.attach("a", "inside", ports=[port()])
    assert await net.ids() == []
    assert BRIDGE
