# Generated from corral/client/aio/__init__.py by cli/generate_sync.py.
"""The client for ordinary code, as `corral.client.aio` is for asyncio.

Each noun is a module, loaded when it is first asked for.
"""

from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Self

from corral.client.address import default_address, default_namespace, default_tls
from corral.client.transport import Transport
from corral.rpc.address import Tls

if TYPE_CHECKING:
    from corral.client.sync.containers import Containers
    from corral.client.sync.images import Images
    from corral.client.sync.networks import Networks
    from corral.client.sync.secrets import Secrets
    from corral.client.sync.snapshots import Snapshots
    from corral.client.sync.system import System
    from corral.client.sync.volumes import Volumes


class Client:
    """One corral, in one namespace. Use it as a context manager, or call `close`.

    `address` is unix:///path or tcp://host:port; by default $CORRAL_ADDRESS, else the system's daemon. `tls`, for
    tcp, is what this side shows and whom it trusts; by default $CORRAL_TLS_CERT, $CORRAL_TLS_KEY and $CORRAL_TLS_CA.
    `transport` makes the calls.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        namespace: str | None = None,
        tls: Tls | None = None,
        transport: type[Transport] = Transport,
    ) -> None:
        self.address = address or default_address()
        self.namespace = namespace or default_namespace()
        self._tls = tls or default_tls()
        self._transport_type = transport
        self._transports: dict[str, Transport] = {}
        self._addresses: dict[str, str] | None = None

    @cached_property
    def containers(self) -> "Containers":
        """Containers, and the processes in them."""
        from corral.client.sync.containers import Containers

        return Containers(self)

    @cached_property
    def images(self) -> "Images":
        """Images: here, in archives, and in registries."""
        from corral.client.sync.images import Images

        return Images(self)

    @cached_property
    def snapshots(self) -> "Snapshots":
        """Snapshots."""
        from corral.client.sync.snapshots import Snapshots

        return Snapshots(self)

    @cached_property
    def networks(self) -> "Networks":
        """Networks."""
        from corral.client.sync.networks import Networks

        return Networks(self)

    @cached_property
    def secrets(self) -> "Secrets":
        """Secrets."""
        from corral.client.sync.secrets import Secrets

        return Secrets(self)

    @cached_property
    def volumes(self) -> "Volumes":
        """Volumes."""
        from corral.client.sync.volumes import Volumes

        return Volumes(self)

    @cached_property
    def system(self) -> "System":
        """The engine as a whole."""
        from corral.client.sync.system import System

        return System(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends every call that still runs."""
        for transport in self._transports.values():
            transport.close()
        self._transports.clear()
        for noun in ("containers", "images", "snapshots", "networks", "secrets", "volumes", "system"):
            self.__dict__.pop(noun, None)  # they know the closed channel

    def engine(self) -> Transport:
        """The channel to the address this client was made for."""
        return self._transport(self.address)

    def leaf(self, service: str) -> Transport:
        """The channel to a leaf, whose address the engine tells."""
        if self._addresses is None:
            answer = self.system.addresses()
            self._addresses = dict(answer.addresses)
        address = self._addresses.get(service, self.address)
        # A socket file of another host is of no use here; that host's engine then serves the leaf at its own address.
        elsewhere = self.address.startswith("tcp:") and address.startswith("unix:")
        return self._transport(self.address if elsewhere else address)

    def _transport(self, address: str) -> Transport:
        if address not in self._transports:
            self._transports[address] = self._transport_type(
                address, self.namespace, self._tls if address.startswith("tcp:") else None
            )
        return self._transports[address]
