"""Links, addresses and routes: the only module that speaks netlink, through pyroute2.

One thread of ours holds one socket for the host's side; the kernel serialises these requests anyway (RTNL). Inside
another namespace a short-lived thread does setns and opens a socket of its own there; IPRoute(netns=…) would fork.

What deletion costs (Linux 6.18, 2 cores): deleting a veth pair waits for RCU while it holds RTNL, 17 ms, and 30 ms in a
tight loop. So nothing here deletes one on the way of a request: `unplug` takes the host's end out of the bridge and
down, 0.3 ms, after which no packet passes; the pair then dies with its namespace, in the kernel's time and in batches.

Which pyroute2: its plain socket, IPRSocket, with its message classes. An IPRoute has an event loop of its own and
rewrites each request through filters, which cost an Attach 2 ms more. Importing any of pyroute2 takes 0.1 s and
12 MiB: only links.NetlinkThread imports this module, when it is first needed.
"""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

from pyroute2.netlink import (
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_DUMP_INTR,
    NLM_F_EXCL,
    NLM_F_REQUEST,
    NLMSG_DONE,
)
from pyroute2.netlink.rtnl import (
    RTM_DELLINK,
    RTM_GETADDR,
    RTM_GETLINK,
    RTM_GETROUTE,
    RTM_NEWADDR,
    RTM_NEWLINK,
    RTM_NEWROUTE,
    rt_proto,
    rt_type,
)
from pyroute2.netlink.rtnl.ifaddrmsg import IFA_F_NODAD, ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import IFF_UP, ifinfmsg
from pyroute2.netlink.rtnl.iprsocket import IPRSocket
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from corral.kernel.netns import in_namespace
from corral.network.ipam import Address
from corral.network.links import BridgePlan, InterfacePlan, Route, index_of, link_exists, name_of

DEFAULT_MTU = 1500

_CHANGE = NLM_F_REQUEST | NLM_F_ACK
_CREATE = _CHANGE | NLM_F_CREATE | NLM_F_EXCL
_LIST = NLM_F_REQUEST | NLM_F_DUMP
# A list that the kernel marks as torn by a change is asked for again.
_LIST_ATTEMPTS = 5
_RT_TABLE_MAIN, _RT_TABLE_LOCAL = 254, 255


@dataclass(frozen=True, slots=True)
class _Request:
    """A message of pyroute2 (untyped), what to do with it, and in words what it asks for."""

    message: Any
    kind: int
    flags: int
    what: str


