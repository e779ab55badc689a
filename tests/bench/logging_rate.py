"""How fast a container's output becomes its log: lines written as fast as can be, until the container has ended."""

import os
import subprocess
import time

from peers import Docker, Peer, Podman, quiet
from support.corrald import CORRAL, Corrald

MIB = int(os.environ.get("CORRAL_BENCH_LOG_MIB", "96"))
LINE = "x" * 99
# Large enough that nobody rotates.
MAX_SIZE = "1g"
ARGS = ["busybox", "sh", "-c", f"yes {LINE} | head -c {MIB << 20}"]


def bench_logs(daemon: Corrald, peers: list[Peer]) -> None:
    """MiB per second into a log of JSON lines, or what the peer has for it; the log is then counted."""
    environment = {"CORRAL_ADDRESS": daemon.address}
    commands = {
        "corral, json-file": ([str(CORRAL)], "json-file", environment),
        "corral, cri": ([str(CORRAL)], "cri", environment),
    }
    for peer in peers:
        if isinstance(peer, Docker):
            commands["docker, json-file"] = (peer.command, "json-file", {})
        if isinstance(peer, Podman):
            commands["podman, k8s-file"] = (peer.command, "k8s-file", {})
    rates: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(2):
        for name, (command, driver, env) in commands.items():
            rates[name].append(_rate(command, driver, env))
    print(f"\nlog of one container, {MIB} MiB in lines of 100 bytes")
    ours = max(rates["corral, json-file"])
    for name, rate in rates.items():
        print(f"  {name:<28} {max(rate):9.1f} MiB/s {max(rate) / ours:6.2f}x")


def _rate(command: list[str], driver: str, env: dict[str, str]) -> float:
    name = f"corral-bench-log-{os.getpid()}"
    run = [*command, "run", "--detach", "--network", "none", "--name", name, "--log-driver", driver]
    began = time.monotonic()
    quiet([*run, "--log-opt", f"max-size={MAX_SIZE}", *ARGS], **env)
    quiet([*command, "wait", name], **env)
    took = time.monotonic() - began
    logged = subprocess.run([*command, "logs", name], env=os.environ | env, stdout=subprocess.PIPE, check=True).stdout
    quiet([*command, "rm", "--force", name], **env)
    if logged.count(b"\n") < (MIB << 20) // (len(LINE) + 1):
        raise RuntimeError(f"{' '.join(run)}: the log has only {len(logged)} bytes")
    return MIB / took
