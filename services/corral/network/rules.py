"""Our nftables table as data: a fixed set of chains and rules, sets whose elements are the networks, maps of the ports.

    loopback     iif not lo, daddr 127.0.0.0/8         drop     what is bound or published there is for the host only
    forward      mark MARK                             mark 0   nobody else is to look like what we accepted
                 iif . oif in @same                    pass     inside one network (seen here only with br_netfilter)
                 iif or oif in @internal               drop     no way out, none in
                 oif in @bridges, ct status dnat       pass     published ports
                 iif in @bridges, oif in @bridges      drop     user networks do not reach each other
                 oif in @bridges, established          pass     answers
                 oif in @bridges                       drop     nobody else from outside
                 iif in @bridges                       pass     out
    pass         oif a bridge, not in @bridges or @uplinks      accept   another engine's containers, for it to guard
                 mark 0                                mark MARK
                 always                                accept
    after        mark MARK                             mark 0   it is gone before anything else looks at marks
    prerouting   protocol . daddr . dport in @ports4   dnat     a port published on one address of the host
    and output   protocol . dport in @any4             dnat     on all of them
    postrouting  saddr in @subnets4, oif not in @bridges        masquerade
                 dnat, oif in @bridges, saddr in @subnets4      masquerade: the answer must come back this way
                 dnat, oif in @bridges, saddr 127.0.0.0/8       masquerade: the host's loopback is known to nobody else

With MARK, packets get through iptables' FORWARD where that drops by its policy: see corral.network.forwarding, and why
`forward` comes before it and `after` behind it.

A call of ::1 is for the proxy (corral.network.proxying): the kernel routes no packet from there. The rules never change
and their number does not grow with the networks: adding one, or a port, adds elements. Everything here is a value, sent
as one transaction by corral.network.firewall. Source: libnftables-json(5).
"""

from collections.abc import Iterable, Mapping, Sequence

from corral.network.forwarding import mark
from corral.network.model import ANY_HOST_IPS, Forward, Network
from corral.network.network_options import is_masqueraded, may_talk

type Json = bool | int | str | Sequence[Json] | Mapping[str, Json] | None
type Command = Mapping[str, Json]

FAMILY = "inet"
# Where the kernel's own names put them: "raw", "dstnat", "filter" and "srcnat".
RAW_PRIORITY, DSTNAT_PRIORITY, FILTER_PRIORITY, SRCNAT_PRIORITY = -300, -100, 0, 100
ADMITTING = "pass"

_SETS: Mapping[str, Mapping[str, Json]] = {
    "bridges": {"type": "ifname"},
    "internal": {"type": "ifname"},
    "uplinks": {"type": "ifname"},
    "same": {"type": ["ifname", "ifname"]},
    "subnets4": {"type": "ipv4_addr", "flags": ["interval"]},
    "subnets6": {"type": "ipv6_addr", "flags": ["interval"]},
}
_MAPS: Mapping[str, Mapping[str, Json]] = {
    f"{kind}{version}": {
        "type": ["inet_proto", *([f"ipv{version}_addr"] if kind == "ports" else []), "inet_service"],
        "map": [f"ipv{version}_addr", "inet_service"],
    }
    for kind in ("ports", "any")
    for version in (4, 6)
}


def table(name: str, networks: Iterable[Network], ports: Iterable[Forward] = ()) -> list[Command]:
    """Replace whatever the table is by what these networks and ports need, in one transaction."""
    target: Json = {"family": FAMILY, "name": name}
    commands: list[Command] = [{"add": {"table": target}}, {"delete": {"table": target}}, {"add": {"table": target}}]
    commands += [
        {"add": {"set": {"family": FAMILY, "table": name, "name": key, **kind}}} for key, kind in _SETS.items()
    ]
    commands += [
        {"add": {"map": {"family": FAMILY, "table": name, "name": key, **kind}}} for key, kind in _MAPS.items()
    ]
    commands.append({"add": {"chain": {"family": FAMILY, "table": name, "name": ADMITTING}}})
    commands += [_rule(name, ADMITTING, *expressions) for expressions in _passing(name)]
    for chain, (hook, kind, priority, rules) in _chains(name).items():
        commands += [_base_chain(name, chain, hook, kind, priority)]
        commands += [_rule(name, chain, *expressions) for expressions in rules]
    for network in networks:
        commands += add_network(name, network)
    return commands + add_ports(name, ports)


