"""The leaves, as the engine sees them: typed stubs over their addresses."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc.aio

from corral.api.cgroups.v1.cgroups_pb2_grpc import CgroupsStub
from corral.api.images.v1.images_pb2_grpc import ImagesStub, SnapshotsStub
from corral.api.network.v1.network_pb2_grpc import EndpointsStub, NetworksStub
from corral.api.tasks.v1.tasks_pb2_grpc import TasksStub
from corral.rpc.channel import Channels
from corral.rpc.errors import Unavailable

if TYPE_CHECKING:  # these exist for type checkers only
    from corral.api.cgroups.v1.cgroups_pb2_grpc import CgroupsAsyncStub
    from corral.api.images.v1.images_pb2_grpc import ImagesAsyncStub, SnapshotsAsyncStub
    from corral.api.network.v1.network_pb2_grpc import EndpointsAsyncStub, NetworksAsyncStub
    from corral.api.tasks.v1.tasks_pb2_grpc import TasksAsyncStub

# A leaf that restarts is back within a second or two; longer than this a user would rather read an error.
RETRY_DELAYS_S = (0.1, 0.3, 0.6, 1.0)


@dataclass(frozen=True, slots=True)
class Leaves:
    """One stub per leaf service. Failing calls raise CorralErrors."""

    images: "ImagesAsyncStub"
    snapshots: "SnapshotsAsyncStub"
    tasks: "TasksAsyncStub"
    networks: "NetworksAsyncStub"
    endpoints: "EndpointsAsyncStub"
    cgroups: "CgroupsAsyncStub"
    tasks_channel: grpc.aio.Channel

    @classmethod
    def connect(cls, addresses: Mapping[str, str], channels: Channels) -> "Leaves":
        """`addresses` by leaf name. Connects when a stub is first used."""
        images, tasks = channels.get(addresses["images"]), channels.get(addresses["tasks"])
        network, cgroups = channels.get(addresses["network"]), channels.get(addresses["cgroups"])
        return cls(
            images=ImagesStub(images),
            snapshots=SnapshotsStub(images),
            tasks=TasksStub(tasks),
            networks=NetworksStub(network),
            endpoints=EndpointsStub(network),
            cgroups=CgroupsStub(cgroups),
            tasks_channel=tasks,
        )


async def persistently[T](call: Callable[[], Awaitable[T]]) -> T:
    """Make an idempotent call, again a few times while nobody answers. Raises what the last try raised."""
    for delay_s in RETRY_DELAYS_S:
        try:
            return await call()
        except Unavailable:
            await asyncio.sleep(delay_s)
    return await call()
