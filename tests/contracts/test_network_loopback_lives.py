"""The proxy of published ports at [::1] outlives the network service; who of the two hangs or dies is replaced."""

import asyncio
import contextlib
import os
import resource
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.corrald import running
from support.hogs import open_files
from support.loopback import (
    LOOPBACK,
    answers_echo,
    call,
    echo,
    goes_on,
    is_free,
    refused,
    served,
    the_proxy,
)
from support.netlab import HOST, TABLE, Calls, Lab, address, command, eventually, port
from support.requirements import needs
from support.sweep import proxies

from corral.api.network.v1 import network_pb2 as pb
from corral.network.links import NetlinkThread
from corral.network.proxy import wire
from corral.network.proxy.loop import Loop
from corral.network.proxy.streams import Room, StreamPort
from corral.network.proxying import Proxying
from corral.rpc.channel import open_channel

pytestmark = needs("root", "netns", "nft", "nsenter", "ip")


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
    resource.prlimit(before, resource.RLIMIT_NOFILE, (open_files(before) + 1, 4096))
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
        before = open_files(os.getpid())
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
        assert open_files(os.getpid()) == before


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
