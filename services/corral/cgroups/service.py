"""The gRPC side of the cgroups leaf."""
# ruff: noqa: N802 (methods are named as the RPCs are)

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Sequence

import grpc.aio

from corral.api.cgroups.v1 import cgroups_pb2, cgroups_pb2_grpc
from corral.api.types.v1 import types_pb2
from corral.cgroups import engine_limits, recovery, store, wire
from corral.cgroups.checking import Checker
from corral.cgroups.config import SYSTEMD, CgroupsConfig
from corral.cgroups.errors import translated
from corral.cgroups.groups import Groups, Timeouts
from corral.cgroups.messages import Messages
from corral.cgroups.parent import Parent, Slice
from corral.cgroups.store import Key, Record, State
from corral.kernel.cgroup import Driver, OomWatch, detect, open_driver
from corral.rpc.blocking import run_blocking
from corral.rpc.checking import check
from corral.rpc.context import check_id, current_namespace
from corral.rpc.errors import FailedPrecondition, InvalidArgument, NotFound
from corral.rpc.events import stream_events, timestamp
from corral.rpc.local_call import LocalContext
from corral.store import Database

SHORTEST_INTERVAL_MS = 100


class CgroupsService:
    """Hosts the leaf; see corral.rpc.service.Service."""

    name = "cgroups"

    def __init__(self, config: CgroupsConfig) -> None:
        """Nothing is opened before start()."""
        self.config = config
        self._servicer = CgroupsServicer(config)
        self._database: Database | None = None
        self._driver: Driver | None = None
        self._parent: Parent | None = None
        self._groups: Groups | None = None

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        """Add the servicer."""
        cgroups_pb2_grpc.add_CgroupsServicer_to_server(self._servicer, server)
        return [cgroups_pb2.DESCRIPTOR.services_by_name["Cgroups"].full_name]

    async def start(self) -> None:
        """Open the store and reconcile it with the kernel. Raises FailedPrecondition if the parent is another's."""
        watches = await run_blocking(self._open)
        assert self._database is not None
        assert self._driver is not None
        assert self._parent is not None
        timeouts = Timeouts(self.config.remove_timeout_s, self.config.freeze_timeout_s)
        self._groups = await run_blocking(Groups, self._database, self._driver, timeouts, self._parent)
        for key, watch in watches.items():
            self._groups.watch(key, watch)
        checker = Checker(self._driver, self._groups, self._parent)
        self._servicer.open(self._groups, self._database, self._driver, self._parent, checker)

    def _open(self) -> dict[Key, OomWatch]:
        config = self.config
        config.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._database = Database(config.root / "cgroups.db", store.MIGRATIONS, durable=False, on_loop=True)
        self._driver = _open_driver(config.driver)
        kind, path = Slice if config.driver == SYSTEMD else Parent, config.parent_path()
        parent = kind(self._driver, path, config.root, config.limits())
        with translated(f"use the cgroup parent {path}"):
            parent.claim()
            self._parent = parent
            engine_limits.enforce(self._driver, path, config.limits())
            return recovery.reconcile(self._database, self._driver, parent, timeout_s=config.remove_timeout_s)

    async def stop(self) -> None:
        """Finish changes, let go of the kernel's files; the parents that are empty now go too."""
        if self._groups:
            await self._groups.close()
        if self._driver:
            await run_blocking(self._driver.close)
        if self._parent:
            await run_blocking(self._parent.prune)
        if self._database:
            self._database.close()


def _open_driver(name: str) -> Driver:
    try:
        return open_driver(detect(), name)
    except OSError as e:
        if name != SYSTEMD:
            raise
        raise FailedPrecondition(
            f"[cgroups] driver = {SYSTEMD!r} needs systemd as pid 1, and its D-Bus socket: {e.strerror}"
            f' ({e.filename}); use driver = "cgroupfs"',
            reason="NO_SYSTEMD",
        ) from e


