"""What every operation of the engine works with: rows, leaves, locks, those who wait for an exit, background work."""

import asyncio
import os
import platform
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from corral.api.types.v1.types_pb2 import ExitStatus
from corral.engine import store
from corral.engine.config import EngineConfig
from corral.engine.leaves import Leaves
from corral.engine.records import ALIVE, ContainerRecord, Status
from corral.engine.seccomp import kernel_version
from corral.engine.spec import HostFacts
from corral.kernel import capabilities
from corral.rpc.context import current_namespace
from corral.rpc.errors import CorralError, FailedPrecondition
from corral.rpc.lasting import lasting
from corral.store import Database, Transaction, Trash

log = structlog.get_logger()

type Key = tuple[str, str]  # namespace, and id of a container or name of a volume


class Locks:
    """One lock per container, or volume, so that two calls never change the same one at once. Waiting for an exit takes
    none."""

    def __init__(self) -> None:
        self._held: dict[Key, tuple[asyncio.Lock, int]] = {}

    @asynccontextmanager
    async def of(self, key: Key) -> AsyncIterator[None]:
        """Hold its lock within a block."""
        lock, users = self._held.get(key, (None, 0))
        lock = lock or asyncio.Lock()
        self._held[key] = lock, users + 1
        try:
            async with lock:
                yield
        finally:
            lock, users = self._held[key]
            if users == 1:
                del self._held[key]
            else:
                self._held[key] = lock, users - 1

    @asynccontextmanager
    async def of_all(self, keys: Iterable[Key]) -> AsyncIterator[None]:
        """Hold the locks of all of them."""
        async with AsyncExitStack() as held:
            for key in sorted(set(keys)):  # each in the same order, so that no two wait for one another
                await held.enter_async_context(self.of(key))
            yield


class Watch:
    """Those who wait for a container to end or to be removed, told after the row says so."""

    def __init__(self) -> None:
        self._exits: dict[Key, list[asyncio.Future[ExitStatus]]] = {}
        self._removals: dict[Key, list[asyncio.Future[ExitStatus | None]]] = {}

    def next_exit(self, key: Key) -> asyncio.Future[ExitStatus]:
        """Resolved when the container ends the next time."""
        return _enlist(self._exits, key)

    def removal(self, key: Key) -> asyncio.Future[ExitStatus | None]:
        """Resolved when it is gone, with how it ended if it ever ran."""
        return _enlist(self._removals, key)

    def tell_exit(self, key: Key, status: ExitStatus) -> None:
        _resolve(self._exits, key, status)

    def tell_removal(self, key: Key, status: ExitStatus | None) -> None:
        _resolve(self._removals, key, status)
        for future in self._exits.pop(key, ()):
            future.cancel()


def _enlist[T](waiting: dict[Key, list[asyncio.Future[T]]], key: Key) -> asyncio.Future[T]:
    future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
    waiting.setdefault(key, []).append(future)

    def leave(future: asyncio.Future[T]) -> None:
        others = waiting.get(key, [])
        with suppress(ValueError):
            others.remove(future)
        if not others:
            waiting.pop(key, None)

    future.add_done_callback(leave)
    return future


def _resolve[T](waiting: dict[Key, list[asyncio.Future[T]]], key: Key, value: T) -> None:
    for future in waiting.pop(key, ()):
        if not future.done():
            future.set_result(value)


