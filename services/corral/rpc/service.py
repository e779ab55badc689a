"""What a host needs to know of a service."""

from collections.abc import Sequence
from typing import Protocol

import grpc.aio


class Service(Protocol):
    """One leaf or composer, hosted by corral.rpc.server.serve.

    Life: register() once, then start() once, then RPCs are let in, then stop() once. RPCs that arrive before start() is
    done wait for it. stop() is called after the last RPC ended, and also if start() failed halfway.
    """

    @property
    def name(self) -> str:
        """The short name: `images`, `tasks`, …"""
        ...

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        """Add the servicers; returns the full names of the gRPC services, such as `corral.tasks.v1.Tasks`."""
        ...

    async def start(self) -> None:
        """Open the stores and recover what an earlier process left behind. A composer may call leaves here."""
        ...

    async def stop(self) -> None:
        """Release everything that a next process would need."""
        ...
