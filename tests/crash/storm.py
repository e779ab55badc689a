"""Kills at random, of anything of ours, while workers make, use and delete containers."""

import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from support.corrald import SERVICES, Corrald
from support.sweep import forgotten

from crash import victims
from crash.excuses import Excuses
from crash.journal import mistold
from crash.load import LOAD, Lives
from crash.tally import Fault, Tally
from crash.worker import STUCK_S, Worker

WORKERS = 20
SETTLED_S = 20.0
REPORT_EVERY = 50
# Where a shim kills itself, at the N-th time, when a daemon was started with that armed.
SHIM_POINTS = (
    "shim.exit.seen",
    "shim.exit.before_rename",
    "shim.exit.after_rename",
    "shim.exit.before_event",
    "shim.exit.after_event",
    "shim.end.after_hang_up",
    "shim.exec_exit.before_rename",
    "shim.exec_exit.after_rename",
    "shim.log.taken",
    "shim.log.emptied",
    "shim.log.written",
    "shim.exec.before_start",
    "shim.exec.after_clone",
)
ARM = 0.15


class StuckError(Exception):
    """A worker makes no step any more."""


@dataclass
class Storm:
    """Kills, and the workers that they hit. kinds: chances of each kind of kill."""

    daemon: Corrald
    kills: int
    seed: int
    kinds: dict[str, float]
    load: Sequence[type[Worker]] = LOAD
    arm: float = ARM
    """The chance that a daemon is started so that shims kill themselves, too."""
    points: Sequence[str] = SHIM_POINTS
    stop_at_fault: bool = False
    tally: Tally = field(default_factory=Tally)
    excuses: Excuses = field(default_factory=Excuses)
    _zygotes: dict[str, victims.Victim] = field(default_factory=dict)
    _start_took_s: float = 0.0
    """On a busy machine kills come more slowly, so that something is done between them."""

    def run(self) -> list[str]:
        """Returns what is left when all is deleted. Raises StuckError."""
        import threading

        self._chance = random.Random(self.seed)
        stop = threading.Event()
        workers = [
            kind(number, self.daemon, self.tally, self.excuses, stop, seed=self.seed)
            for number, kind in enumerate(self.load)
        ]
        for worker in workers:
            worker.start()
        try:
            self._kill_at_random(workers)
        finally:
            stop.set()
        self._settle(workers)
        if self.stop_at_fault and not self.tally.is_clean:
            return []
        with self.daemon.client() as client:
            for wrong in self._within(lambda: mistold(client)):
                self.tally.blame(Fault.MISTOLD, wrong)
        return self._within(lambda: forgotten(self.daemon))

    def _settle(self, workers: Sequence[Worker]) -> None:
        self._note_unattended()
        self.daemon.kill9()
        self.daemon.start()  # nothing armed any more
        deadline = time.monotonic() + STUCK_S
        for worker in workers:
            worker.join(max(0.0, deadline - time.monotonic()))
            if worker.is_alive():
                raise StuckError(f"{worker.name} is stuck while {worker.doing}")

    def _within(self, look: Callable[[], list[str]]) -> list[str]:
        """What is still so after a while, in which removals and merges of journals come to their ends."""
        deadline = time.monotonic() + SETTLED_S
        while (found := look()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return found

    def _kill_at_random(self, workers: Sequence[Worker]) -> None:
        done = 0
        while done < self.kills and not (self.stop_at_fault and not self.tally.is_clean):
            kind = self._chance.choices(list(self.kinds), list(self.kinds.values()))[0]
            pause_s = 0.6 if kind in ("shim", "zygote") else max(1.2, 2 * self._start_took_s)
            time.sleep(self._chance.uniform(0, pause_s if self._chance.random() < 0.8 else 0.05))
            killed = self._kill(kind)
            done += killed > 0
            self.tally.add(f"kills: {kind}", killed > 0)
            if killed and done % REPORT_EVERY == 0:
                slow = max(workers, key=lambda w: time.monotonic() - w.since)
                print(f"{done} kills; {self.tally.counts['containers']} containers; slowest: {slow.doing}", flush=True)
            for worker in workers:
                if worker.is_stuck:
                    raise StuckError(f"{worker.name} is stuck while {worker.doing}")

    def _kill(self, kind: str) -> int:
        """One kill of a kind, and a start of what is to be started; how many processes it hit."""
        self._note_zygotes()
        match kind:
            case "shim":
                return self._kill_shims(1)
            case "zygote":
                return self._kill_zygote()
            case "everything":
                return self._kill_everything()
            case _:
                names = [self._chance.choice(SERVICES)] if kind == "service" else list(self.daemon.processes)
                if not {"tasks", "corrald"}.isdisjoint(names):
                    self._note_unattended()
                self.tally.note(f"killing {', '.join(names)}")
                self.daemon.kill9(*names)
                self._start()
                return len(names)

    def _kill_shims(self, number: int) -> int:
        chosen = self._some_shims(number)
        for shim in chosen:
            self.excuses.shim_killed(shim.container)
        self.tally.note(f"killing the shims of {', '.join(shim.container for shim in chosen)}")
        return victims.kill([shim.process for shim in chosen])

    def _some_shims(self, number: int) -> list[victims.ShimVictim]:
        alive = [shim for shim in victims.shims(self.daemon) if shim.process.runs]
        return self._chance.sample(sorted(alive, key=lambda shim: shim.container), min(number, len(alive)))

    def _kill_zygote(self) -> int:
        found = victims.zygotes(self.daemon)
        self.tally.note("killing a zygote")
        return victims.kill([self._chance.choice(found)]) if found else 0

    def _kill_everything(self) -> int:
        """Every service, every zygote, and some shims."""
        chosen = self._some_shims(self._chance.randrange(1, 4))
        for shim in chosen:
            self.excuses.shim_killed(shim.container)
            self.excuses.unattended(shim.container)
        processes = [shim.process for shim in chosen] + victims.zygotes(self.daemon)
        for name in self.daemon.processes:
            with suppress(OSError):
                processes.append(victims.Victim.of(self.daemon.processes[name].pid))
        self._note_unattended(zygotes=False)
        self.tally.note(f"killing everything and the shims of {', '.join(shim.container for shim in chosen)}")
        killed = victims.kill(processes)
        self.daemon.kill9()
        self._start()
        return killed

    def _note_zygotes(self) -> None:
        """Who made the shims that live; of those that died since it is known from before."""
        for shim in victims.shims(self.daemon):
            if shim.process.runs and (pid := victims.zygote_of(shim)) is not None:
                with suppress(OSError):
                    self._zygotes[shim.container] = victims.Victim.of(pid)

    def _note_unattended(self, *, zygotes: bool = True) -> None:
        """The tasks service is to be killed, zygotes are not: whose shim has died just before or is to kill itself, and
        its zygote has died."""
        for shim in victims.shims(self.daemon):
            zygote = self._zygotes.get(shim.container)
            if (shim.is_armed or not shim.process.runs) and not (zygotes and zygote is not None and zygote.runs):
                self.excuses.unattended(shim.container)

    def _start(self) -> None:
        environment = {}
        if self._chance.random() < self.arm:
            self.excuses.armed()
            point = self._chance.choice(self.points)
            environment["CORRAL_FAILPOINTS"] = f"{point}=kill@{self._chance.randrange(1, 4)}"
            self.tally.note(f"starting with {environment['CORRAL_FAILPOINTS']}")
            self.tally.add("starts at which shims were told to kill themselves")
        began = time.monotonic()
        self.daemon.start(environment=environment)
        self._start_took_s = time.monotonic() - began


ONE_PROCESS = {"daemon": 0.4, "shim": 0.4, "zygote": 0.12, "everything": 0.08}
FIVE_PROCESSES = {"service": 0.37, "all services": 0.03, "shim": 0.4, "zygote": 0.12, "everything": 0.08}
DAEMON_ONLY = {"daemon": 1.0}
SERVICES_ONLY = {"service": 1.0}
SIMPLE_LOAD: tuple[type[Worker], ...] = (Lives,) * WORKERS