class Netlink:
    """A netlink socket in the namespace of the thread that made it. For that thread only."""

    def __init__(self) -> None:
        """Raises OSError."""
        self._socket = IPRSocket(ext_ack=True, groups=0)
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()

    # Looking

    def routes(self) -> list[Route]:
        """What the host routes: every unicast destination in any table, but default routes and its own addresses."""
        found = []
        for row in (*self._routes(socket.AF_INET), *self._routes(socket.AF_INET6)):
            destination = row.get_attr("RTA_DST")
            table = row.get_attr("RTA_TABLE") or row["table"]
            if destination is None or row["type"] != rt_type["unicast"] or table == _RT_TABLE_LOCAL:
                continue
            subnet = ip_network((destination, row["dst_len"]), strict=False)
            if not subnet.is_link_local:
                found.append(Route(subnet, name_of(row.get_attr("RTA_OIF"))))
        return found

    def default_mtu(self) -> int:
        """The MTU of the interface with the default route; 1500 without one."""
        for row in self._routes(socket.AF_INET):
            index = row.get_attr("RTA_OIF")
            if row["dst_len"] == 0 and row["type"] == rt_type["unicast"] and index is not None:
                mtus = {link["index"]: link.get_attr("IFLA_MTU") for link in self._list(_list_links())}
                return int(mtus.get(index, DEFAULT_MTU))
        return DEFAULT_MTU

    def links(self, kind: str) -> list[tuple[str, str]]:
        """Names of all links of a kind, each with the name of the bridge it is in, or ""."""
        return [
            (link.get_attr("IFLA_IFNAME"), name_of(link.get_attr("IFLA_MASTER")))
            for link in self._list(_list_links(kind))
            if link.get_nested("linkinfo", "kind") == kind
        ]

    def _routes(self, family: int) -> list[Any]:
        return self._list(_list_routes(family))

    def _addresses(self, index: int) -> list[tuple[Address, int]]:
        return [
            (ip_address(row.get_attr("IFA_LOCAL") or row.get_attr("IFA_ADDRESS")), row["prefixlen"])
            for row in self._list(_list_addresses())
            if row["index"] == index
        ]

    # Bridges

    def ensure_bridge(self, plan: BridgePlan) -> bool:
        """Make the bridge, or mend what it lacks; returns whether it had to be made.

        Raises OSError(EEXIST) if something else has its name.
        """
        made = not link_exists(plan.name)
        if made:
            self._ask(_new_bridge(plan))
        elif plan.name not in dict(self.links("bridge")):
            raise OSError(errno.EEXIST, f"netlink: {plan.name} exists and is not a bridge")
        index = index_of(plan.name)
        present = [] if made else self._addresses(index)
        missing = [held for held in plan.addresses if held not in present]
        self._ask(
            *(_new_address(index, address, length, plan.name) for address, length in missing),
            _set_link(index, up=True, what=f"set {plan.name} up"),
        )
        return made

    def delete_link(self, name: str) -> bool:
        """Delete a link (a veth with its peer); False if there is none. May take 20 ms and more, see above."""
        with _missing_is_fine() as outcome:
            self._ask(_delete_link(name))
        return outcome.found

    # Endpoints

    def plug(self, plan: InterfacePlan, netns: Path) -> None:
        """Make the veth pair, one end on the bridge and up, the other inside the namespace, in one request.

        Raises OSError(ENODEV) if the bridge is missing, EEXIST if a name is taken.
        """
        with _namespace_fd(netns) as fd:
            self._ask(_new_veth(plan, index_of(plan.bridge), fd))

    def unplug(self, host_name: str) -> bool:
        """Cut the pair off the bridge at once; False if it is gone already. It is deleted with its namespace."""
        with _missing_is_fine() as outcome:
            index = index_of(host_name)
            what = f"take {host_name} off its bridge"
            self._ask(_set_link(index, up=False, master=0, what=what))
        return outcome.found

    def enslave(self, host_name: str, bridge: str) -> None:
        """Put the host's end back on a bridge that was made anew. Raises OSError(ENODEV)."""
        what = f"put {host_name} on {bridge}"
        self._ask(_set_link(index_of(host_name), up=True, master=index_of(bridge), what=what))

    @staticmethod
    def configure_inside(netns: Path, plans: Sequence[InterfacePlan]) -> None:
        """Configure the inner ends of plugged pairs, inside their namespace. Raises OSError."""

        def work() -> None:
            with contextlib.closing(Netlink()) as netlink:
                for plan in plans:
                    netlink.configure(plan)

        in_namespace(netns, work)

    def configure(self, plan: InterfacePlan) -> None:
        """Give the inner end its addresses and routes, and set it up. For a Netlink inside the namespace."""
        index = index_of(plan.name)
        if any(address.version == 6 for address, _ in plan.addresses):
            Path(f"/proc/sys/net/ipv6/conf/{plan.name}/disable_ipv6").write_text("0")
        self._ask(
            *(_new_address(index, address, length, plan.name) for address, length in plan.addresses),
            _set_link(index, up=True, what=f"set {plan.name} up"),
            *(_new_default_route(gateway, index) for gateway in plan.gateways),
        )

    # Asking

    def _ask(self, *requests: _Request) -> None:
        """Have a few requests done, in order; they are when this returns.

        Raises OSError for the first that failed, naming it. The others are not undone, and those after it were tried.
        """
        first = self._send(requests)
        failures: dict[int, OSError] = {}
        waiting = set(range(len(requests)))
        while waiting:
            for answer in self._socket.get():
                number = answer["header"]["sequence_number"] - first
                if number in waiting:  # else to a request nobody waits for any more
                    waiting.remove(number)
                    if (failure := _failure(answer, requests[number].what)) is not None:
                        failures[number] = failure
        if failures:
            raise failures[min(failures)]

    def _list(self, request: _Request) -> list[Any]:
        """The messages that answer a request for a list. Raises OSError."""
        for _ in range(_LIST_ATTEMPTS):
            found, torn = self._dump(request)
            if not torn:
                return found
        raise OSError(errno.EAGAIN, f"netlink: {request.what}: it changes too fast to be read")

    def _dump(self, request: _Request) -> tuple[list[Any], bool]:
        sequence = self._send([request])
        found: list[Any] = []
        torn = False
        while True:
            for answer in self._socket.get():
                header = answer["header"]
                if header["sequence_number"] != sequence:
                    continue
                if (failure := _failure(answer, request.what)) is not None:
                    raise failure
                torn |= bool(header["flags"] & NLM_F_DUMP_INTR)
                if header["type"] == NLMSG_DONE:
                    return found, torn
                found.append(answer)

    def _send(self, requests: Sequence[_Request]) -> int:
        """Send them; returns the sequence number of the first."""
        first = self._sequence + 1
        for request in requests:
            self._sequence += 1
            self._socket.put(request.message, request.kind, request.flags, msg_seq=self._sequence)
        return first


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


