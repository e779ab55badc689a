"""corral.engine.v1: translates RPCs, nothing else."""
# ruff: noqa: N802 (methods are named as the RPCs are)

from collections.abc import AsyncIterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import grpc.aio

from corral.api.engine.v1 import engine_pb2 as pb
from corral.api.engine.v1 import engine_pb2_grpc
from corral.api.images.v1 import images_pb2
from corral.api.tasks.v1 import tasks_pb2
from corral.api.types.v1 import types_pb2
from corral.engine import store
from corral.engine.checking import Checker
from corral.engine.commits import Commits
from corral.engine.config import EngineConfig
from corral.engine.copying import Copying
from corral.engine.core import Core, host_facts, require_alive
from corral.engine.creation import Creation
from corral.engine.disk_usage import DiskUsage
from corral.engine.execs import Execs
from corral.engine.health import Checks
from corral.engine.leaves import Leaves
from corral.engine.lifecycle import Lifecycle
from corral.engine.merge import Merger, write_merged_event
from corral.engine.networking import Networking
from corral.engine.ports import Ports
from corral.engine.publishing import Publishing
from corral.engine.records import ContainerRecord
from corral.engine.recovery import Recovery
from corral.engine.removal import Removal
from corral.engine.restarts import Restarts
from corral.engine.secrets import Secrets
from corral.engine.sizes import Sizes
from corral.engine.streams import Streams, register
from corral.engine.system import System
from corral.engine.task_making import TaskMaking
from corral.engine.updates import Updates
from corral.engine.usage import Usage
from corral.engine.views import Views
from corral.engine.volumes import Volumes
from corral.rpc.blocking import run_blocking
from corral.rpc.channel import Channels
from corral.rpc.context import only_follows
from corral.rpc.events import stream_events
from corral.store import Database, Retention, Trash

if TYPE_CHECKING:
    from corral.engine.metrics import Exporter

STOP_GRACE_S = 5.0


class EngineService:
    """Hosts the engine; see corral.rpc.service.Service."""

    name = "engine"

    def __init__(self, config: EngineConfig) -> None:
        """Nothing is opened before start()."""
        self._config = config
        self._containers = ContainersServicer()
        self._volumes = VolumesServicer()
        self._secrets = SecretsServicer()
        self._system = SystemServicer()
        self._streams: Streams | None = None
        self._channels = Channels()
        self._core: Core | None = None
        self._merger: Merger | None = None
        self._exporter: Exporter | None = None

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        """Add the servicers; Attach, ExecRun and Logs go through unparsed."""
        register(self._open_streams, server)
        engine_pb2_grpc.add_ContainersServicer_to_server(self._containers, server)
        engine_pb2_grpc.add_VolumesServicer_to_server(self._volumes, server)
        engine_pb2_grpc.add_SecretsServicer_to_server(self._secrets, server)
        engine_pb2_grpc.add_SystemServicer_to_server(self._system, server)
        return [service.full_name for service in pb.DESCRIPTOR.services_by_name.values()]

    def _open_streams(self) -> Streams:
        assert self._streams is not None, "calls are let in after start()"
        return self._streams

    async def start(self) -> None:
        """Open the records and make them and the leaves agree; leaves that are not up yet are waited for in the
        background."""
        config = self._config
        kept = Retention(config.journal_keep, config.journal_max_age_s, config.journal_max_bytes)
        database = await run_blocking(store.open_database, config.root / "engine.db", journal_keep=kept)
        leaves = Leaves.connect(config.addresses, self._channels)
        core = self._core = Core(config, database, leaves, host_facts(), Trash(config.root / "trash"))
        removal = Removal(core)
        task_making = TaskMaking(core)
        lifecycle = Lifecycle(core, task_making)
        restarts = Restarts(core, lifecycle)
        ports = Ports(core)

        def act_on_exit(record: ContainerRecord, *, at_boot: bool = False) -> None:
            if record.config.auto_remove and (record.namespace, record.id) not in core.restarting:
                removal.remove_when_read(record)
            elif not restarts.on_exit(record, at_boot=at_boot):
                ports.on_exit(record)

        core.on_exit = act_on_exit
        core.on_stays_ended = ports.on_exit
        core.on_cut_short = restarts.on_cut_short
        core.on_found_ended = lambda record: act_on_exit(record, at_boot=True)
        execs = Execs(core)
        checks = Checks(core, lifecycle, execs)
        core.on_start = checks.on_start
        core.on_pause = checks.on_pause
        core.on_found_running = lambda record: checks.on_start(record, at_once=True)
        views, networking, publishing = Views(core, checks), Networking(core), Publishing(core)
        self._containers.serve(
            core,
            views,
            Creation(core, task_making, removal),
            lifecycle,
            removal,
            Updates(core, networking),
            networking,
            publishing,
            execs,
            task_making,
        )
        self._volumes.serve(Volumes(core))
        self._secrets.serve(Secrets(core))
        self._streams = Streams(core, execs, lifecycle)
        self._merger = Merger(core)
        recovery = Recovery(core, removal, networking, publishing, self._merger.catch_up)
        self._system.serve(System(core, _version()), DiskUsage(core), Checker(core, recovery), config, database)
        self._merger.on_reconnect = recovery.after_outage
        await recovery.start()
        checks.on_daemon_start()
        if config.metrics_address:
            await self._export(core, config.metrics_address)
        self._merger.start()

    async def _export(self, core: Core, address: str) -> None:
        from corral.engine import metrics  # its library takes 40 ms to load

        exporter = metrics.Exporter(address, lambda: metrics.read(core))
        await run_blocking(exporter.start)
        self._exporter = exporter

    async def stop(self) -> None:
        """Let changes finish, stop following the leaves, close the database."""
        if self._core is not None:
            self._core.is_stopping = True
        if self._streams is not None:
            self._streams.close()
        if self._exporter is not None:
            await run_blocking(self._exporter.stop)
        if self._core is not None:
            await self._core.background.stop(STOP_GRACE_S)
            await self._core.trash.close()
        if self._merger is not None:
            await self._merger.stop()
        await self._channels.close()
        if self._core is not None:
            await run_blocking(self._core.database.close)


