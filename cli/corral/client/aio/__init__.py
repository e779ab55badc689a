"""The client for asyncio. `corral.client.sync` is generated from this package (cli/generate_sync.py).

Each noun is a module, loaded when it is first asked for.
"""

from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Self

from corral.client.address import default_address, default_namespace, default_tls
from corral.client.async_transport import AsyncTransport
from corral.rpc.address import Tls

if TYPE_CHECKING:
    from corral.client.aio.containers import Containers
    from corral.client.aio.images import Images
    from corral.client.aio.networks import Networks
    from corral.client.aio.secrets import Secrets
    from corral.client.aio.snapshots import Snapshots
    from corral.client.aio.system import System
    from corral.client.aio.volumes import Volumes


class AsyncClient:
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
        transport: type[AsyncTransport] = AsyncTransport,
    ) -> None:
        self.address = address or default_address()
        self.namespace = namespace or default_namespace()
        self._tls = tls or default_tls()
        self._transport_type = transport
        self._transports: dict[str, AsyncTransport] = {}
        self._addresses: dict[str, str] | None = None

    @cached_property
    def containers(self) -> "Containers":
        """Containers, and the processes in them."""
        from corral.client.aio.containers import Containers

        return Containers(self)

    @cached_property
    def images(self) -> "Images":
        """Images: here, in archives, and in registries."""
        from corral.client.aio.images import Images

        return Images(self)

    @cached_property
    def snapshots(self) -> "Snapshots":
        """Snapshots."""
        from corral.client.aio.snapshots import Snapshots

        return Snapshots(self)

    @cached_property
    def networks(self) -> "Networks":
        """Networks."""
        from corral.client.aio.networks import Networks

        return Networks(self)

    @cached_property
    def secrets(self) -> "Secrets":
        """Secrets."""
        from corral.client.aio.secrets import Secrets

        return Secrets(self)

    @cached_property
    def volumes(self) -> "Volumes":
        """Volumes."""
        from corral.client.aio.volumes import Volumes

        return Volumes(self)

    @cached_property
    def system(self) -> "System":
        """The engine as a whole."""
        from corral.client.aio.system import System

        return System(self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends every call that still runs."""
        for transport in self._transports.values():
            await transport.close()
        self._transports.clear()
        for noun in ("containers", "images", "snapshots", "networks", "secrets", "volumes", "system"):
            self.__dict__.pop(noun, None)  # they know the closed channel

    def engine(self) -> AsyncTransport:
        """The channel to the address this client was made for."""
        return self._transport(self.address)

    async def leaf(self, service: str) -> AsyncTransport:
        """The channel to a leaf, whose address the engine tells."""
        if self._addresses is None:
            answer = await self.system.addresses()
            self._addresses = dict(answer.addresses)
        address = self._addresses.get(service, self.address)
        # A socket file of another host is of no use here; that host's engine then serves the leaf at its own address.
        elsewhere = self.address.startswith("tcp:") and address.startswith("unix:")
        return self._transport(self.address if elsewhere else address)

    def _transport(self, address: str) -> AsyncTransport:
        if address not in self._transports:
            self._transports[address] = self._transport_type(
                address, self.namespace, self._tls if address.startswith("tcp:") else None
            )
        return self._transports[address]
