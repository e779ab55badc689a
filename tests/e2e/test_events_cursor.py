"""A consumer of the merged journal that keeps only the number of the last event it has dealt with."""

import contextlib
import json
import os
import random
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest
from support.corrald import CORRAL, PATIENCE, Corrald
from support.requirements import needs

from corral.rpc.errors import CorralError

pytestmark = needs("root", "overlayfs", "netns", "busybox")

KILLS = 4


class Consumer:
    """`corral events --after CURSOR --format json`, started anew from its cursor whenever it ends."""

    def __init__(self, daemon: Corrald) -> None:
        self.daemon = daemon
        self.cursor = 0
        self.events: list[dict[str, object]] = []

    def read(self, *options: str) -> None:
        """Until the command ends, be it because the daemon was killed."""
        command = [str(CORRAL), "events", "--after", str(self.cursor), "--format", "json", *options]
        environment = os.environ | {"CORRAL_ADDRESS": self.daemon.address}
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as events:
            assert events.stdout is not None
            for line in events.stdout:
                event = json.loads(line)
                self.events.append(event)
                self.cursor = int(event["seq"])


@pytest.fixture
def daemon(busybox_archive: os.PathLike[str]) -> Iterator[Corrald]:
    with Corrald() as daemon:
        daemon.start()
        daemon.corral("image", "import", str(busybox_archive), check=True)
        yield daemon


def live(daemon: Corrald, one_has_ended: threading.Event) -> None:
    """Containers come and go, until the daemon is killed over it."""
    with contextlib.suppress(CorralError), daemon.client() as client:
        while True:
            made = client.containers.run("busybox", ["true"])
            client.containers.wait(made.id)
            one_has_ended.set()
            client.containers.remove(made.id, force=True)


def test_none_is_missed_and_none_comes_twice_over_kills_of_the_daemon(daemon: Corrald) -> None:
    rng = random.Random(5)
    consumer = Consumer(daemon)
    for _ in range(KILLS):
        one_has_ended = threading.Event()
        threads = [threading.Thread(target=live, args=(daemon, one_has_ended)), threading.Thread(target=consumer.read)]
        for thread in threads:
            thread.start()
        assert one_has_ended.wait(60 * PATIENCE)
        time.sleep(rng.uniform(0.0, 1.0))
        daemon.kill9()
        daemon.processes.clear()
        for thread in threads:
            thread.join(60 * PATIENCE)
        daemon.start()
    daemon.corral("run", "--name", "last", "busybox", "true", check=True)
    time.sleep(0.5)
    consumer.read("--no-follow")
    everything = Consumer(daemon)
    everything.read("--no-follow")
    assert [event["seq"] for event in consumer.events] == list(range(1, len(consumer.events) + 1))
    assert consumer.events == everything.events
    sources = [(e["origin"], e["origin_seq"]) for e in consumer.events if e.get("origin")]
    assert len(sources) == len(set(sources))
    for subject in {e["subject"] for e in consumer.events if e["topic"] == "container.created"}:
        told = [str(e["topic"]) for e in consumer.events if e["subject"] == subject]
        life = [topic for topic in told if topic.startswith("container.")]
        assert life == sorted(life, key=_rank)
        assert len(life) == len(set(life)), told
    assert len({e["subject"] for e in consumer.events if e["topic"] == "container.died"}) >= KILLS


def _rank(topic: str) -> int:
    return ["created", "started", "died", "removed"].index(topic.partition(".")[2])
