"""Why a packet of a container would reach a destination or not, step by step, as the kernel is now.

    inside     its interfaces, and the route that its namespace takes
    bridge     the same network: over the bridge, if its containers may talk
    host       another one: our rules, forwarding, the host's route
    others     chains of other tables at the same hook: what they drop stays dropped, whatever our table accepts

Facts are gathered first, by corral.network.facts; what they mean is a function of them. Nothing is changed, and no rule
of others is evaluated: those that may drop are named.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from corral.network import forwarding, network_options
from corral.network.ipam import Address
from corral.network.links import PathTaken
from corral.network.model import Endpoint, Interface, Network
from corral.network.rules import Json


class Verdict(StrEnum):
    """What a step does to the packet."""

    PASSES = "passes"
    MAY_DROP = "may drop"
    DROPS = "drops"


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the way, in a sentence that a user can act on."""

    where: str
    verdict: Verdict
    says: str


@dataclass(frozen=True, slots=True)
class ForeignChain:
    """A base chain of another table that packets come to: those that are forwarded, or those for the host itself."""

    name: str  # "ip filter FORWARD"
    policy: str
    may_drop: bool  # a rule in it, or in a chain that it jumps to, drops or rejects
    leads_to: frozenset[str] = frozenset()  # chains that it jumps to
    trusts: frozenset[str] = frozenset()  # of firewalld's: links whose zone accepts all
    admits: bool = False  # a rule in it accepts what our own table has accepted

    @property
    def owner(self) -> str:
        """Whose way of letting packets through it has."""
        if any(name.startswith("ufw") for name in self.leads_to):
            return "ufw"
        return "firewalld" if self.name.split()[1] == _FIREWALLD[1] else ""

    @property
    def is_shared(self) -> bool:
        """Whether it is iptables' FORWARD, which is everybody's."""
        return self.name in (f"{family} {forwarding.TABLE} {forwarding.CHAIN}" for family in ("ip", "ip6", LEGACY))


@dataclass(frozen=True, slots=True)
class Facts:
    """What was seen in the kernel."""

    down: Sequence[str] = ()  # of its interfaces, those that are not there or not up
    inside: PathTaken | None = None  # None: there is no route
    outside: PathTaken | None = None
    forwarding: bool = True
    back: PathTaken | None = None  # the host's way to the container
    strict_rp_filter: bool = False  # of the container's bridge
    bridge_filtered: bool = False  # br_netfilter hands bridged packets to the forward hook
    table_stands: bool = True
    unseen_legacy: bool = False  # rules of the old iptables are loaded, and could not be read
    chains: Sequence[ForeignChain] = ()  # at the hook that it comes to
    unread: bool = False  # tables of others could not be read
    guarded: bool = False  # it leaves by a bridge that is neither ours nor the way of a default route
    mark: int = 0  # what our table puts on what it accepts, until chains at the same priority have seen it

    @property
    def hook(self) -> str:
        """The one of netfilter that it comes to on this host."""
        return "input" if self.outside is not None and self.outside.link == "lo" else "forward"


def explain(endpoint: Endpoint, destination: Address, facts: Facts, networks: Iterable[Network]) -> list[Step]:
    """The steps, up to the first that drops it. Pure."""
    steps: list[Step] = []
    for step in _steps(endpoint, destination, facts, list(networks)):
        steps.append(step)
        if step.verdict is Verdict.DROPS:
            break
    return steps


