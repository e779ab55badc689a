"""What health checks cost: the CPU time of the whole machine while containers are probed, less that while they are not.

A probe's cost is spread over daemons, shims and short-lived runtimes that end up in many places; what the machine as a
whole is busy with is all of it. So the machine has to be quiet otherwise.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from peers import Docker, Peer, quiet
from support.corrald import Corrald

PROBED = int(os.environ.get("CORRAL_BENCH_PROBED", "100"))
SECONDS = 15.0
SETTLING_S = 3.0
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def busy_s() -> float:
    """CPU seconds that this machine has worked since it was started. Source: proc_stat(5)."""
    user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
    return (user + nice + system + irq + softirq) / TICKS_PER_S


def cores_used() -> float:
    """How many cores are busy, on average over a while."""
    time.sleep(SETTLING_S)
    began, busy = time.monotonic(), busy_s()
    time.sleep(SECONDS)
    return (busy_s() - busy) / (time.monotonic() - began)


@contextlib.contextmanager
def of_corral(daemon: Corrald, *, probed: bool) -> Iterator[None]:
    """Containers that run, each with a health check every second or without one."""
    options = {"health_cmd": "true", "health_interval": "1s"} if probed else {}
    with daemon.client() as client:
        made = [
            client.containers.run("busybox", ["sleep", "1000"], network="none", **options).id  # type: ignore[arg-type]
            for _ in range(PROBED)
        ]
        yield
        for container in made:
            client.containers.remove(container, force=True)


@contextlib.contextmanager
def of_docker(docker: Docker, *, probed: bool) -> Iterator[None]:
    options = ["--health-cmd", "true", "--health-interval", "1s"] if probed else []
    names = [docker.new_name() for _ in range(PROBED)]
    run = [*docker.command, "run", "--detach", "--network", "none", *options]
    for name in names:
        quiet([*run, "--name", name, "busybox", "sleep", "1000"])
    yield
    quiet([*docker.command, "rm", "--force", *names])


def bench_health(daemon: Corrald, peers: list[Peer]) -> None:
    """A health check every second on each of many containers."""
    used = {"corral": _added(of_corral(daemon, probed=False), of_corral(daemon, probed=True))}
    for peer in peers:
        if isinstance(peer, Docker):
            used[peer.name] = _added(of_docker(peer, probed=False), of_docker(peer, probed=True))
    print(f"\na health check every second on {PROBED} containers, CPU of the whole machine")
    for name, cores in used.items():
        print(f"  {name:<28} {cores * 100:9.1f} %    {cores / used['corral']:6.2f}x")


def _added(plain: contextlib.AbstractContextManager[None], probed: contextlib.AbstractContextManager[None]) -> float:
    with plain:
        base = cores_used()
    with probed:
        return cores_used() - base
