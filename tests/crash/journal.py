"""Whether the engine's journal tells of every container's life once, and has every leaf's events without a hole."""

from collections import Counter

from corral.api.types.v1 import types_pb2
from corral.client.sync import Client

TOPICS = ("container.created", "container.started", "container.died", "container.removed")
LEAVES = ("tasks", "images", "network", "cgroups")


def mistold(client: Client) -> list[str]:
    """Each container was created and removed once, and died if it was started."""
    request = types_pb2.EventsRequest(no_follow=True, all_namespaces=True)
    events = [event for answer in client.system.events(request) for event in answer.events]
    told = Counter((event.subject, event.topic) for event in events if event.topic in TOPICS and not event.origin)
    wrong = []
    for subject in sorted({subject for subject, _ in told}):
        created, started, died, removed = (told[subject, topic] for topic in TOPICS)
        if created != 1 or removed != 1 or started > 1 or died != started:
            wrong.append(f"{subject}: created {created}, started {started}, died {died}, removed {removed} times")
    for origin in LEAVES:
        numbers = [event.origin_seq for event in events if event.origin == origin]
        if numbers and numbers != list(range(numbers[0], numbers[0] + len(numbers))):
            wrong.append(f"the journal of {origin}, merged, has holes or doubles")
    return wrong
