"""Which links of an endpoint are not there: somebody deleted them, or what they hung on."""

from collections.abc import Sequence
from pathlib import Path

from corral.kernel.netns import in_namespace
from corral.network.links import link_exists
from corral.network.model import Endpoint, Interface


def lost_links(endpoint: Endpoint, netns: Path | str) -> Sequence[Interface]:
    """Those of its interfaces, but for what plugins made; its namespace is pinned at netns. Blocks for moments."""
    return [interface for interface in endpoint.interfaces if not _is_there(interface, netns)]


def _is_there(interface: Interface, netns: Path | str) -> bool:
    if interface.network.is_cni:
        return True
    if interface.network.is_bridge:
        return link_exists(interface.host_name)
    try:
        return in_namespace(netns, lambda: link_exists(interface.name))
    except OSError:  # unpinned since
        return False