class CgroupsServicer(cgroups_pb2_grpc.CgroupsServicer):
    """Translates RPCs."""

    def __init__(self, config: CgroupsConfig) -> None:
        """Answers once open() was called; the host lets no RPC in before."""
        self._driver_name = config.driver
        self._messages = Messages()
        self._groups: Groups
        self._database: Database
        self._driver: Driver
        self._parent: Parent
        self._checker: Checker

    def open(self, groups: Groups, database: Database, driver: Driver, parent: Parent, checker: Checker) -> None:
        """Begin to serve from these."""
        self._groups, self._database, self._driver = groups, database, driver
        self._parent, self._checker = parent, checker

    async def Create(self, request: cgroups_pb2.CreateCgroupRequest, context: object) -> cgroups_pb2.Cgroup:
        key = _key(request.id)
        own = not request.parent
        resources = request.resources.SerializeToString(deterministic=True)
        record = Record(
            key=key,
            path=self._parent.place(key) if own else self._parent.place_below(request.parent, key),
            state=State.READY,
            first_resources=resources,
            resources=resources,
            labels=dict(request.labels),
            created_ns=time.time_ns(),
        )
        made = await self._groups.create(record, announce=not own, is_waited_for=_is_from_elsewhere(context))
        return self._message(made, frozen=False)

    async def Settle(self, request: cgroups_pb2.SettleRequest, context: object) -> cgroups_pb2.SettleResponse:
        await self._groups.settle(_key(request.id))
        return cgroups_pb2.SettleResponse()

    async def Update(self, request: cgroups_pb2.UpdateCgroupRequest, context: object) -> cgroups_pb2.Cgroup:
        record = await self._groups.update(_key(request.id), request.resources)
        return await run_blocking(self._live, record)

    async def Get(self, request: cgroups_pb2.GetCgroupRequest, context: object) -> cgroups_pb2.Cgroup:
        return await run_blocking(self._live, self._groups.find(_key(request.id)))

    async def List(self, request: cgroups_pb2.ListCgroupsRequest, context: object) -> cgroups_pb2.ListCgroupsResponse:
        records = self._groups.every(None if request.all_namespaces else current_namespace())
        messages = await run_blocking(lambda: [self._live(record) for record in records])
        return cgroups_pb2.ListCgroupsResponse(cgroups=messages)

    async def Stats(
        self, request: cgroups_pb2.StatsRequest, context: object
    ) -> AsyncIterator[cgroups_pb2.StatsResponse]:
        interval_s = max(request.interval_ms, SHORTEST_INTERVAL_MS) / 1000
        ids = [check_id(name, "cgroup id") for name in request.ids]
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            readings = await self._groups.stats(current_namespace(), ids, request.max_age_ms / 1000)
            yield self._messages.response(readings)
            if not request.interval_ms:
                return
            due = max(due + interval_s, loop.time())
            await asyncio.sleep(due - loop.time())

    async def Freeze(self, request: cgroups_pb2.FreezeRequest, context: object) -> cgroups_pb2.FreezeResponse:
        await self._groups.freeze(_key(request.id))
        return cgroups_pb2.FreezeResponse()

    async def Thaw(self, request: cgroups_pb2.ThawRequest, context: object) -> cgroups_pb2.ThawResponse:
        await self._groups.thaw(_key(request.id))
        return cgroups_pb2.ThawResponse()

    async def Kill(self, request: cgroups_pb2.KillRequest, context: object) -> cgroups_pb2.KillResponse:
        number = request.signal or signal.SIGKILL
        if number >= signal.NSIG:
            raise InvalidArgument(f"there is no signal {number}", reason="BAD_SIGNAL")
        await self._groups.kill(_key(request.id), number)
        return cgroups_pb2.KillResponse()

    async def Delete(
        self, request: cgroups_pb2.DeleteCgroupRequest, context: object
    ) -> cgroups_pb2.DeleteCgroupResponse:
        found = await self._groups.delete(_key(request.id), is_waited_for=_is_from_elsewhere(context))
        if not found and request.must_exist:
            raise NotFound(f"there is no cgroup {request.id!r}", reason="CGROUP_NOT_FOUND")
        return cgroups_pb2.DeleteCgroupResponse()

    async def Host(self, request: cgroups_pb2.HostRequest, context: object) -> cgroups_pb2.HostResponse:
        host, path = wire.host(self._driver.layout, self._driver_name), self._parent.path
        with translated(f"read the limits of {path}"):
            host.limits.CopyFrom(await run_blocking(engine_limits.describe, self._driver, path))
        return host

    async def Check(self, request: types_pb2.CheckRequest, context: object) -> types_pb2.CheckResponse:
        return await check("cgroups", self._checker.look, repair=request.repair)

    async def Events(
        self, request: types_pb2.EventsRequest, context: object
    ) -> AsyncIterator[types_pb2.EventsResponse]:
        await self._groups.journalled()
        async for event in stream_events(self._database.journal, request):
            yield event

    def _live(self, record: Record) -> cgroups_pb2.Cgroup:
        """The row and what the kernel says now. Blocks."""
        try:
            frozen = self._groups.open(record).is_frozen()
        except OSError:  # being removed; the row is still true of what was
            frozen = False
        return self._message(record, frozen=frozen)

    def _message(self, record: Record, *, frozen: bool) -> cgroups_pb2.Cgroup:
        message = cgroups_pb2.Cgroup(
            id=record.key.id,
            path=record.path,
            join_paths=self._groups.open(record).directories,
            frozen=frozen,
            created_at=timestamp(record.created_ns),
            oom_kills=record.oom_kills,
            labels=record.labels or None,
            unit=self._parent.unit(record.path),
        )
        message.resources.ParseFromString(record.resources)
        return message


def _is_from_elsewhere(context: object) -> bool:
    """Or from within this process, whose loop then has the caller's work to do, too."""
    return not isinstance(context, LocalContext)


def _key(name: str) -> Key:
    return Key(current_namespace(), check_id(name, "cgroup id"))