def _steps(endpoint: Endpoint, destination: Address, facts: Facts, networks: Sequence[Network]) -> Iterable[Step]:
    for name in facts.down:
        yield Step("container", Verdict.DROPS, f"interface {name} is not there, or down: restart the container")
    taken = facts.inside
    if taken is None or taken.refused:
        why = f"its routes refuse {destination}" if taken else f"it has no route to {destination}"
        yield Step("container", Verdict.DROPS, f"{why}: connect it to a network with a way there that is not internal")
        return
    if taken.link == "lo":
        yield Step("container", Verdict.PASSES, f"{destination} is the container itself")
        return
    interface = next((each for each in endpoint.interfaces if each.name == taken.link), None)
    yield Step("container", Verdict.PASSES, _route_told(taken, interface))
    if interface is None:
        yield Step("container", Verdict.MAY_DROP, f"link {taken.link} is not corral's: nothing is known of it")
    elif not interface.network.is_bridge:
        yield Step(
            f"network {interface.network.name}",
            Verdict.PASSES,
            f"driver {interface.network.driver}: from here it is not this host that decides",
        )
    elif any(destination in part.subnet for part in interface.network.ranges) and not taken.gateway:
        yield from _bridged(interface.network, destination, facts)
    else:
        yield from _routed(interface.network, destination, facts, networks)


def _route_told(taken: PathTaken, interface: Interface | None) -> str:
    via = f" via {taken.gateway}" if taken.gateway else ""
    network = f" of network {interface.network.name}" if interface is not None else ""
    return f"leaves by {taken.link}{network}{via}"


def _bridged(network: Network, destination: Address, facts: Facts) -> Iterable[Step]:
    if any(destination == part.gateway for part in network.ranges):
        yield Step(f"bridge {network.bridge}", Verdict.PASSES, f"{destination} is this host")
        yield from _others(network, facts)
        return
    if not network_options.may_talk(network):
        yield Step(
            f"bridge {network.bridge}",
            Verdict.DROPS,
            f"network {network.name} keeps its containers apart ({network_options.ICC}=false)",
        )
    yield Step(f"bridge {network.bridge}", Verdict.PASSES, "both are on it")
    if facts.bridge_filtered:
        yield Step("br_netfilter", Verdict.PASSES, "hands bridged packets to the forward hook as well")
        yield from _others(network, facts)


def _routed(network: Network, destination: Address, facts: Facts, networks: Sequence[Network]) -> Iterable[Step]:
    if not facts.table_stands:
        yield Step("rules of corral", Verdict.DROPS, "the table is gone: `corral system check --repair` makes it anew")
    if facts.back is None or facts.back.link != network.bridge:
        way = f"leave by {facts.back.link}" if facts.back and facts.back.link else "have no route"
        checked = ", and rp_filter=1 drops what comes from where no answer goes" if facts.strict_rp_filter else ""
        says = f"answers to the container {way} instead of {network.bridge}: a route of this host overlaps the network"
        yield Step("host", Verdict.DROPS, says + checked)
    if network.internal:
        yield Step("rules of corral", Verdict.DROPS, f"network {network.name} is internal: nothing leaves it")
    out = facts.outside
    if out is None or out.refused:
        yield Step("host", Verdict.DROPS, f"this host has no route to {destination}")
        return
    if out.link == "lo":
        yield Step("host", Verdict.PASSES, f"{destination} is this host")
        yield from _others(network, facts)
        return
    other = next((one for one in networks if one.is_bridge and one.bridge == out.link), None)
    if other is not None:
        yield Step(
            "rules of corral",
            Verdict.DROPS,
            f"{destination} is in network {other.name}, which others do not reach: connect the container to it",
        )
    if not facts.forwarding:
        name = "net.ipv6.conf.all.forwarding" if destination.version == 6 else "net.ipv4.ip_forward"
        yield Step("host", Verdict.DROPS, f"it forwards nothing: `sysctl -w {name}=1`")
    via = f" via {out.gateway}" if out.gateway else ""
    yield Step("host", Verdict.PASSES, f"forwards it to {out.link}{via}")
    yield from _others(network, facts)
    if network_options.is_masqueraded(network):
        yield Step("rules of corral", Verdict.PASSES, "accepted, and masqueraded as this host")
    else:
        yield Step("rules of corral", Verdict.PASSES, "accepted with the container's own address")


