"""Links, addresses and routes: the only module that speaks netlink, through pyroute2.

One thread of ours holds one socket for the host's side; the kernel serialises these requests anyway (RTNL). Inside another
namespace a short-lived thread does setns and opens a socket of its own there. IPRoute(netns=…) would fork, and is not used.

What deletion costs (Linux 6.18, 2 cores): deleting a veth pair waits for RCU while it holds RTNL, 17 ms, and 30 ms in a
tight loop. So nothing here deletes one on the way of a request: `unplug` takes the host's end out of the bridge and down,
0.3 ms, after which no packet passes; the pair then dies with its namespace, in the kernel's own time and in batches.
"""

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import ip_interface, ip_network
from pathlib import Path
from typing import Any

from corral.kernel.netns import in_namespace
from corral.network.ipam import Address, Subnet

DEFAULT_MTU = 1500
_TABLE_LOCAL = 255
_UNICAST = 1
_NO_DAD = 0x02


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


@contextlib.contextmanager
def _doing(what: str) -> Iterator[None]:
    """Turn pyroute2's errors into OSError naming the request."""
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        yield
    except NetlinkError as e:
        raise OSError(e.code, f"netlink: {what}: {os.strerror(e.code)}") from e


class Netlink:
    """A netlink socket in the namespace of the thread that made it. For that thread only."""

    def __init__(self) -> None:
        from pyroute2.iproute.linux import IPRoute

        self._ip: Any = IPRoute()  # type: ignore[no-untyped-call]  # its methods are made at run time, without types

    def close(self) -> None:
        self._ip.close()

    # Looking

    def routes(self) -> list[Route]:
        """What the host routes: every unicast destination in any table, but default routes and its own addresses."""
        found = []
        with _doing("list routes"):
            routes = list(self._ip.get_routes(family=socket.AF_INET)) + list(
                self._ip.get_routes(family=socket.AF_INET6)
            )
        for route in routes:
            attributes = dict(route["attrs"])
            if route["type"] != _UNICAST or "RTA_DST" not in attributes or route["table"] == _TABLE_LOCAL:
                continue
            subnet = ip_network(f"{attributes['RTA_DST']}/{route['dst_len']}", strict=False)
            if not subnet.is_link_local:
                found.append(Route(subnet, _name_of(attributes.get("RTA_OIF"))))
        return found

    def default_mtu(self) -> int:
        """The MTU of the interface with the default route; 1500 without one."""
        with _doing("list routes"):
            for route in self._ip.get_routes(family=socket.AF_INET, dst_len=0):
                index = dict(route["attrs"]).get("RTA_OIF")
                if route["dst_len"] == 0 and route["type"] == _UNICAST and index is not None:
                    return _mtu_of(_name_of(index))
        return DEFAULT_MTU

    def links(self, kind: str) -> list[tuple[str, str]]:
        """Names of all links of a kind, each with the name of the bridge it is in or ""."""
        with _doing(f"list {kind} links"):
            links = list(self._ip.get_links(kind=kind))
        found = []
        for link in links:
            attributes = dict(link["attrs"])
            found.append((attributes["IFLA_IFNAME"], _name_of(attributes.get("IFLA_MASTER"))))
        return found

    def addresses(self, name: str) -> set[tuple[Address, int]]:
        """The addresses of a link, with their prefix lengths, link-local ones left out."""
        with _doing(f"list addresses of {name}"):
            rows = list(self._ip.get_addr(index=index_of(name)))
        found = set()
        for row in rows:
            interface = ip_interface(f"{dict(row['attrs'])['IFA_ADDRESS']}/{row['prefixlen']}")
            if not interface.is_link_local:
                found.add((interface.ip, interface.network.prefixlen))
        return found

    # Bridges

    def ensure_bridge(self, plan: BridgePlan) -> bool:
        """Make the bridge, or mend what it lacks; returns whether it had to be made.

        Raises OSError(EEXIST) if something else has its name.
        """
        made = not link_exists(plan.name)
        if made:
            # Its own MAC: else it takes that of its lowest port, and changes when ports come and go.
            with _doing(f"add bridge {plan.name}"):
                self._ip.link("add", ifname=plan.name, kind="bridge", address=plan.mac, mtu=plan.mtu)
        elif plan.name not in dict(self.links("bridge")):
            raise OSError(errno.EEXIST, f"netlink: {plan.name} exists and is not a bridge")
        index = index_of(plan.name)
        present = set() if made else self.addresses(plan.name)
        for address, length in plan.addresses:
            if (address, length) not in present:
                self._add_address(index, address, length, plan.name)
        with _doing(f"set {plan.name} up"):
            self._ip.link("set", index=index, state="up")
        return made

    def delete_link(self, name: str) -> bool:
        """Delete a link (a veth with its peer); False if there is none. May take 20 ms and more, see above."""
        try:
            with _doing(f"delete {name}"):
                self._ip.link("del", ifname=name)
        except OSError as e:
            if e.errno != errno.ENODEV:
                raise
            return False
        return True

    # Endpoints

    def plug(self, plan: InterfacePlan, netns: Path) -> None:
        """Make the veth pair, one end on the bridge and up, the other inside the namespace, in one request.

        Raises OSError(ENODEV) if the bridge is missing, EEXIST if a name is taken.
        """
        bridge = index_of(plan.bridge)
        with _namespace_fd(netns) as fd, _doing(f"add veth {plan.host_name} to {plan.bridge}"):
            self._ip.link(
                "add",
                ifname=plan.host_name,
                kind="veth",
                master=bridge,
                mtu=plan.mtu,
                state="up",
                peer={"ifname": plan.name, "net_ns_fd": fd, "address": plan.mac, "mtu": plan.mtu},
            )

    def unplug(self, host_name: str) -> bool:
        """Cut the pair off the bridge at once; False if it is gone already. It is deleted with its namespace."""
        try:
            index = index_of(host_name)
            with _doing(f"take {host_name} off its bridge"):
                self._ip.link("set", index=index, master=0, state="down")
        except OSError as e:
            if e.errno != errno.ENODEV:
                raise
            return False
        return True

    def enslave(self, host_name: str, bridge: str) -> None:
        """Put the host's end back on a bridge that was made anew. Raises OSError(ENODEV)."""
        with _doing(f"put {host_name} on {bridge}"):
            self._ip.link("set", index=index_of(host_name), master=index_of(bridge), state="up")

    def configure(self, plan: InterfacePlan) -> None:
        """Give the inner end its addresses and routes. For a Netlink inside the namespace."""
        index = index_of(plan.name)
        if any(address.version == 6 for address, _ in plan.addresses):
            Path(f"/proc/sys/net/ipv6/conf/{plan.name}/disable_ipv6").write_text("0")
        for address, length in plan.addresses:
            self._add_address(index, address, length, plan.name)
        with _doing(f"set {plan.name} up"):
            self._ip.link("set", index=index, state="up")
        for gateway in plan.gateways:
            family = socket.AF_INET if gateway.version == 4 else socket.AF_INET6
            with _doing(f"add default route via {gateway}"):
                self._ip.route("add", family=family, dst="default", gateway=str(gateway), oif=index)

    def _add_address(self, index: int, address: Address, length: int, where: str) -> None:
        # Our addresses are unique by allocation; duplicate address detection would keep IPv6 ones unusable for a second.
        flags = {"flags": _NO_DAD} if address.version == 6 else {}
        with _doing(f"add address {address}/{length} to {where}"):
            self._ip.addr("add", index=index, address=str(address), prefixlen=length, **flags)


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


@contextlib.contextmanager
def _namespace_fd(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _name_of(index: Any) -> str:
    """The name of an interface; "" for none, or one that has just gone."""
    if not index:
        return ""
    try:
        return socket.if_indextoname(int(index))
    except OSError:
        return ""


def _mtu_of(name: str) -> int:
    import fcntl
    import struct

    siocgifmtu = 0x8921
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16si", name.encode(), 0)
        try:
            answer = fcntl.ioctl(any_socket, siocgifmtu, request)
        except OSError:
            return DEFAULT_MTU
    return int(struct.unpack("16si", answer)[1])


class NetlinkThread:
    """The thread that changes the host's links and firewall, one change at a time."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="netlink")
        self._netlink: Netlink | None = None

    def warm(self) -> None:
        """Import pyroute2 (0.1 s) and open the socket in the background."""
        self._executor.submit(self._opened)

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
