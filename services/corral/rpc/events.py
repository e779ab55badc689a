"""The RPC `Events` that every service has: its journal on the wire."""

from collections.abc import AsyncIterator, Callable, Sequence

from google.protobuf.timestamp_pb2 import Timestamp

from corral.api.types.v1 import types_pb2
from corral.rpc.context import current_namespace, only_follows
from corral.store import Event, Journal

NS_PER_S = 1_000_000_000


async def stream_events(
    journal: Journal,
    request: types_pb2.EventsRequest,
    *,
    to_wire: "Callable[[Event], types_pb2.Event] | None" = None,
) -> AsyncIterator[types_pb2.EventsResponse]:
    """Answer an EventsRequest, in the namespace of the caller, as its fields promise.

    `until` ends the stream at the first later event, or when that moment has passed if nothing happens.
    """
    only_follows()
    to_wire = to_wire or event_to_wire
    namespace = None if request.all_namespaces else current_namespace()
    since_ns = nanoseconds(request.since) if request.HasField("since") else 0
    until_ns = nanoseconds(request.until) if request.HasField("until") else None
    events = journal.follow(request.after, namespace=namespace, until_now=request.no_follow, deadline_ns=until_ns)
    wanted = Filter(request.topics, request.subjects, since_ns)
    async for event in events:
        if event.is_gap:
            yield types_pb2.EventsResponse(gap=types_pb2.Gap(resumes_at=event.seq + 1))
        elif until_ns is not None and event.time_ns > until_ns:
            return
        elif wanted.has(event):
            yield types_pb2.EventsResponse(event=to_wire(event))


class Filter:
    """Which events a client asked for."""

    def __init__(self, topics: Sequence[str], subjects: Sequence[str], since_ns: int) -> None:
        self._exact = frozenset(topic for topic in topics if not topic.endswith("*"))
        self._prefixes = tuple(topic[:-1] for topic in topics if topic.endswith("*"))
        self._subjects = frozenset(subjects)
        self._since_ns = since_ns

    def has(self, event: Event) -> bool:
        if event.time_ns < self._since_ns or (self._subjects and event.subject not in self._subjects):
            return False
        any_topic = not self._exact and not self._prefixes
        return any_topic or event.topic in self._exact or event.topic.startswith(self._prefixes)


def event_to_wire(event: Event) -> types_pb2.Event:
    """The message for one event; `origin` stays empty."""
    message = types_pb2.Event(
        seq=event.seq,
        time=timestamp(event.time_ns),
        namespace=event.namespace,
        topic=event.topic,
        subject=event.subject,
    )
    message.payload.update(dict(event.payload))
    return message


def timestamp(time_ns: int) -> Timestamp:
    """Nanoseconds since the epoch as a message."""
    seconds, nanos = divmod(time_ns, NS_PER_S)
    return Timestamp(seconds=seconds, nanos=nanos)


def nanoseconds(message: Timestamp) -> int:
    """A message as nanoseconds since the epoch."""
    return message.seconds * NS_PER_S + message.nanos
