"""FORWARD of the old iptables: the same as corral.network.forwarding has for the new one, at the same place in it.

The old one's tables tell nobody when they change. So they are looked at when a network is made or goes, at a start, and
when something else of ours has to be made again.
"""

from collections.abc import Callable, Sequence

from corral.kernel import iptables_legacy
from corral.kernel.iptables_legacy import Rule, Table
from corral.network.explaining import HARMLESS_TARGETS, ForeignChain
from corral.network.forwarding import CHAIN, DOCKER, TABLE, ForwardChain, admits, is_of_ufw
from corral.network.model import Network

VERSIONS = (4, 6)
NAME = "iptables-legacy"
_PASSING = HARMLESS_TARGETS | {"", "ACCEPT", "RETURN"}


def follow(version: int, own: str, networks: Sequence[Network]) -> bool:
    """Have our chain accept these networks where FORWARD drops by its policy; returns whether it had to be changed.

    For the netlink thread. Raises OSError.
    """
    if not iptables_legacy.is_loaded(version, TABLE):
        return False
    with iptables_legacy.locked(), Table(version, TABLE) as table:
        work = _change(table, own, networks)
        if work is None:
            return False
        work()
        table.commit()
    return True


def foreign(version: int) -> ForeignChain | None:
    """FORWARD as it is, for whoever explains it; None if there is none. Raises OSError."""
    if not iptables_legacy.is_loaded(version, TABLE):
        return None
    with Table(version, TABLE) as table:
        return ForeignChain(
            f"{NAME} {TABLE} {CHAIN}",
            table.policy(CHAIN).lower(),
            _may_drop(table, CHAIN, set()),
            frozenset(rule.target for rule in table.rules(CHAIN)),
            guarded=frozenset(_guarded(table)),
        )


def _may_drop(table: Table, chain: str, seen: set[str]) -> bool:
    seen.add(chain)
    targets = {rule.target for rule in table.rules(chain)} - seen
    return any(
        _may_drop(table, target, seen) if table.has_chain(target) else target not in _PASSING for target in targets
    )


def _read(table: Table, own: str) -> ForwardChain:
    targets = [rule.target for rule in table.rules(CHAIN)]
    jumps = tuple(number for number, target in enumerate(targets) if target == own)
    return ForwardChain(
        drops=table.policy(CHAIN) == "DROP",
        of_ufw=any(map(is_of_ufw, targets)),
        jumps=jumps,
        last=bool(jumps) and jumps[-1] == len(targets) - 1,
        guarded=_guarded(table),
    )


def _guarded(table: Table) -> Sequence[str]:
    return sorted({rule.output for rule in table.rules(CHAIN) if rule.target == DOCKER} - {""})


def _change(table: Table, own: str, networks: Sequence[Network]) -> Callable[[], None] | None:
    """What has to be done to a copy; None for nothing."""
    chain = _read(table, own)
    if not admits(chain, networks):
        return (lambda: _dismiss(table, own, chain)) if chain.jumps or table.has_chain(own) else None
    rules = [Rule("RETURN", output=link) for link in chain.guarded]
    rules += [rule for network in networks for rule in _rules(network)]
    if len(chain.jumps) == 1 and chain.last and table.rules(own) == rules:
        return None
    return lambda: _admit(table, own, chain, rules)


def _admit(table: Table, own: str, chain: ForwardChain, rules: Sequence[Rule]) -> None:
    _dismiss(table, own, chain)
    table.create(own)
    for rule in rules:
        table.append(own, rule)
    table.append(CHAIN, Rule(own))


def _dismiss(table: Table, own: str, chain: ForwardChain) -> None:
    for number in reversed(chain.jumps):
        table.delete(CHAIN, number)
    if table.has_chain(own):
        table.flush(own)
        table.remove(own)


def _rules(network: Network) -> Sequence[Rule]:
    bridge = network.bridge
    if network.internal:
        return (Rule("ACCEPT", bridge, bridge),)
    return Rule("ACCEPT", input=bridge), Rule("ACCEPT", output=bridge)
