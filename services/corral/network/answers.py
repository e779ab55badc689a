"""What a container's question is answered with: from our names, or by those whom the host asks.

The only module with dnspython, whose import takes a tenth of a second: loaded off the loop, for the first network that
has names. Source: RFC 1035, RFC 6891.
"""

import asyncio
import secrets
import struct
from collections.abc import Sequence
from ipaddress import ip_address

import dns.exception
import dns.flags
import dns.message
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.reversename
import dns.rrset

from corral.network.ipam import Address
from corral.network.model import Endpoint
from corral.network.names import Names

TTL_S = 5
UPSTREAM_S = 2.0
PORT = 53
_LENGTH = struct.Struct("!H")
_OF_VERSION = {4: dns.rdatatype.A, 6: dns.rdatatype.AAAA}


class Malformed(Exception):
    """Not a question: it is not answered at all."""


def parse(wire: bytes) -> dns.message.Message:
    """Raises Malformed."""
    try:
        query = dns.message.from_wire(wire, ignore_trailing=True)
    except (dns.exception.DNSException, ValueError, IndexError) as e:
        raise Malformed from e
    if query.flags & dns.flags.QR:
        raise Malformed
    return query


def own_answer(query: dns.message.Message, names: Names, asker: Endpoint | None) -> dns.message.Message | None:
    """What we know ourselves; None: somebody else has to be asked. Pure."""
    if asker is None:
        return _refusal(query, dns.rcode.REFUSED)
    if query.opcode() != dns.opcode.QUERY or len(query.question) != 1:
        return _refusal(query, dns.rcode.NOTIMP)
    [question] = query.question
    if question.rdclass != dns.rdataclass.IN:
        return None
    if question.rdtype == dns.rdatatype.PTR:
        return _reverse(query, question, names, asker)
    found = names.addresses(asker, question.name.to_text())
    if not found:
        return None
    texts = [str(address) for address in found if question.rdtype in (_OF_VERSION[address.version], dns.rdatatype.ANY)]
    kind = question.rdtype if question.rdtype != dns.rdatatype.ANY else dns.rdatatype.A
    return _answer(query, question, kind, texts)


def _reverse(
    query: dns.message.Message, question: dns.rrset.RRset, names: Names, asker: Endpoint
) -> dns.message.Message | None:
    try:
        address = ip_address(dns.reversename.to_address(question.name))
    except (dns.exception.DNSException, ValueError):
        return None
    if name := names.name(asker, address):
        return _answer(query, question, question.rdtype, [f"{name}."])
    return _refusal(query, dns.rcode.NXDOMAIN) if _is_ours(asker, address) else None


def _is_ours(asker: Endpoint, address: Address) -> bool:
    """Whether nobody else could know of it."""
    return any(address in part.subnet for interface in asker.interfaces for part in interface.network.ranges)


def _answer(
    query: dns.message.Message, question: dns.rrset.RRset, kind: dns.rdatatype.RdataType, texts: Sequence[str]
) -> dns.message.Message:
    response = _refusal(query, dns.rcode.NOERROR)
    response.flags |= dns.flags.AA
    if texts:
        response.answer.append(dns.rrset.from_text_list(question.name, TTL_S, dns.rdataclass.IN, kind, texts))
    return response


def _refusal(query: dns.message.Message, code: dns.rcode.Rcode) -> dns.message.Message:
    response = dns.message.make_response(query, recursion_available=True)
    response.set_rcode(code)
    return response


def failure(query: dns.message.Message) -> bytes:
    """Nobody could be asked."""
    return _refusal(query, dns.rcode.SERVFAIL).to_wire()


def to_wire(query: dns.message.Message, response: dns.message.Message, *, tcp: bool) -> bytes:
    """In UDP no more than the asker takes; what is cut off it asks for again by TCP."""
    size = 65535 if tcp else max(query.payload, 512)
    try:
        return response.to_wire(max_size=size)
    except dns.exception.TooBig:
        cut = dns.message.make_response(query, recursion_available=True)
        cut.flags |= dns.flags.TC
        return cut.to_wire()


# Asking others


async def ask(wire: bytes, servers: Sequence[str], *, tcp: bool) -> bytes | None:
    """The first answer that one of the servers gives to a question, passed on unread; None if none does."""
    number = secrets.token_bytes(2)
    for server in servers:
        try:
            async with asyncio.timeout(UPSTREAM_S):
                found = await (_ask_tcp if tcp else _ask_udp)(number + wire[2:], server)
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            continue
        return wire[:2] + found[2:]
    return None


class _One(asyncio.DatagramProtocol):
    """One question and its answer: a connected socket with a port of its own takes no other server's word."""

    def __init__(self, number: bytes) -> None:
        self._number = number
        self.answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def datagram_received(self, data: bytes, addr: object) -> None:
        if data[:2] == self._number and len(data) > 2 and data[2] & 0x80 and not self.answer.done():
            self.answer.set_result(data)

    def error_received(self, exc: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(exc)


async def _ask_udp(wire: bytes, server: str) -> bytes:
    loop = asyncio.get_running_loop()
    transport, one = await loop.create_datagram_endpoint(lambda: _One(wire[:2]), remote_addr=(server, PORT))
    try:
        transport.sendto(wire)
        return await one.answer
    finally:
        transport.close()


async def _ask_tcp(wire: bytes, server: str) -> bytes:
    reader, writer = await asyncio.open_connection(server, PORT)
    try:
        writer.write(_LENGTH.pack(len(wire)) + wire)
        [length] = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        return await reader.readexactly(length)
    finally:
        writer.close()
