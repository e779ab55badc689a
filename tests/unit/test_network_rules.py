"""The firewall as data: what does not depend on the networks, and what they add."""

import json

from corral.network import rules
from corral.network.model import Network
from corral.network.subnets import make_range


def network(name: str, cidr: str, *, internal: bool = False) -> Network:
    return Network(
        id=name,
        namespace="default",
        name=name,
        driver="bridge",
        bridge=name,
        ranges=(make_range(cidr),),
        internal=internal,
    )


OPEN, INSIDE = network("one", "10.1.0.0/24"), network("two", "10.2.0.0/24", internal=True)


def kinds(commands: list[rules.Command], kind: str) -> list[object]:
    return [content[kind] for command in commands for content in command.values() if kind in content]  # type: ignore[union-attr,operator]


def test_every_command_speaks_of_our_table_only() -> None:
    for commands in (
        rules.table("ours", [OPEN, INSIDE]),
        rules.remove_network("ours", OPEN),
        rules.remove_table("ours"),
    ):
        for command in commands:
            [content] = command.values()
            [(kind, thing)] = content.items()  # type: ignore[union-attr]
            assert thing["name" if kind == "table" else "table"] == "ours"
            assert thing["family"] == "inet"


def test_the_rules_are_the_same_however_many_networks_there_are() -> None:
    none, both = rules.table("t", []), rules.table("t", [OPEN, INSIDE])
    assert kinds(none, "rule") == kinds(both, "rule")
    assert kinds(none, "chain") == kinds(both, "chain")
    assert both[: len(none)] == none


def test_replacing_the_table_is_one_transaction_that_works_whether_or_not_it_is_there() -> None:
    first = [next(iter(command)) for command in rules.table("t", [])[:3]]
    assert first == ["add", "delete", "add"]


def test_an_internal_network_is_never_masqueraded() -> None:
    assert "subnets4" in rules.elements(OPEN)
    assert "internal" not in rules.elements(OPEN)
    assert set(rules.elements(INSIDE)) == {"bridges", "same", "internal"}


def test_removing_adds_first_so_that_nothing_missing_is_an_error() -> None:
    commands = rules.remove_network("t", OPEN)
    half = len(commands) // 2
    assert [next(iter(command)) for command in commands] == ["add"] * half + ["delete"] * half
    assert [next(iter(c.values())) for c in commands[:half]] == [next(iter(c.values())) for c in commands[half:]]


def test_it_is_json() -> None:
    json.dumps(rules.table("t", [OPEN, INSIDE]))
