"""Secrets."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from corral.api.engine.v1 import engine_pb2, engine_pb2_grpc
from corral.client.async_transport import AsyncTransport

if TYPE_CHECKING:
    from corral.client.aio import AsyncClient


class Secrets:
    """Secrets: what containers get as files in memory, or as variables. Nobody can read them back here."""

    def __init__(self, client: "AsyncClient") -> None:
        self._client = client

    @property
    def _engine(self) -> AsyncTransport:
        return self._client.engine()

    @cached_property
    def _stub(self) -> "engine_pb2_grpc.SecretsAsyncStub":
        return engine_pb2_grpc.SecretsStub(self._engine.channel)

    async def create(self, name: str, data: bytes, *, labels: Mapping[str, str] | None = None) -> engine_pb2.Secret:
        """Makes a secret of 1 to 512000 bytes."""
        request = engine_pb2.CreateSecretRequest(name=name, data=data, labels=labels or {})
        return await self._engine.unary(self._stub.Create, request)

    async def get(self, name: str) -> engine_pb2.Secret:
        """All facts about one secret, but for its content."""
        return await self._engine.unary(self._stub.Get, engine_pb2.GetSecretRequest(name=name))

    async def list(self) -> Sequence[engine_pb2.Secret]:
        """All secrets."""
        answer = await self._engine.unary(self._stub.List, engine_pb2.ListSecretsRequest())
        return answer.secrets

    async def remove(self, name: str) -> None:
        """Removes a secret that no container uses."""
        await self._engine.unary(self._stub.Remove, engine_pb2.RemoveSecretRequest(name=name))
