"""The merged journal: what the leaves journalled, appended to the engine's own, each event exactly once and in order.

Every leaf's journal is followed from the number that was merged last. That number is written in the transaction that
appends the event, so neither a crash here nor one of the leaf loses or repeats one. An event that tells of a start or
an end is acted on in the same transaction: the container's row and `container.died` follow from it.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import structlog
from google.protobuf.struct_pb2 import Struct, Value

from corral.api.types.v1.types_pb2 import Event, EventsRequest, EventsResponse, ExitStatus
from corral.engine import store
from corral.engine.core import Core, apply_exit
from corral.engine.records import ContainerRecord, from_ns, to_ns
from corral.rpc.errors import CorralError
from corral.rpc.events import write_event
from corral.store import GAP_TOPIC, JSON, Transaction, failpoint, to_text
from corral.store import Event as Row

log = structlog.get_logger()

# In the payload of a merged event: where it comes from. No leaf's facts have such a name.
ORIGIN = "@origin"
# Messages, of one or a few events each, in a transaction on the loop.
MAX_BATCH = 32
# A message waits this long for those of other leaves, to share its transaction: a container's life makes a dozen events
# within some 20 ms, for as long as which each leaf's journal gathers them. Whoever waits for an exit is told by tasks
# itself, not from here.
BATCH_S = 0.005
RETRY_FIRST_S, RETRY_MOST_S = 0.05, 1.0


@dataclass(frozen=True, slots=True)
class Arrived:
    """A message of a leaf's journal."""

    origin: str
    response: EventsResponse


class Merger:
    """Follows every leaf. on_reconnect is called with a leaf's name after it was away, and when its journal had a gap:
    what events would have told must then be asked for."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self.on_reconnect: Callable[[str], Awaitable[None]] | None = None
        self._queue: asyncio.Queue[Arrived] = asyncio.Queue(maxsize=4 * MAX_BATCH)
        leaves = core.leaves
        self._sources: Mapping[str, Any] = {
            "images": leaves.images,
            "tasks": leaves.tasks,
            "network": leaves.networks,
            "cgroups": leaves.cgroups,
        }
        self._running: list[asyncio.Task[None]] = []
        self._unreconciled: dict[str, bool] = {}
        """Leaves that are being asked; True if they have to be, perhaps once more: something was lost since."""

    async def catch_up(self, origin: str) -> None:
        """Merge what this leaf has journalled until now. Raises CorralError if it does not answer."""
        batch: list[Arrived] = []
        async for response in self._sources[origin].Events(self._request(origin, no_follow=True)):
            batch.append(Arrived(origin, response))
            if len(batch) == MAX_BATCH:
                await self._merge(batch)
                batch = []
        if batch:
            await self._merge(batch)

    def start(self) -> None:
        """Follow from now on, in the background."""
        self._running = [asyncio.ensure_future(self._follow(origin)) for origin in self._sources]
        self._running.append(asyncio.ensure_future(self._write()))

    async def stop(self) -> None:
        """What has not been merged yet is merged after the next start."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    def _request(self, origin: str, *, no_follow: bool = False) -> EventsRequest:
        after = self._core.database.glance(lambda view: store.cursor(view, origin)).seq
        return EventsRequest(after=after, all_namespaces=True, no_follow=no_follow, payload_as_json=True)

    async def _follow(self, origin: str) -> None:
        delay_s = RETRY_FIRST_S
        lost = False
        while True:
            try:
                if lost:
                    await self.catch_up(origin)
                    self._reconcile(origin)
                    lost = False
                async for response in self._sources[origin].Events(self._request(origin)):
                    delay_s = RETRY_FIRST_S
                    await self._queue.put(Arrived(origin, response))
            except (CorralError, OSError) as e:
                log.debug("journal.lost", origin=origin, error=str(e), next_s=delay_s)
                lost = True
            # What is queued still must be written before the cursor says where to go on.
            await self._queue.join()
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, RETRY_MOST_S)

    async def _write(self) -> None:
        while True:
            batch = [await self._queue.get()]
            await asyncio.sleep(BATCH_S)
            while len(batch) < MAX_BATCH and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            await self._merge_at_last(batch)
            for _ in batch:
                self._queue.task_done()

    async def _merge_at_last(self, batch: Sequence[Arrived]) -> None:
        """Nothing that follows may be merged before it: the cursor would then pass over what it holds."""
        while True:
            try:
                return await self._merge(batch)
            except OSError as e:  # a full disk, say
                log.error("journal.merge_failed", error=str(e), next_s=RETRY_MOST_S)
                await asyncio.sleep(RETRY_MOST_S)

    async def _merge(self, batch: Sequence[Arrived]) -> None:
        failpoint("engine.merge.before_write")
        ended, gaps = await self._core.database.write(lambda tx: append(tx, batch))
        failpoint("engine.merge.after_write")
        for record in ended:
            self._core.tell_exit(record)
        for origin in gaps:
            self._reconcile(origin)

    def _reconcile(self, origin: str) -> None:
        if self.on_reconnect is None:
            return
        begun = origin in self._unreconciled
        self._unreconciled[origin] = True
        if not begun:
            self._core.background.spawn_endless(self._until_reconciled(origin, self.on_reconnect))

    async def _until_reconciled(self, origin: str, act: Callable[[str], Awaitable[None]]) -> None:
        delay_s = RETRY_FIRST_S
        while self._unreconciled[origin]:
            self._unreconciled[origin] = False
            try:
                await act(origin)
            except (CorralError, OSError) as e:  # the leaf is away again, or a disk is full
                log.info("journal.not_reconciled", origin=origin, error=str(e), next_s=delay_s)
                self._unreconciled[origin] = True
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, RETRY_MOST_S)
        del self._unreconciled[origin]