def _version() -> str:
    try:
        return version("corral")
    except PackageNotFoundError:
        return "0"


class ContainersServicer(engine_pb2_grpc.ContainersServicer):
    """corral.engine.v1.Containers. Attach, ExecRun and Logs are in corral.engine.streams."""

    def serve(
        self,
        core: Core,
        views: Views,
        creation: Creation,
        lifecycle: Lifecycle,
        removal: Removal,
        updates: Updates,
        networking: Networking,
        publishing: Publishing,
        execs: Execs,
        task_making: TaskMaking,
    ) -> None:
        """Called before the first RPC is let in."""
        self._core = core
        self._views = views
        self._creation = creation
        self._lifecycle = lifecycle
        self._removal = removal
        self._updates = updates
        self._networking = networking
        self._publishing = publishing
        self._commits = Commits(core, lifecycle)
        self._execs = execs
        self._copying = Copying(core, task_making)
        self._sizes = Sizes(core)
        self._usage = Usage(core, self._sizes)

    async def Attach(self, request_iterator: object, context: object) -> None:  # type: ignore[override]
        raise NotImplementedError("passed on unparsed, see corral.engine.streams")

    async def ExecRun(self, request_iterator: object, context: object) -> None:  # type: ignore[override]
        raise NotImplementedError("passed on unparsed, see corral.engine.streams")

    async def Logs(self, request: object, context: object) -> None:  # type: ignore[override]
        raise NotImplementedError("passed on unparsed, see corral.engine.streams")

    async def Create(self, request: pb.CreateContainerRequest, context: object) -> pb.Container:
        return (await self._creation.create(request)).to_wire()

    async def Start(self, request: pb.StartContainerRequest, context: object) -> pb.Container:
        act = self._lifecycle.make_again if request.create_only else self._lifecycle.start
        return (await act(request.container)).to_wire()

    async def Stop(self, request: pb.StopContainerRequest, context: object) -> pb.Container:
        record = await self._lifecycle.stop(request.container, signal=request.signal, timeout_s=_timeout_s(request))
        return record.to_wire()

    async def Restart(self, request: pb.StopContainerRequest, context: object) -> pb.Container:
        record = await self._lifecycle.restart(request.container, signal=request.signal, timeout_s=_timeout_s(request))
        return record.to_wire()

    async def Kill(self, request: pb.KillContainerRequest, context: object) -> pb.KillContainerResponse:
        await self._lifecycle.kill(request.container, signal=request.signal, everything=request.all)
        return pb.KillContainerResponse()

    async def Pause(self, request: pb.PauseContainerRequest, context: object) -> pb.Container:
        return await self._views.of(await self._lifecycle.pause(request.container))

    async def Resume(self, request: pb.ResumeContainerRequest, context: object) -> pb.Container:
        return await self._views.of(await self._lifecycle.resume(request.container))

    async def Delete(self, request: pb.DeleteContainerRequest, context: object) -> pb.DeleteContainerResponse:
        record = await self._removal.delete(request.container, force=request.force, volumes=request.volumes)
        return pb.DeleteContainerResponse(id=record.id, exit=record.exit)

    async def Wait(self, request: pb.WaitContainerRequest, context: object) -> pb.WaitContainerResponse:
        only_follows()
        return pb.WaitContainerResponse(exit=await self._lifecycle.wait(request.container, request.condition))

    async def Get(self, request: pb.GetContainerRequest, context: object) -> pb.Container:
        found = await self._views.get(request.container)
        if request.size:
            await self._sizes.fill_in([found])
        return found

    async def List(self, request: pb.ListContainersRequest, context: object) -> pb.ListContainersResponse:
        found = await self._views.list(request)
        if request.size:
            await self._sizes.fill_in(found)
        return pb.ListContainersResponse(containers=found)

    async def Rename(self, request: pb.RenameContainerRequest, context: object) -> pb.Container:
        return await self._views.of(await self._updates.rename(request.container, request.name))

    async def Update(self, request: pb.UpdateContainerRequest, context: object) -> pb.Container:
        return await self._views.of(await self._updates.update(request))

    async def ReopenLog(self, request: tasks_pb2.ReopenLogRequest, context: object) -> tasks_pb2.ReopenLogResponse:
        record = self._core.resolve(request.id)
        require_alive(record, "told to open its log again")
        return await self._core.leaves.tasks.ReopenLog(tasks_pb2.ReopenLogRequest(id=record.id))

    async def Connect(self, request: pb.ConnectContainerRequest, context: object) -> pb.Container:
        return await self._views.of(await self._networking.connect(request.container, request.network))

    async def Disconnect(self, request: pb.DisconnectContainerRequest, context: object) -> pb.Container:
        return await self._views.of(await self._networking.disconnect(request.container, request.network))

    async def Publish(self, request: pb.ContainerPortsRequest, context: object) -> pb.Container:
        return await self._views.of(await self._publishing.publish(request.container, request.ports))

    async def Unpublish(self, request: pb.ContainerPortsRequest, context: object) -> pb.Container:
        return await self._views.of(await self._publishing.unpublish(request.container, request.ports))

    async def Commit(self, request: pb.CommitContainerRequest, context: object) -> images_pb2.Image:
        return await self._commits.commit(request)

    async def CopyFrom(self, request: pb.CopyFromRequest, context: object) -> AsyncIterator[pb.CopyFromResponse]:
        async for response in self._copying.out(request):
            yield response

    async def CopyTo(self, request_iterator: AsyncIterator[pb.CopyToRequest], context: object) -> pb.CopyToResponse:
        await self._copying.into(request_iterator)
        return pb.CopyToResponse()

    async def Exec(self, request: pb.ExecContainerRequest, context: object) -> pb.ExecContainerResponse:
        record, exec_id = await self._execs.make(request)
        return pb.ExecContainerResponse(id=record.id, exec_id=exec_id)

    async def ExecStart(self, request: pb.ExecStartRequest, context: object) -> pb.ExecStartResponse:
        return pb.ExecStartResponse(pid=await self._execs.start(request.container, request.exec_id))

    async def ExecWait(self, request: pb.ExecWaitRequest, context: object) -> pb.WaitContainerResponse:
        only_follows()
        status = await self._execs.wait(request.container, request.exec_id, remove=request.remove)
        return pb.WaitContainerResponse(exit=status)

    async def Resize(self, request: pb.ResizeContainerRequest, context: object) -> pb.ResizeContainerResponse:
        await self._execs.resize(request.container, request.exec_id, request.size)
        return pb.ResizeContainerResponse()

    async def Stats(
        self, request: pb.ContainerStatsRequest, context: object
    ) -> AsyncIterator[pb.ContainerStatsResponse]:
        only_follows()
        async for response in self._usage.stats(request.containers, request.interval_ms):
            yield response

    async def Top(self, request: pb.TopRequest, context: object) -> pb.TopResponse:
        if request.ps_options:
            return await self._usage.ps(request.container, request.ps_options)
        return pb.TopResponse(processes=await self._usage.top(request.container))


