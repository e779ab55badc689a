"""Attacks by a container that holds CAP_NET_RAW, as all do: what it says on its network, and who listens."""

import asyncio
import secrets
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.corrald import Corrald
from support.engine import EngineClient
from support.engine_fixtures import engine, loaded
from support.requirements import needs

from corral.kernel.netns import in_namespace

__all__ = ["engine", "loaded"]
pytestmark = needs("root", "overlayfs", "busybox", "netns")

ROUTER = socket.inet_pton(socket.AF_INET6, "fe80::66")
ALL_NODES = socket.inet_pton(socket.AF_INET6, "ff02::1")
EVERYWHERE = "0" * 32 + " 00 "


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def router_advertisement() -> bytes:
    """A frame to everybody: the way to everywhere is by me. Source: RFC 4861 section 4.2."""
    head = struct.pack("!BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0)
    pseudo = ROUTER + ALL_NODES + struct.pack("!II", len(head), socket.IPPROTO_ICMPV6)
    message = head[:2] + struct.pack("!H", checksum(pseudo + head)) + head[4:]
    packet = struct.pack("!IHBB", 6 << 28, len(message), socket.IPPROTO_ICMPV6, 255) + ROUTER + ALL_NODES + message
    return bytes.fromhex("333300000001" + "020000000066" + "86dd") + packet


def advertise(pid: int) -> None:
    """Say so from within a container, as often as it takes."""

    def send() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
            sock.bind(("eth0", 0))
            for _ in range(5):
                sock.send(router_advertisement())

    in_namespace(f"/proc/{pid}/ns/net", send)


def routes(lines: str, device: str) -> list[str]:
    """Those to everywhere by a device, of an ipv6_route file."""
    return [line for line in lines.splitlines() if line.startswith(EVERYWHERE) and line.split()[-1] == device]


@pytest.fixture
def network(loaded: Corrald) -> Iterator[str]:
    """A network that has IPv6 too. Named before the engine, so that it goes after the containers."""
    name = f"net{secrets.token_hex(3)}"
    subnets = (f"10.213.{secrets.randbelow(250)}.0/24", f"fd{secrets.token_hex(1)}:{secrets.token_hex(2)}::/64")
    words = [word for subnet in subnets for word in ("--subnet", subnet)]
    loaded.corral("network", "create", *words, name, check=True)
    yield name
    loaded.corral("network", "rm", name, check=True)


async def pid_of(engine: EngineClient, container: str) -> int:
    return (await engine.get(container)).pid


async def test_cve_2020_13401_nobody_is_the_hosts_router(engine: EngineClient) -> None:
    made = await engine.run("sleep", "60", network="bridge")
    await asyncio.sleep(2.5)  # until the bridge's own address has proved to be nobody else's
    await asyncio.to_thread(advertise, await pid_of(engine, made))
    await asyncio.sleep(0.5)
    found = await asyncio.to_thread(Path("/proc/net/ipv6_route").read_text)
    assert routes(found, engine.daemon.place.bridge) == []


async def test_cve_2020_10749_nobody_is_the_router_of_a_neighbour(network: str, engine: EngineClient) -> None:
    made = await engine.run("sleep", "60", network=network)
    neighbour = await engine.run("sleep", "60", network=network)
    await asyncio.sleep(2.5)
    _, before = await engine.exec(neighbour, "cat", "/proc/net/ipv6_route")
    await asyncio.to_thread(advertise, await pid_of(engine, made))
    await asyncio.sleep(0.5)
    _, after = await engine.exec(neighbour, "cat", "/proc/net/ipv6_route")
    found = routes(after.decode(), "eth0")
    assert len(found) == len(routes(before.decode(), "eth0"))
    assert not [line for line in found if ROUTER.hex() in line]


async def test_cve_2024_32473_a_network_of_ipv4_alone_has_no_other_addresses(engine: EngineClient) -> None:
    """One that nobody gave has no rules either."""
    made = await engine.run("sleep", "60", network="bridge")
    _, output = await engine.exec(made, "sh", "-c", "cat /proc/net/if_inet6 /proc/net/ipv6_route; echo end")
    lines = output.decode().splitlines()
    assert lines.pop() == "end"
    assert not [line for line in lines if line.split()[-1] != "lo"]
