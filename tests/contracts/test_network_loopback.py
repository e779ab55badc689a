"""Published ports at [::1] of the host: served by a proxy, which outlives the network service."""

import asyncio
import contextlib
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from support.corrald import running
from support.netlab import HOST, OUTSIDE, TABLE, Calls, Lab, address, command, eventually, tcp_call, tcp_server
from support.requirements import needs
from support.sweep import proxies

from corral.api.network.v1 import network_pb2 as pb
from corral.kernel.netns import in_namespace
from corral.network.links import NetlinkThread
from corral.network.proxy import wire
from corral.network.proxy.loop import Loop
from corral.network.proxy.streams import Room, StreamPort
from corral.network.proxying import Proxying
from corral.rpc.channel import open_channel
from corral.rpc.errors import AlreadyExists, InvalidArgument

pytestmark = needs("root", "netns", "nft", "nsenter", "ip")
LOOPBACK = "::1"


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab() as made:
        yield made


@pytest.fixture
async def net(lab: Lab) -> AsyncIterator[Calls]:
    async with lab.calls() as calls:
        yield calls
        for name in await calls.ids():
            await calls.detach(name)
        for name in await calls.network_names():
            if name not in ("bridge", "host", "none"):
                await calls.remove(name)


def port(inside: int = 7, host: int = 8080, **fields: str) -> pb.PortMapping:
    return pb.PortMapping(container_port=inside, host_port=host, **fields)  # type: ignore[arg-type]


def refused(lab: Lab, number: int = 8080) -> bool:
    with pytest.raises(OSError, match=r"refused|reset") as caught:
        lab.on_host(lambda: socket.create_connection((LOOPBACK, number), 3).close())
    return isinstance(caught.value, ConnectionRefusedError)


def answers(lab: Lab, number: int = 8080) -> bool:
    with contextlib.suppress(OSError):
        return bool(tcp_call(lab.host, LOOPBACK, number))
    return False


def is_free(lab: Lab, own: str, number: int = 8080, kind: int = socket.SOCK_STREAM) -> bool:
    """To a program as forbearing as can be."""

    def bind() -> bool:
        with socket.socket(socket.AF_INET6 if ":" in own else socket.AF_INET, kind) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                one.bind((own, number))
                if kind == socket.SOCK_STREAM:
                    one.listen()
                return True
            return False

    return lab.on_host(bind)


@contextlib.contextmanager
def served(where: str | Path, own: str, talk: Callable[[socket.socket], None], number: int = 7) -> Iterator[None]:
    """Each connection has a thread."""
    family = socket.AF_INET6 if ":" in own else socket.AF_INET
    listener = in_namespace(Path(where), lambda: socket.create_server((own, number), family=family, backlog=512))

    def one(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            talk(connection)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=one, args=(listener.accept()[0],), daemon=True).start()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


def echo(connection: socket.socket) -> None:
    while data := connection.recv(1 << 16):
        connection.sendall(data)


def counts(connection: socket.socket) -> None:
    """How many bytes came, told after their end."""
    total = 0
    while data := connection.recv(1 << 20):
        total += len(data)
    connection.sendall(str(total).encode())


def call(lab: Lab, number: int = 8080) -> socket.socket:
    return lab.on_host(lambda: socket.create_connection((LOOPBACK, number), 10))


def goes_on(caller: socket.socket) -> bool:
    try:
        caller.sendall(b"?")
        return caller.recv(1) == b"?"
    except OSError:
        return False


@contextlib.contextmanager
def udp_echo(where: str | Path, own: str, number: int = 7) -> Iterator[None]:
    """Answers each datagram with where it came from."""

    def bound() -> socket.socket:
        made = socket.socket(socket.AF_INET6 if ":" in own else socket.AF_INET, socket.SOCK_DGRAM)
        made.bind((own, number))
        made.settimeout(0.1)
        return made

    server, ended = in_namespace(Path(where), bound), threading.Event()

    def answer() -> None:
        while not ended.is_set():
            with contextlib.suppress(TimeoutError):
                data, source = server.recvfrom(1 << 16)
                server.sendto(f"{source[0]} {source[1]} {len(data)}".encode(), source)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(5)
        server.close()


def datagrams(lab: Lab, number: int = 8080) -> socket.socket:
    def connected() -> socket.socket:
        made = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        made.settimeout(2)
        made.connect((LOOPBACK, number))
        return made

    return lab.on_host(connected)


