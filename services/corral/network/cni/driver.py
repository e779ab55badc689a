"""The driver cni: a network that plugins make for each container; on the host it is nothing of ours.

-o cni.config=JSON    the configuration, as the specification has it (`corral network create --cni-config FILE`);
                      by default the one of the network's name that the host has in /etc/cni/net.d, as it is then;
                      that is for other runtimes, too, so what plugins have of it is never collected
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from corral.network import network_options
from corral.network.cni import conf_dir, documents, plugins
from corral.network.cni.documents import Configuration
from corral.network.cni.sharing import SharedNames
from corral.network.model import CNI_DRIVER, Network, NetworkSpec
from corral.rpc.errors import InvalidArgument
from corral.store import failpoint

if TYPE_CHECKING:
    from corral.network.netlink import Netlink

CONFIG = "cni.config"


def configuration_of(network: Network) -> Configuration:
    """What its plugins are told of it."""
    return documents.parse(network.options[CONFIG], network.name)


def maps_ports(network: Network) -> bool:
    """Whether a plugin publishes ports of its containers."""
    return network.is_cni and configuration_of(network).has(documents.PORT_MAPPINGS)


@dataclass(frozen=True, slots=True)
class CniDriver:
    """See corral.network.driver."""

    directories: Sequence[str]
    conf_dirs: Sequence[str]
    names: SharedNames

    @property
    def name(self) -> str:
        return CNI_DRIVER

    def check(self, spec: NetworkSpec) -> NetworkSpec:
        network_options.refuse_unknown(spec, CONFIG)
        if not spec.options.get(CONFIG):
            spec = replace(spec, options={**spec.options, CONFIG: self._of_the_host(spec.name)})
        if spec.ranges or spec.mtu or spec.interface or spec.internal or spec.ipv6:
            raise InvalidArgument(
                "a network of driver cni has what its configuration says: leave out subnets, MTU, --internal, --ipv6",
                reason="BAD_OPTION",
            )
        documents.parse(spec.options[CONFIG], spec.name)
        return spec

    def _of_the_host(self, name: str) -> str:
        found = conf_dir.find(name, self.conf_dirs)
        if not found:
            raise InvalidArgument(
                "a network of driver cni needs its --cni-config FILE, or the name of one that the host has in"
                f" {', '.join(self.conf_dirs)}: none is called {name!r} there",
                reason="BAD_OPTION",
            )
        return json.dumps({**json.loads(found), "disableGC": True})

    def prove(self, netlink: "Netlink", network: Network) -> None:
        """Its plugins are there."""
        for plugin in configuration_of(network).plugins:
            plugins.find(plugin, self.directories)

    def build(self, netlink: "Netlink", network: Network) -> bool:
        self.names.claim(configuration_of(network).name, network.id)
        failpoint("network.build.after_claim")
        return False

    def stands(self, network: Network) -> bool:
        return True

    def remove(self, netlink: "Netlink", network: Network) -> None:
        """What its plugins have made on the host, a bridge say, is theirs and may be shared."""
        self.names.release(configuration_of(network).name, network.id)
