"""What is read of iptables' FORWARD, what is added to it, and which of its changes are looked at: pure functions."""

import struct
from collections.abc import Sequence

import pytest

from corral.network import forwarding, watching
from corral.network.nfnetlink import ACCEPT, DROP, Chain, Rule

OWN, ANOTHERS = forwarding.mark("corral"), forwarding.mark("another")
JUMP, OURS, ANOTHER = Rule(7, b"DOCKER-USER"), Rule(8, accepts_mark=OWN), Rule(9, accepts_mark=ANOTHERS)


@pytest.mark.parametrize(
    ("rules", "change"),
    [
        ((), ((), True)),
        ((OURS,), ((), False)),
        ((JUMP, OURS), ((), False)),
        ((OURS, JUMP), ((OURS,), True)),
        ((OURS, ANOTHER), ((), False)),
        ((ANOTHER, OURS), ((), False)),
        ((OURS, Rule(10, accepts_mark=1)), ((OURS,), True)),
        ((OURS, JUMP, OURS), ((OURS, OURS), True)),
    ],
)
def test_a_rule_of_ours_is_last_if_only_those_of_other_engines_come_after_it(
    rules: Sequence[Rule], change: tuple[Sequence[Rule], bool]
) -> None:
    found = forwarding.change(Chain(1, DROP, rules), OWN, wanted=True)
    assert (found.old, found.is_added) == change


@pytest.mark.parametrize(
    ("policy", "rules", "wanted"),
    [(ACCEPT, (), True), (DROP, (Rule(7, b"ufw-before-forward"),), True), (DROP, (JUMP,), False)],
)
def test_a_chain_that_accepts_or_is_ufws_or_that_we_have_no_network_for_has_no_rule_of_ours(
    policy: int, rules: Sequence[Rule], wanted: bool
) -> None:
    assert forwarding.change(Chain(1, policy, rules), OWN, wanted=wanted) == forwarding.NO_CHANGE
    assert forwarding.change(Chain(1, policy, (*rules, OURS)), OWN, wanted=wanted).old == (OURS,)


def test_engines_of_different_tables_have_different_marks() -> None:
    assert len({forwarding.mark(f"corral{number}") for number in range(10)}) == 10


def message(kind: int, family: int, port: int = 5, **named: str) -> bytes:
    """As nftables tells of a change. Attributes: table 1, chain of a rule 2, name of a chain 3."""
    body = struct.pack("=BBH", family, 0, 0)
    for attribute, key in ((1, "table"), (2, "chain"), (3, "name")):
        if key in named:
            value = named[key].encode() + b"\0"
            body += struct.pack("=HH", 4 + len(value), attribute) + value + bytes(-len(value) % 4)
    return struct.pack("=IHHII", 16 + len(body), 10 << 8 | kind, 0, 0, port) + body


IP, IP6, INET = 2, 10, 1


@pytest.mark.parametrize(
    ("data", "seen"),
    [
        (message(3, IP, table="filter", name="FORWARD"), True),  # its policy
        (message(3, IP6, table="filter", name="FORWARD"), True),
        (message(6, IP, table="filter", chain="FORWARD"), True),
        (message(8, IP, table="filter", chain="FORWARD"), True),
        (message(2, IP, table="filter"), True),
        (message(3, IP, table="filter", name="INPUT"), False),
        (message(6, IP, table="filter", chain="DOCKER"), False),
        (message(3, IP, table="nat", name="FORWARD"), False),
        (message(3, INET, table="filter", name="FORWARD"), False),
        (message(3, IP, port=77, table="filter", name="FORWARD"), False),  # our own
        (message(12, IP, table="filter"), False),
        (message(8, IP, table="nat", chain="a") + message(3, IP, table="filter", name="FORWARD"), True),
    ],
)
def test_changes_of_that_chain_are_looked_at_and_no_others(data: bytes, seen: bool) -> None:
    assert watching.changed_forward(data, {77}) is seen
