"""Volumes."""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from corral.api.engine.v1 import engine_pb2, engine_pb2_grpc
from corral.client.async_transport import AsyncTransport

if TYPE_CHECKING:
    from corral.client.aio import AsyncClient


class Volumes:
    """Volumes: directories that outlive containers."""

    def __init__(self, client: "AsyncClient") -> None:
        self._client = client

    @property
    def _engine(self) -> AsyncTransport:
        return self._client.engine()

    @cached_property
    def _stub(self) -> "engine_pb2_grpc.VolumesAsyncStub":
        return engine_pb2_grpc.VolumesStub(self._engine.channel)

    async def create(
        self, name: str = "", *, labels: dict[str, str] | None = None, options: dict[str, str] | None = None
    ) -> engine_pb2.Volume:
        """Makes a volume; with the option "size", such as "10g", it holds no more than that."""
        request = engine_pb2.CreateVolumeRequest(name=name, labels=labels or {}, options=options or {})
        return await self._engine.unary(self._stub.Create, request)

    async def get(self, name: str) -> engine_pb2.Volume:
        """All facts about one volume."""
        return await self._engine.unary(self._stub.Get, engine_pb2.GetVolumeRequest(name=name))

    async def list(self) -> Sequence[engine_pb2.Volume]:
        """All volumes."""
        answer = await self._engine.unary(self._stub.List, engine_pb2.ListVolumesRequest())
        return answer.volumes

    async def remove(self, name: str) -> None:
        """Removes a volume that no container uses."""
        await self._engine.unary(self._stub.Remove, engine_pb2.RemoveVolumeRequest(name=name))

    async def prune(self, *, all: bool = False) -> Sequence[str]:  # noqa: A002 - docker's word
        """Removes anonymous volumes that no container uses, with `all` named ones too; returns their names."""
        answer = await self._engine.unary(self._stub.Prune, engine_pb2.PruneVolumesRequest(all=all))
        return answer.removed
