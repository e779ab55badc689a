"""Our networks let through where others drop by default what is forwarded: iptables' FORWARD, old and new, firewalld.

See corral.network.forwarding, legacy_forward and firewalld.
"""

import errno
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import structlog

from corral.kernel.nftables import NftablesError
from corral.network import firewalld, forwarding, legacy_forward
from corral.network.model import Network
from corral.network.rules import Command, Json

log = structlog.get_logger()

ACCEPT, LEAVE = "accept", "leave"

type Run = Callable[[Sequence[Command]], Sequence[Mapping[str, Json]]]


class Admission:
    """For the thread of the firewall."""

    def __init__(self, run: Run, table: str, forward: str) -> None:
        """forward: the setting. With "leave" only what an earlier daemon added is taken back."""
        self._run = run
        self._wanted = forward == ACCEPT
        self.chain = forwarding.chain_name(table)

    def follow(self, networks: Sequence[Network], gone: str = "") -> bool:
        """See that these get through, and nobody else because of us; gone: the bridge of one that goes.

        Returns whether all could be done. What fails is told in the log: a network is no worse off than without us.
        """
        wanted = networks if self._wanted else ()
        places = [(family, partial(self._follow, family, wanted)) for family in forwarding.FAMILIES]
        places += [
            (f"legacy, IPv{version}", partial(legacy_forward.follow, version, self.chain, wanted))
            for version in legacy_forward.VERSIONS
        ]
        places.append(("firewalld", partial(self._follow_zone, wanted, gone)))
        done = [self._done(where, work) for where, work in places]
        return all(done)

    def _done(self, where: str, work: Callable[[], bool]) -> bool:
        try:
            changed = work()
        except OSError as e:
            log.warning("network.not_admitted", where=where, chain=self.chain, error=str(e))
            return False
        if changed:
            log.info("network.admission", where=where, chain=self.chain)
        return True

    def _follow(self, family: str, networks: Sequence[Network]) -> bool:
        found = self._found(family)
        if found is None:
            return False
        if forwarding.admits(found, networks):
            self._run(forwarding.admission(family, self.chain, found, networks))
            return len(found.jumps) != 1 or not found.last
        if not found.jumps and not self._has_chain(family):
            return False
        self._run(forwarding.dismissal(family, self.chain, found))
        return True

    def _follow_zone(self, networks: Sequence[Network], gone: str) -> bool:
        bridges = {network.bridge for network in networks if not network.internal}
        old = {gone} - bridges if gone else set()
        if not bridges | old or not self._has_firewalld():
            return False
        return firewalld.follow(sorted(bridges), sorted(old))

    def _has_firewalld(self) -> bool:
        """In this network namespace, whatever bus there is: by its table."""
        return self._has({"family": firewalld.FAMILY, "table": firewalld.TABLE, "name": firewalld.CHAIN})

    def _found(self, family: str) -> forwarding.ForwardChain | None:
        try:
            return forwarding.read(self._run(forwarding.listing(family)), self.chain)
        except NftablesError as e:
            if e.errno == errno.ENOENT:
                return None
            raise

    def _has_chain(self, family: str) -> bool:
        return self._has({"family": family, "table": forwarding.TABLE, "name": self.chain})

    def _has(self, chain: Json) -> bool:
        try:
            self._run([{"list": {"chain": chain}}])
        except NftablesError as e:
            if e.errno == errno.ENOENT:
                return False
            raise
        return True
