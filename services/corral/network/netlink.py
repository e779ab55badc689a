"""Links, addresses and routes, through netlink: changes are packed by rtnetlink, lists are read by pyroute2.

One thread of ours holds one socket for the host's side; the kernel serialises these requests anyway (RTNL). Inside
another namespace a short-lived thread does setns and opens a socket of its own there; IPRoute(netns=…) would fork.

What deletion costs (Linux 6.18, 2 cores): deleting a veth pair waits for RCU while it holds RTNL, 17 ms, and 30 ms in a
tight loop. So nothing here deletes one on the way of a request: `unplug` takes the host's end out of the bridge and
down, 0.3 ms, after which no packet passes; the pair then dies with its namespace, in the kernel's time and in batches.

Which pyroute2: its plain socket, IPRSocket, with its message classes. An IPRoute has an event loop of its own and
rewrites each request through filters. Importing any of pyroute2 takes 0.1 s and 12 MiB: only links.NetlinkThread
imports this module, when it is first needed. This is the only module that imports it.
"""

import contextlib
import errno
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

from pyroute2.netlink import NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_DONE
from pyroute2.netlink.rtnl import RTM_GETADDR, RTM_GETLINK, RTM_GETROUTE, rt_type
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.iprsocket import IPRSocket
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from corral.kernel.netns import in_namespace
from corral.network import rtnetlink
from corral.network.ipam import Address
from corral.network.links import (
    BridgePlan,
    InterfacePlan,
    Owner,
    PathTaken,
    Route,
    SubLink,
    index_of,
    link_exists,
    name_of,
)

DEFAULT_MTU = 1500

_LIST = NLM_F_REQUEST | NLM_F_DUMP
# A list that the kernel marks as torn by a change is asked for again, after ever longer pauses: 1.3 s in all.
_LIST_PAUSES_S = (0.0, 0.0, *(0.001 * 1.5**n for n in range(16)))
_RT_TABLE_LOCAL = 255
_RTEXT_FILTER_SKIP_STATS = 8


@dataclass(frozen=True, slots=True)
class _Question:
    """A message of pyroute2 (untyped) that asks for a list, its kind, and in words what it asks for."""

    message: Any
    kind: int
    what: str


