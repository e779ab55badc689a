"""iptables' chain FORWARD as data, and what we add to it: it may drop by its policy what our own table accepts.

An accept ends only the base chain it is in, so a packet passes if all chains at the forward hook let it. The table
`filter` of iptables is everybody's, and its FORWARD has a place for those who come after all others: its end. What
docker, libvirt or an admin decide in it stays decided; what nobody did, which is what the policy is for, is decided
there:

    FORWARD              …, jump <table>-FORWARD        the last rule, there only while the policy is drop
    <table>-FORWARD      oif DOCKER0 return             for the bridges of a docker before 28, which leaves it to the
                                                        policy to keep others from its containers
                         iif BRIDGE accept              one of each for every bridge of ours, one for both where the
                         oif BRIDGE accept              network is internal; our own table drops what it has to

Only what iptables can read is written, or it would refuse the whole chain. ufw has its own words for the same, so a
FORWARD of ufw's is left to it; so are tables of programs that own theirs, as docker-bridges or firewalld.

Source: docs.docker.com, "Docker with iptables" (the order of rules in FORWARD); iptables-nft(8); libnftables-json(5).
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from corral.network.model import Network
from corral.network.rules import Command, Json

FAMILIES = ("ip", "ip6")
TABLE, CHAIN = "filter", "FORWARD"
# What says of a rule in FORWARD that it is an engine's of ours: two engines are content to be last, both of them.
COMMENT = "corral network"
_NAME_CHARS = 28  # of a chain of iptables
_UFW = ("ufw-", "ufw6-")
DOCKER = "DOCKER"


@dataclass(frozen=True, slots=True)
class ForwardChain:
    """iptables' FORWARD of an IP version, as it is."""

    drops: bool = False  # by its policy
    of_ufw: bool = False
    jumps: Sequence[int] = ()  # handles of rules that lead to our chain
    last: bool = False  # whether nothing but what engines of ours added comes after the first of them
    guarded: Sequence[str] = ()  # links of docker's, which its rules here name


def chain_name(table: str) -> str:
    """What the engine with that table calls its chain."""
    name = f"{table}-{CHAIN}"
    return name if len(name) <= _NAME_CHARS else f"corral-{hashlib.sha256(table.encode()).hexdigest()[:16]}"


def listing(family: str) -> list[Command]:
    """Asks for what read() reads; NftablesError(ENOENT) where it is not."""
    return [{"list": {"chain": {"family": family, "table": TABLE, "name": CHAIN}}}]


def read(listed: Iterable[Mapping[str, Json]], own: str) -> ForwardChain:
    """What libnftables listed of FORWARD. Pure."""
    policy: Json = ""
    rules: list[Mapping[str, Json]] = []
    for item in listed:
        chain, rule = item.get("chain"), item.get("rule")
        if isinstance(chain, Mapping) and chain.get("hook") == "forward":
            policy = chain.get("policy")
        elif isinstance(rule, Mapping):
            rules.append(rule)
    targets = [target(rule.get("expr")) for rule in rules]
    ours = [number for number, name in enumerate(targets) if name == own]
    after = rules[ours[0] :] if ours else ()
    return ForwardChain(
        drops=policy == "drop",
        of_ufw=any(map(is_of_ufw, targets)),
        jumps=tuple(int(str(rules[number]["handle"])) for number in ours),
        guarded=sorted(guarded(rule.get("expr") for rule in rules)),
        last=bool(ours) and all(str(rule.get("comment", "")).startswith(COMMENT) for rule in after),
    )


def is_of_ufw(target: str) -> bool:
    """Whether a rule that leads there is ufw's."""
    return target.startswith(_UFW)


def target(expressions: Json) -> str:
    """Where a rule jumps to; "" if it does not."""
    for one in expressions if isinstance(expressions, Sequence) and not isinstance(expressions, str) else ():
        jump = one.get("jump") if isinstance(one, Mapping) else None
        if isinstance(jump, Mapping):
            return str(jump.get("target"))
    return ""


def guarded(rules: Iterable[Json]) -> frozenset[str]:
    """The links for which rules ask docker. Pure."""
    return frozenset(output(rule) for rule in rules if target(rule) == DOCKER) - {""}


def output(expressions: Json) -> str:
    """The link that a rule wants packets to leave by; "" if it names none."""
    for one in expressions if isinstance(expressions, Sequence) and not isinstance(expressions, str) else ():
        match one:
            case {"match": {"op": "==", "left": {"meta": {"key": "oifname"}}, "right": str(link)}}:
                return link
    return ""


def admits(found: ForwardChain, networks: Sequence[Network]) -> bool:
    """Whether rules of ours belong there. Pure."""
    return found.drops and not found.of_ufw and bool(networks)


def admission(family: str, own: str, found: ForwardChain, networks: Iterable[Network]) -> list[Command]:
    """Have our chain hold the rules of these networks, and FORWARD lead to it at its end. Pure."""
    where: dict[str, Json] = {"family": family, "table": TABLE}
    chain: Json = {"chain": {**where, "name": own}}
    rules: list[Json] = [[_match("oifname", link), {"counter": None}, {"return": None}] for link in found.guarded]
    rules += [[*one, {"counter": None}, {"accept": None}] for network in networks for one in _matches(network)]
    commands: list[Command] = [{"add": chain}, {"flush": chain}]
    commands += [{"add": {"rule": {**where, "chain": own, "expr": expressions}}} for expressions in rules]
    if len(found.jumps) == 1 and found.last:
        return commands
    jump: Json = [{"counter": None}, {"jump": {"target": own}}]
    return [
        *commands,
        *_without(where, found),
        {"add": {"rule": {**where, "chain": CHAIN, "comment": f"{COMMENT}s of {own}", "expr": jump}}},
    ]


def dismissal(family: str, own: str, found: ForwardChain) -> list[Command]:
    """Leave no trace of ours there. Pure."""
    where: dict[str, Json] = {"family": family, "table": TABLE}
    chain: Json = {"chain": {**where, "name": own}}
    return [*_without(where, found), {"add": chain}, {"flush": chain}, {"delete": chain}]


def _without(where: Mapping[str, Json], found: ForwardChain) -> list[Command]:
    return [{"delete": {"rule": {**where, "chain": CHAIN, "handle": handle}}} for handle in found.jumps]


def _matches(network: Network) -> Sequence[Sequence[Json]]:
    into, out_of = _match("oifname", network.bridge), _match("iifname", network.bridge)
    return ((out_of, into),) if network.internal else ((out_of,), (into,))


def _match(key: str, name: str) -> Json:
    return {"match": {"op": "==", "left": {"meta": {"key": key}}, "right": name}}
