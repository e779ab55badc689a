"""Links, addresses and routes of networks and endpoints, on the kernel side of the leaf.

One thread of ours holds one socket for the host's side; the kernel serialises these requests anyway (RTNL). Inside
another namespace a short-lived thread does setns and opens a socket of its own there.

What deletion costs (Linux 6.18, 2 cores): deleting a veth pair waits for RCU while it holds RTNL, 17 ms, and 30 ms in a
tight loop. So nothing here deletes one on the way of a request: `unplug` takes the host's end out of the bridge and
down, 0.3 ms, after which no packet passes; the pair then dies with its namespace, in the kernel's time and in batches.

Why not pyroute2: the same requests took 4.1 ms with it and take 1.1 ms with corral.kernel.rtnetlink, which is a part of
an Attach that has 10; and it costs every daemon 17 MiB of memory and 0.12 s of CPU at start.
"""

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from corral.kernel import rtnetlink
from corral.kernel.netlink import Message, Socket
from corral.kernel.netns import in_namespace
from corral.network.ipam import Address, Subnet

DEFAULT_MTU = 1500


@dataclass(frozen=True, slots=True)
class Route:
    """A destination that the host knows, and through which of its interfaces."""

    subnet: Subnet
    interface: str


@dataclass(frozen=True, slots=True)
class BridgePlan:
    """A bridge as it should be."""

    name: str
    mac: str
    mtu: int
    addresses: Sequence[tuple[Address, int]]  # with the length of the prefix


@dataclass(frozen=True, slots=True)
class InterfacePlan:
    """A veth pair as it should be: `name` inside the namespace, `host_name` on the bridge."""

    name: str
    host_name: str
    bridge: str
    mac: str
    mtu: int
    addresses: Sequence[tuple[Address, int]]
    gateways: Sequence[Address]  # of default routes


class Netlink:
    """A netlink socket in the namespace of the thread that made it. For that thread only."""

    def __init__(self) -> None:
        self._socket = Socket(rtnetlink.NETLINK_ROUTE)

    def close(self) -> None:
        self._socket.close()

    # Looking

    def routes(self) -> list[Route]:
        """What the host routes: every unicast destination in any table, but default routes and its own addresses."""
        return [
            Route(route.destination, _name_of(route.oif))
            for route in rtnetlink.routes(self._socket)
            if route.destination is not None
            and route.kind == rtnetlink.RTN_UNICAST
            and route.table != rtnetlink.RT_TABLE_LOCAL
            and not route.destination.is_link_local
        ]

    def default_mtu(self) -> int:
        """The MTU of the interface with the default route; 1500 without one."""
        for route in rtnetlink.routes(self._socket, (socket.AF_INET,)):
            if route.destination is None and route.kind == rtnetlink.RTN_UNICAST and route.oif:
                links = {link.index: link.mtu for link in rtnetlink.links(self._socket)}
                return links.get(route.oif, DEFAULT_MTU)
        return DEFAULT_MTU

    def links(self, kind: str) -> list[tuple[str, str]]:
        """Names of all links of a kind, each with the name of the bridge it is in, or ""."""
        return [(link.name, _name_of(link.master)) for link in rtnetlink.links(self._socket, kind)]

    # Bridges

    def ensure_bridge(self, plan: BridgePlan) -> bool:
        """Make the bridge, or mend what it lacks; returns whether it had to be made.

        Raises OSError(EEXIST) if something else has its name.
        """
        made = not link_exists(plan.name)
        if made:
            self._socket.request(rtnetlink.new_bridge(plan.name, mac=plan.mac, mtu=plan.mtu))
        elif plan.name not in dict(self.links("bridge")):
            raise OSError(errno.EEXIST, f"netlink: {plan.name} exists and is not a bridge")
        index = index_of(plan.name)
        present = [] if made else rtnetlink.addresses(self._socket, index)
        missing = [held for held in plan.addresses if held not in present]
        self._socket.request(
            *(_address(index, address, length, plan.name) for address, length in missing),
            rtnetlink.set_link(index, up=True, what=f"set {plan.name} up"),
        )
        return made

    def delete_link(self, name: str) -> bool:
        """Delete a link (a veth with its peer); False if there is none. May take 20 ms and more, see above."""
        with _missing_is_fine() as outcome:
            self._socket.request(rtnetlink.delete_link(name))
        return outcome.found

    # Endpoints

    def plug(self, plan: InterfacePlan, netns: Path) -> None:
        """Make the veth pair, one end on the bridge and up, the other inside the namespace, in one request.

        Raises OSError(ENODEV) if the bridge is missing, EEXIST if a name is taken.
        """
        with _namespace_fd(netns) as fd:
            message = rtnetlink.new_veth(
                plan.host_name,
                master=index_of(plan.bridge),
                mtu=plan.mtu,
                peer=plan.name,
                peer_netns=fd,
                peer_mac=plan.mac,
            )
            self._socket.request(message)

    def unplug(self, host_name: str) -> bool:
        """Cut the pair off the bridge at once; False if it is gone already. It is deleted with its namespace."""
        with _missing_is_fine() as outcome:
            index = index_of(host_name)
            what = f"take {host_name} off its bridge"
            self._socket.request(rtnetlink.set_link(index, up=False, master=0, what=what))
        return outcome.found

    def enslave(self, host_name: str, bridge: str) -> None:
        """Put the host's end back on a bridge that was made anew. Raises OSError(ENODEV)."""
        what = f"put {host_name} on {bridge}"
        self._socket.request(rtnetlink.set_link(index_of(host_name), up=True, master=index_of(bridge), what=what))

    def configure(self, plan: InterfacePlan) -> None:
        """Give the inner end its addresses and routes. For a Netlink inside the namespace."""
        index = index_of(plan.name)
        if any(address.version == 6 for address, _ in plan.addresses):
            Path(f"/proc/sys/net/ipv6/conf/{plan.name}/disable_ipv6").write_text("0")
        self._socket.request(
            *(_address(index, address, length, plan.name) for address, length in plan.addresses),
            rtnetlink.set_link(index, up=True, what=f"set {plan.name} up"),
            *(rtnetlink.new_default_route(gateway, index) for gateway in plan.gateways),
        )


