"""Our networks let through where iptables' FORWARD drops by default what it forwards: see corral.network.forwarding."""

import errno
from collections.abc import Callable
from functools import partial

import structlog

from corral.network import forwarding, legacy_forward
from corral.network.nfnetlink import Nfnetlink

log = structlog.get_logger()

ACCEPT, LEAVE = "accept", "leave"
# How often others may be faster before it is left for later.
_TRIES = 5


class Admission:
    """For the thread of the firewall."""

    def __init__(self, table: str, forward: str) -> None:
        """forward: the setting. With "leave" only what an earlier daemon added is taken back."""
        self._nfnetlink = Nfnetlink()
        self._wanted = forward == ACCEPT
        self._mark = forwarding.mark(table)
        self._told: dict[Callable[..., None], str] = {}  # by way, what failed last
        self._ways = [partial(self._follow, family) for family in forwarding.FAMILIES]
        self._legacy_ways = [partial(self._follow_legacy, version) for version in legacy_forward.VERSIONS]

    def follow(self, *, networks: bool) -> bool:
        """See that networks of ours get through, if there are any, and that nothing of ours is there otherwise.

        Returns whether that could be done. What fails is told in the log, once: a network is no worse off than without
        us.
        """
        done = [self._done(way, wanted=networks and self._wanted) for way in self._ways]
        return self.follow_legacy(networks=networks) and all(done)

    def follow_legacy(self, *, networks: bool) -> bool:
        """The same for the old iptables alone, which tells nobody of its changes."""
        done = [self._done(way, wanted=networks and self._wanted) for way in self._legacy_ways]
        return all(done)

    def close(self) -> None:
        """Harmless when repeated."""
        self._nfnetlink.close()

    def _done(self, way: Callable[..., None], *, wanted: bool) -> bool:
        try:
            way(wanted=wanted)
        except OSError as e:
            self._nfnetlink.close()  # answers that come late are not taken for those of the next question
            if self._told.get(way) != str(e):
                log.warning("network.not_admitted", error=str(e))
            self._told[way] = str(e)
            return False
        return True

    def _follow(self, family: int, *, wanted: bool) -> None:
        for left in reversed(range(_TRIES)):
            found = self._nfnetlink.chain(family, forwarding.TABLE, forwarding.CHAIN)
            change = forwarding.change(found, self._mark, wanted=wanted) if found is not None else forwarding.NO_CHANGE
            if found is None or change == forwarding.NO_CHANGE:
                return
            try:
                self._nfnetlink.replace(
                    family,
                    forwarding.TABLE,
                    forwarding.CHAIN,
                    found,
                    change.old,
                    self._mark if change.is_added else None,
                )
            except OSError as e:
                if e.errno != errno.ERESTART or not left:
                    raise
            else:
                log.info("network.admission", family=family, added=change.is_added)
                return

    def _follow_legacy(self, version: int, *, wanted: bool) -> None:
        added = legacy_forward.follow(version, self._mark, wanted=wanted)
        if added is not None:
            log.info("network.admission", legacy=True, version=version, added=added)
