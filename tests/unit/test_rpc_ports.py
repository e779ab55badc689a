"""What who connects by TCP notices of one server after the other at the same port."""

import asyncio
import os
import socket
import struct
from array import array
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from corral.rpc import handover
from corral.rpc.address import TcpAddress
from corral.rpc.farewell import SO_ATTACH_FILTER, listening
from corral.rpc.server import Host

SO_DETACH_FILTER = 27
# Takes a packet that opens a connection, and no other. Source: linux/filter.h; RFC 9293, 3.1, for the flags.
OPENING_ALONE = array("B", b"".join(struct.pack("HBBI", *each) for each in [
    (0x30, 0, 0, 13),  # load the byte of the flags
    (0x45, 0, 1, 0x02),  # is SYN among them?
    (0x06, 0, 0, 0xFFFF),
    (0x06, 0, 0, 0),
]))  # fmt: skip
# What a client begins with, and the type of the frame that it is answered by. Source: RFC 9113, 3.4 and 6.5.
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + struct.pack("!IBI", 4, 0, 0)
SETTINGS = 4


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


async def connect(address: TcpAddress) -> socket.socket:
    """And begin to speak."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    client = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        async with asyncio.timeout(5):
            await asyncio.get_running_loop().sock_connect(client, (address.host, address.port))
    except BaseException:
        client.close()
        raise
    client.send(PREFACE)
    return client


async def first_frame(client: socket.socket) -> int:
    async with asyncio.timeout(20):
        data = await asyncio.get_running_loop().sock_recv(client, 9)
    return data[3]


@contextmanager
def only_half_connected(fd: int) -> Iterator[None]:
    """Who connects in the block is heard of, but not that he was told so: he says it again 200 ms later."""
    stream = socket.socket(fileno=fd)
    try:
        address, length = OPENING_ALONE.buffer_info()
        stream.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", length // 8, address))
        yield
        stream.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)
    finally:
        stream.detach()


def descriptor(inode: int) -> int:
    for fd in os.listdir("/proc/self/fd"):  # noqa: PTH208  # as numbers
        try:
            if os.fstat(int(fd)).st_ino == inode:
                return int(fd)
        except OSError:  # that of the directory
            continue
    raise LookupError(inode)


async def follow(*addresses: TcpAddress) -> Host:
    handover.take_back()
    host = Host([])
    await host.start(addresses)
    handover.close_unclaimed()
    return host


async def test_who_comes_meanwhile_is_answered_at_each_of_two_addresses_with_one_port() -> None:
    port = free_port()
    addresses = [TcpAddress("127.0.0.1", port), TcpAddress("::1", port)]
    host = Host([])
    await host.start(addresses)
    await host.hand_over({}, grace_s=1)
    clients = [await connect(address) for address in addresses for _ in range(20)]
    host = await follow(*addresses)
    try:
        assert [await first_frame(client) for client in clients] == [SETTINGS] * 40
    finally:
        for client in clients:
            client.close()
        await host.stop(grace_s=0)


@pytest.mark.parametrize("upgrade", [True, False])
async def test_who_else_listens_at_another_address_of_that_port_is_left_alone(upgrade: bool) -> None:
    """As the network service does, for published ports."""
    address = TcpAddress("127.0.0.1", free_port())
    host = Host([])
    await host.start([address])
    with socket.create_server(("::1", address.port), family=socket.AF_INET6) as other:
        if upgrade:
            await host.hand_over({}, grace_s=1)
            host = await follow(address)
        await host.stop(grace_s=0)
        for _ in range(10):
            with closing(await connect(TcpAddress("::1", address.port))):
                other.accept()[0].close()
        assert not other.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)


async def test_a_connection_that_has_begun_is_that_of_the_server_with_which_it_began() -> None:
    address = TcpAddress("127.0.0.1", free_port())
    host = Host([])
    before = listening()
    await host.start([address])
    [ours] = listening().keys() - before.keys()
    with only_half_connected(descriptor(ours)):
        client = await connect(address)
    await host.hand_over({}, grace_s=1)
    with closing(client):
        assert await first_frame(client) == SETTINGS
    await (await follow(address)).stop(grace_s=0)


async def test_a_connection_that_has_begun_while_nobody_serves_is_that_of_who_follows() -> None:
    address = TcpAddress("127.0.0.1", free_port())
    host = Host([])
    await host.start([address])
    await host.hand_over({}, grace_s=1)
    [(_, _, fds)] = handover.all_kept()
    with only_half_connected(fds["socket"]):
        client = await connect(address)
    host = await follow(address)
    with closing(client):
        assert await first_frame(client) == SETTINGS
    await host.stop(grace_s=0)


async def test_one_upgrade_right_after_another_loses_nobody() -> None:
    address = TcpAddress("127.0.0.1", free_port())
    host = Host([])
    await host.start([address])
    for _ in range(3):
        await host.hand_over({}, grace_s=1)
        clients = [await connect(address) for _ in range(10)]
        host = await follow(address)
        clients += [await connect(address) for _ in range(10)]
        assert [await first_frame(client) for client in clients] == [SETTINGS] * 20
        for client in clients:
            client.close()
    await host.stop(grace_s=0)
