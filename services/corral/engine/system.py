"""The whole installation: what it is, where its services are, what the host has."""

import asyncio
import os
import platform
from contextlib import suppress

from corral.api.cgroups.v1.cgroups_pb2 import HostRequest, HostResponse
from corral.api.engine.v1.engine_pb2 import Check, InfoResponse
from corral.api.images.v1.images_pb2 import DriversRequest, ListImagesRequest
from corral.engine import store
from corral.engine.core import Core
from corral.engine.host import check_host, memory_bytes, operating_system, security_features
from corral.engine.records import Status
from corral.rpc.blocking import run_blocking
from corral.rpc.context import current_namespace
from corral.rpc.errors import CorralError

LAYOUTS = {
    HostResponse.LAYOUT_V1: "v1",
    HostResponse.LAYOUT_V2: "v2",
    HostResponse.LAYOUT_HYBRID: "hybrid",
}


class System:
    """See the module."""

    def __init__(self, core: Core, version: str) -> None:
        self._core = core
        self._version = version

    async def info(self) -> InfoResponse:
        """Facts and counts of the caller's namespace. What a leaf that does not answer would say is left empty."""
        namespace = current_namespace()
        counts = await self._core.database.read(lambda view: store.count_by_status(view, namespace))
        info = InfoResponse(
            version=self._version,
            root=str(self._core.config.root.parent),
            state=str(self._core.config.state),
            containers=sum(counts.values()),
            containers_running=counts.get(Status.RUNNING, 0),
            containers_paused=counts.get(Status.PAUSED, 0),
            containers_stopped=counts.get(Status.CREATED, 0) + counts.get(Status.EXITED, 0),
            kernel_release=platform.release(),
            operating_system=operating_system(),
            architecture=platform.machine(),
            cpus=os.cpu_count() or 0,
            memory_bytes=memory_bytes(),
            hostname=self._core.host.hostname,
            security=security_features(),
        )
        await self._ask_leaves(info)
        return info

    async def _ask_leaves(self, info: InfoResponse) -> None:
        leaves = self._core.leaves
        images, drivers, host = await asyncio.gather(
            leaves.images.List(ListImagesRequest()),
            leaves.snapshots.Drivers(DriversRequest()),
            leaves.cgroups.Host(HostRequest()),
            return_exceptions=True,
        )
        for answer in (images, drivers, host):
            if isinstance(answer, BaseException) and not isinstance(answer, CorralError):
                raise answer
        if not isinstance(images, BaseException):
            info.images = len({image.id for image in images.images})
        if not isinstance(drivers, BaseException):
            info.snapshot_driver = next((driver.name for driver in drivers.drivers if driver.is_default), "")
        if not isinstance(host, BaseException):
            info.cgroup_layout = LAYOUTS.get(host.layout, "")
            info.cgroup_driver = host.driver
            info.limits.CopyFrom(host.limits)

    async def check_host(self) -> list[Check]:
        """See corral.engine.host; and who makes cgroups, which is a setting."""
        config = self._core.config
        checks = await run_blocking(check_host, config.root.parent, config.state)
        with suppress(CorralError):  # others say that a leaf is away
            driver = (await self._core.leaves.cgroups.Host(HostRequest())).driver
            checks.append(Check(name="cgroup driver", result=Check.RESULT_OK, detail=driver))
        return checks