def asked(caller: socket.socket, data: bytes = b"?") -> list[str]:
    caller.send(data)
    return caller.recv(100).decode().split()


def the_proxy(lab: Lab) -> int:
    [pid] = proxies(lab.place.state)
    return pid


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


def _open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


async def test_many_are_served_at_once(lab: Lab, net: Calls) -> None:
    a = await net.attach("a", ports=[port()])
    with served(a.netns_path, address(a), echo), contextlib.ExitStack() as stack:
        callers = [stack.enter_context(call(lab)) for _ in range(300)]
        for caller in callers:
            caller.sendall(b"?")
        assert all(caller.recv(1) == b"?" for caller in callers)
        proxy = the_proxy(lab)
        assert _open_files(proxy) > 600
        stack.close()
        assert eventually(lambda: _open_files(proxy) < 20)


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


async def test_it_goes_on_while_the_service_is_dead_and_is_the_next_ones(lab: Lab, net: Calls) -> None:
    a = await net.attach("a", ports=[port(), port(host=8081, host_ip="::1")])
    with served(a.netns_path, address(a), echo), call(lab) as old:
        assert goes_on(old)
        proxy = the_proxy(lab)
        lab.corrald.kill9()
        with call(lab) as new, call(lab, 8081) as other:
            assert goes_on(new)
            assert goes_on(other)
        assert not is_free(lab, "::")
        lab.corrald.start()
        assert goes_on(old)
        await net.attach("b", ports=[port(host=8082)])
        assert the_proxy(lab) == proxy
        await net.endpoints.Unpublish(pb.UnpublishRequest(endpoint_id="a", ports=[port()]))
        assert not goes_on(old)
        assert refused(lab)
        with call(lab, 8081) as other:
            assert goes_on(other)


async def test_a_service_that_stops_and_starts_cuts_nobody(lab: Lab, net: Calls) -> None:
    a = await net.attach("a", ports=[port()])
    with served(a.netns_path, address(a), echo), call(lab) as caller:
        lab.corrald.restart()
        assert goes_on(caller)
        with call(lab) as new:
            assert goes_on(new)


async def test_an_upgrade_of_the_daemon_is_noticed_by_nobody() -> None:
    """On the machine's own loopback: the lab's daemon, which enters a namespace first, is not to be executed anew."""
    with running(services=("network",)) as daemon, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number = probe.getsockname()[1]
        probe.close()
        async with open_channel(daemon.address_of("network")) as channel:
            a = await Calls(channel).attach("a", ports=[port(host=number)])
        with (
            served(a.netns_path, address(a), echo),
            socket.create_connection((LOOPBACK, number), 10) as old,
        ):
            assert goes_on(old)
            mark, proxy = len(daemon.log()), proxies(daemon.state)
            daemon.processes["corrald"].send_signal(signal.SIGUSR2)
            while '"daemon.ready"' not in daemon.log()[mark:]:
                with socket.create_connection((LOOPBACK, number), 10) as new:
                    assert goes_on(new)
                await asyncio.sleep(0.02)
            assert goes_on(old)
        assert proxies(daemon.state) == proxy
        async with open_channel(daemon.address_of("network")) as channel:
            await Calls(channel).detach("a")


async def test_a_proxy_that_is_killed_has_a_successor_and_who_calls_meanwhile_waits(lab: Lab, net: Calls) -> None:
    a = await net.attach("a", ports=[port(), port(host=8081)])
    with served(a.netns_path, address(a), echo):
        with call(lab) as cut:
            assert goes_on(cut)
            before = the_proxy(lab)
            os.kill(before, signal.SIGKILL)
            with call(lab) as meanwhile:
                assert goes_on(meanwhile)
            assert not goes_on(cut)
        assert the_proxy(lab) != before
        with call(lab, 8081) as other:
            assert goes_on(other)


async def test_both_killed_come_back_with_the_service(lab: Lab, net: Calls) -> None:
    a = await net.attach("a", ports=[port()])
    with served(a.netns_path, address(a), echo):
        with call(lab) as cut:
            assert goes_on(cut)
            os.kill(the_proxy(lab), signal.SIGKILL)
            lab.corrald.kill9()
        lab.corrald.start()
        assert eventually(lambda: answers_echo(lab))


def answers_echo(lab: Lab, number: int = 8080) -> bool:
    with contextlib.suppress(OSError), call(lab, number) as caller:
        return goes_on(caller)
    return False