def configure_inside(netns: Path, plans: Sequence[InterfacePlan], sysctls: Sequence[tuple[Path, str]]) -> None:
    """Configure the inner ends of plugged pairs, and write sysctls, inside a namespace.

    Sysctls are written when the interfaces are there and before they are up. Raises OSError.
    """

    def work() -> None:
        for path, value in sysctls:
            path.write_text(value)
        if not plans:
            return
        netlink = Netlink()
        try:
            for plan in plans:
                netlink.configure(plan)
        finally:
            netlink.close()

    in_namespace(netns, work)


def index_of(name: str) -> int:
    """The index of a link in the calling thread's namespace. Raises OSError(ENODEV)."""
    try:
        return socket.if_nametoindex(name)
    except OSError as e:
        raise OSError(errno.ENODEV, f"no link is named {name}") from e


def link_exists(name: str) -> bool:
    """Whether the calling thread's namespace has a link of that name."""
    try:
        index_of(name)
    except OSError:
        return False
    return True


class _Outcome:
    found = True


@contextlib.contextmanager
def _missing_is_fine() -> Iterator[_Outcome]:
    outcome = _Outcome()
    try:
        yield outcome
    except OSError as e:
        if e.errno != errno.ENODEV:
            raise
        outcome.found = False


@contextlib.contextmanager
def _namespace_fd(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _address(index: int, address: Address, length: int, where: str) -> Message:
    return rtnetlink.new_address(index, address, length, what=f"add address {address}/{length} to {where}")


def _name_of(index: int) -> str:
    """The name of an interface; "" for none, or one that has just gone."""
    try:
        return socket.if_indextoname(index) if index else ""
    except OSError:
        return ""


class NetlinkThread:
    """The thread that changes the host's links and firewall, one change at a time."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="netlink")
        self._netlink: Netlink | None = None

    async def run[T](self, work: Callable[[Netlink], T]) -> T:
        """Run `work` on the thread. A cancelled caller stops waiting; the work still runs to its end."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, lambda: work(self._opened()))

    def close(self) -> None:
        """Wait for what was asked for, and end."""
        self._executor.submit(self._close).result()
        self._executor.shutdown()

    def _opened(self) -> Netlink:
        if self._netlink is None:
            self._netlink = Netlink()
        return self._netlink

    def _close(self) -> None:
        netlink, self._netlink = self._netlink, None
        if netlink is not None:
            netlink.close()
