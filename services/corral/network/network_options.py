"""Options of networks, in docker's words (`-o KEY=VALUE`), as values. Pure.

Source: docs.docker.com, "Bridge network driver", "Macvlan network driver", "IPvlan network driver".
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from corral.network.model import Network, NetworkSpec
from corral.rpc.errors import InvalidArgument

MTU = "com.docker.network.driver.mtu"
BRIDGE_NAME = "com.docker.network.bridge.name"
ICC = "com.docker.network.bridge.enable_icc"
MASQUERADE = "com.docker.network.bridge.enable_ip_masquerade"
PARENT = "parent"
MACVLAN_MODE, IPVLAN_MODE, IPVLAN_FLAG = "macvlan_mode", "ipvlan_mode", "ipvlan_flag"

# Numbers of linux/if_link.h.
MACVLAN_MODES: Mapping[str, int] = {"private": 1, "vepa": 2, "bridge": 4, "passthru": 8}
IPVLAN_MODES: Mapping[str, int] = {"l2": 0, "l3": 1, "l3s": 2}
IPVLAN_FLAGS: Mapping[str, int] = {"bridge": 0, "private": 1, "vepa": 2}
_MIN_VLAN, _MAX_VLAN = 1, 4094
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


def refuse_unknown(spec: NetworkSpec, *known: str) -> None:
    """Raises InvalidArgument for an option that the driver has not."""
    for key in spec.options:
        if key not in known:
            raise InvalidArgument(
                f"network driver {spec.driver} has no option {key!r}: it has {', '.join(known)}", reason="BAD_OPTION"
            )


def with_mtu(spec: NetworkSpec) -> NetworkSpec:
    """The MTU where it belongs."""
    text = spec.options.get(MTU, "")
    if not text:
        return spec
    if not (text.isascii() and text.isdigit()) or len(text) > 5 or (spec.mtu and spec.mtu != int(text)):
        raise InvalidArgument(f"{MTU}={text!r} is no MTU, or not the one that is asked for otherwise", reason="BAD_MTU")
    return replace(spec, mtu=int(text))


def boolean(options: Mapping[str, str], key: str, *, default: bool) -> bool:
    """Raises InvalidArgument."""
    text = options.get(key, "").lower()
    if text and text not in _BOOLEANS:
        raise InvalidArgument(f"{key}={options[key]!r} is neither true nor false", reason="BAD_OPTION")
    return _BOOLEANS[text] if text else default


def chosen(options: Mapping[str, str], key: str, choices: Mapping[str, int], default: str) -> int:
    """The number of one of several words. Raises InvalidArgument."""
    word = options.get(key, "") or default
    if word not in choices:
        raise InvalidArgument(f"{key}={word!r} is not known: use {', '.join(choices)}", reason="BAD_OPTION")
    return choices[word]


def may_talk(network: Network) -> bool:
    """Whether its containers reach one another without the host's help ("icc")."""
    return boolean(network.options, ICC, default=True)


def is_masqueraded(network: Network) -> bool:
    """Whether its containers are seen from outside by the host's address."""
    return boolean(network.options, MASQUERADE, default=True)


@dataclass(frozen=True, slots=True)
class Vlan:
    """A tagged network on a link of the host: "eth0.10"."""

    parent: str
    tag: int


def vlan(name: str, exists: Callable[[str], bool]) -> Vlan | None:
    """What a name like eth0.10 asks to be made, where no link has it. Pure but for `exists`."""
    parent, _, tag = name.rpartition(".")
    if exists(name) or not parent or not (tag.isascii() and tag.isdigit()):
        return None
    if not _MIN_VLAN <= int(tag) <= _MAX_VLAN:
        raise InvalidArgument(f"parent {name!r}: VLANs have numbers from 1 to 4094", reason="BAD_OPTION")
    return Vlan(parent, int(tag))