async def test_a_proxy_that_hangs_is_replaced_by_whoever_needs_an_answer(lab: Lab, net: Calls) -> None:
    await net.attach("a", ports=[port(), port(host=8081)])
    before = the_proxy(lab)
    os.kill(before, signal.SIGSTOP)
    await net.endpoints.Unpublish(pb.UnpublishRequest(endpoint_id="a", ports=[port()]))
    assert the_proxy(lab) != before
    assert refused(lab)
    assert is_free(lab, LOOPBACK)


async def test_a_proxy_that_hangs_is_replaced_by_the_next_service(lab: Lab, net: Calls) -> None:
    a = await net.attach("a", ports=[port()])
    before = the_proxy(lab)
    os.kill(before, signal.SIGSTOP)
    lab.corrald.restart()
    with served(a.netns_path, address(a), echo):
        assert eventually(lambda: answers_echo(lab), within_s=10)
    assert the_proxy(lab) != before


async def test_what_was_withdrawn_while_the_service_was_dead_is_dropped_at_its_start(lab: Lab) -> None:
    async with lab.calls() as net:
        await net.attach("a")
    lab.corrald.restart_with({"CORRAL_FAILPOINTS": "network.publish.after_proxy=kill"})
    async with lab.calls() as net:
        with contextlib.suppress(Exception):
            await net.endpoints.Publish(pb.PublishRequest(endpoint_id="a", ports=[port()]))
    lab.corrald.revive()
    async with lab.calls() as net:
        known = [p.host_port for p in (await net.get("a")).ports]
        assert eventually(lambda: is_free(lab, LOOPBACK) == (8080 not in known))
        await net.detach("a")
    assert is_free(lab, LOOPBACK)


async def test_rules_that_others_flush_are_nothing_to_it(lab: Lab, net: Calls) -> None:
    a = await net.attach("a", ports=[port()])
    with served(a.netns_path, address(a), echo), call(lab) as caller:
        command(lab.host, "nft", "flush", "ruleset")
        assert goes_on(caller)
        with call(lab) as new:
            assert goes_on(new)
        assert eventually(lambda: TABLE in lab.ruleset())


async def test_it_ends_after_the_last_port(lab: Lab, net: Calls) -> None:
    await net.attach("a", ports=[port()])
    assert the_proxy(lab)
    await net.detach("a")
    assert eventually(lambda: not proxies(lab.place.state), within_s=15)
    await net.attach("a", ports=[port(host_ip=HOST)])
    assert not proxies(lab.place.state)


async def test_a_port_follows_its_container_to_the_network_that_it_has_left(lab: Lab, net: Calls) -> None:
    await net.create("one", "10.231.64.0/24")
    await net.create("two", "10.231.65.0/24")
    a = await net.attach("a", "one", "two", ports=[port(host_ip="::1")])
    with served(a.netns_path, address(a, 1), echo):
        await net.endpoints.Disconnect(pb.DisconnectRequest(endpoint_id="a", network="one"))
        with call(lab) as caller:
            assert goes_on(caller)


async def test_while_no_proxy_can_be_started_callers_are_refused(lab: Lab, net: Calls) -> None:
    output = lab.place.state / "proxy.log"
    a = await net.attach("a", ports=[port(), port(host=8081, host_ip="::1")])
    output.unlink()
    output.mkdir()
    try:
        with served(a.netns_path, address(a), echo):
            os.kill(the_proxy(lab), signal.SIGKILL)
            assert eventually(lambda: "network.proxy_not_started" in lab.corrald.log())
            for number in (8080, 8081):
                assert refused(lab, number)
                assert not is_free(lab, LOOPBACK, number)
            output.rmdir()
            assert eventually(lambda: answers_echo(lab), within_s=10)
    finally:
        if output.is_dir():
            output.rmdir()


async def test_a_proxy_that_has_no_room_for_a_port_is_replaced_by_one_that_has(lab: Lab, net: Calls) -> None:
    a = await net.attach("a", ports=[port()])
    before = the_proxy(lab)
    resource.prlimit(before, resource.RLIMIT_NOFILE, (_open_files(before) + 1, 4096))
    await net.endpoints.Publish(pb.PublishRequest(endpoint_id="a", ports=[port(host=8081)]))
    assert the_proxy(lab) != before
    with served(a.netns_path, address(a), echo):
        for number in (8080, 8081):
            with call(lab, number) as caller:
                assert goes_on(caller)


