"""Our nftables table as data: a fixed set of chains and rules, and sets whose elements are the networks.

    forward      iif . oif in @same                    accept   inside one network (seen here only with br_netfilter)
                 iif or oif in @internal               drop     no way out, none in
                 iif in @bridges, oif in @bridges      drop     user networks do not reach each other
                 oif in @bridges, established          accept   answers
                 oif in @bridges, ct status dnat       accept   published ports
                 oif in @bridges                       drop     nobody else from outside
                 iif in @bridges                       accept   out
    postrouting  saddr in @subnets4, oif not in @bridges        masquerade

The rules never change and their number does not grow with the networks: adding one adds elements. Everything here is a
value, sent as one transaction by corral.network.firewall. Source: libnftables-json(5).
"""

from collections.abc import Iterable, Mapping, Sequence

from corral.network.model import Network

type Json = bool | int | str | Sequence[Json] | Mapping[str, Json] | None
type Command = Mapping[str, Json]

FAMILY = "inet"
# Where the kernel's own names put them: "filter" and "srcnat".
FILTER_PRIORITY, SRCNAT_PRIORITY = 0, 100

_SETS: Mapping[str, Mapping[str, Json]] = {
    "bridges": {"type": "ifname"},
    "internal": {"type": "ifname"},
    "same": {"type": ["ifname", "ifname"]},
    "subnets4": {"type": "ipv4_addr", "flags": ["interval"]},
    "subnets6": {"type": "ipv6_addr", "flags": ["interval"]},
}


def table(name: str, networks: Iterable[Network]) -> list[Command]:
    """Replace whatever the table is by what these networks need, in one transaction."""
    target: Json = {"family": FAMILY, "name": name}
    commands: list[Command] = [{"add": {"table": target}}, {"delete": {"table": target}}, {"add": {"table": target}}]
    commands += [
        {"add": {"set": {"family": FAMILY, "table": name, "name": key, **kind}}} for key, kind in _SETS.items()
    ]
    commands += [_base_chain(name, "forward", "filter", FILTER_PRIORITY)]
    commands += [_base_chain(name, "postrouting", "nat", SRCNAT_PRIORITY)]
    commands += [_rule(name, "forward", *expressions) for expressions in _FORWARD]
    commands += [_rule(name, "postrouting", *expressions) for expressions in _POSTROUTING]
    for network in networks:
        commands += add_network(name, network)
    return commands


def add_network(name: str, network: Network) -> list[Command]:
    """Let a network through; adding it twice is no error."""
    return _change("add", name, network)


def remove_network(name: str, network: Network) -> list[Command]:
    """Take a network out. Deleting what is not there is an error, so it is added first in the same transaction."""
    return _change("add", name, network) + _change("delete", name, network)


def remove_table(name: str) -> list[Command]:
    """Remove the table, there or not."""
    target: Json = {"family": FAMILY, "name": name}
    return [{"add": {"table": target}}, {"delete": {"table": target}}]


def elements(network: Network) -> Mapping[str, Sequence[Json]]:
    """What stands in each set for a network."""
    own: dict[str, Sequence[Json]] = {
        "bridges": [network.bridge],
        "same": [{"concat": [network.bridge, network.bridge]}],
    }
    if network.internal:
        own["internal"] = [network.bridge]
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


def _base_chain(name: str, chain: str, kind: str, priority: int) -> Command:
    fields: Json = {
        "family": FAMILY,
        "table": name,
        "name": chain,
        "type": kind,
        "hook": chain,
        "prio": priority,
        "policy": "accept",
    }
    return {"add": {"chain": fields}}


def _rule(name: str, chain: str, *expressions: Json) -> Command:
    return {"add": {"rule": {"family": FAMILY, "table": name, "chain": chain, "expr": expressions}}}


def _match(left: Json, right: Json, op: str = "==") -> Json:
    return {"match": {"op": op, "left": left, "right": right}}


_IIF: Json = {"meta": {"key": "iifname"}}
_OIF: Json = {"meta": {"key": "oifname"}}
_INTO = _match(_OIF, "@bridges")
_OUT_OF = _match(_IIF, "@bridges")
_ACCEPT: Json = {"accept": None}
_DROP: Json = {"drop": None}
_MASQUERADE: Json = {"masquerade": None}

_FORWARD: Sequence[Sequence[Json]] = (
    (_match({"concat": [_IIF, _OIF]}, "@same"), _ACCEPT),
    (_match(_IIF, "@internal"), _DROP),
    (_match(_OIF, "@internal"), _DROP),
    (_OUT_OF, _INTO, _DROP),
    (_INTO, _match({"ct": {"key": "state"}}, ["established", "related"], "in"), _ACCEPT),
    (_INTO, _match({"ct": {"key": "status"}}, "dnat", "in"), _ACCEPT),
    (_INTO, _DROP),
    (_OUT_OF, _ACCEPT),
)


def _leaving(protocol: str, subnets: str) -> Sequence[Json]:
    source: Json = {"payload": {"protocol": protocol, "field": "saddr"}}
    return _match(source, f"@{subnets}"), _match(_OIF, "@bridges", "!="), _MASQUERADE


_POSTROUTING: Sequence[Sequence[Json]] = (_leaving("ip", "subnets4"), _leaving("ip6", "subnets6"))