class Netlink:
    """Netlink sockets in the namespace of the thread that made it. For that thread only."""

    def __init__(self) -> None:
        """Raises OSError."""
        self._requests = rtnetlink.Requests()
        self._lists: Any = None  # opened when first needed
        self._sequence = 0

    def close(self) -> None:
        self._requests.close()
        if self._lists is not None:
            self._lists.close()

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

    def path_to(self, address: Address) -> PathTaken | None:
        """The way that packets for an address take from here; None if there is no route."""
        return self._requests.path_to(address)

    @staticmethod
    def path_inside(netns: Path, address: Address) -> PathTaken | None:
        """The same from inside a namespace. Raises OSError."""
        return _inside(netns, lambda netlink: netlink.path_to(address))

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

    def own_addresses(self) -> frozenset[Address]:
        """All that the links of this host have."""
        rows = self._list(_list_addresses())
        return frozenset(ip_address(row.get_attr("IFA_LOCAL") or row.get_attr("IFA_ADDRESS")) for row in rows)

    # Bridges

    def ensure_bridge(self, plan: BridgePlan) -> bool:
        """Make the bridge, or mend what it lacks; returns whether it had to be made.

        Raises OSError(EEXIST) if something else has its name.
        """
        made = not link_exists(plan.name)
        if made:
            self._make_owned(plan.name, plan.owner, rtnetlink.new_bridge(plan))
        elif plan.name not in dict(self.links("bridge")):
            raise OSError(errno.EEXIST, f"netlink: {plan.name} exists and is not a bridge")
        index = index_of(plan.name)
        _heed_no_router(plan.name)
        present = [] if made else self._addresses(index)
        missing = [held for held in plan.addresses if held not in present]
        self._requests.ask(
            *(rtnetlink.new_address(index, address, length, plan.name) for address, length in missing),
            rtnetlink.set_link(index, up=True, what=f"set {plan.name} up"),
        )
        return made

    def _make_owned(self, name: str, owner: Owner, request: rtnetlink.Request) -> None:
        """Make a link by a request that gives it the owner's name of birth, and call it what it is to be called."""
        self.delete_link(owner.birth_name)  # of a process that died here
        self._requests.ask(request)
        try:
            self._requests.ask(rtnetlink.rename(index_of(owner.birth_name), name, owner.alias))
        except OSError:
            self.delete_link(owner.birth_name)
            raise

    def delete_own(self, name: str, owner: Owner) -> None:
        """Delete a link of that name if it is the owner's, and what was to have the name; no error if it is gone."""
        self.delete_link(owner.birth_name)
        alias = (link.get_attr("IFLA_IFALIAS") for link in self._list_named(name))
        if owner.alias in alias:
            self.delete_link(name)

    def _list_named(self, name: str) -> list[Any]:
        return [link for link in self._list(_list_links()) if link.get_attr("IFLA_IFNAME") == name]

    def delete_link(self, name: str) -> bool:
        """Delete a link (a veth with its peer); False if there is none. May take 20 ms and more, see above."""
        with _missing_is_fine() as outcome:
            self._requests.ask(rtnetlink.delete_link(name))
        return outcome.found

    # Endpoints

    def plug(self, plan: InterfacePlan, netns: Path) -> None:
        """Make the veth pair, one end on the bridge and up, the other inside the namespace, in one request.

        Raises OSError(ENODEV) if the bridge is missing, EEXIST if a name is taken.
        """
        with _namespace_fd(netns) as fd:
            self._requests.ask(rtnetlink.new_veth(plan, index_of(plan.bridge), fd))
        if plan.isolated:
            self.isolate(plan.host_name)
        if plan.receive_bps:
            index, what = index_of(plan.host_name), f"limit what {plan.host_name} sends"
            self._requests.ask(rtnetlink.limit_rate(index, plan.receive_bps, what))

    def set_rates(self, plan: InterfacePlan, netns: Path) -> None:
        """Limit what a link that stands receives and sends as its plan says, or no more. Raises OSError."""
        if plan.host_name:
            self.set_rate(plan.host_name, plan.receive_bps)
        _inside(netns, lambda netlink: netlink.set_rate(plan.name, plan.send_bps))

    def set_rate(self, name: str, bits_per_s: int) -> None:
        """Limit what a link sends; 0: no more. Raises OSError."""
        index, what = index_of(name), f"limit what {name} sends"
        if bits_per_s:
            self._requests.ask(rtnetlink.limit_rate(index, bits_per_s, what))
            return
        try:
            self._requests.ask(rtnetlink.lift_rate(index, what))
        except OSError as e:
            if e.errno not in (errno.ENOENT, errno.EINVAL):  # there was no limit
                raise

    def plug_sublink(self, plan: InterfacePlan, kind: SubLink, netns: Path, seclusion: Path | None = None) -> None:
        """Make a link of a parent, which may be in another namespace than this, inside a namespace.

        Raises OSError: ENODEV without the parent, EEXIST if the name is taken, EOPNOTSUPP if the kernel lacks the kind,
        EBUSY and others if the parent does not take it.
        """

        def work(netlink: Netlink) -> None:
            with _namespace_fd(netns) as fd:
                netlink._requests.ask(rtnetlink.new_sublink(plan, kind, index_of(plan.bridge), fd))

        if seclusion is None:
            work(self)
        else:
            _inside(seclusion, work)

    def isolate(self, host_name: str) -> None:
        """Let it reach the bridge itself only. Raises OSError(ENODEV)."""
        self._requests.ask(rtnetlink.isolate(index_of(host_name), f"isolate {host_name}"))

    @staticmethod
    def lay_cable(name: str, peer: str) -> None:
        """A pair of links, both up, in the calling thread's namespace."""
        with contextlib.closing(rtnetlink.Requests()) as requests:
            requests.ask(rtnetlink.new_cable(name, peer))
            for each in (name, peer):
                requests.ask(rtnetlink.set_link(index_of(each), up=True, what=f"set {each} up"))

    def make_vlan(self, name: str, owner: Owner, parent: str, tag: int) -> None:
        """A tagged network on a link, up; this host itself takes no part in it.

        Raises OSError: ENODEV without the parent, EOPNOTSUPP.
        """
        self._make_owned(name, owner, rtnetlink.new_vlan(owner.birth_name, index_of(parent), tag))
        _heed_no_router(name)
        _set_ipv6(name, on=False)
        self._requests.ask(rtnetlink.set_link(index_of(name), up=True, what=f"set {name} up"))

    def rename(self, name: str, wanted: str) -> None:
        """Give a link that is up another name, in one request. Raises OSError(EEXIST)."""
        index = index_of(name)
        self._requests.ask(
            rtnetlink.set_link(index, up=False, what=f"set {name} down"),
            rtnetlink.rename(index, wanted),
            rtnetlink.set_link(index, up=True, what=f"set {wanted} up"),
        )

    @staticmethod
    def delete_inside(netns: Path, name: str) -> None:
        """Delete a link inside a namespace; no error if there is none."""
        _inside(netns, lambda netlink: netlink.delete_link(name))

    def unplug(self, host_name: str) -> bool:
        """Cut the pair off the bridge at once; False if it is gone already. It is deleted with its namespace."""
        with _missing_is_fine() as outcome:
            index = index_of(host_name)
            what = f"take {host_name} off its bridge"
            self._requests.ask(rtnetlink.set_link(index, up=False, master=0, what=what))
        return outcome.found

    def enslave(self, host_name: str, bridge: str) -> None:
        """Put the host's end back on a bridge that was made anew. Raises OSError(ENODEV)."""
        what = f"put {host_name} on {bridge}"
        self._requests.ask(rtnetlink.set_link(index_of(host_name), up=True, master=index_of(bridge), what=what))

    def reflect(self, host_name: str) -> None:
        """Let the bridge send frames back to the interface that sent them. No error if it has gone.

        With br_netfilter, a packet to a port of the host that leads back to its sender is turned round in the bridge.
        """
        with _missing_is_fine():
            self._requests.ask(rtnetlink.reflect(index_of(host_name), f"let {host_name} have its frames back"))

    @staticmethod
    def configure_inside(netns: Path, plans: Sequence[InterfacePlan], born: str = "") -> None:
        """Configure the inner ends of plugged pairs, inside their namespace; `born`: as they are called until then.

        Raises OSError.
        """

        def work(netlink: Netlink) -> None:
            for plan in plans:
                netlink.configure(plan, born or plan.name)

        _inside(netns, work)

    def configure(self, plan: InterfacePlan, born: str) -> None:
        """Give the inner end its name, addresses and routes, and set it up, in one request. For a Netlink inside the
        namespace."""
        index = index_of(born)
        if any(address.version == 6 for address, _ in plan.addresses):
            _heed_no_router(born)
            _set_ipv6(born, on=True)
        self._requests.ask(
            *([rtnetlink.rename(index, plan.name)] if born != plan.name else []),
            *(rtnetlink.new_address(index, address, length, plan.name) for address, length in plan.addresses),
            rtnetlink.set_link(index, up=True, what=f"set {plan.name} up"),
            *(rtnetlink.default_route(gateway, index) for gateway in plan.gateways),
            *(rtnetlink.route_by_link(version, index) for version in plan.versions_by_link),
            *(rtnetlink.route(subnet, gateway, index) for subnet, gateway in plan.routes),
        )
        if plan.send_bps:
            self._requests.ask(rtnetlink.limit_rate(index, plan.send_bps, f"limit what {plan.name} sends"))

    @staticmethod
    def reroute_inside(netns: Path, plans: Sequence[InterfacePlan]) -> None:
        """Set the default routes of interfaces that are there, inside their namespace. Raises OSError."""

        def work(netlink: Netlink) -> None:
            for plan in plans:
                if plan.gateways or plan.versions_by_link:
                    netlink.reroute(plan)

        _inside(netns, work)

    def reroute(self, plan: InterfacePlan) -> None:
        """Give the inner end, which is up, its default routes. For a Netlink inside the namespace."""
        index = index_of(plan.name)
        self._requests.ask(
            *(rtnetlink.default_route(gateway, index) for gateway in plan.gateways),
            *(rtnetlink.route_by_link(version, index) for version in plan.versions_by_link),
        )

    # Lists

    def _list(self, request: _Question) -> list[Any]:
        """The messages that answer a request for a list. Raises OSError."""
        for pause_s in _LIST_PAUSES_S:
            time.sleep(pause_s)
            found, torn = self._dump(request)
            if not torn:
                return found
        raise OSError(errno.EAGAIN, f"netlink: {request.what}: it changes too fast to be read")

    def _dump(self, request: _Question) -> tuple[list[Any], bool]:
        if self._lists is None:
            self._lists = IPRSocket(groups=0)
        self._sequence += 1
        sequence = self._sequence
        self._lists.put(request.message, request.kind, _LIST, msg_seq=sequence)
        found: list[Any] = []
        torn = False
        while True:
            for answer in self._lists.get():
                header = answer["header"]
                if header["sequence_number"] != sequence:
                    continue
                if (failure := _failure(answer, request.what)) is not None:
                    raise failure
                torn |= bool(header["flags"] & NLM_F_DUMP_INTR)
                if header["type"] == NLMSG_DONE:
                    return found, torn
                found.append(answer)


