"""Links of the host that are ours, told from those of others that have the name which a network asks for.

A link is made under a name that its network alone has. One request gives it then the name that it is to have and an
alias that says whose it is: a link with neither is somebody else's, whatever its name, and nothing here deletes it.
"""

from collections.abc import Iterable

from corral.network.links import Owner
from corral.network.model import Network

PREFIX = "crl"
_NAME_CHARS = 12  # with the prefix the 15 of an interface's name


def name_for(network_id: str) -> str:
    """The name of a link that no other network has."""
    return f"{PREFIX}{network_id[:_NAME_CHARS]}"


def owner(network: Network) -> Owner:
    """How the link of a network is known."""
    return Owner(name_for(network.id), f"corral network {network.id}")


def seclusions(networks: Iterable[Network]) -> set[str]:
    """The names under which namespaces are pinned that these networks have for themselves."""
    return {network.bridge for network in networks if network.is_secluded}