def add_ports(name: str, ports: Iterable[Forward]) -> list[Command]:
    """Let ports of the host lead to containers; adding one twice is no error."""
    return [_map_element("add", name, port) for port in ports]


def remove_ports(name: str, ports: Iterable[Forward]) -> list[Command]:
    """Withdraw them; as with networks."""
    return [_map_element(verb, name, port) for port in ports for verb in ("add", "delete")]


def _map_element(verb: str, name: str, port: Forward) -> Command:
    version = port.address.version
    key: list[Json] = [port.protocol, port.host_port]
    if port.host_ip not in ANY_HOST_IPS:
        key.insert(1, port.host_ip)
    value: list[Json] = [str(port.address), port.container_port]
    kind = f"{'ports' if len(key) == 3 else 'any'}{version}"
    pair: Json = [[{"concat": key}, {"concat": value}]]
    return {verb: {"element": {"family": FAMILY, "table": name, "name": kind, "elem": pair}}}


def add_network(name: str, network: Network) -> list[Command]:
    """Let a network through; adding it twice is no error."""
    return _change("add", name, network)


def set_uplinks(name: str, links: Iterable[str]) -> list[Command]:
    """Have these be the links by which packets leave this host that may be bridges all the same."""
    uplinks: dict[str, Json] = {"family": FAMILY, "table": name}
    names = list(links)
    added: list[Command] = [{"add": {"element": {**uplinks, "name": "uplinks", "elem": names}}}] if names else []
    return [{"flush": {"set": {**uplinks, "name": "uplinks"}}}, *added]


def remove_network(name: str, network: Network) -> list[Command]:
    """Take a network out. Deleting what is not there is an error, so it is added first in the same transaction."""
    return _change("add", name, network) + _change("delete", name, network)


def remove_table(name: str) -> list[Command]:
    """Remove the table, there or not."""
    target: Json = {"family": FAMILY, "name": name}
    return [{"add": {"table": target}}, {"delete": {"table": target}}]


def elements(network: Network) -> Mapping[str, Sequence[Json]]:
    """What stands in each set for a network."""
    own: dict[str, Sequence[Json]] = {"bridges": [network.bridge]}
    if may_talk(network):
        own["same"] = [{"concat": [network.bridge, network.bridge]}]
    if network.internal:
        own["internal"] = [network.bridge]
        return own
    if not is_masqueraded(network):
        return own
    for version in (4, 6):
        subnets = [part.subnet for part in network.ranges if part.subnet.version == version]
        if subnets:
            own[f"subnets{version}"] = [
                {"prefix": {"addr": str(subnet.network_address), "len": subnet.prefixlen}} for subnet in subnets
            ]
    return own


def _change(verb: str, name: str, network: Network) -> list[Command]:
    return [
        {verb: {"element": {"family": FAMILY, "table": name, "name": key, "elem": values}}}
        for key, values in elements(network).items()
    ]


def _base_chain(name: str, chain: str, hook: str, kind: str, priority: int) -> Command:
    fields: Json = {
        "family": FAMILY,
        "table": name,
        "name": chain,
        "type": kind,
        "hook": hook,
        "prio": priority,
        "policy": "accept",
    }
    return {"add": {"chain": fields}}


def _rule(name: str, chain: str, *expressions: Json) -> Command:
    return {"add": {"rule": {"family": FAMILY, "table": name, "chain": chain, "expr": expressions}}}


def _match(left: Json, right: Json, op: str = "==") -> Json:
    return {"match": {"op": op, "left": left, "right": right}}


def _address(protocol: str, field: str) -> Json:
    return {"payload": {"protocol": protocol, "field": field}}


_IIF: Json = {"meta": {"key": "iifname"}}
_OIF: Json = {"meta": {"key": "oifname"}}
_INTO = _match(_OIF, "@bridges")
_OUT_OF = _match(_IIF, "@bridges")
_ACCEPT: Json = {"accept": None}
_PASS: Json = {"goto": {"target": ADMITTING}}
_MARK: Json = {"meta": {"key": "mark"}}
_DROP: Json = {"drop": None}
_MASQUERADE: Json = {"masquerade": None}