def _inside[T](netns: Path, work: Callable[[Netlink], T]) -> T:
    """Run work inside a namespace with a Netlink of there. Raises OSError."""

    def enter() -> T:
        with contextlib.closing(Netlink()) as netlink:
            return work(netlink)

    return in_namespace(netns, enter)


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


# Questions. Source: rtnetlink(7).


def _heed_no_router(name: str) -> None:
    """Take no route from who advertises himself on a link: there any container can (CVE-2020-13401, CVE-2020-10749)."""
    with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
        Path(f"/proc/sys/net/ipv6/conf/{name}/accept_ra").write_text("0")


def _set_ipv6(name: str, *, on: bool) -> None:
    with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6, where an address of it is refused
        Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("0" if on else "1")


def _list_links(kind: str = "") -> _Question:
    message = ifinfmsg()
    message["attrs"] = [("IFLA_EXT_MASK", _RTEXT_FILTER_SKIP_STATS)]  # a smaller answer is torn less often
    if kind:
        message["attrs"].append(("IFLA_LINKINFO", {"attrs": [("IFLA_INFO_KIND", kind)]}))
    return _Question(message, RTM_GETLINK, "list links")


def _list_addresses() -> _Question:
    return _Question(ifaddrmsg(), RTM_GETADDR, "list addresses")


def _list_routes(family: int) -> _Question:
    message = rtmsg()
    message["family"] = family
    return _Question(message, RTM_GETROUTE, "list routes")
