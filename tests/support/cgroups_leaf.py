"""A client of the cgroups leaf, and a look at what it does in the kernel."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from corral.api.cgroups.v1 import cgroups_pb2 as pb
from corral.api.cgroups.v1.cgroups_pb2_grpc import CgroupsStub
from corral.api.types.v1 import types_pb2
from corral.kernel.cgroup import Cgroup, detect, open_driver
from corral.rpc.channel import open_channel
from support.corrald import Corrald

if TYPE_CHECKING:
    from corral.api.cgroups.v1.cgroups_pb2_grpc import CgroupsAsyncStub

MIB = 1 << 20
LIMITS = types_pb2.Resources(
    cpu=types_pb2.CpuResources(shares=512, quota_us=50_000, period_us=100_000),
    memory=types_pb2.MemoryResources(limit_bytes=32 * MIB, swap_bytes=32 * MIB),
    pids=types_pb2.PidsResources(limit=50),
)


@dataclass(slots=True)
class Leaf:
    """Calls to the leaf, and a look at what it does in the kernel."""

    stub: "CgroupsAsyncStub"
    corrald: Corrald

    async def create(
        self, name: str, resources: types_pb2.Resources = LIMITS, parent: str = "", **labels: str
    ) -> pb.Cgroup:
        request = pb.CreateCgroupRequest(id=name, parent=parent, resources=resources, labels=labels)
        return await self.stub.Create(request)

    async def get(self, name: str) -> pb.Cgroup:
        return await self.stub.Get(pb.GetCgroupRequest(id=name))

    async def update(self, name: str, **parts: object) -> pb.Cgroup:
        change = types_pb2.Resources(**parts)  # type: ignore[arg-type]
        return await self.stub.Update(pb.UpdateCgroupRequest(id=name, resources=change))

    async def delete(self, name: str, *, must_exist: bool = False) -> None:
        await self.stub.Delete(pb.DeleteCgroupRequest(id=name, must_exist=must_exist))

    async def stats(self, *names: str) -> list[pb.Stats]:
        [answer] = [each async for each in self.stub.Stats(pb.StatsRequest(ids=names))]
        return list(answer.stats)

    async def names(self, *, all_namespaces: bool = False) -> list[str]:
        listed = await self.stub.List(pb.ListCgroupsRequest(all_namespaces=all_namespaces))
        return [each.id for each in listed.cgroups]

    async def oom(self, subject: str) -> None:
        """Wait until an OOM is journalled."""
        async with asyncio.timeout(5):
            async for _ in self.stub.Events(types_pb2.EventsRequest(subjects=[subject], topics=["cgroup.oom"])):
                return

    async def topics(self, subject: str) -> list[str]:
        request = types_pb2.EventsRequest(no_follow=True, subjects=[subject])
        return [event.topic async for each in self.stub.Events(request) for event in each.events]

    def kernel(self, name: str, namespace: str = "default") -> Cgroup:
        return open_driver(detect()).open(f"{self.corrald.place.cgroup_parent}/{namespace}/{name}")


@asynccontextmanager
async def connected(corrald: Corrald) -> AsyncIterator[Leaf]:
    channel = open_channel(corrald.address_of("cgroups"))
    try:
        yield Leaf(CgroupsStub(channel), corrald)
    finally:
        await channel.close()
