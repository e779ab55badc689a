"""Giving a container its cgroup and its task: when it is created, and again each time it starts after having ended."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path

from corral.api.cgroups.v1.cgroups_pb2 import Cgroup, CreateCgroupRequest, SettleRequest
from corral.api.engine.v1.engine_pb2 import ContainerConfig, VolumeMount
from corral.api.tasks.v1.tasks_pb2 import CreateTaskRequest, DeleteTaskRequest, GetTaskRequest, Task
from corral.api.types.v1.types_pb2 import Mount
from corral.engine import bounded_volumes, devices, image_mounts, requests, secrets, volume_rows
from corral.engine.core import Core, require_alive
from corral.engine.leaves import persistently
from corral.engine.options import check_writable_cgroups
from corral.engine.records import ContainerRecord
from corral.engine.spec import Facts, build, capability_set
from corral.engine.spec_text import encode, with_cgroup
from corral.kernel.cgroup import detect
from corral.kernel.cgroup.systemd.names import unit_at
from corral.kernel.namespaces import Kind, open_namespace
from corral.kernel.process import start_time
from corral.rpc.blocking import run_blocking
from corral.rpc.errors import (
    CorralError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
    Unimplemented,
    from_os_error,
)
from corral.store import failpoint

LOG_NAME = "container.log"


class TaskMaking:
    """See the module."""

    def __init__(self, core: Core) -> None:
        self._core = core
        # Becomes False on the first host that says it cannot count swap.
        self._swap_accounting = True

    async def make_cgroup(self, record: ContainerRecord) -> Cgroup:
        """The container's cgroup with its limits; the same again gives the same."""
        if record.config.writable_cgroups:
            capabilities = capability_set(record.config, self._core.host)
            check_writable_cgroups(record.config, capabilities, detect())
        granted = devices.every_device() if record.config.privileged else devices.grant(record.config.devices)
        rules = devices.rules(granted, privileged=record.config.privileged)

        def request(*, swap_default: bool) -> CreateCgroupRequest:
            return requests.cgroup(record.config, rules, record.namespace, record.id, swap_default=swap_default)

        cgroups = self._core.leaves.cgroups
        try:
            return await cgroups.Create(request(swap_default=self._swap_accounting))
        except Unimplemented:
            if not self._swap_accounting or not requests.has_default_swap(record.config.resources):
                raise
            # Nobody asked for that limit: without swap accounting the memory limit stands alone, as with docker.
            cgroup = await cgroups.Create(request(swap_default=False))
            self._swap_accounting = False
            return cgroup

    @asynccontextmanager
    async def cgroup_meanwhile(self, record: ContainerRecord) -> AsyncIterator[asyncio.Task[Cgroup]]:
        """It is made while the block does what needs none of it, and not left to be made when the block is left."""
        cgroup = self._core.background.spawn(persistently(lambda: self.make_cgroup(record)))
        try:
            yield cgroup
        finally:
            if not cgroup.done():
                await asyncio.wait((cgroup,))

    async def make(
        self, record: ContainerRecord, rootfs: Iterable[Mount], cgroup: asyncio.Task[Cgroup]
    ) -> ContainerRecord:
        """Create the task; returns the record with what is known of it, its cgroup too. That may still be made while
        the rest is got ready. Raises CorralError."""
        config = record.config
        directory = self._core.make_container_directory(record)
        volume_paths = {}
        if config.mounts:
            await cgroup  # what is made of mounts stays, and it may be refused
            volume_paths = await self.ready_sources(record)
        with ExitStack() as opened:
            joined = await self._joined(config, opened)
            request = self._request(record, rootfs, volume_paths, joined, f"{directory}/{LOG_NAME}")
            if config.mounts:
                request.images.extend(await image_mounts.mounted(self._core.leaves, record))
                request.images.extend(image_mounts.parts_of_volumes(config, volume_paths))
            if config.secrets:
                files, env = await run_blocking(secrets.of_container, self._core, record)
                request.secrets.extend(files)
                request.secret_env.update(env)
            made = await cgroup
            record = record._replace(cgroup_path=made.path)
            request.spec = with_cgroup(request.spec, made.path)
            request.cgroup_paths.extend(made.join_paths)
            failpoint("engine.task.before_create")
            try:
                task = await self._create(request)
            except NotFound:
                if not made.unit:
                    raise
                made = await persistently(lambda: self.make_cgroup(record))  # cgroups was killed, and its scope went
                request.cgroup_paths[:] = made.join_paths
                task = await self._create(request)
        await self.settle(record)
        return record._replace(pid=task.pid, log_path=task.log_path, bundle=task.bundle)

    async def settle(self, record: ContainerRecord) -> None:
        """Have all its limits hold for a task that was created, if its cgroup is a scope of systemd's; the same again
        does no harm. Raises CorralError; a task that does not run yet is gone then."""
        if not unit_at(record.cgroup_path):
            return
        try:
            await persistently(lambda: self._core.leaves.cgroups.Settle(SettleRequest(id=record.id)))
        except CorralError:
            with suppress(CorralError):  # it runs, or goes when it is made again
                await self._core.leaves.tasks.Delete(DeleteTaskRequest(id=record.id))
            raise

    def _request(
        self,
        record: ContainerRecord,
        rootfs: Iterable[Mount],
        volume_paths: Mapping[str, str],
        joined: Mapping[Kind, str],
        log_path: str,
    ) -> CreateTaskRequest:
        """All of it but the cgroup."""
        config = record.config
        granted = devices.every_device() if config.privileged else devices.grant(config.devices)
        assert record.endpoint is not None
        facts = Facts(
            id=record.id,
            host=self._core.host,
            endpoint=record.endpoint,
            volume_paths=volume_paths,
            joined=joined,
            devices=granted,
            is_new=not record.started_ns,
        )
        return requests.task(
            record,
            spec=encode(build(config, facts)),
            rootfs=rootfs,
            log_path=log_path,
        )

    async def _create(self, request: CreateTaskRequest) -> Task:
        """tasks.Create, over a restart of tasks: it may or may not have been done before the answer was lost."""
        tasks = self._core.leaves.tasks

        async def get_or_create() -> Task:
            try:
                return await tasks.Get(GetTaskRequest(id=request.id))
            except NotFound:
                return await tasks.Create(request)

        try:
            return await tasks.Create(request)
        except Unavailable:
            return await persistently(get_or_create)

    async def _joined(self, config: ContainerConfig, opened: ExitStack) -> dict[Kind, str]:
        """The namespaces of other containers that are joined, as paths that hold while `opened` does. They must run."""
        modes = (
            (Kind.PID, config.pid_mode),
            (Kind.IPC, config.ipc_mode),
            (Kind.UTS, config.uts_mode),
            (Kind.CGROUP, config.cgroupns_mode),
        )
        found = {}
        for kind, mode in modes:
            if not mode.startswith("container:"):
                continue
            other = self._core.resolve(mode.removeprefix("container:"))
            require_alive(other, "joined")
            task = await self._core.leaves.tasks.Get(GetTaskRequest(id=other.id))
            fd = open_namespace_of(task, kind)
            opened.callback(os.close, fd)
            found[kind] = f"/proc/{os.getpid()}/fd/{fd}"
        return found

    def _ready_volume(self, namespace: str, name: str) -> Path:
        volume = self._core.database.read_sync(lambda view: volume_rows.get_volume(view, namespace, name))
        try:
            return bounded_volumes.ready(self._core.volume_root(namespace) / name, volume.options)
        except OSError as e:
            raise from_os_error(e, f"cannot use the volume {name!r}") from e

    async def ready_sources(self, record: ContainerRecord) -> dict[str, str]:
        """Make the directories of volumes and, where wanted, of bind mounts; returns the volumes' paths. What is left
        of volumes that were called so, and are being removed, is gone before."""
        mounts = record.config.mounts
        keys = [(record.namespace, mount.source) for mount in mounts if mount.type == VolumeMount.TYPE_VOLUME]
        async with self._core.volume_locks.of_all(keys):
            return await run_blocking(self._ready_sources, record)

    def _ready_sources(self, record: ContainerRecord) -> dict[str, str]:
        paths = {}
        for mount in record.config.mounts:
            if mount.type == VolumeMount.TYPE_VOLUME:
                paths[mount.source] = str(self._ready_volume(record.namespace, mount.source))
            elif mount.type == VolumeMount.TYPE_BIND:
                _ready_bind_source(mount)
        return paths


def open_namespace_of(task: Task, kind: Kind) -> int:
    """An fd of a namespace of a task's init. Raises FailedPrecondition if that has ended, whoever has its pid now."""
    ended = FailedPrecondition(f"container {task.id} has ended, and can't be joined", reason="NOT_RUNNING")
    try:
        fd = open_namespace(f"/proc/{task.pid}/ns/{kind.file}")
    except (FileNotFoundError, ProcessLookupError):
        raise ended from None
    try:
        # Only now: had the pid been another's when the file was opened, it would not be this process's afterwards.
        if start_time(task.pid) == task.start_time:
            return fd
    except (FileNotFoundError, ProcessLookupError):
        pass
    os.close(fd)
    raise ended


def _ready_bind_source(mount: VolumeMount) -> None:
    source = Path(mount.source)
    if mount.create_source and not source.exists():
        try:
            source.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise from_os_error(e, f"cannot make the source {mount.source} of the mount {mount.target}") from e
    elif not source.exists():
        raise InvalidArgument(
            f"the source {mount.source} of the mount {mount.target} does not exist on this host",
            reason="NO_MOUNT_SOURCE",
            metadata={"source": mount.source},
        )
