"""corral.version.v1.Version, and reflection: what every address answers whatever it hosts."""

import asyncio
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import grpc.aio

from corral.api.version.v1 import version_pb2, version_pb2_grpc
from corral.daemon.upgrade import Upgrading, check_at, upgrade_at
from corral.rpc.context import only_follows

VERSION_SERVICE = "corral.version.v1.Version"


def package_version() -> str:
    """The version of the installed package."""
    try:
        return metadata.version("corral")
    except metadata.PackageNotFoundError:
        return "unknown"


class VersionServicer(version_pb2_grpc.VersionServicer):
    """Who answers here."""

    def __init__(
        self,
        services: Sequence[str],
        apis: Sequence[str],
        root: Path,
        state: Path,
        upgrading: Upgrading,
        elsewhere: Sequence[str],
    ) -> None:
        self._services = services
        self._upgrading = upgrading
        self._elsewhere = elsewhere
        self._apis = apis
        self._root = root
        self._state = state

    async def Get(self, request: version_pb2.GetRequest, context: Any) -> version_pb2.GetResponse:  # noqa: N802
        return version_pb2.GetResponse(
            version=package_version(),
            services=self._services,
            apis=self._apis,
            python_version=platform.python_version(),
            kernel_release=os.uname().release,
            root=str(self._root),
            state=str(self._state),
            generation=self._upgrading.generation,
            pid=os.getpid(),
        )

    async def Upgrade(self, request: version_pb2.UpgradeRequest, context: Any) -> version_pb2.UpgradeResponse:  # noqa: N802
        only_follows()  # whoever upgrades us meanwhile: it asks again
        if not request.only_this and request.generation >= self._upgrading.generation:
            await self._upgrade_elsewhere()
        await self._upgrading.beyond(request.generation)
        return version_pb2.UpgradeResponse(version=package_version(), generation=self._upgrading.generation)

    async def Check(self, request: version_pb2.CheckRequest, context: Any) -> version_pb2.CheckResponse:  # noqa: N802
        only_follows()
        await self._upgrading.check()
        return version_pb2.CheckResponse()

    async def _upgrade_elsewhere(self) -> None:
        """First those that we call, then we; but nobody at all if one of us would not start."""
        if self._elsewhere:
            await asyncio.gather(self._upgrading.check(), *map(check_at, self._elsewhere))
        for address in self._elsewhere:
            await upgrade_at(address)


class Common:
    """Adds the servicers of this module to a host."""

    def __init__(
        self, services: Sequence[str], root: Path, state: Path, upgrading: Upgrading, elsewhere: Sequence[str]
    ) -> None:
        """elsewhere: the addresses of other processes whose services ours call."""
        self._services = services
        self._root = root
        self._state = state
        self._upgrading = upgrading
        self._elsewhere = elsewhere

    def __call__(self, server: grpc.aio.Server, full_names: Sequence[str]) -> Sequence[str]:
        from grpc_reflection.v1alpha import reflection

        apis = sorted({name.rpartition(".")[0] for name in full_names if name.startswith("corral.")})
        servicer = VersionServicer(self._services, apis, self._root, self._state, self._upgrading, self._elsewhere)
        version_pb2_grpc.add_VersionServicer_to_server(servicer, server)
        reflection.enable_server_reflection([*full_names, VERSION_SERVICE, reflection.SERVICE_NAME], server)  # type: ignore[no-untyped-call]
        return [VERSION_SERVICE, reflection.SERVICE_NAME]
