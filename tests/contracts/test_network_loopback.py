"""Published ports at [::1] of the host, which a proxy serves: whose bytes come where, and whose ports they are."""

import asyncio
import contextlib
import os
import socket
import threading
import time
from pathlib import Path

import pytest
from support.hogs import open_files
from support.loopback import (
    LOOPBACK,
    answers,
    asked,
    call,
    counts,
    datagrams,
    echo,
    goes_on,
    is_free,
    refused,
    served,
    the_proxy,
    udp_echo,
)
from support.netlab import HOST, OUTSIDE, Calls, Lab, address, command, eventually, port, tcp_call, tcp_server
from support.requirements import needs
from support.sweep import proxies

from corral.api.network.v1 import network_pb2 as pb
from corral.rpc.errors import AlreadyExists, InvalidArgument

pytestmark = needs("root", "netns", "nft", "nsenter", "ip")


@pytest.mark.parametrize("host_ip", ["", "::", "::1"])
async def test_a_port_of_a_container_that_has_ipv4_alone_is_reached_there(lab: Lab, net: Calls, host_ip: str) -> None:
    a = await net.attach("a", ports=[port(host_ip=host_ip)])
    with tcp_server(a.netns_path, address(a)):
        assert tcp_call(lab.host, LOOPBACK, 8080) == a.interfaces[0].ipv4_gateway
        if not host_ip:
            assert tcp_call(lab.outside, HOST, 8080) == OUTSIDE


@pytest.mark.parametrize("host_ip", ["", "::", "::1"])
async def test_one_that_has_ipv6_is_called_by_that(lab: Lab, net: Calls, host_ip: str) -> None:
    await net.create("six", "10.231.64.0/24", "fd00:231::/64", ipv6=True)
    a = await net.attach("a", "six", ports=[port(host_ip=host_ip)])
    with tcp_server(a.netns_path, a.interfaces[0].ipv6_address.partition("/")[0]):
        assert tcp_call(lab.host, LOOPBACK, 8080) == "fd00:231::1"


async def test_datagrams_of_each_caller_come_from_one_port_and_are_answered_to_that_caller(
    lab: Lab, net: Calls
) -> None:
    a = await net.attach("a", ports=[port(protocol="udp")])
    with (
        udp_echo(a.netns_path, address(a)),
        datagrams(lab) as one,
        datagrams(lab) as other,
    ):
        first = asked(one)
        assert first == asked(one)
        assert first[0] == a.interfaces[0].ipv4_gateway
        assert asked(other)[1] != first[1]
        assert asked(one, bytes(60000))[2] == "60000"


async def test_a_server_that_comes_later_gets_the_datagrams_of_who_called_before(lab: Lab, net: Calls) -> None:
    a = await net.attach("a", ports=[port(protocol="udp")])
    with datagrams(lab) as caller:
        for _ in range(3):
            caller.send(b"?")
            await asyncio.sleep(0.02)
        with udp_echo(a.netns_path, address(a)):
            assert asked(caller)[0] == a.interfaces[0].ipv4_gateway


async def test_only_the_hosts_own_loopback_is_listened_on(lab: Lab, net: Calls) -> None:
    command(lab.host, "ip", "addr", "add", "fd00:99::1/64", "dev", "uplink", "nodad")
    command(lab.outside, "ip", "addr", "add", "fd00:99::2/64", "dev", "world", "nodad")
    try:
        a = await net.attach("a", ports=[port()])
        with tcp_server(a.netns_path, address(a)) as came:
            for where in (lab.outside, lab.host):
                with pytest.raises(OSError, match="refused"):
                    tcp_call(where, "fd00:99::1", 8080)
            assert came == []
            assert answers(lab)
        with pytest.raises(InvalidArgument, match="the container has no IPv6 address"):
            await net.attach("b", ports=[port(host=8081, host_ip="fd00:99::1")])
        listening = [line.split()[3] for line in command(lab.host, "ss", "-Hltn").splitlines()]
        assert listening == ["[::1]:8080"]
        await net.attach("b", ports=[port(host=8081, host_ip=HOST), port(host=8082, host_ip="0.0.0.0")])
        assert refused(lab, 8081)
        assert refused(lab, 8082)
    finally:
        command(lab.host, "ip", "addr", "del", "fd00:99::1/64", "dev", "uplink")
        command(lab.outside, "ip", "addr", "del", "fd00:99::2/64", "dev", "world")


async def test_the_end_of_one_way_is_passed_on_and_the_other_goes_on(lab: Lab, net: Calls) -> None:
    a = await net.attach("a", ports=[port()])
    with served(a.netns_path, address(a), counts), call(lab) as caller:
        caller.sendall(bytes(5_000_000))
        caller.shutdown(socket.SHUT_WR)
        assert caller.recv(100) == b"5000000"
        assert caller.recv(100) == b""


async def test_bytes_come_as_they_were_sent_in_both_ways_at_once(lab: Lab, net: Calls) -> None:
    a = await net.attach("a", ports=[port()])
    sent = os.urandom(8 << 20)
    got = bytearray()
    with served(a.netns_path, address(a), echo), call(lab) as caller:

        def send() -> None:
            caller.sendall(sent)
            caller.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        while data := caller.recv(1 << 16):
            got += data
        sender.join()
    assert bytes(got) == sent


async def test_whoever_does_not_read_stops_the_sender_and_costs_the_proxy_little(lab: Lab, net: Calls) -> None:
    a = await net.attach("a", ports=[port()])
    idle = threading.Event()
    with served(a.netns_path, address(a), lambda _: idle.wait(30) and None), call(lab) as caller:
        before = _memory_kib(the_proxy(lab))
        caller.settimeout(0.5)
        with pytest.raises(TimeoutError):
            caller.sendall(bytes(1 << 28))
        assert _memory_kib(the_proxy(lab)) - before < 2048
        idle.set()


