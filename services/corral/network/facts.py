"""What corral.network.explaining needs to know, read from the kernel on the netlink thread; tables of others by a
process of its own."""

import asyncio
import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from corral.kernel.netns import in_namespace
from corral.kernel.nftables import Json
from corral.network import legacy_forward
from corral.network.explaining import Facts, ForeignChain, foreign_chains
from corral.network.firewall import IP6_FORWARD, IP_FORWARD, Firewall, uplinks
from corral.network.forwarding import mark
from corral.network.ipam import Address
from corral.network.links import is_up
from corral.network.model import Endpoint
from corral.rpc.blocking import run_blocking

if TYPE_CHECKING:
    from corral.network.netlink import Netlink

_CONF = Path("/proc/sys/net/ipv4/conf")
_BRIDGE_FILTERED = {
    4: Path("/proc/sys/net/bridge/bridge-nf-call-iptables"),
    6: Path("/proc/sys/net/bridge/bridge-nf-call-ip6tables"),
}


type Ruleset = Sequence[Mapping[str, Json]]


# Lists all tables for ruleset().
_PROGRAM = """
import json, resource
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
from corral.kernel.nftables import Nftables
with Nftables() as nftables:
    print(json.dumps(nftables.run([{"list": {"ruleset": None}}])))
"""
_LISTING_S = 20.0


async def ruleset() -> Ruleset | None:
    """All tables with their chains and rules; None where they cannot be read.

    By a process of its own: libnftables ends the one that it is in where a name in a rule of anybody's is not UTF-8.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        _PROGRAM,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        cwd="/",
    )
    try:
        async with asyncio.timeout(_LISTING_S):
            output, _ = await process.communicate()
    except TimeoutError:
        return None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        return None
    listed: Ruleset = await run_blocking(json.loads, output)  # there may be much of it
    return listed


def gather(
    netlink: "Netlink", firewall: Firewall, rules: Ruleset | None, endpoint: Endpoint, netns: Path, destination: Address
) -> Facts:
    """The facts about the way from an endpoint to a destination; rules: what ruleset() gave. Raises OSError."""
    names = [each.name for each in endpoint.interfaces]
    down = in_namespace(netns, lambda: [name for name in names if not is_up(name)])
    down += [each.host_name for each in endpoint.interfaces if each.network.is_bridge and not is_up(each.host_name)]
    inside = netlink.path_inside(netns, destination)
    own = next((each for each in endpoint.interfaces if inside is not None and each.name == inside.link), None)
    held = own.address(destination.version) if own is not None else None
    forward = IP_FORWARD if destination.version == 4 else IP6_FORWARD
    own_mark = mark(firewall.table)
    outside = netlink.path_to(destination)
    facts = Facts(
        down=down,
        inside=inside,
        outside=outside,
        back=netlink.path_to(held[0]) if held is not None else None,
        forwarding=_flag(forward),
        strict_rp_filter=own is not None and own.network.is_bridge and _is_strict(own.network.bridge),
        bridge_filtered=_flag(_BRIDGE_FILTERED[destination.version]),
        table_stands=firewall.stands(),
        unread=rules is None,
        guarded=outside is not None and outside.link in _bridges(netlink) - uplinks(),
        mark=own_mark,
    )
    legacy, unseen_legacy = _legacy(destination.version, facts.hook, own_mark)
    chains = [*foreign_chains(rules or (), firewall.table, destination.version, facts.hook), *legacy]
    return replace(facts, chains=chains, unseen_legacy=unseen_legacy)


def _flag(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return path.read_text().strip() not in ("", "0")
    return False


def _is_strict(link: str) -> bool:
    values = []
    for name in ("all", link):
        with contextlib.suppress(OSError, ValueError):
            values.append(int((_CONF / name / "rp_filter").read_text()))
    return max(values, default=0) == 1


def _bridges(netlink: "Netlink") -> frozenset[str]:
    return frozenset(name for name, _ in netlink.links("bridge"))


def _legacy(version: int, hook: str, own_mark: int) -> tuple[Sequence[ForeignChain], bool]:
    """What the old iptables has at a hook, and whether that is there but cannot be read."""
    try:
        found = legacy_forward.foreign(version, hook.upper(), own_mark)
    except OSError:
        return (), True
    return [found] if found is not None else (), False