def _failure(answer: Any, what: str) -> OSError | None:
    """What an answer says that is an error, with the kernel's own words where it gave some; None if all went well."""
    error = answer["header"]["error"]
    if error is None:
        return None
    code = int(answer["error"]) if "error" in answer else errno.EBADMSG
    words = os.strerror(abs(code))
    if reason := answer.get_attr("NLMSGERR_ATTR_MSG"):
        words = f"{words} ({reason})"
    return OSError(abs(code), f"netlink: {what}: {words}")


# Messages. Source: rtnetlink(7), linux/if_link.h, linux/if_addr.h, linux/rtnetlink.h, linux/veth.h.


def _new_bridge(plan: BridgePlan) -> _Request:
    """A bridge, down, with a MAC of its own: else it takes that of its lowest port, which come and go."""
    attributes = [("IFLA_IFNAME", plan.name), ("IFLA_ADDRESS", plan.mac), ("IFLA_MTU", plan.mtu), _kind("bridge")]
    return _Request(_link(attributes), RTM_NEWLINK, _CREATE, f"add bridge {plan.name}")


def _new_veth(plan: InterfacePlan, master: int, netns_fd: int) -> _Request:
    peer = [
        ("IFLA_IFNAME", plan.name),
        ("IFLA_ADDRESS", plan.mac),
        ("IFLA_MTU", plan.mtu),
        ("IFLA_NET_NS_FD", netns_fd),
    ]
    attributes = [
        ("IFLA_IFNAME", plan.host_name),
        ("IFLA_MTU", plan.mtu),
        ("IFLA_MASTER", master),
        _kind("veth", {"attrs": [("VETH_INFO_PEER", {"attrs": peer})]}),
    ]
    what = f"add veth {plan.host_name} to {plan.bridge}"
    return _Request(_link(attributes, up=True), RTM_NEWLINK, _CREATE, what)


def _set_link(index: int, *, up: bool, what: str, master: int | None = None) -> _Request:
    """Set a link up or down, and put it into a bridge (0: out of any)."""
    attributes = [] if master is None else [("IFLA_MASTER", master)]
    return _Request(_link(attributes, index, up=up), RTM_NEWLINK, _CHANGE, what)


def _delete_link(name: str) -> _Request:
    return _Request(_link([("IFLA_IFNAME", name)]), RTM_DELLINK, _CHANGE, f"delete {name}")


def _list_links(kind: str = "") -> _Request:
    return _Request(_link([_kind(kind)] if kind else []), RTM_GETLINK, _LIST, "list links")


def _new_address(index: int, address: Address, length: int, where: str) -> _Request:
    """An address on a link. Ours are unique by allocation; duplicate address detection would keep IPv6 ones unusable
    for a second."""
    message = ifaddrmsg()
    message.update(
        family=_family(address),
        prefixlen=length,
        flags=IFA_F_NODAD if address.version == 6 else 0,
        index=index,
        attrs=[("IFA_LOCAL", str(address)), ("IFA_ADDRESS", str(address))],
    )
    return _Request(message, RTM_NEWADDR, _CREATE, f"add address {address}/{length} to {where}")


def _list_addresses() -> _Request:
    return _Request(ifaddrmsg(), RTM_GETADDR, _LIST, "list addresses")


def _new_default_route(gateway: Address, index: int) -> _Request:
    message = rtmsg()
    message.update(
        family=_family(gateway),
        table=_RT_TABLE_MAIN,
        proto=rt_proto["static"],
        type=rt_type["unicast"],
        attrs=[("RTA_GATEWAY", str(gateway)), ("RTA_OIF", index)],
    )
    return _Request(message, RTM_NEWROUTE, _CREATE, f"add default route via {gateway}")


def _list_routes(family: int) -> _Request:
    message = rtmsg()
    message["family"] = family
    return _Request(message, RTM_GETROUTE, _LIST, "list routes")


def _link(attributes: Sequence[tuple[str, Any]], index: int = 0, *, up: bool | None = None) -> Any:
    """A message about a link; up=None leaves its flags alone."""
    message = ifinfmsg()
    message.update(index=index, flags=IFF_UP if up else 0, change=0 if up is None else IFF_UP, attrs=list(attributes))
    return message


def _kind(kind: str, data: Any = None) -> tuple[str, Any]:
    info = [("IFLA_INFO_KIND", kind)]
    return "IFLA_LINKINFO", {"attrs": info if data is None else [*info, ("IFLA_INFO_DATA", data)]}


def _family(address: Address) -> int:
    return socket.AF_INET if address.version == 4 else socket.AF_INET6