def _memory_kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


async def test_many_are_served_at_once(lab: Lab, net: Calls) -> None:
    a = await net.attach("a", ports=[port()])
    with served(a.netns_path, address(a), echo), contextlib.ExitStack() as stack:
        callers = [stack.enter_context(call(lab)) for _ in range(300)]
        for caller in callers:
            caller.sendall(b"?")
        assert all(caller.recv(1) == b"?" for caller in callers)
        proxy = the_proxy(lab)
        assert open_files(proxy) > 600
        stack.close()
        assert eventually(lambda: open_files(proxy) < 20)


async def test_who_finds_no_server_behind_the_port_is_told_at_once(lab: Lab, net: Calls) -> None:
    await net.attach("a", ports=[port()])
    began = time.monotonic()
    with call(lab) as caller, pytest.raises(ConnectionResetError):
        caller.recv(1)
    assert time.monotonic() - began < 5


async def test_a_server_that_resets_is_seen_to_reset(lab: Lab, net: Calls) -> None:
    a = await net.attach("a", ports=[port()])

    def reset(connection: socket.socket) -> None:
        connection.recv(1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    with served(a.netns_path, address(a), reset), call(lab) as caller:
        caller.sendall(b"?")
        with pytest.raises(ConnectionResetError):
            caller.recv(1)


async def test_ports_come_and_go_and_what_came_by_them_is_cut_off(lab: Lab, net: Calls) -> None:
    a = await net.attach("a", ports=[port()])
    with served(a.netns_path, address(a), echo), call(lab) as stays:
        await net.endpoints.Publish(pb.PublishRequest(endpoint_id="a", ports=[port(host=8081)]))
        with call(lab, 8081) as goes:
            assert goes_on(goes)
            await net.endpoints.Unpublish(pb.UnpublishRequest(endpoint_id="a", ports=[port(host=8081)]))
            assert not goes_on(goes)
        assert refused(lab, 8081)
        assert is_free(lab, LOOPBACK, 8081)
        assert goes_on(stays)


async def test_a_container_that_goes_is_refused_at_once_and_its_callers_are_cut_off(lab: Lab, net: Calls) -> None:
    a = await net.attach("a", ports=[port()])
    with served(a.netns_path, address(a), echo), call(lab) as caller:
        assert goes_on(caller)
        await net.detach("a")
        assert not goes_on(caller)
        assert refused(lab)
    await net.attach("b", ports=[port()])


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
@pytest.mark.parametrize("host_ip", ["", "::", "::1"])
async def test_a_program_of_the_host_at_loopback_has_the_port_and_keeps_it(
    lab: Lab, net: Calls, host_ip: str, kind: int
) -> None:
    protocol = "tcp" if kind == socket.SOCK_STREAM else "udp"
    with lab.on_host(lambda: socket.socket(socket.AF_INET6, kind)) as program:
        program.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        program.bind((LOOPBACK, 8080))
        if kind == socket.SOCK_STREAM:
            program.listen()
        with pytest.raises(AlreadyExists, match=f"8080/{protocol} of the host is in use by another program"):
            await net.attach("a", ports=[port(host_ip=host_ip, protocol=protocol)])
    assert await net.ids() == []
    await net.attach("a", ports=[port(host_ip=host_ip, protocol=protocol)])
    assert not is_free(lab, LOOPBACK, kind=kind)


async def test_no_address_of_the_host_can_be_had_beside_the_proxys(lab: Lab, net: Calls) -> None:
    command(lab.host, "ip", "addr", "add", "fd00:99::1/64", "dev", "uplink", "nodad")
    try:
        await net.attach("a", ports=[port(), port(protocol="udp")])
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            assert not any(is_free(lab, own, kind=kind) for own in ("::", "::1", "fd00:99::1", "0.0.0.0", HOST))
        await net.detach("a")
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            assert all(is_free(lab, own, kind=kind) for own in ("::", "::1", "fd00:99::1", "0.0.0.0", HOST))
    finally:
        command(lab.host, "ip", "addr", "del", "fd00:99::1/64", "dev", "uplink")


async def test_a_port_follows_its_container_to_the_network_that_it_has_left(lab: Lab, net: Calls) -> None:
    await net.create("one", "10.231.64.0/24")
    await net.create("two", "10.231.65.0/24")
    a = await net.attach("a", "one", "two", ports=[port(host_ip="::1")])
    with served(a.netns_path, address(a, 1), echo):
        await net.endpoints.Disconnect(pb.DisconnectRequest(endpoint_id="a", network="one"))
        with call(lab) as caller:
            assert goes_on(caller)


async def test_it_has_no_privileges_and_no_protection(lab: Lab, net: Calls) -> None:
    await net.attach("a", ports=[port()])
    proc = Path(f"/proc/{the_proxy(lab)}")
    status = dict(line.split(":\t", 1) for line in (proc / "status").read_text().splitlines())
    assert {int(status[f"Cap{each}"], 16) for each in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {0}
    assert status["NoNewPrivs"] == "1"
    assert int((proc / "oom_score_adj").read_text()) >= 0


async def test_a_host_without_ipv6_has_none_and_nothing_is_said_of_it() -> None:
    with Lab() as lab:
        command(lab.host, "sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1")
        async with lab.calls() as net:
            a = await net.attach("a", ports=[port()])
            with tcp_server(a.netns_path, address(a)):
                assert tcp_call(lab.outside, HOST, 8080) == OUTSIDE
            assert not proxies(lab.place.state)
            with pytest.raises(InvalidArgument, match="::1 is no address of this host"):
                await net.attach("b", ports=[port(host=8081, host_ip="::1")])
        assert "warning" not in lab.corrald.log()
