"""Containers find one another by name: questions asked inside, and what is passed on to whom the host asks."""

import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import dns.message
import dns.query
import dns.rcode
import dns.rdatatype
import dns.reversename
import dns.rrset
import pytest
from support.netlab import HOST, OUTSIDE, Calls, Lab, address, command, eventually, text
from support.requirements import needs

from corral.api.network.v1 import network_pb2 as pb
from corral.kernel.netns import in_namespace

pytestmark = needs("root", "netns", "nft", "nsenter", "ip")
Attachment = pb.NetworkAttachment
BIG = 60


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    conf = tmp_path_factory.mktemp("dns") / "resolv.conf"
    conf.write_text(f"nameserver {OUTSIDE}\nsearch example.test\n")
    with Lab(settings={"resolv_conf": str(conf)}) as made, upstream(made):
        yield made


@pytest.fixture
async def net(lab: Lab) -> AsyncIterator[Calls]:
    async with lab.calls() as calls:
        await calls.create("app")
        yield calls
        await calls.clear()


@contextlib.contextmanager
def upstream(lab: Lab) -> Iterator[None]:
    """A name server outside: one name has an address, one has many, all others do not exist."""

    def sockets() -> tuple[socket.socket, socket.socket]:
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.bind((OUTSIDE, 53))
        return udp, socket.create_server((OUTSIDE, 53))

    udp, tcp = in_namespace(lab.outside, sockets)

    def answer(wire: bytes, size: int) -> bytes:
        query = dns.message.from_wire(wire)
        response = dns.message.make_response(query)
        name = query.question[0].name
        if name.to_text() == "outside.test.":
            response.answer.append(dns.rrset.from_text(name, 60, "IN", "A", "192.0.2.1"))
        elif name.to_text() == "big.test.":
            many = [f"192.0.2.{number}" for number in range(BIG)]
            response.answer.append(dns.rrset.from_text_list(name, 60, "IN", "A", many))
        else:
            response.set_rcode(dns.rcode.NXDOMAIN)
        try:
            return response.to_wire(max_size=size)
        except dns.exception.TooBig:
            cut = dns.message.make_response(query)
            cut.flags |= dns.flags.TC
            return cut.to_wire()

    def serve_udp() -> None:
        with contextlib.suppress(OSError):
            while True:
                wire, source = udp.recvfrom(4096)
                if wire == b"end":
                    return
                udp.sendto(answer(wire, 512), source)

    def serve_tcp() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = tcp.accept()
                with connection:
                    length = int.from_bytes(connection.recv(2, socket.MSG_WAITALL))
                    wire = answer(connection.recv(length, socket.MSG_WAITALL), 65535)
                    connection.sendall(len(wire).to_bytes(2) + wire)

    threads = [threading.Thread(target=serve, daemon=True) for serve in (serve_udp, serve_tcp)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        in_namespace(lab.outside, _stop)
        tcp.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(5)
        udp.close()
        tcp.close()


def _stop() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"end", (OUTSIDE, 53))


def ask(where: pb.Endpoint, name: str, kind: str = "A", *, tcp: bool = False, server: str = "") -> dns.message.Message:
    """The answer that a program inside gets from its resolver."""
    server = server or text(where.resolv_conf_path).split()[1]
    query = dns.message.make_query(name, kind)
    call = dns.query.tcp if tcp else dns.query.udp
    return in_namespace(Path(where.netns_path), lambda: call(query, server, timeout=3))


def addresses(where: pb.Endpoint, name: str, kind: str = "A") -> list[str]:
    return sorted(str(one) for rrset in ask(where, name, kind).answer for one in rrset)


async def test_names_aliases_and_short_ids_are_found(net: Calls) -> None:
    a = await net.attach("a", networks=[Attachment(network="app", aliases=["web", "www"])], hostname="alpha")
    b = await net.attach("b", networks=[Attachment(network="app", aliases=["db"])])
    for name in ("web", "www", "WWW", "alpha", "a", "web."):
        assert addresses(b, name) == [address(a)]
    assert addresses(a, "db") == [address(b)]
    assert addresses(a, "web") == [address(a)]


async def test_several_containers_may_have_one_name(net: Calls) -> None:
    a = await net.attach("a", networks=[Attachment(network="app", aliases=["service"])])
    b = await net.attach("b", networks=[Attachment(network="app", aliases=["service"])])
    assert addresses(a, "service") == sorted([address(a), address(b)])
    await net.detach("b")
    assert addresses(a, "service") == [address(a)]


