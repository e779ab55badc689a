"""FORWARD of the old iptables: read for whoever explains it, and given our rule as that of the new one is.

Its tables are replaced as a whole, under a lock, and tell nobody when they change: who follows it looks now and then.
"""

from corral.kernel import iptables_legacy
from corral.kernel.iptables_legacy import Table
from corral.network import forwarding
from corral.network.explaining import HARMLESS_TARGETS, LEGACY, ForeignChain
from corral.network.forwarding import CHAIN, TABLE
from corral.network.nfnetlink import ACCEPT, DROP, Chain, Rule

VERSIONS = (4, 6)
_PASSING = HARMLESS_TARGETS | {"", "ACCEPT", "RETURN"}


def foreign(version: int, chain: str, mark: int) -> ForeignChain | None:
    """FORWARD or INPUT as it is; None if there is none. mark: see corral.network.forwarding. Raises OSError."""
    if not iptables_legacy.is_loaded(version, TABLE):
        return None
    with Table(version, TABLE) as table:
        return ForeignChain(
            f"{LEGACY} {TABLE} {chain}",
            table.policy(chain).lower(),
            _may_drop(table, chain, set()),
            frozenset(rule.target for rule in table.rules(chain)),
            admits=any(rule.target == "ACCEPT" and rule.mark == mark for rule in table.rules(chain)),
        )


def follow(version: int, mark: int, *, wanted: bool) -> bool | None:
    """See that our rule is at its end where it is needed, and nowhere else; see corral.network.forwarding.

    Returns whether it was added or, False, only taken away; None if nothing had to be done. Raises OSError.
    """
    if not iptables_legacy.is_loaded(version, TABLE) or not _change(version, mark, wanted=wanted, is_made=False):
        return None
    with iptables_legacy.locked():
        change = _change(version, mark, wanted=wanted, is_made=True)
    return change.is_added if change else None


def _change(version: int, mark: int, *, wanted: bool, is_made: bool) -> forwarding.Change | None:
    with Table(version, TABLE) as table:
        change = forwarding.change(_chain(table), mark, wanted=wanted)
        if change == forwarding.NO_CHANGE:
            return None
        if is_made:
            for rule in reversed(change.old):
                table.delete(CHAIN, rule.handle)
            if change.is_added:
                table.append_accepting(CHAIN, mark)
            table.commit()
        return change


def _chain(table: Table) -> Chain:
    """As one of nf_tables; the handles are numbers in the chain."""
    rules = [
        Rule(number, rule.target.encode(), rule.mark if rule.target == "ACCEPT" else None)
        for number, rule in enumerate(table.rules(CHAIN))
    ]
    return Chain(0, DROP if table.policy(CHAIN) == "DROP" else ACCEPT, rules)


def _may_drop(table: Table, chain: str, seen: set[str]) -> bool:
    seen.add(chain)
    targets = {rule.target for rule in table.rules(chain)} - seen
    return any(
        _may_drop(table, target, seen) if table.has_chain(target) else target not in _PASSING for target in targets
    )
