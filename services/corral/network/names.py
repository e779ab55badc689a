"""Who is called what in which network, as those see it who are in there. Pure.

A container sees the others of the networks it is in, but for the default one, which has no names: by their names and
aliases, host names and the beginnings of their ids.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from corral.network.ipam import Address
from corral.network.model import Endpoint, Interface

SHORT_ID = 12


def has_names(interface: Interface) -> bool:
    """Whether containers find one another by name in its network."""
    return interface.network.is_bridge and not interface.network.builtin


class Names:
    """All names of all networks."""

    def __init__(self, endpoints: Iterable[Endpoint]) -> None:
        self._named: dict[tuple[str, str], list[Address]] = defaultdict(list)  # by network and name
        self._called: dict[tuple[str, Address], str] = {}  # by network and address
        self._endpoints: dict[tuple[str, Address], Endpoint] = {}
        for endpoint in endpoints:
            for interface in filter(has_names, endpoint.interfaces):
                self._add(endpoint, interface)

    def _add(self, endpoint: Endpoint, interface: Interface) -> None:
        network, own = interface.network.id, _names_of(endpoint, interface)
        for address, _ in interface.addresses:
            self._endpoints[network, address] = endpoint
            self._called[network, address] = own[0]
            for name in own:
                self._named[network, name].append(address)

    def asker(self, network_id: str, address: Address) -> Endpoint | None:
        """Who asks from that address of a network."""
        return self._endpoints.get((network_id, address))

    def addresses(self, asker: Endpoint, name: str) -> Sequence[Address]:
        """What a name means to a container; nothing if it is no container's, as far as that one can see."""
        wanted = name.rstrip(".").lower()
        return [
            address
            for interface in filter(has_names, asker.interfaces)
            for address in self._named.get((interface.network.id, wanted), ())
        ]

    def name(self, asker: Endpoint, address: Address) -> str:
        """Who has an address that a container can reach, as that one's network calls it; "" for nobody."""
        own = (interface.network for interface in filter(has_names, asker.interfaces))
        found = ((self._called.get((network.id, address), ""), network.name) for network in own)
        return next((f"{name}.{network}" for name, network in found if name), "")


def _names_of(endpoint: Endpoint, interface: Interface) -> list[str]:
    names = (*interface.aliases, endpoint.request.hostname, endpoint.key.id[:SHORT_ID])
    return [name.rstrip(".").lower() for name in dict.fromkeys(names) if name]
