"""What is read of iptables' FORWARD, what is added to it, and which of its changes are looked at: pure functions."""

import struct

import pytest

from corral.network import forwarding, watching
from corral.network.forwarding import ForwardChain
from corral.network.model import Network

OWN = "corral-FORWARD"


def network(bridge: str, *, internal: bool = False) -> Network:
    return Network("0" * 64, "default", bridge, "bridge", bridge=bridge, internal=internal)


def listed(*rules: dict[str, object], policy: str = "drop") -> list[dict[str, object]]:
    chain = {"family": "ip", "table": "filter", "name": "FORWARD", "hook": "forward", "policy": policy}
    return [{"chain": chain}, *({"rule": {"handle": 7 + number, **rule}} for number, rule in enumerate(rules))]


def jump(target: str, link: str = "", comment: str = "") -> dict[str, object]:
    leaving = [{"match": {"op": "==", "left": {"meta": {"key": "oifname"}}, "right": link}}] if link else []
    return {"expr": [*leaving, {"counter": {}}, {"jump": {"target": target}}], "comment": comment}


def ours(target: str = OWN) -> dict[str, object]:
    return jump(target, comment=f"{forwarding.COMMENT}s of {target}")


@pytest.mark.parametrize(
    ("rules", "jumps", "last"),
    [
        ((), (), False),
        ((ours(),), (7,), True),
        ((jump("DOCKER-USER"), ours()), (8,), True),
        ((ours(), jump("strangers")), (7,), False),
        ((ours(), ours("another-FORWARD")), (7,), True),
        ((ours("another-FORWARD"), ours()), (8,), True),
        ((ours(), jump("strangers"), ours()), (7, 9), False),
    ],
)
def test_a_jump_of_ours_is_last_if_only_engines_of_ours_come_after_it(
    rules: tuple[dict[str, object], ...], jumps: tuple[int, ...], last: bool
) -> None:
    found = forwarding.read(listed(*rules), OWN)  # type: ignore[arg-type]
    assert (found.jumps, found.last) == (jumps, last)


def test_a_chain_that_accepts_or_is_ufws_is_left_alone() -> None:
    networks = [network("crl1")]
    assert forwarding.admits(forwarding.read(listed(), OWN), networks)  # type: ignore[arg-type]
    assert not forwarding.admits(forwarding.read(listed(policy="accept"), OWN), networks)  # type: ignore[arg-type]
    ufw = listed(jump("ufw-before-forward"))
    assert not forwarding.admits(forwarding.read(ufw, OWN), networks)  # type: ignore[arg-type]
    assert not forwarding.admits(forwarding.read(listed(), OWN), [])  # type: ignore[arg-type]


def test_links_of_docker_are_those_of_its_rules_alone() -> None:
    rules = jump("DOCKER", "docker0"), jump("DOCKER", "br-1"), jump("strangers", "eth0"), jump("DOCKER")
    assert forwarding.read(listed(*rules), OWN).guarded == ["br-1", "docker0"]  # type: ignore[arg-type]


def test_a_jump_that_is_last_is_not_made_again_and_one_that_is_not_is_moved() -> None:
    networks = [network("crl1"), network("crl2", internal=True)]
    assert "jump" not in str(forwarding.admission("ip", OWN, ForwardChain(drops=True, jumps=(9,), last=True), networks))
    *_, deleted, added = forwarding.admission("ip", OWN, ForwardChain(drops=True, jumps=(9,)), networks)
    assert deleted == {"delete": {"rule": {"family": "ip", "table": "filter", "chain": "FORWARD", "handle": 9}}}
    assert OWN in str(added)


def test_a_chain_has_a_name_that_iptables_takes() -> None:
    assert forwarding.chain_name("corral") == OWN
    long = [forwarding.chain_name("corral" + letter * 30) for letter in "ab"]
    assert all(len(name) <= 28 for name in long)
    assert long[0] != long[1]


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
        (message(8, IP, table="filter", chain=OWN), True),
        (message(2, IP, table="filter"), True),
        (message(3, INET, table="firewalld", name="filter_FORWARD"), True),
        (message(3, IP, table="filter", name="INPUT"), False),
        (message(6, IP, table="filter", chain="DOCKER"), False),
        (message(3, IP, table="nat", name="FORWARD"), False),
        (message(3, INET, table="filter", name="FORWARD"), False),
        (message(6, INET, table="firewalld", chain="filter_FORWARD"), False),
        (message(3, IP, port=77, table="filter", name="FORWARD"), False),  # our own
        (message(12, IP, table="filter"), False),
        (message(8, IP, table="nat", chain="a") + message(3, IP, table="filter", name="FORWARD"), True),
    ],
)
def test_changes_of_that_chain_are_looked_at_and_no_others(data: bytes, seen: bool) -> None:
    assert watching.changed_forward(data, OWN, {77}) is seen
