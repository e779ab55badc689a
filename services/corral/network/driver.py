"""What a network driver is: how a network stands in the kernel, and what links its endpoints get.

    check    options and names as asked for, pure: what the driver makes of them
    prove    once, before it is first built: that this host can have it
    build    what it needs on the host; again at every start, and to mend it
    remove   what build made; no error for what is gone

Vocabulary: the *lower link* of a network is the link that its endpoints hang on: its bridge, or the parent of their
macvlan or ipvlan links. It belongs to the network, and goes with it, only if it has the name in `Network.bridge`.

Everything but check() runs on the netlink thread.
"""

from typing import TYPE_CHECKING, Protocol

from corral.network.model import Network, NetworkSpec

if TYPE_CHECKING:
    from corral.network.netlink import Netlink


class Driver(Protocol):
    """See the module."""

    @property
    def name(self) -> str:
        """As networks name it."""
        ...

    def check(self, spec: NetworkSpec) -> NetworkSpec:
        """The network as asked for, with what its options say put in its place. Raises InvalidArgument."""
        ...

    def prove(self, netlink: "Netlink", network: Network) -> None:
        """Raises FailedPrecondition with the reason if this host cannot have it."""
        ...

    def build(self, netlink: "Netlink", network: Network) -> bool:
        """Make, or mend, what it needs on the host.

        Returns whether packet forwarding had to be switched on. Raises FailedPrecondition, OSError.
        """
        ...

    def stands(self, network: Network) -> bool:
        """Whether the lower link is there."""
        ...

    def remove(self, netlink: "Netlink", network: Network) -> None:
        """Remove what build() made; no error for what is gone."""
        ...