@contextlib.contextmanager
def proxying(state: Path) -> Iterator[tuple[Proxying, wire.Port]]:
    """One of the machine's own loopback, and a port that leads to a server there."""
    thread = NetlinkThread()
    made = Proxying(state, thread)
    try:
        with (
            socket.socket(socket.AF_INET6) as held,
            socket.create_server((LOOPBACK, 0), family=socket.AF_INET6) as server,
        ):
            with socket.socket(socket.AF_INET6) as probe:
                probe.bind((LOOPBACK, 0))
                number = probe.getsockname()[1]
            held.bind((LOOPBACK, number))  # where the kernel chooses, it is free again once nobody listens
            yield made, wire.Port(("tcp", LOOPBACK, 1), server.getsockname()[:2], [held])
            made.drop([("tcp", LOOPBACK, 1)])
    finally:
        made.close()
        thread.close()
        assert eventually(lambda: not proxies(state), within_s=15)


def connects(port: wire.Port) -> bool:
    with contextlib.suppress(ConnectionRefusedError):
        socket.create_connection(port.sockets[0].getsockname()[:2], 5).close()
        return True
    return False


def test_a_port_that_leads_nowhere_any_more_is_refused_and_stays_taken_until_it_does_again(tmp_path: Path) -> None:
    with proxying(tmp_path) as (made, own):
        assert not connects(own)
        for _ in range(2):
            made.serve([own])
            assert connects(own)
            made.drop([own.key])
            assert not connects(own)
            with socket.socket(socket.AF_INET6) as other:
                other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                with pytest.raises(OSError, match="in use"):
                    other.bind(own.sockets[0].getsockname()[:2])


def test_the_path_of_the_state_may_be_longer_than_the_address_of_a_socket(tmp_path: Path) -> None:
    state = tmp_path / ("s" * 100)
    state.mkdir()
    with proxying(state) as (made, own):
        made.serve([own])
        assert len(proxies(state)) == 1
        assert connects(own)
        made.close()
        [found] = made.find()
        assert found.key == own.key
        for each in found.sockets:
            each.close()


@contextlib.contextmanager
def limited_files(soft: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def test_more_ports_than_a_program_may_have_files_at_first_are_the_next_services(lab: Lab, net: Calls) -> None:
    """Sockets of more than 1024 files leave their numbers to libnftables, which cannot do with higher ones."""
    ports = [port(host=20000 + number) for number in range(400)]
    a = await net.attach("a", ports=ports)
    before = the_proxy(lab)
    with limited_files(1024):
        lab.corrald.restart()
    with served(a.netns_path, address(a), echo):
        assert eventually(lambda: answers_echo(lab, 20399), within_s=10)
    assert the_proxy(lab) == before


def test_sockets_that_there_is_no_room_for_are_an_error_and_none_of_them_is_kept() -> None:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there, socket.socket(socket.AF_INET6) as one:
        wire.send(here, {}, [wire.Port(("tcp", "", 1), (LOOPBACK, 1), [one, one, one])])
        before = _open_files(os.getpid())
        with limited_files(max(int(path.name) for path in Path("/proc/self/fd").iterdir()) + 1):
            fillers = []
            with contextlib.suppress(OSError):
                while True:
                    fillers.append(os.dup(0))
            os.close(fillers.pop())
            with pytest.raises(OSError, match="not all sockets"):
                wire.receive(there)
            for each in fillers:
                os.close(each)
        assert _open_files(os.getpid()) == before


def test_who_comes_when_there_are_as_many_connections_as_may_be_waits_for_one_to_end() -> None:
    loop = Loop()
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server((LOOPBACK, 0), family=socket.AF_INET6))
        server.settimeout(0)
        held = stack.enter_context(socket.socket(socket.AF_INET6))
        held.bind((LOOPBACK, 0))
        own = StreamPort(loop, [held], server.getsockname()[:2], Room(2))
        callers = [stack.enter_context(socket.create_connection(held.getsockname()[:2], 5)) for _ in range(3)]
        came = [stack.enter_context(one) for one in _coming(loop, server)]
        assert len(came) == 2
        for one in (callers[0], came[0]):
            one.close()
        came += [stack.enter_context(one) for one in _coming(loop, server)]
        assert len(came) == 3
        own.close()


def _coming(loop: Loop, server: socket.socket) -> list[socket.socket]:
    """What reaches the server within the next half second."""
    found = []
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        loop.call_later(0.05, lambda: None)
        loop.run_once()
        with contextlib.suppress(BlockingIOError):
            found.append(server.accept()[0])
    return found


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