_PUBLISHED = _match({"ct": {"key": "status"}}, "dnat", "in")
_LOOPBACK4: Json = {"prefix": {"addr": "127.0.0.0", "len": 8}}

_GUARD: Sequence[Sequence[Json]] = ((_match(_IIF, "lo", "!="), _match(_address("ip", "daddr"), _LOOPBACK4), _DROP),)

_FORWARD: Sequence[Sequence[Json]] = (
    (_match({"concat": [_IIF, _OIF]}, "@same"), _PASS),
    (_match(_IIF, "@internal"), _DROP),
    (_match(_OIF, "@internal"), _DROP),
    (_INTO, _PUBLISHED, _PASS),
    (_OUT_OF, _INTO, _DROP),
    (_INTO, _match({"ct": {"key": "state"}}, ["established", "related"], "in"), _PASS),
    (_INTO, _DROP),
    (_OUT_OF, _PASS),
)


def _passing(table: str) -> Sequence[Sequence[Json]]:
    others_bridge = (
        _match({"meta": {"key": "oifkind"}}, "bridge"),
        _match(_OIF, "@bridges", "!="),
        _match(_OIF, "@uplinks", "!="),
    )
    return (*others_bridge, _ACCEPT), (_match(_MARK, 0), _marked(mark(table))), (_ACCEPT,)


def _unmarking(table: str) -> Sequence[Json]:
    return _match(_MARK, mark(table)), _marked(0)


def _marked(value: int) -> Json:
    return {"mangle": {"key": _MARK, "value": value}}


def _leaving(protocol: str, subnets: str) -> Sequence[Json]:
    return _match(_address(protocol, "saddr"), f"@{subnets}"), _match(_OIF, "@bridges", "!="), _MASQUERADE


def _returning(protocol: str, source: Json) -> Sequence[Json]:
    return _PUBLISHED, _INTO, _match(_address(protocol, "saddr"), source), _MASQUERADE


_POSTROUTING: Sequence[Sequence[Json]] = (
    _leaving("ip", "subnets4"),
    _leaving("ip6", "subnets6"),
    _returning("ip", "@subnets4"),
    _returning("ip6", "@subnets6"),
    _returning("ip", _LOOPBACK4),
)


def _dnat(protocol: str, version: int) -> Sequence[Sequence[Json]]:
    family = _match({"meta": {"key": "nfproto"}}, f"ipv{version}")
    local = _match({"fib": {"result": "type", "flags": ["daddr"]}}, "local")
    not_loopback6 = () if version == 4 else (_match(_address(protocol, "daddr"), "::1", "!="),)
    which: Json = {"meta": {"key": "l4proto"}}
    port: Json = {"payload": {"protocol": "th", "field": "dport"}}

    def lead(key: Sequence[Json], where: str) -> Json:
        target: Json = {"map": {"key": {"concat": key}, "data": f"@{where}{version}"}}
        return {"dnat": {"family": protocol, "type_flags": ["concat"], "addr": target}}

    return (
        (family, local, *not_loopback6, lead([which, _address(protocol, "daddr"), port], "ports")),
        (family, local, *not_loopback6, lead([which, port], "any")),
    )


_TO_CONTAINERS = (*_dnat("ip", 4), *_dnat("ip6", 6))


def _chains(table: str) -> Mapping[str, tuple[str, str, int, Sequence[Sequence[Json]]]]:
    """Base chain: its hook, type, priority and rules."""
    return {
        "loopback": ("prerouting", "filter", RAW_PRIORITY, _GUARD),
        "prerouting": ("prerouting", "nat", DSTNAT_PRIORITY, _TO_CONTAINERS),
        "output": ("output", "nat", DSTNAT_PRIORITY, _TO_CONTAINERS),
        "forward": ("forward", "filter", FILTER_PRIORITY - 1, (_unmarking(table), *_FORWARD)),
        "after": ("forward", "filter", FILTER_PRIORITY + 1, (_unmarking(table),)),
        "postrouting": ("postrouting", "nat", SRCNAT_PRIORITY, _POSTROUTING),
    }