def _others(network: Network, facts: Facts) -> Iterable[Step]:
    for chain in facts.chains:
        verdict, says = _foreign(chain, network.bridge, facts)
        yield Step(f"chain {chain.name}", verdict, says)
    if facts.unread:
        yield Step(
            "others", Verdict.MAY_DROP, "their tables cannot be read from here: `nft list ruleset` may show them"
        )
    if facts.unseen_legacy:
        yield Step(
            "iptables-legacy",
            Verdict.MAY_DROP,
            "rules of the old iptables are loaded, which cannot be seen from here: `iptables-legacy -S`",
        )


def _foreign(chain: ForeignChain, bridge: str, facts: Facts) -> tuple[Verdict, str]:
    if bridge in chain.trusts:
        return Verdict.PASSES, f"firewalld has {bridge} in a zone that accepts this"
    drops = chain.policy == "drop"
    if drops and not chain.admits:
        return Verdict.MAY_DROP, f"its policy is drop, whatever corral accepts{_remedy(chain, bridge, facts.hook)}"
    if drops and facts.guarded:
        out = facts.outside.link if facts.outside is not None else ""
        return (
            Verdict.MAY_DROP,
            f"its policy is drop, and who gets to {out} is another's to say: publish the port there",
        )
    if chain.may_drop:
        return Verdict.MAY_DROP, f"it has rules that drop or reject{_remedy(chain, bridge, facts.hook)}"
    if drops:
        return (
            Verdict.PASSES,
            f"its policy is drop, but its rule for corral's mark {facts.mark:#x} accepts this, unless others mark it",
        )
    return Verdict.PASSES, "drops nothing"


def _remedy(chain: ForeignChain, bridge: str, hook: str) -> str:
    if hook == "input" and chain.owner == "ufw":
        return f": `ufw allow in on {bridge} to any port 53` lets containers ask for names"
    if hook == "input" and chain.owner != "firewalld":
        return f": have it accept UDP and TCP to port 53 that come from {bridge}, so that containers can ask for names"
    if chain.owner == "ufw":
        return f": `ufw route allow in on {bridge}` and `ufw route allow out on {bridge}` let it through"
    if chain.owner == "firewalld":
        return (
            f", unless {bridge} is in a zone that accepts: `firewall-cmd --zone=trusted --add-interface={bridge}`, "
            "which opens the host's own ports to its containers as well"
        )
    if chain.policy != "drop" or chain.may_drop:
        return ""
    if chain.is_shared:
        return ': with forward = "accept" in [network] of the configuration, corral adds a rule there that accepts this'
    return f": have whoever made it accept there what comes from {bridge}, and what goes to it"


type _Key = tuple[str, str, str]
"""Family, table, and the name of a chain or map in there."""

LEGACY = "iptables-legacy"
_FIREWALLD = ("inet", "firewalld")
_DROPPING = {"drop", "reject", "queue", "synproxy"}
HARMLESS_TARGETS = {"CHECKSUM", "CLASSIFY", "CONNMARK", "CT", "DSCP", "LOG", "MARK", "NFLOG", "TCPMSS", "TOS", "TRACE"}


