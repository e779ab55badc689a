"""iptables' chain FORWARD as data, and what we add to it: it may drop by its policy what our own table accepts.

An accept ends only the base chain it is in, so a packet passes if all chains at the forward hook let it. The table
`filter` of iptables is everybody's, and its FORWARD has a place for those who come after all others: its end. What
docker, libvirt or an admin decide in it stays decided; what nobody did, which is what the policy is for, is decided
there, by one rule that is there only while the policy is drop, and while there are networks:

    FORWARD              …, mark MARK accept

The mark is put on by our own table, on packets that it has accepted itself, and taken off by it after FORWARD
(corral.network.rules). So without that table the rule accepts nothing. It is a value of all the 32 bits: packets that
others have marked are left to them.

ufw has its own words for the same, so a FORWARD of ufw's is left to it; so are tables of programs that own theirs, as
docker-bridges or firewalld. The old iptables has a FORWARD of its own (corral.network.legacy_forward).

Source: docs.docker.com, "Docker with iptables" (the order of rules in FORWARD); iptables-nft(8).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from corral.network.nfnetlink import DROP, IPV4, IPV6, Chain, Rule

FAMILIES = (IPV4, IPV6)
TABLE, CHAIN = "filter", "FORWARD"
# Of the marks of all engines of ours: two of them are content to be last, both.
_MARKS = 0x636F0000
_UFW = (b"ufw-", b"ufw6-")


@dataclass(frozen=True, slots=True)
class Change:
    """Of FORWARD: rules of ours that go, and whether one comes at its end."""

    old: Sequence[Rule] = ()
    is_added: bool = False


NO_CHANGE = Change()


def mark(table: str) -> int:
    """What the engine with that table puts on packets that it accepts."""
    return _MARKS | int.from_bytes(hashlib.sha256(table.encode()).digest()[:2])


def is_of_ufw(chain: Chain) -> bool:
    """Whether a rule there leads to ufw's."""
    return any(rule.target.startswith(_UFW) for rule in chain.rules)


def change(found: Chain, own: int, *, wanted: bool) -> Change:
    """What is to be done to FORWARD for the engine that has this mark; wanted: whether it has networks. Pure."""
    ours = [number for number, rule in enumerate(found.rules) if rule.accepts_mark == own]
    old = tuple(found.rules[number] for number in ours)
    if not wanted or found.policy != DROP or is_of_ufw(found):
        return Change(old)
    if len(ours) == 1 and all(_is_of_an_engine(rule) for rule in found.rules[ours[0] :]):
        return NO_CHANGE
    return Change(old, is_added=True)


def _is_of_an_engine(rule: Rule) -> bool:
    return rule.accepts_mark is not None and rule.accepts_mark & 0xFFFF0000 == _MARKS
