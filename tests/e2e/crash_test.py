"""`make crash-test`: whatever is killed, and whenever, nothing is lost, nothing is left and nothing is invented.

    failpoints   every failpoint of every service: killed there, started again, looked through (test_failpoints.py);
                 those of shims; one that tells of an exit before it has written it is found out (test_shim_crash.py)
    daemon       kill -9 of corrald at random moments while containers are created, run and deleted in a loop
    storm        kill -9 of anything: the daemon, services of five processes, zygotes, shims, all at once; under
                 creates, execs, attached clients, stdin, followed logs, terminals, deletes; shims kill themselves, too
    lines        300 containers write numbered lines while their daemon is killed every second for a minute

    CORRAL_KILLS (200)         of the daemon      CORRAL_SPLIT=1   of one of five processes instead
    CORRAL_STORM_KILLS (1000)  in the storm       CORRAL_SEED      to repeat what is done (not what happens by it)
    CORRAL_PHASES              those wanted       CORRAL_TRACE=1   tell of every kill
    CORRAL_LINES (300)         containers that write lines

A container whose exit code is not the one asked for is a fault, and so is one that vanished, a line that is missing in
a log or is there twice, an event that tells wrongly, and what is left after all are deleted. What the design lets be
unknown, the end of a process that nobody was there to see, must be told to be unknown, and is counted apart.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# Under such a load a start takes its time.
os.environ.setdefault("CORRAL_TEST_PATIENCE", "4")

from crash.lines import kill_under_lines
from crash.storm import DAEMON_ONLY, FIVE_PROCESSES, ONE_PROCESS, SERVICES_ONLY, SIMPLE_LOAD, Storm, StuckError
from crash.tally import Fault, Tally
from support.corrald import Corrald, running
from support.images import write_busybox
from support.preloaded import PROGRAMS

TESTS = Path(__file__).resolve().parents[1]
PHASES = ("failpoints", "daemon", "storm", "lines")
LINES_S = 60
# Every event is looked at in the end, of some ten thousand containers.
KEEP_EVERY_EVENT = {"engine": {"journal_keep": 10_000_000, "journal_max_bytes": 1 << 32}}
FAILPOINT_TESTS = ("e2e/test_failpoints.py", "kernel/test_shim_crash.py", "kernel/test_shim_adoption.py")


def options(arguments: Sequence[str]) -> argparse.Namespace:
    environment = os.environ.get
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=int(environment("CORRAL_KILLS", "200")))
    parser.add_argument("--storm-kills", type=int, default=int(environment("CORRAL_STORM_KILLS", "1000")))
    parser.add_argument("--lines", type=int, default=int(environment("CORRAL_LINES", "300")))
    parser.add_argument("--seed", type=int, default=int(environment("CORRAL_SEED", str(random.randrange(1 << 32)))))
    parser.add_argument("--split", action="store_true", default=environment("CORRAL_SPLIT", "") not in ("", "0"))
    parser.add_argument("--trace", action="store_true", default=environment("CORRAL_TRACE", "") not in ("", "0"))
    parser.add_argument("--phases", default=environment("CORRAL_PHASES", ",".join(PHASES)))
    return parser.parse_args(arguments)


@contextmanager
def daemon_with_busybox(*, split: bool) -> Iterator[Corrald]:
    with (
        tempfile.TemporaryDirectory(prefix="corral-crash-") as scratch,
        running(split=split, settings=KEEP_EVERY_EVENT) as daemon,
    ):
        archive = write_busybox(Path(scratch) / "busybox.tar")
        with daemon.client() as client:
            client.images.load(archive, name="busybox")
        yield daemon


def failpoints(_: argparse.Namespace) -> bool:
    """As pytest runs them, and how many there are."""
    print("failpoints: every one of them", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "--preloaded", "-k", "not killed_there"]
    done = subprocess.run(
        [*command, *(TESTS / name for name in FAILPOINT_TESTS)], stdout=subprocess.PIPE, text=True, check=False
    )
    sys.path.insert(0, str(TESTS / "e2e"))
    from test_failpoints import triggers

    print(done.stdout if done.returncode else done.stdout.splitlines()[-1])
    if not done.returncode:
        print(f"{len(triggers())} failpoints of services, 0 lost, 0 leaked", flush=True)
    return done.returncode == 0


def daemon(wanted: argparse.Namespace) -> bool:
    """Kills of the daemon alone."""
    kinds = SERVICES_ONLY if wanted.split else DAEMON_ONLY
    print(f"daemon: {wanted.kills} kills, {len(SIMPLE_LOAD)} workers{', five processes' if wanted.split else ''}")
    tally = Tally(trace=wanted.trace)
    with daemon_with_busybox(split=wanted.split) as corrald:
        left = run(Storm(corrald, wanted.kills, wanted.seed, kinds, SIMPLE_LOAD, arm=0, tally=tally))
    tell(tally, left)
    lost = tally.faults.total()
    print(f"{wanted.kills} kills, {lost} lost, {len(left)} leaked", flush=True)
    return not lost and not left


def storm(wanted: argparse.Namespace) -> bool:
    """Half of the kills with one process, half with five."""
    tally, left = Tally(trace=wanted.trace), []
    for split, kinds in ((False, ONE_PROCESS), (True, FIVE_PROCESSES)):
        kills = (wanted.storm_kills + 1) // 2 if split is False else wanted.storm_kills // 2
        print(f"storm: {kills} kills, {'five processes' if split else 'one process'}", flush=True)
        with daemon_with_busybox(split=split) as corrald:
            left += run(Storm(corrald, kills, wanted.seed, kinds, tally=tally))
    tell(tally, left)
    faults = tally.faults
    print(
        f"{wanted.storm_kills} kills, {faults[Fault.LOST]} lost, {len(left)} leaked,"
        f" {faults[Fault.WRONG_CODE]} wrong exit codes, {faults[Fault.MISSING]} bytes of output missing"
    )
    print(f"{faults[Fault.TWICE]} bytes of output twice, {faults[Fault.MISTOLD]} lives told wrongly", flush=True)
    return tally.is_clean and not left


def lines(wanted: argparse.Namespace) -> bool:
    """Numbered lines."""
    print(f"lines: {wanted.lines} containers, a kill every second for {LINES_S} seconds", flush=True)
    tally = Tally(trace=wanted.trace)
    with daemon_with_busybox(split=False) as corrald:
        left = kill_under_lines(corrald, tally, containers=wanted.lines, seconds=LINES_S)
    tell(tally, left)
    faults = tally.faults
    print(
        f"{tally.counts['lines']} lines of {wanted.lines} containers, {LINES_S} kills,"
        f" {faults[Fault.MISSING]} bytes missing, {faults[Fault.TWICE]} bytes twice",
        flush=True,
    )
    return tally.is_clean and not left


def run(storm: Storm) -> list[str]:
    try:
        return storm.run()
    except StuckError as e:
        raise SystemExit(f"{e}\n{storm.daemon.log()[-20000:]}") from e


def tell(tally: Tally, left: Sequence[str]) -> None:
    for what in left:
        print(f"LEAKED {what}")
    for what, number in sorted(tally.counts.items()):
        print(f"  {number} {what}")


def main() -> None:
    wanted = options(sys.argv[1:])
    phases = wanted.phases.split(",")
    if unknown := set(phases) - set(PHASES):
        raise SystemExit(f"no such phase: {', '.join(sorted(unknown))}; there are {', '.join(PHASES)}")
    PROGRAMS.wanted = True  # most of a start would be the loading of Python's modules
    print(f"crash test, seed {wanted.seed}", flush=True)
    sound = True
    for phase in (failpoints, daemon, storm, lines):
        if phase.__name__ in phases:
            began = time.monotonic()
            sound &= phase(wanted)
            print(f"({phase.__name__}: {time.monotonic() - began:.0f} s)\n", flush=True)
    PROGRAMS.close()
    raise SystemExit(0 if sound else 1)


if __name__ == "__main__":
    main()