class Background:
    """Tasks that live on when the call that began them is cancelled."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._endless: set[asyncio.Task[Any]] = set()

    async def to_the_end[T](self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work`; if the caller is cancelled it still runs to its end: half of a change must never be left."""
        return await lasting(work, self.spawn)

    def spawn[T](self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Begin `work`, which changes something and ends soon. It runs at once, as far as it can."""
        return self._begin(asyncio.Task(work, loop=asyncio.get_running_loop(), eager_start=True), self._tasks)

    def spawn_endless[T](self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Begin `work`, which tries until it succeeds and may be interrupted at any time."""
        return self._begin(asyncio.get_running_loop().create_task(work), self._endless)

    def _begin[T](self, task: asyncio.Task[T], kept_in: set[asyncio.Task[Any]]) -> asyncio.Task[T]:
        kept_in.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        endless = task in self._endless
        self._tasks.discard(task)
        self._endless.discard(task)
        if task.cancelled():
            return
        error = task.exception()  # a cancelled caller cannot take it; asyncio would complain
        if endless and not isinstance(error, CorralError | None):
            log.error("engine.background_failed", exc_info=error)  # nobody awaits it

    async def stop(self, grace_s: float) -> None:
        """Let what changes something finish, then cancel the rest."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=grace_s)
        left = self._tasks | self._endless
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)


async def all_ended(*steps: Coroutine[Any, Any, Any] | asyncio.Task[Any]) -> list[Any]:
    """What every step returns; each begins at once, in this order. Raises the first error, after all have ended: an
    undo must not overtake one."""
    loop = asyncio.get_running_loop()
    begun = [
        step if isinstance(step, asyncio.Task) else asyncio.Task(step, loop=loop, eager_start=True) for step in steps
    ]
    if not all(task.done() for task in begun):
        await asyncio.gather(*begun, return_exceptions=True)
    for error in [asyncio.CancelledError() if task.cancelled() else task.exception() for task in begun]:
        if error is not None:
            raise error
    return [task.result() for task in begun]


@dataclass(slots=True)
class Core:
    """See the module."""

    config: EngineConfig
    database: Database
    leaves: Leaves
    host: HostFacts
    trash: Trash
    locks: Locks = field(default_factory=Locks)
    # Held while a volume's directory is made or removed; a volume of that name may be made in between by its row.
    volume_locks: Locks = field(default_factory=Locks)
    watch: Watch = field(default_factory=Watch)
    background: Background = field(default_factory=Background)
    # Containers that are being made now: recovery must leave them alone.
    being_made: set[Key] = field(default_factory=set)
    # Those that a restart ends: they do not remove themselves then.
    restarting: set[Key] = field(default_factory=set)
    # Those that a user has stopped, which is not written yet: no policy starts them again.
    unwritten_stops: set[Key] = field(default_factory=set)
    # Those that wait to be started again by their policy; cancelling ends the wait.
    backoffs: dict[Key, asyncio.Task[Any]] = field(default_factory=dict)
    # Those that are started again by it now.
    rerunning: set[Key] = field(default_factory=set)
    # Ports of ended ones that are being withdrawn, for whoever stops them.
    freeing: dict[Key, asyncio.Task[None]] = field(default_factory=dict)
    # Streams of output that are being passed on, by container.
    attached: dict[Key, set[asyncio.Task[Any]]] = field(default_factory=dict)
    # What a next program would find to be done as well is not begun any more.
    is_stopping: bool = False
    # Called with a record after its exit was written. Set once, by whoever acts on exits.
    on_exit: Callable[[ContainerRecord], None] = lambda _: None
    # Called with the record of one that has ended and, against expectation, is not to run again.
    on_stays_ended: Callable[[ContainerRecord], None] = lambda _: None
    # Called with the record of a container that was just started.
    on_start: Callable[[ContainerRecord], None] = lambda _: None
    # Called with the key of one that is paused now, under its lock.
    on_pause: Callable[[Key], None] = lambda _: None
    # As on_start, for one of whose start nobody knew.
    on_found_running: Callable[[ContainerRecord], None] = lambda _: None
    # Called with the record of one that was made again by its policy, and then not started: somebody died.
    # The flag: whether the daemon has just started.
    on_cut_short: Callable[[ContainerRecord, bool], None] = lambda _record, _at_boot: None
    # As on_exit, for one that the daemon finds ended when it starts.
    on_found_ended: Callable[[ContainerRecord], None] = lambda _: None

    def resolve(self, reference: str) -> ContainerRecord:
        """The container that a call in its namespace means. Raises NotFound, FailedPrecondition if ambiguous."""
        namespace = current_namespace()
        found = self._recall(namespace, reference)
        return found or self.database.read_sync(lambda view: store.resolve(view, namespace, reference))

    def get(self, namespace: str, id_: str) -> ContainerRecord:
        """The container with this id. Raises NotFound."""
        found = self._recall(namespace, id_)
        return (
            found
            if found is not None and found.id == id_
            else self.database.read_sync(lambda view: store.get(view, namespace, id_))
        )

    def _recall(self, namespace: str, reference: str) -> ContainerRecord | None:
        """By its id or name. A call asks more than once: who it means, and under its lock how it is now."""
        return self.database.recall((namespace, reference), lambda view: store.named(view, namespace, reference))

    def volume_root(self, namespace: str) -> Path:
        """Where the volumes of a namespace are."""
        return self.config.root / "volumes" / namespace

    def container_directory(self, record: ContainerRecord) -> str:
        """Where the container's log is, whatever becomes of its tasks."""
        return f"{self.config.root}/containers/{record.namespace}/{record.id}"

    def make_container_directory(self, record: ContainerRecord) -> str:
        """The same, made where it is missing. No thread: it waits for the disk as little as an ordinary row does."""
        directory = self.container_directory(record)
        try:
            os.mkdir(directory, 0o700)  # noqa: PTH102 - in the path of every creation
        except FileExistsError:
            pass
        except FileNotFoundError:
            Path(directory).mkdir(mode=0o700, parents=True, exist_ok=True)
        return directory

    async def record_exit(
        self, record: ContainerRecord, status: ExitStatus, *, started: bool = True
    ) -> ContainerRecord:
        """Write down how the run that `record` describes ended, unless that is known already; returns what is known."""
        ended = await self.database.write(
            lambda tx: apply_exit(tx, record.namespace, record.id, status, pid=record.pid, started=started)
        )
        if ended is None:
            return self.get(record.namespace, record.id)
        self.tell_exit(ended)
        return ended

    async def record_lost(self, record: ContainerRecord, reason: str) -> ContainerRecord:
        """Write down that its task is gone: so is how it ended; or it never ran, and the next start makes a task."""
        if await self.database.write(lambda tx: store.take_back_start(tx, record.namespace, record.id)):
            return self.get(record.namespace, record.id)
        return await self.record_exit(record, lost_exit(reason))

    def is_restarting(self, record: ContainerRecord) -> bool:
        """Whether it has ended, and its policy starts it again: after a pause, or just now."""
        key = (record.namespace, record.id)
        return record.status not in ALIVE and (key in self.backoffs or key in self.rerunning)

    def forget_backoff(self, key: Key) -> None:
        """Do not start it again after all, if that is what it waits for."""
        if (waiting := self.backoffs.pop(key, None)) is not None:
            waiting.cancel()

    def tell_exit(self, record: ContainerRecord) -> None:
        """After an exit was committed: wake those who wait, act on it."""
        assert record.exit is not None
        self.watch.tell_exit((record.namespace, record.id), record.exit)
        self.on_exit(record)


def lost_exit(reason: str) -> ExitStatus:
    """Nobody saw how it ended; 255 by convention."""
    status = ExitStatus(code=255, known=False, reason=reason)
    status.exited_at.GetCurrentTime()
    return status


def apply_exit(
    tx: Transaction, namespace: str, id_: str, status: ExitStatus, *, pid: int, started: bool = True
) -> ContainerRecord | None:
    """The container's init `pid` ended. None if that is no news: it is gone, has ended, or runs anew since.

    started=False: it never ran, so nobody is told that it did.
    """
    record = store.find(tx, namespace, id_)
    if record is None or record.status not in ALIVE | {Status.CREATED}:
        return None
    if pid and record.pid and pid != record.pid:  # the exit of an earlier run
        return None
    if record.status is not Status.CREATED and started:
        store.announce_started(tx, record)
    ended = record.with_exit(status)
    store.save_exit(tx, ended)
    return ended


def require_alive(record: ContainerRecord, doing: str) -> None:
    """Raises FailedPrecondition unless the container runs or is paused."""
    if record.status not in ALIVE:
        raise FailedPrecondition(
            f"container {record.name} is not running ({record.status.word}): it cannot be {doing}",
            reason="NOT_RUNNING",
            metadata={"container": record.id, "status": record.status.word},
        )


def host_facts() -> HostFacts:
    """This host and this process, as specs depend on them."""
    return HostFacts(
        hostname=socket.gethostname(),
        machine=platform.machine(),
        kernel=kernel_version(platform.release()),
        capabilities=frozenset(capabilities.names_of(capabilities.permitted())),
    )
