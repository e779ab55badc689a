"""Our networks let through iptables' FORWARD where that drops by its policy (see corral.network.forwarding)."""

import errno
from collections.abc import Callable, Mapping, Sequence

import structlog

from corral.kernel.nftables import NftablesError
from corral.network import forwarding
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

    def follow(self, networks: Sequence[Network]) -> bool:
        """See that these get through, and nobody else because of us; returns whether anything had to be changed.

        What fails is told in the log: a network is no worse off for it than without us.
        """
        changed = False
        for family in forwarding.FAMILIES:
            try:
                changed |= self._follow(family, networks if self._wanted else ())
            except OSError as e:
                log.warning("network.not_admitted", family=family, chain=self.chain, error=str(e))
        return changed

    def _follow(self, family: str, networks: Sequence[Network]) -> bool:
        found = self._found(family)
        if found is None:
            return False
        if forwarding.admits(found, networks):
            self._run(forwarding.admission(family, self.chain, found, networks))
            changed = len(found.jumps) != 1 or not found.last
        elif found.jumps or self._has_chain(family):
            self._run(forwarding.dismissal(family, self.chain, found))
            changed = True
        else:
            return False
        if changed:
            log.info("network.admission", family=family, chain=self.chain, networks=[one.name for one in networks])
        return changed

    def _found(self, family: str) -> forwarding.ForwardChain | None:
        try:
            return forwarding.read(self._run(forwarding.listing(family)), self.chain)
        except NftablesError as e:
            if e.errno == errno.ENOENT:
                return None
            raise

    def _has_chain(self, family: str) -> bool:
        own: Json = {"family": family, "table": forwarding.TABLE, "name": self.chain}
        try:
            self._run([{"list": {"chain": own}}])
        except NftablesError as e:
            if e.errno == errno.ENOENT:
                return False
            raise
        return True
