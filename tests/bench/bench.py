"""`make bench`: speed and memory of corral, and of the peers that are installed, interleaved in one run.

    make bench                      all of it, about ten minutes
    bench.py NAME...                only these: cold api exec network verbs memory many unpack logs health resources
    CORRAL_BENCH_ROUNDS (20)        how often each is measured

Figures are medians; ratios are against corral's own figure of the same run. Peers get private roots and are skipped,
by name, where they are not installed. Everybody's run state is on a tmpfs, as /run is on most hosts.
"""

import compileall
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import memory
from logging_rate import bench_logs
from network import bench_network
from peers import CorralOci, Peer, Runc, installed_peers, memory_directory, quiet
from pipeline import bench_pipeline
from probes import bench_health
from resources import bench_resources
from support.corrald import CORRAL, Corrald, Place, running
from support.images import write_busybox
from unpack import bench_unpack

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("protos", "shim", "services", "cli")
ROUNDS = int(os.environ.get("CORRAL_BENCH_ROUNDS", "20"))
SETTLE_S = 0.2
IDLE_CONTAINERS = 50
PUBLISHED = ("--network", "bridge", "--publish", "80")
MANY = 200


def median_ms(samples: list[float]) -> float:
    return statistics.median(samples) * 1000


def interleaved(jobs: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median milliseconds of each job; one warm-up round, then all jobs in turn, so that noise hits them alike. Each
    begins once what the one before has left to do in the background is done, so that nobody pays for another."""
    samples: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds + 1):
        for name, job in jobs.items():
            time.sleep(SETTLE_S)
            began = time.perf_counter()
            job()
            if number:
                samples[name].append(time.perf_counter() - began)
    return {name: median_ms(taken) for name, taken in samples.items()}


def table(title: str, rows: dict[str, float], unit: str, base: str) -> None:
    """One block of figures with ratios against `base`."""
    print(f"\n{title}")
    for name, value in rows.items():
        ratio = f"{value / rows[base]:6.2f}x" if rows[base] else ""
        print(f"  {name:<28} {value:9.2f} {unit:<4} {ratio}", flush=True)


# ---------------------------------------------------------------- what is measured


def bench_cold(daemon: Corrald, peers: list[Peer]) -> None:
    """The command as a user types it."""
    for network in ("none", "bridge"):
        jobs: dict[str, Callable[[], object]] = {
            "corral": lambda network=network: corral(daemon, "run", "--rm", "--network", network, "busybox", "true")  # type: ignore[misc]
        }
        for peer in peers:
            if peer.runs_with(network):
                jobs[peer.name] = lambda peer=peer, network=network: peer.run(network)  # type: ignore[misc]
        table(f"cold start: run --rm IMAGE true, network {network}", interleaved(jobs), "ms", "corral")
    jobs = {"corral": lambda: corral(daemon, "run", "--rm", *PUBLISHED, "busybox", "true")}
    for peer in peers:
        if peer.runs_with("bridge"):
            jobs[peer.name] = lambda peer=peer: peer.run("bridge", *PUBLISHED[2:])  # type: ignore[misc]
    table("cold start: run --rm -p 80 IMAGE true, network bridge", interleaved(jobs), "ms", "corral")
    with tempfile.TemporaryDirectory(prefix="corral-bench-") as scratch, contextlib.ExitStack() as stack:
        runtimes = [CorralOci(Path(scratch), Path(), stack), *(peer for peer in peers if isinstance(peer, Runc))]
        jobs = {f"{each.name} run": lambda each=each: each.run("none") for each in runtimes}  # type: ignore[misc]
        table("an OCI runtime alone: run of true", interleaved(jobs, ROUNDS * 2), "ms", f"{runtimes[-1].name} run")


def bench_api(daemon: Corrald, peers: list[Peer]) -> None:
    """create + start + wait + delete of `true`, from a client that stays connected."""
    with daemon.client() as client:

        def cycle(network: str) -> None:
            made = client.containers.create("busybox", ["true"], network=network)
            client.containers.start(made.id)
            assert client.containers.wait(made.id).code == 0
            client.containers.remove(made.id)

        jobs: dict[str, Callable[[], object]] = {
            "corral, no network": lambda: cycle("none"),
            "corral, bridge": lambda: cycle("bridge"),
        }
        for peer in peers:
            if peer.name in ("ctr", "runc"):
                jobs[f"{peer.name} run"] = lambda peer=peer: peer.run("none")  # type: ignore[misc]
        rows = interleaved(jobs, ROUNDS * 3)
    table("create+start+wait+delete over gRPC", rows, "ms", "corral, no network")


def bench_exec(daemon: Corrald, peers: list[Peer]) -> None:
    """A further `true` in a running container."""
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(daemon.client())
        made = client.containers.run("busybox", ["sleep", "1000"], network="none")
        stack.callback(client.containers.remove, made.id, force=True)
        jobs: dict[str, Callable[[], object]] = {
            "corral over gRPC": lambda: client.containers.exec(made.id, ["true"]),
            "corral exec": lambda: corral(daemon, "exec", made.id, "true"),
        }
        for peer in peers:
            running = stack.enter_context(peer.running())
            jobs[f"{peer.name} exec"] = lambda peer=peer, running=running: peer.exec(running)  # type: ignore[misc]
        rows = interleaved(jobs)
    table("exec of true", rows, "ms", "corral over gRPC")


def bench_verbs(daemon: Corrald, peers: list[Peer]) -> None:
    """How long each verb takes to start: its help, which loads all of its options."""
    from corral.cli.main import VERBS

    jobs: dict[str, Callable[[], object]] = {"--help": lambda: corral(daemon, "--help")}
    for verb in VERBS:
        jobs[f"{verb} --help"] = lambda verb=verb: corral(daemon, verb, "--help")  # type: ignore[misc]
    jobs["ps"] = lambda: corral(daemon, "ps")
    table("start of each verb", interleaved(jobs, 7), "ms", "--help")


def bench_memory(daemon: Corrald, peers: list[Peer]) -> None:
    """PSS of everything of ours over N idle containers, less what the daemon takes without any."""
    before = memory.of_daemon(daemon)
    with daemon.client() as client:
        made = [client.containers.run("busybox", ["sleep", "1000"], network="none").id for _ in range(IDLE_CONTAINERS)]
        shims = memory.of_shims(daemon)
        after = memory.of_daemon(daemon)
        for container in made:
            client.containers.remove(container, force=True)
    print(f"\nmemory, {IDLE_CONTAINERS} idle containers")
    print(f"  shims, PSS per container     {shims.pss / IDLE_CONTAINERS / 2**20:9.2f} MiB")
    print(f"  daemon's growth per container{(after.pss - before.pss) / IDLE_CONTAINERS / 2**20:9.2f} MiB")
    print(f"  daemon, RSS when idle        {before.rss / 2**20:9.2f} MiB")
    print(f"  daemon, RSS with all of them {after.rss / 2**20:9.2f} MiB")
    for peer in peers:
        if (each := peer.idle_memory(min(IDLE_CONTAINERS, 10))) is not None:
            print(f"  {peer.name}, PSS per container{'':<{10 - len(peer.name)}}{each / 2**20:9.2f} MiB")


def bench_many(daemon: Corrald, peers: list[Peer]) -> None:
    """Starting one more when 200 run, against starting the first."""
    with daemon.client() as client:

        def one() -> float:
            began = time.perf_counter()
            made = client.containers.run("busybox", ["sleep", "1000"], network="bridge")
            took = time.perf_counter() - began
            client.containers.remove(made.id, force=True)
            return took

        one()
        first = median_ms([one() for _ in range(ROUNDS)])
        began = time.perf_counter()
        ids = [client.containers.run("busybox", ["sleep", "1000"], network="bridge").id for _ in range(MANY)]
        filled = time.perf_counter() - began
        further = median_ms([one() for _ in range(ROUNDS)])
        began = time.perf_counter()
        listed = client.containers.list()
        listing = time.perf_counter() - began
        assert len(listed) >= MANY
        for container in ids:
            client.containers.remove(container, force=True)
    table("create+start with the bridge", {"the first": first, f"with {MANY} running": further}, "ms", "the first")
    print(f"  {MANY} started one after the other in {filled:.2f} s; `ps` of them {listing * 1000:.1f} ms")


def corral(daemon: Corrald, *args: str) -> None:
    quiet([str(CORRAL), *args], CORRAL_ADDRESS=daemon.address)


BENCHES: dict[str, Callable[[Corrald, list[Peer]], None]] = {
    "api": bench_api,
    "cold": bench_cold,
    "exec": bench_exec,
    "network": bench_network,
    "memory": bench_memory,
    "many": bench_many,
    "verbs": bench_verbs,
    "unpack": bench_unpack,
    "logs": bench_logs,
    "pipeline": bench_pipeline,
    "health": bench_health,
    "resources": bench_resources,
}


def main() -> None:
    wanted = sys.argv[1:] or list(BENCHES)
    if unknown := set(wanted) - BENCHES.keys():
        raise SystemExit(f"bench: there is no {', '.join(sorted(unknown))}; there are {', '.join(BENCHES)}")
    for root in SOURCES:  # as they are where it is installed: else the command compiles what was edited, at each start
        compileall.compile_dir(ROOT / root, quiet=1)
    with tempfile.TemporaryDirectory(prefix="corral-bench-") as scratch, contextlib.ExitStack() as stack:
        archive = write_busybox(Path(scratch) / "busybox.tar", "docker.io/library/busybox:latest")
        daemon = stack.enter_context(running(place=Place.make(run_in=memory_directory())))
        with daemon.client() as client:
            client.images.load(archive)
        peers = installed_peers(stack, Path(scratch), archive)
        names = ", ".join(p.name for p in peers) or "no peer: none is installed"
        print(f"corral beside {names}; {ROUNDS} rounds, medians")
        for name in wanted:
            BENCHES[name](daemon, peers)


if __name__ == "__main__":
    main()
