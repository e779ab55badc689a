"""Links as they should be, the thread on which they are made so, and what can be asked about them without netlink."""

import asyncio
import errno
import fcntl
import socket
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from corral.network.ipam import Address, Subnet

_SIOCGIFFLAGS, _IFF_UP = 0x8913, 1
_FLAGS = struct.Struct("16sh22x")

if TYPE_CHECKING:
    from corral.network.netlink import Netlink


@dataclass(frozen=True, slots=True)
class Route:
    """A destination that the host knows, and through which of its interfaces."""

    subnet: Subnet
    interface: str


@dataclass(frozen=True, slots=True)
class PathTaken:
    """The way that a namespace's routes send packets for an address. refused: they say unreachable, or the like."""

    link: str
    gateway: Address | None = None
    refused: bool = False


@dataclass(frozen=True, slots=True)
class Owner:
    """How a link of ours is known: the name that it is made under, and its alias from when it has another."""

    birth_name: str
    alias: str


@dataclass(frozen=True, slots=True)
class BridgePlan:
    """A bridge as it should be."""

    name: str
    mac: str
    mtu: int
    addresses: Sequence[tuple[Address, int]]  # with the length of the prefix
    owner: Owner


@dataclass(frozen=True, slots=True)
class SubLink:
    """A link that shares another one: "macvlan" or "ipvlan", with the kernel's numbers of its mode and flags."""

    kind: str
    mode: int
    flags: int = 0


@dataclass(frozen=True, slots=True)
class InterfacePlan:
    """A veth pair as it should be: `name` inside the namespace, `host_name` on the bridge. Or, with `sublink`, a link
    of that kind inside, whose parent is called `bridge`."""

    name: str
    host_name: str
    bridge: str
    mac: str
    mtu: int
    addresses: Sequence[tuple[Address, int]]
    gateways: Sequence[Address]  # of default routes
    versions_by_link: Sequence[int] = ()  # IP versions whose default route has no gateway
    sublink: SubLink | None = None
    secluded: bool = False  # whether the parent is in a namespace of its own
    isolated: bool = False  # from other such ends on the same bridge
    receive_bps: int = 0  # what the inner end may receive and send; 0: no limit
    send_bps: int = 0
    routes: Sequence[tuple[Subnet, Address]] = ()  # further ones, each with its gateway


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


def is_up(name: str) -> bool:
    """Whether the calling thread's namespace has a link of that name, and it is up. Source: netdevice(7)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        try:
            answer = fcntl.ioctl(one, _SIOCGIFFLAGS, _FLAGS.pack(name.encode(), 0))
        except OSError:
            return False
    return bool(_FLAGS.unpack(answer)[1] & _IFF_UP)


def name_of(index: int | None) -> str:
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

    def warm(self) -> None:
        """Open the socket in the background, which the first that runs would wait for."""
        self._executor.submit(self._opened)

    async def run[T](self, work: "Callable[[Netlink], T]") -> T:
        """Run `work` on the thread. A cancelled caller stops waiting; the work still runs to its end."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, lambda: work(self._opened()))

    def close(self) -> None:
        """Wait for what was asked for, and end."""
        self._executor.submit(self._close).result()
        self._executor.shutdown()

    def _opened(self) -> "Netlink":
        if self._netlink is None:
            from corral.network.netlink import Netlink  # brings in pyroute2

            self._netlink = Netlink()
        return self._netlink

    def _close(self) -> None:
        netlink, self._netlink = self._netlink, None
        if netlink is not None:
            netlink.close()