def _timeout_s(request: pb.StopContainerRequest) -> float | None:
    return request.timeout.ToNanoseconds() / 1e9 if request.HasField("timeout") else None


class VolumesServicer(engine_pb2_grpc.VolumesServicer):
    """corral.engine.v1.Volumes."""

    def serve(self, volumes: Volumes) -> None:
        """Called before the first RPC is let in."""
        self._volumes = volumes

    async def Create(self, request: pb.CreateVolumeRequest, context: object) -> pb.Volume:
        return await self._volumes.create(request)

    async def Get(self, request: pb.GetVolumeRequest, context: object) -> pb.Volume:
        return await self._volumes.get(request.name)

    async def List(self, request: pb.ListVolumesRequest, context: object) -> pb.ListVolumesResponse:
        return pb.ListVolumesResponse(volumes=await self._volumes.every())

    async def Remove(self, request: pb.RemoveVolumeRequest, context: object) -> pb.RemoveVolumeResponse:
        await self._volumes.remove(request.name)
        return pb.RemoveVolumeResponse()

    async def Prune(self, request: pb.PruneVolumesRequest, context: object) -> pb.PruneVolumesResponse:
        return pb.PruneVolumesResponse(removed=await self._volumes.prune(everything=request.all))


class SecretsServicer(engine_pb2_grpc.SecretsServicer):
    """corral.engine.v1.Secrets."""

    def serve(self, secrets: Secrets) -> None:
        self._secrets = secrets

    async def Create(self, request: pb.CreateSecretRequest, context: object) -> pb.Secret:
        return await self._secrets.create(request)

    async def Get(self, request: pb.GetSecretRequest, context: object) -> pb.Secret:
        return await self._secrets.get(request.name)

    async def List(self, request: pb.ListSecretsRequest, context: object) -> pb.ListSecretsResponse:
        return pb.ListSecretsResponse(secrets=await self._secrets.every())

    async def Remove(self, request: pb.RemoveSecretRequest, context: object) -> pb.RemoveSecretResponse:
        await self._secrets.remove(request.name)
        return pb.RemoveSecretResponse()


