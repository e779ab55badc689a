"""FORWARD of the old iptables, for whoever explains it. It is only read: its tables are replaced as a whole, and tell
nobody when they change."""

from corral.kernel import iptables_legacy
from corral.kernel.iptables_legacy import Table
from corral.network.explaining import HARMLESS_TARGETS, LEGACY, ForeignChain
from corral.network.forwarding import CHAIN, TABLE

_PASSING = HARMLESS_TARGETS | {"", "ACCEPT", "RETURN"}


def foreign(version: int, mark: int) -> ForeignChain | None:
    """FORWARD as it is; None if there is none. mark: see corral.network.forwarding. Raises OSError."""
    if not iptables_legacy.is_loaded(version, TABLE):
        return None
    with Table(version, TABLE) as table:
        return ForeignChain(
            f"{LEGACY} {TABLE} {CHAIN}",
            table.policy(CHAIN).lower(),
            _may_drop(table, CHAIN, set()),
            frozenset(rule.target for rule in table.rules(CHAIN)),
            admits=any(rule.target == "ACCEPT" and rule.mark == mark for rule in table.rules(CHAIN)),
        )


def _may_drop(table: Table, chain: str, seen: set[str]) -> bool:
    seen.add(chain)
    targets = {rule.target for rule in table.rules(chain)} - seen
    return any(
        _may_drop(table, target, seen) if table.has_chain(target) else target not in _PASSING for target in targets
    )