def append(tx: Transaction, batch: Sequence[Arrived]) -> tuple[list[ContainerRecord], set[str]]:
    """Append a batch; returns the containers that ended, and the leaves of which events are lost."""
    known = store.cursors(tx)
    moved: dict[str, store.Cursor] = {}
    ended, gaps = [], set()
    for arrived in batch:
        origin, response = arrived.origin, arrived.response
        at = moved.get(origin) or known.get(origin, store.Cursor())
        if response.HasField("gap"):
            gaps.add(origin)
            at = _over_gap(at, int(response.gap.resumes_at))
            tx.journal(GAP_TOPIC, origin, {"origin": origin, "resumes_at": response.gap.resumes_at}, namespace="")
        for event in response.events:
            if event.seq <= at.seq:  # followed anew, and it was merged meanwhile
                continue
            time_ns = to_ns(event.time)
            at = store.Cursor(event.seq, time_ns, at.known_until_ns)
            if time_ns <= at.known_until_ns:
                continue
            text = _with_origin(payload_text(event), origin, event.seq, time_ns)
            tx.journal(event.topic, event.subject, text, namespace=event.namespace)
            if origin == "tasks" and (record := _act(tx, event)) is not None:
                ended.append(record)
        moved[origin] = at
    if moved:
        store.save_cursors(tx, moved)
    return ended, gaps


def _over_gap(at: store.Cursor, resumes_at: int) -> store.Cursor:
    """Where to go on. A journal that begins anew lost its newest rows to a power loss, or was replaced: either way all
    that it has from before its last merged event is known."""
    known_until_ns = at.time_ns if resumes_at <= at.seq else at.known_until_ns
    return at._replace(seq=resumes_at - 1, known_until_ns=known_until_ns)


def payload_text(event: Event) -> str:
    """The facts that an event tells, as JSON; a leaf that does not know that it was asked for that tells a Struct."""
    return event.payload_json or to_text(struct_to_json(event.payload))


def _with_origin(text: str, origin: str, seq: int, time_ns: int) -> str:
    source = f'{{"{ORIGIN}":["{origin}",{seq},{time_ns}]'
    return f"{source}}}" if text == "{}" else f"{source},{text[1:]}"


def _act(tx: Transaction, event: Event) -> ContainerRecord | None:
    """What an event of tasks means for a container; its record if it ended thereby."""
    if event.topic == "task.started":
        record = store.find(tx, event.namespace, event.subject)
        if record is not None and record.pid == json.loads(payload_text(event)).get("pid"):
            store.announce_started(tx, record)
    elif event.topic == "task.exited":
        payload = json.loads(payload_text(event))
        pid = payload.get("pid")
        return apply_exit(
            tx, event.namespace, event.subject, exit_from_event(event, payload), pid=pid if isinstance(pid, int) else 0
        )
    return None


def exit_from_event(event: Event, payload: Mapping[str, JSON]) -> ExitStatus:
    """The exit that `task.exited` tells of."""
    known = payload.get("known", True)
    exited_ns = payload.get("exited_at_ns")
    return ExitStatus(
        code=_number(payload, "code"),
        signal=_number(payload, "signal"),
        oom_killed=bool(payload.get("oom")),
        exited_at=from_ns(exited_ns) if isinstance(exited_ns, int) else event.time,
        reason=str(payload.get("reason") or ""),
        known=bool(known),
        timed_out=bool(payload.get("timed_out")),
    )


def _number(payload: Mapping[str, JSON], key: str) -> int:
    value = payload.get(key)
    return value if isinstance(value, int) else 0


def struct_to_json(struct: Struct) -> dict[str, JSON]:
    """A Struct's values; numbers that are whole become int again."""
    return {key: _value_to_json(value) for key, value in struct.fields.items()}


def _value_to_json(value: Value) -> JSON:
    match value.WhichOneof("kind"):
        case "number_value":
            number = value.number_value
            return int(number) if number.is_integer() else number
        case "string_value":
            return value.string_value
        case "bool_value":
            return value.bool_value
        case "struct_value":
            return struct_to_json(value.struct_value)
        case "list_value":
            return [_value_to_json(item) for item in value.list_value.values]
        case _:
            return None


def write_merged_event(message: Event, row: Row) -> None:
    """A row of the engine's journal as clients see it: a merged one with its origin and its own time."""
    facts = row.payload
    source = facts.get(ORIGIN)
    if not isinstance(source, list):
        write_event(message, row)
        return
    message.origin, message.origin_seq, time_ns = source
    payload = {key: value for key, value in facts.items() if key != ORIGIN}
    write_event(message, Row(row.seq, time_ns, row.namespace, row.topic, row.subject, to_text(payload)))
