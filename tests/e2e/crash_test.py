"""`make crash-test`: kill -9 of corrald at random moments while containers are created, run and deleted in a loop.

    CORRAL_KILLS (200)  how often     CORRAL_SEED  to repeat a run     CORRAL_SPLIT=1  five processes, one is killed

Twenty workers each create a container, start it, wait for its exit code, which is known beforehand, and delete it. A
call that a kill broke is repeated until the daemon is back. A container whose exit code is not the one asked for is
"lost"; so is one that vanished before it was deleted. What is there after all are deleted is "leaked".
"""

import contextlib
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.corrald import SERVICES, Corrald, running
from support.images import write_busybox
from support.sweep import forgotten

from corral.client.sync import Client
from corral.rpc.errors import AlreadyExists, CorralError, NotFound, Unavailable

WORKERS = 20
KILLS = int(os.environ.get("CORRAL_KILLS", "200"))
SEED = int(os.environ.get("CORRAL_SEED", str(random.SystemRandom().randrange(1 << 32))))
SPLIT = os.environ.get("CORRAL_SPLIT", "") not in ("", "0")
# A worker that makes no step for this long is stuck.
STUCK_S = 120


@dataclass(slots=True)
class Tally:
    """What the workers saw, counted under one lock."""

    ran: int = 0
    broken_calls: int = 0
    lost: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def finished(self) -> None:
        with self._lock:
            self.ran += 1

    def broke(self) -> None:
        with self._lock:
            self.broken_calls += 1

    def lose(self, what: str) -> None:
        print(f"LOST {what}", flush=True)
        with self._lock:
            self.lost.append(what)


class Worker(threading.Thread):
    """Creates, runs and deletes containers until told to stop."""

    def __init__(self, number: int, daemon: Corrald, tally: Tally, stop: threading.Event) -> None:
        super().__init__(name=f"worker-{number}", daemon=True)
        self.number = number
        self.client: Client = daemon.client()
        self.tally = tally
        self.stop = stop
        self.random = random.Random(SEED + number)
        self.doing = "nothing yet"
        self.since = time.monotonic()

    def run(self) -> None:
        round_number = 0
        while not self.stop.is_set():
            round_number += 1
            try:
                self.one_container(f"w{self.number}-{round_number}")
            except CorralError as e:
                self.tally.lose(f"w{self.number}-{round_number}: {type(e).__name__}: {e} while {self.doing}")

    def one_container(self, name: str) -> None:
        code = self.random.randrange(256)
        nap = self.random.choice(["", "", "sleep 0.05; ", "sleep 0.3; "])
        network = "none" if self.number % 2 else "bridge"
        self.create(name, ["sh", "-c", f"{nap}exit {code}"], network)
        self.persist("start", name, lambda: self.client.containers.start(name))
        status = self.persist("wait", name, lambda: self.client.containers.wait(name))
        if not status.known or status.code != code:
            self.tally.lose(
                f"{name}: exit code {code} came out as {status.code} (known={status.known}: {status.reason})"
            )
        with contextlib.suppress(NotFound):  # a repeated delete whose first call succeeded
            self.persist("delete", name, lambda: self.client.containers.remove(name, force=True))
        self.tally.finished()

    def create(self, name: str, args: list[str], network: str) -> None:
        """A create that a kill broke is either done or undone: "taken" by ourselves is done."""
        try:
            self.persist(
                "create", name, lambda: self.client.containers.create("busybox", args, name=name, network=network)
            )
        except AlreadyExists:
            self.persist("get", name, lambda: self.client.containers.get(name))

    def persist[T](self, verb: str, name: str, call: Callable[[], T]) -> T:
        """Repeats a call until an answer comes that no kill broke."""
        self.doing, self.since = f"{verb} {name}", time.monotonic()
        while True:
            try:
                return call()
            except Unavailable:
                self.tally.broke()
                if time.monotonic() - self.since > STUCK_S:
                    raise
                time.sleep(0.05)


def kill_at_random(daemon: Corrald, workers: list[Worker]) -> None:
    """The kills, each followed by a restart."""
    chance = random.Random(SEED)
    for number in range(1, KILLS + 1):
        time.sleep(chance.uniform(0, 1.5) if chance.random() < 0.8 else chance.uniform(0, 0.05))
        victim = chance.choice(SERVICES) if SPLIT else "corrald"
        daemon.kill9(victim)
        daemon.start()
        if number % 20 == 0:
            slow = max(workers, key=lambda w: time.monotonic() - w.since)
            print(f"{number} kills, {workers[0].tally.ran} containers; slowest: {slow.doing}", flush=True)
        for worker in workers:
            if not worker.is_alive() or time.monotonic() - worker.since > STUCK_S:
                raise SystemExit(f"{worker.name} is stuck while {worker.doing}\n{daemon.log(victim)}")


def main() -> None:
    print(f"crash test: {KILLS} kills, {WORKERS} workers, seed {SEED}{', five processes' if SPLIT else ''}", flush=True)
    with tempfile.TemporaryDirectory(prefix="corral-crash-") as scratch, running(split=SPLIT) as daemon:
        archive = write_busybox(Path(scratch) / "busybox.tar")
        with daemon.client() as client:
            client.images.load(archive, name="busybox")
        tally, stop = Tally(), threading.Event()
        workers = [Worker(n, daemon, tally, stop) for n in range(WORKERS)]
        for worker in workers:
            worker.start()
        kill_at_random(daemon, workers)
        stop.set()
        for worker in workers:
            worker.join(STUCK_S)
        time.sleep(2)  # what is removed in the background
        leaked = forgotten(daemon)
    for leak in leaked:
        print(f"LEAKED {leak}")
    print(f"{tally.ran} containers, {tally.broken_calls} calls broken and repeated")
    print(f"{KILLS} kills, {len(tally.lost)} lost, {len(leaked)} leaked")
    raise SystemExit(1 if tally.lost or leaked else 0)


if __name__ == "__main__":
    main()
