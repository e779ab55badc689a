"""Our nftables table in the kernel: the shell around corral.network.rules, and corral.network.admission with it."""

import errno
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from corral.kernel.nftables import Nftables, NftablesError
from corral.network import admission, rules
from corral.network.model import Forward, Network

IP_FORWARD = Path("/proc/sys/net/ipv4/ip_forward")
ROUTE_LOCALNET = Path("/proc/sys/net/ipv4/conf")
IP6_FORWARD = Path("/proc/sys/net/ipv6/conf/all/forwarding")
_ROUTES4, _ROUTES6 = Path("/proc/thread-self/net/route"), Path("/proc/thread-self/net/ipv6_route")
# Of links of others, what can stand in a set: "*" would mean more than one.
_LINK_NAME = re.compile(r"[A-Za-z0-9_.:@-]+")


def _nothing() -> None:
    pass


class Firewall:
    """One table. For the netlink thread only: libnftables works in the namespace of the thread that opened it."""

    def __init__(self, table: str, forward: str = admission.ACCEPT) -> None:
        # What the table holds, for when it is built anew: rows come before what they say is there, or go after it.
        self._networks: dict[str, Network] = {}
        self._forwards: dict[Forward, None] = {}
        self.table = self._table = table
        self._nftables: Nftables | None = None
        self._known = False  # whether the table is what this process made it
        self._begun = False  # whether it is known which networks there are
        self._admission = admission.Admission(table, forward)
        self._uplinks: frozenset[str] = frozenset()
        # Called on the netlink thread where admit() should be tried again.
        self.on_not_admitted: Callable[[], None] = _nothing

    def stands(self) -> bool:
        """Whether the table is there."""
        try:
            self._run([{"list": {"table": {"family": rules.FAMILY, "name": self._table}}}])
        except NftablesError as e:
            if e.errno != errno.ENOENT:
                raise
            return False
        return True

    def begin(self, networks: Iterable[Network], forwards: Iterable[Forward]) -> None:
        """Replace the table by what the bridges of these networks, and ports of another process, need."""
        self._networks |= {network.id: network for network in networks if network.is_bridge}
        self._forwards |= dict.fromkeys(forwards)
        self.rebuild()

    def rebuild(self) -> None:
        """Make the table anew for all that was let through; no bridge, no table."""
        networks = self._networks.values()
        self._uplinks = uplinks()
        self._run(
            [
                *rules.table(self._table, networks, self._forwards),
                *rules.set_uplinks(self._table, sorted(self._uplinks)),
            ]
            if networks
            else rules.remove_table(self._table)
        )
        self._known, self._begun = bool(networks), True
        self._admit_or_tell()

    def admit(self) -> bool:
        """See that its networks get through what others have at the forward hook; returns whether that was done."""
        return not self._begun or self._admission.follow(networks=bool(self._networks))

    def admit_legacy(self) -> None:
        """As admit(), for the old iptables; what can't be done now is for the next time."""
        if self._begun:
            self._admission.follow_legacy(networks=bool(self._networks))

    def _admit_or_tell(self) -> None:
        if not self.admit():
            self.on_not_admitted()

    def follow_uplinks(self) -> None:
        """See by which links packets leave this host now; no error where the table is missing. Raises OSError."""
        found = uplinks()
        if found == self._uplinks or not self._known:
            return
        try:
            self._run(rules.set_uplinks(self._table, sorted(found)))
        except NftablesError as e:
            if e.errno != errno.ENOENT:
                raise
        self._uplinks = found

    def add(self, network: Network) -> None:
        """Let a network through. Where the table is missing, or left from another process, it is built anew for all."""
        is_new = network.id not in self._networks
        self._networks[network.id] = network
        if self._known:
            try:
                self.follow_uplinks()
                self._run(rules.add_network(self._table, network))
                if is_new:  # the others are in, or somebody's change of that is noticed
                    self._admit_or_tell()
                return
            except NftablesError as e:
                if e.errno != errno.ENOENT:
                    raise
        self.rebuild()

    def remove(self, network: Network) -> None:
        """Take a network out; no error where the table is missing."""
        self._networks.pop(network.id, None)
        self._admit_or_tell()
        try:
            self._run(rules.remove_network(self._table, network))
        except NftablesError as e:
            if e.errno != errno.ENOENT:
                raise

    def publish(self, ports: Sequence[Forward]) -> None:
        """Let ports lead to containers whose networks stand, also if somebody has just removed the table. What fails is
        to be withdrawn."""
        self._forwards |= dict.fromkeys(ports)
        try:
            self._run(rules.add_ports(self._table, ports))
        except NftablesError as e:
            if e.errno != errno.ENOENT:
                raise
            self.rebuild()

    def withdraw(self, ports: Sequence[Forward]) -> None:
        """Let them lead nowhere; no error where the table is missing."""
        for port in ports:
            self._forwards.pop(port, None)
        try:
            self._run(rules.remove_ports(self._table, ports))
        except NftablesError as e:
            if e.errno != errno.ENOENT:
                raise

    def close(self) -> None:
        nftables, self._nftables = self._nftables, None
        if nftables is not None:
            nftables.close()
        self._admission.close()

    def _run(self, commands: Sequence[rules.Command]) -> Sequence[Mapping[str, rules.Json]]:
        if self._nftables is None:
            self._nftables = Nftables()
        return self._nftables.run(commands)


def uplinks() -> frozenset[str]:
    """The links that default routes of the calling thread's network namespace leave by."""
    found: set[str] = set()
    for path, is_default, column in ((_ROUTES4, _is_default4, 0), (_ROUTES6, _is_default6, 9)):
        try:
            lines = path.read_bytes().decode("ascii", "replace").splitlines()
        except OSError:  # a kernel without IPv6
            continue
        found |= {words[column] for words in map(str.split, lines) if is_default(words)}
    return frozenset(name for name in found - {"lo"} if _LINK_NAME.fullmatch(name))


def _is_default4(words: Sequence[str]) -> bool:
    return len(words) > 7 and words[1] == words[7] == "00000000"  # destination and mask


def _is_default6(words: Sequence[str]) -> bool:
    return len(words) > 9 and set(words[0]) == {"0"} and words[1] == "00"


def route_loopback_to(bridge: str) -> None:
    """Let packets from the host's loopback addresses leave by a bridge; the table drops what would come in for them.

    Source: ip-sysctl.rst, "route_localnet".
    """
    (ROUTE_LOCALNET / bridge / "route_localnet").write_text("1")


def switch_on_forwarding(*, ipv6: bool) -> bool:
    """Let this host forward packets; returns whether IPv4 forwarding had been off."""
    was_off = IP_FORWARD.read_text().strip() == "0"
    if was_off:
        IP_FORWARD.write_text("1")
    if ipv6 and IP6_FORWARD.read_text().strip() == "0":
        IP6_FORWARD.write_text("1")
    return was_off