class SystemServicer(engine_pb2_grpc.SystemServicer):
    """corral.engine.v1.System."""

    def serve(
        self, system: System, disk_usage: DiskUsage, checker: Checker, config: EngineConfig, database: Database
    ) -> None:
        """Called before the first RPC is let in."""
        self._system = system
        self._disk_usage = disk_usage
        self._checker = checker
        self._config = config
        self._database = database

    async def Info(self, request: pb.InfoRequest, context: object) -> pb.InfoResponse:
        return await self._system.info()

    async def Addresses(self, request: pb.AddressesRequest, context: object) -> pb.AddressesResponse:
        return pb.AddressesResponse(addresses=self._config.addresses)

    async def DiskUsage(self, request: pb.DiskUsageRequest, context: object) -> pb.DiskUsageResponse:
        return await self._disk_usage.usage()

    async def Check(self, request: types_pb2.CheckRequest, context: object) -> types_pb2.CheckResponse:
        return types_pb2.CheckResponse(findings=await self._checker.check(repair=request.repair, deep=request.deep))

    async def CheckHost(self, request: pb.CheckHostRequest, context: object) -> pb.CheckHostResponse:
        return pb.CheckHostResponse(checks=await self._system.check_host())

    async def Events(
        self, request: types_pb2.EventsRequest, context: object
    ) -> AsyncIterator[types_pb2.EventsResponse]:
        async for response in stream_events(self._database.journal, request, write=write_merged_event):
            yield response