async def test_only_those_of_the_same_network_are_found(net: Calls) -> None:
    await net.create("other")
    a, b = await net.attach("a", "app"), await net.attach("b", "other")
    both = await net.attach("c", "app", "other")
    assert ask(a, "b").rcode() == dns.rcode.NXDOMAIN
    assert addresses(both, "a") == [address(a)]
    assert addresses(both, "b") == [address(b)]
    assert addresses(b, "c") == [address(both, 1)]


async def test_addresses_have_their_names_back(net: Calls) -> None:
    a = await net.attach("a", networks=[Attachment(network="app", aliases=["web"])])
    b = await net.attach("b", "app")
    assert addresses(b, str(dns.reversename.from_address(address(a))), "PTR") == ["web.app."]
    unused = ".".join([*address(a).split(".")[:3], "250"])
    assert ask(b, str(dns.reversename.from_address(unused)), "PTR").rcode() == dns.rcode.NXDOMAIN


async def test_other_kinds_of_a_known_name_are_empty_and_not_denied(net: Calls) -> None:
    """A denial would make a resolver believe that the name has no address either."""
    a = await net.attach("a", "app")
    answer = ask(a, "a", "AAAA")
    assert (answer.rcode(), answer.answer) == (dns.rcode.NOERROR, [])


async def test_the_rest_is_asked_of_whom_the_host_asks(net: Calls) -> None:
    a = await net.attach("a", "app")
    assert addresses(a, "outside.test") == ["192.0.2.1"]
    assert ask(a, "nowhere.test").rcode() == dns.rcode.NXDOMAIN
    assert "search example.test" in text(a.resolv_conf_path)
    assert "ndots:0" in text(a.resolv_conf_path)


async def test_large_answers_come_by_tcp(net: Calls) -> None:
    a = await net.attach("a", "app")
    assert ask(a, "big.test").flags & dns.flags.TC
    assert len(ask(a, "big.test", tcp=True).answer[0]) == BIG
    assert addresses(a, "a") == [address(a)]


async def test_an_internal_network_asks_nobody_outside(net: Calls) -> None:
    await net.create("inside", internal=True)
    a, b = await net.attach("a", "inside"), await net.attach("b", "inside")
    assert addresses(a, "b") == [address(b)]
    assert ask(a, "outside.test").rcode() == dns.rcode.SERVFAIL


async def test_nobody_else_is_answered(lab: Lab, net: Calls) -> None:
    """No open resolver, neither for the outside nor for other networks, though they know the way."""
    a = await net.attach("a", "app")
    gateway = a.interfaces[0].ipv4_gateway
    command(lab.outside, "ip", "route", "add", "10.231.0.0/16", "via", HOST)
    try:
        query = dns.message.make_query("a", "A")
        with pytest.raises((dns.exception.Timeout, OSError)):
            in_namespace(lab.outside, lambda: dns.query.udp(query, gateway, timeout=0.7))
        plain = await net.attach("b")
        with pytest.raises((dns.exception.Timeout, OSError)):
            in_namespace(Path(plain.netns_path), lambda: dns.query.udp(query, gateway, timeout=0.7))
    finally:
        command(lab.outside, "ip", "route", "del", "10.231.0.0/16")


async def test_the_default_network_has_the_hosts_servers(net: Calls) -> None:
    a = await net.attach("a")
    assert text(a.resolv_conf_path).split()[:2] == ["nameserver", OUTSIDE]


async def test_a_container_can_be_called_otherwise_while_it_runs(net: Calls) -> None:
    a = await net.attach("a", networks=[Attachment(network="app", aliases=["old"])])
    again = await net.attach("a", networks=[Attachment(network="app", aliases=["new"])])
    assert again.interfaces[0].ipv4_address == a.interfaces[0].ipv4_address
    assert addresses(a, "new") == [address(a)]
    assert ask(a, "old").rcode() == dns.rcode.NXDOMAIN


async def test_names_are_found_again_after_kill_9(lab: Lab, net: Calls) -> None:
    a, b = await net.attach("a", "app"), await net.attach("b", "app")
    lab.corrald.kill9()
    lab.corrald.start()

    def is_found() -> bool:
        with contextlib.suppress(dns.exception.Timeout, OSError):
            return addresses(a, "b") == [address(b)]
        return False

    assert eventually(is_found)


async def test_what_is_no_question_is_not_answered_and_does_no_harm(net: Calls) -> None:
    a = await net.attach("a", "app")
    server = text(a.resolv_conf_path).split()[1]

    def send() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            headers = (bytes(12), b"\0\1\x80" + bytes(30), b"\0\1\1\0\xff\xff" + bytes(20))
            for junk in (b"", b"\0", b"\xff" * 600, *headers):
                sender.sendto(junk, (server, 53))

    in_namespace(Path(a.netns_path), send)
    assert addresses(a, "a") == [address(a)]
