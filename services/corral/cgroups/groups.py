"""What the cgroups leaf does: rows and kernel objects together, one change at a time for each cgroup.

    create   make the cgroup --> row and event            a crash between leaves a cgroup without a row
    delete   remove the cgroup --> delete row, event      a crash between leaves a row without a cgroup

Both are put right at the next start (see recovery). So who deletes one is told before the row is deleted, which is done
with what is written next. Where nobody would then look, or another may have come, at a parent of the caller's choice,
a row that says so comes first, and goes first.
"""

import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import structlog

from corral.api.types.v1 import types_pb2
from corral.cgroups import store, wire
from corral.cgroups.alone import Alone
from corral.cgroups.errors import translated
from corral.cgroups.parent import Parent
from corral.cgroups.pressure import PressureWatcher, close_all, open_all, triggers
from corral.cgroups.pressure import check as check_pressure
from corral.cgroups.prompt import Prompt, WouldWaitError
from corral.cgroups.readings import Readings
from corral.cgroups.rows import Rows
from corral.cgroups.store import Key, Record
from corral.cgroups.watch import OomWatcher
from corral.kernel.cgroup import (
    DEFAULT_RULES,
    Cgroup,
    CpuLimits,
    Driver,
    OomWatch,
    PressureTrigger,
    PressureWatch,
    Resources,
    Stats,
)
from corral.rpc.blocking import run_asking, run_blocking
from corral.rpc.errors import AlreadyExists, FailedPrecondition, NotFound
from corral.rpc.limits import after_change, with_shares_again
from corral.store import JSON, Database, Duplicate, failpoint

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long processes may take."""

    remove_s: float
    freeze_s: float


class Groups:
    """The cgroups of all namespaces. Kernel refusals come out as CorralErrors."""

    def __init__(self, database: Database, driver: Driver, timeouts: Timeouts, parent: Parent) -> None:
        """Take a database that has the leaf's tables, and read them. Blocks."""
        self._parent = parent
        self._database = database
        self._rows = Rows(database)
        self._driver = driver
        self._timeouts = timeouts
        self._alone = Alone()
        self._prompt = Prompt()
        self._making_room = threading.Lock()
        self._readings = Readings(driver)
        self._watcher = OomWatcher(self._note_oom)
        self._pressure = PressureWatcher(self._note_pressure)

    def find(self, key: Key) -> Record:
        """A cgroup's row. Raises NotFound."""
        record = self._rows.ready(key)
        if record is None:
            raise NotFound(f"there is no cgroup {key.id!r}", reason="CGROUP_NOT_FOUND", metadata={"id": key.id})
        return record

    def every(self, namespace: str | None) -> list[Record]:
        """The rows of a namespace, or all."""
        return self._rows.every(namespace)

    def rows(self) -> list[Record]:
        """Every row, also of those that are only intended."""
        return self._rows.all()

    async def journalled(self) -> None:
        """Return when everything that anybody was told is in the journal."""
        await self._database.write(lambda _: None)

    def open(self, record: Record) -> Cgroup:
        """The kernel's side of a row."""
        return self._driver.open(record.path)

    # Life

    async def create(self, record: Record, *, announce: bool, is_waited_for: bool = False) -> Record:
        """Make a cgroup. The same request again gives the row that is there.

        announce: write the intent first, for a path at which recovery would not look. is_waited_for: who asks has
        nothing else to do on this loop meanwhile.
        """
        _check(record.resources)
        return await self._change(record.key, self._create(record, announce=announce, here=is_waited_for))

    async def _create(self, record: Record, *, announce: bool, here: bool) -> Record:
        if known := self._rows.ready(record.key):
            if announce or not await self._is_elsewhere(known, record):
                return await self._again(_same(known, record))
            await self._delete(record.key)
        if announce:
            await self._announce(record)
        try:
            oom, pressure = await self._run_soon(self._make, record, here=here)
        except BaseException:
            if announce:
                await self._rows.delete(record.key, {})
            raise
        try:
            failpoint("cgroups.create.after_make")
            await self._put_ready(record)
        except BaseException:
            close_all(pressure)
            oom.close()
            raise
        self._watcher.add(record.key, oom)
        self._pressure.put(record.key, pressure)
        return record

    async def _put_ready(self, record: Record) -> None:
        try:
            await self._rows.put_ready(record)
        except BaseException:  # a full disk, say: whoever undoes this would find nothing to delete
            await self._run(self._unmake, record)
            raise

    def _unmake(self, record: Record) -> None:
        """The next start removes what stays."""
        try:
            self._driver.remove(record.path, self._timeouts.remove_s)
        except OSError as e:
            log.warning("cgroup.not_unmade", path=record.path, error=str(e))

    async def _is_elsewhere(self, known: Record, asked: Record) -> bool:
        """Whether the settings were others when it was made, and nobody is in it who would be in another one now."""
        return known.path != asked.path and not await run_blocking(self.open(known).pids)

    async def _again(self, record: Record) -> Record:
        """What create() answers for a row that is there; if its cgroup went, by somebody's hand or as a scope does when
        its container ends, it is made anew."""
        await self._watcher.look(record.key)
        if not await self._run(self._lasts, record):
            old = await self._watcher.take(record.key)
            if old:
                old.close()
            oom, pressure = await self._run(self._make, self.find(record.key))
            self._watcher.add(record.key, oom)
            self._pressure.put(record.key, pressure)
        else:
            await run_blocking(self._undivide, record)
        return record

    def _undivide(self, record: Record) -> None:
        """Make room for a new life: what the one before has made in its cgroup goes with it."""
        with translated(f"clear the cgroup {record.path}"):
            self.open(record).undivide()

    def _lasts(self, record: Record) -> bool:
        with translated(f"look at the cgroup {record.path}"):
            return self.open(record).is_lasting()

    async def _announce(self, record: Record) -> None:
        try:
            await self._rows.announce(record)
        except Duplicate as e:
            raise AlreadyExists(f"another cgroup of corral is at {record.path}", reason="PATH_TAKEN") from e
        failpoint("cgroups.create.after_announce")

    def _make(self, record: Record, *, may_wait: bool = True) -> tuple[OomWatch, Sequence[PressureWatch]]:
        """Make it in the kernel. An empty one at its place is a leftover; one with processes is not ours."""
        limits = _limits_at_creation(record.resources)
        is_ours = self._parent.holds(record.path)
        made_again = self._driver.asks_systemd  # which may make our parent on the way, and does not say so

        def keep() -> None:
            nonlocal made_again
            if is_ours:
                self._parent.keep()
                made_again = True

        with translated(f"make the cgroup {record.path}"):
            if is_ours:
                self._parent.keep_for_one_more()
                self._check(record.path, limits)
            with self._room(record.path, limits.cpu, may_wait=may_wait):
                group = self._create_or_replace(record.path, limits, keep, may_wait=may_wait)
            try:
                if is_ours and made_again:
                    self._parent.keep(inhabited=True)
                return _watches(group, _triggers_of(record.resources), record.oom_kills)
            except BaseException:
                self._driver.remove(record.path, self._timeouts.remove_s)
                raise

    def _create_or_replace(
        self, path: str, limits: Resources, on_orphan: Callable[[], None], *, may_wait: bool
    ) -> Cgroup:
        try:
            return self._driver.create(path, limits, on_orphan=on_orphan)
        except FileExistsError as e:
            if not may_wait:
                raise WouldWaitError from e
            if pids := self._driver.open(path).pids():
                raise FailedPrecondition(
                    f"a cgroup {path} that corral did not make holds processes: {pids[:10]}",
                    reason="CGROUP_NOT_EMPTY",
                ) from e
        self._driver.remove(path, self._timeouts.remove_s)
        return self._driver.create(path, limits, on_orphan=on_orphan)

    def _room(self, path: str, cpu: CpuLimits, *, may_wait: bool = True) -> AbstractContextManager[None]:
        """Within the block, the parents that are ours have the real-time CPU time that a cgroup gets in it."""
        asks = cpu.realtime_runtime_us or cpu.realtime_period_us
        if not asks or not self._parent.holds(path):  # what another's parents have, others have decided
            return nullcontext()
        if not may_wait:
            raise WouldWaitError
        return self._room_made(path, cpu)

    @contextmanager
    def _room_made(self, path: str, cpu: CpuLimits) -> Iterator[None]:
        with self._making_room:  # what the one before was promised, it has by now
            self._driver.make_room(self._parent.path, path, cpu)
            yield

    def _check(self, path: str, wanted: Resources) -> None:
        if self._parent.holds(path):
            self._parent.limits.check(wanted.cpu, self._driver, self._parent.path)

    async def settle(self, key: Key) -> None:
        """The container's first process is in its cgroup. Raises NotFound."""
        await self._change(key, self._settle(key))

    async def _settle(self, key: Key) -> None:
        record = self.find(key)
        limits = _limits_at_creation(record.resources)
        with translated(f"have systemd keep the limits of {record.path}"):
            await self._run(self._driver.settle, record.path, limits)

    async def update(self, key: Key, change: types_pb2.Resources) -> Record:
        """Change limits, all or none. Raises NotFound, InvalidArgument, Unimplemented."""
        check_pressure(change)
        return await self._change(key, self._update(key, change))

    async def _update(self, key: Key, change: types_pb2.Resources) -> Record:
        record = self.find(key)
        await self._watcher.look(key)
        now = types_pb2.Resources.FromString(record.resources)
        limits = _checked(wire.resources(with_shares_again(now, change)))
        merged = after_change(now, change)

        def apply() -> Sequence[PressureWatch]:
            with translated(f"change the limits of cgroup {key.id!r}"):
                if not self.open(record).is_lasting():  # these are the limits of the one that is made in its place
                    return ()
                if limits.cpu.quota_us is not None or limits.cpu.period_us is not None:
                    self._check(record.path, wire.resources(merged))
                group = self.open(record)
                watches = open_all(group, triggers(change))
                try:
                    self._driver.enable(record.path, limits)
                    with self._room(record.path, limits.cpu):
                        group.apply(limits)
                except BaseException:
                    close_all(watches)
                    raise
                return watches

        watches = await self._run(apply)
        self._readings.forget(record.path)
        if change.HasField("pressure"):
            self._pressure.put(key, watches)
        return await self._rows.set_resources(key, merged.SerializeToString(deterministic=True))

    async def delete(self, key: Key, *, is_waited_for: bool = False) -> bool:
        """Kill what is inside, and remove it; False if there was none. is_waited_for: as in create()."""
        return await self._change(key, self._delete(key, here=is_waited_for))

    async def _delete(self, key: Key, *, here: bool = False) -> bool:
        record = self._rows.ready(key)
        if record is None:
            return False
        watch = await self._watcher.take(key)
        try:
            kills = await self._run_soon(self._remove, record, watch, here=here)
        except BaseException:
            if watch:
                self._watcher.add(key, watch)
            raise
        self._pressure.drop(key)
        self._readings.forget(record.path)
        failpoint("cgroups.delete.after_remove")
        payload: dict[str, JSON] = {"oom_kills": max(kills, record.oom_kills)}
        if self._parent.holds(record.path) and not self._parent.unit(record.path) and kills <= record.oom_kills:
            self._rows.delete_soon(key, payload)  # all of which the next start would find out
        else:
            await self._rows.delete(key, payload)
        return True

    def _remove(self, record: Record, watch: OomWatch | None, *, may_wait: bool = True) -> int:
        with translated(f"remove cgroup {record.key.id!r}"):
            group = self.open(record)
            kills = watch.last_count() if watch else 0
            if types_pb2.Resources.FromString(record.resources).cpu.realtime_runtime_us:
                self._driver.free_room(record.path)
            if may_wait:
                group.remove(self._timeouts.remove_s)
            elif not group.remove_empty():
                raise WouldWaitError
        if watch:
            watch.close()
        return kills

    # Processes

    async def freeze(self, key: Key) -> None:
        """Stop every process; returns when all have stopped. No error if they are."""
        await self._change(key, self._set_frozen(key, frozen=True))

    async def thaw(self, key: Key) -> None:
        """Let every process run again. No error if they do."""
        await self._change(key, self._set_frozen(key, frozen=False))

    async def _set_frozen(self, key: Key, *, frozen: bool) -> None:
        record = self.find(key)

        def act() -> bool:
            with translated(f"{'freeze' if frozen else 'thaw'} cgroup {key.id!r}"):
                group = self.open(record)
                was_frozen = group.is_frozen()
                if frozen and not was_frozen:
                    group.freeze(self._timeouts.freeze_s)
                elif not frozen:
                    group.thaw()
                return was_frozen

        if await run_blocking(act) is not frozen:
            topic = "cgroup.frozen" if frozen else "cgroup.thawed"
            await self._database.write(lambda transaction: store.journal(transaction, topic, key))

    async def kill(self, key: Key, number: int) -> None:
        """A signal to every process, also to those forked meanwhile. Does not wait behind a freeze."""
        record = self.find(key)

        def act() -> None:
            with translated(f"signal the processes of cgroup {key.id!r}"):
                self.open(record).kill(number)

        await run_blocking(act)

    async def stats(self, namespace: str, ids: Sequence[str], max_age_s: float = 0) -> list[tuple[Key, int, Stats]]:
        """One reading of each, or of all of a namespace, by key and with its time; who vanishes meanwhile is left out.

        max_age_s: see Readings. Raises NotFound.
        """
        records = [self.find(Key(namespace, id_)) for id_ in ids] if ids else self._rows.every(namespace)
        paths = {record.key: record.path for record in records}
        found = await run_blocking(lambda: list(self._readings.read(paths, max_age_s)))
        return [(key, at_ns, self._watcher.with_kills(key, stats)) for key, at_ns, stats in found]

    # What a check finds

    async def remove_stray(self, path: str) -> None:
        """Remove a cgroup that no row describes, with what runs in it. Raises CorralError."""

        async def remove() -> None:
            known = {record.path for record in self._rows.all()}
            if path not in known:
                await self._run(self._remove_path, path)

        await self._alone.run(path, remove())

    def _remove_path(self, path: str) -> None:
        with translated(f"remove the cgroup {path}"):
            self._driver.remove(path, self._timeouts.remove_s)

    async def forget_gone(self, key: Key) -> None:
        """Delete a row whose cgroup somebody else removed."""

        async def forget() -> None:
            record = self._rows.find(key)
            if record is None or await run_blocking(self.open(record).exists):
                return
            if watch := await self._watcher.take(key):
                watch.close()
            self._pressure.drop(key)
            payload: dict[str, JSON] = {"oom_kills": record.oom_kills, "reason": "it was gone when it was looked for"}
            await self._rows.delete(key, payload)

        await self._change(key, forget())

    # Watching

    def watch(self, key: Key, watch: OomWatch) -> None:
        """Journal what befalls a cgroup that an earlier process made: OOM kills, pressure. Takes over the watch."""
        record = self.find(key)
        self._watcher.add(key, watch, look=watch.known > record.oom_kills)
        try:
            self._pressure.put(key, open_all(self.open(record), _triggers_of(record.resources)))
        except OSError as e:  # the kernel is another than it was, say
            log.warning("cgroup.pressure_not_watched", namespace=key.namespace, id=key.id, error=str(e))

    async def _note_oom(self, key: Key, kills: int) -> None:
        await self._rows.set_oom_kills(key, kills)

    async def _note_pressure(self, key: Key, trigger: PressureTrigger) -> None:
        await self._database.write(lambda transaction: store.pressed(transaction, key, trigger))

    async def close(self) -> None:
        """Finish what was begun, and stop watching."""
        await self._alone.finish()
        await self._watcher.close()
        await self._pressure.close()

    async def _run[**P, T](self, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Off the loop, what makes, changes or removes cgroups."""
        run = run_asking if self._driver.asks_systemd else run_blocking
        return await run(fn, *args, **kwargs)

    async def _run_soon[T](self, fn: Callable[..., T], *args: Any, here: bool) -> T:
        """The same, here if it may be: where nothing else changes, and it waits for nobody."""
        if here and not self._alone.has_others() and not self._driver.asks_systemd and self._prompt.is_given():
            with suppress(WouldWaitError):
                return self._prompt.run(partial(fn, *args, may_wait=False))
        return await self._run(fn, *args)

    async def _change[T](self, key: Key, change: Coroutine[Any, Any, T]) -> T:
        """Run a change alone on its cgroup, or on the one that is called so elsewhere."""
        return await self._alone.run(self._parent.place(key), change)


@lru_cache(maxsize=64)  # most containers have the same few
def _limits_at_creation(resources: bytes) -> Resources:
    limits = wire.resources(types_pb2.Resources.FromString(resources))
    return limits if limits.devices is not None else replace(limits, devices=DEFAULT_RULES)


def _checked(limits: Resources) -> Resources:
    """Limits for processes that run: less memory than they have is refused, whatever the kernel would do."""
    if limits.memory.limit_bytes is None:
        return limits
    return replace(limits, memory=replace(limits.memory, check_before_update=True))


def _watches(
    group: Cgroup, wanted: Sequence[PressureTrigger], oom_kills: int
) -> tuple[OomWatch, Sequence[PressureWatch]]:
    pressure = open_all(group, wanted)
    try:
        return group.watch_oom(oom_kills), pressure
    except BaseException:
        close_all(pressure)
        raise


@lru_cache(maxsize=64)
def _triggers_of(resources: bytes) -> tuple[PressureTrigger, ...]:
    return triggers(types_pb2.Resources.FromString(resources))


@lru_cache(maxsize=64)
def _check(resources: bytes) -> None:
    """Raises InvalidArgument for limits that no cgroup is made with."""
    check_pressure(types_pb2.Resources.FromString(resources))


def _same(known: Record, asked: Record) -> Record:
    """The known row, if it answers a request to make one. A restart asks with the limits that updates left."""
    if (known.path, known.labels) == (asked.path, asked.labels) and _limits_hold(known, asked.resources):
        return known
    raise AlreadyExists(
        f"cgroup {asked.key.id!r} exists and was made with other settings: update or delete it",
        reason="CGROUP_EXISTS",
        metadata={"id": asked.key.id},
    )


def _limits_hold(known: Record, asked: bytes) -> bool:
    if asked == known.first_resources:
        return True
    if known.resources == known.first_resources:
        return False
    now = types_pb2.Resources.FromString(known.resources)
    return after_change(now, types_pb2.Resources.FromString(asked)) == now