def foreign_chains(ruleset: Iterable[Mapping[str, Json]], table: str, version: int, hook: str) -> list[ForeignChain]:
    """The chains of others at a hook that packets of an IP version come to, in the order that they do. Pure.

    ruleset: what libnftables lists of all tables.
    """
    families = ("inet", "ip" if version == 4 else "ip6")
    chains: dict[_Key, Mapping[str, Json]] = {}
    rules: dict[_Key, list[Json]] = {}
    maps: dict[_Key, Json] = {}
    for item in ruleset:
        for kind, thing in item.items():
            if not isinstance(thing, Mapping) or thing.get("family") not in families:
                continue
            family, of = str(thing["family"]), str(thing.get("table"))
            if (family, of) == ("inet", table):
                continue
            if kind == "chain":
                chains[family, of, str(thing["name"])] = thing
            elif kind == "rule":
                rules.setdefault((family, of, str(thing["chain"])), []).append(thing.get("expr"))
            elif kind == "map":
                maps[family, of, str(thing["name"])] = thing.get("elem")
    bases = [(key, chain) for key, chain in chains.items() if chain.get("hook") == hook]
    bases.sort(key=lambda base: int(str(base[1].get("prio", 0))))
    return [
        ForeignChain(
            " ".join(key),
            str(chain.get("policy", "accept")),
            _Rules(rules, maps).may_drop(key, set()),
            frozenset(filter(None, map(_target, rules.get(key, ())))),
            _trusted(rules, key) if key[:2] == _FIREWALLD else frozenset(),
            admits=any(_accepts(one, forwarding.mark(table)) for one in rules.get(key, ())),
        )
        for key, chain in bases
    ]


def _expressions(rule: Json) -> Sequence[Mapping[str, Json]]:
    if not isinstance(rule, Sequence) or isinstance(rule, str):
        return ()
    return [one for one in rule if isinstance(one, Mapping) and "counter" not in one]


def _target(rule: Json) -> str:
    """Where a rule jumps to; "" if it does not."""
    for one in _expressions(rule):
        if isinstance(jump := one.get("jump"), Mapping):
            return str(jump.get("target"))
    return ""


def _accepts(rule: Json, mark: int) -> bool:
    """Whether it accepts all packets with that mark."""
    match _expressions(rule):
        case [{"match": {"op": "==", "left": {"meta": {"key": "mark"}}, "right": int(value)}}, {"accept": _}]:
            return value == mark
    return False


def _trusted(rules: Mapping[_Key, Sequence[Json]], base: _Key) -> frozenset[str]:
    """Of rules that accept all that comes from a link, the links."""
    found = set()
    for one in rules.get((*_FIREWALLD, f"{base[2]}_POLICIES"), ()):
        match one:
            case [{"match": {"left": {"meta": {"key": "iifname"}}, "right": str(link)}}, {"accept": _}]:
                found.add(link)
    return frozenset(found)


@dataclass(frozen=True, slots=True)
class _Rules:
    """The rules by chain, and the elements of maps, whose verdicts rules may refer to."""

    rules: Mapping[_Key, Sequence[Json]]
    maps: Mapping[_Key, Json]

    def may_drop(self, chain: _Key, seen: set[_Key]) -> bool:
        """Whether a rule in a chain, or in one that it leads to, may drop."""
        if chain in seen:
            return False
        seen.add(chain)
        return any(self._drops(expression, chain, seen) for expression in self.rules.get(chain, ()))

    def _drops(self, said: Json, where: _Key, seen: set[_Key]) -> bool:
        """Of an expression, however deep its verdicts are: {"vmap": {"data": {"set": [[key, {"drop": null}], …]}}}."""
        if isinstance(said, Mapping):
            return any(self._acts(verb, what, where, seen) for verb, what in said.items())
        if isinstance(said, Sequence) and not isinstance(said, str):
            return any(self._drops(one, where, seen) for one in said)
        return False

    def _acts(self, verb: str, what: Json, where: _Key, seen: set[_Key]) -> bool:
        family, table, _ = where
        named = what if isinstance(what, Mapping) else {}
        if verb in _DROPPING:
            return True
        if verb == "xt":  # an extension of iptables: a match, or a target that may be REJECT
            return named.get("type") != "match" and named.get("name") not in HARMLESS_TARGETS
        if verb in ("jump", "goto"):
            return self.may_drop((family, table, str(named.get("target"))), seen)
        data = named.get("data")
        if verb == "vmap" and isinstance(data, str):
            return self._drops(self.maps.get((family, table, data.removeprefix("@"))), where, seen)
        return self._drops(what, where, seen)
