"""How fast `run` in a pipeline moves binary data out of a container and into one."""

import os
import subprocess
import tempfile
import time
from pathlib import Path

from peers import Docker, Peer, Podman
from support.corrald import CORRAL, Corrald

MB = int(os.environ.get("CORRAL_BENCH_PIPELINE_MB", "512"))
BLOCK = 1 << 20
ROUNDS = 3


def bench_pipeline(daemon: Corrald, peers: list[Peer]) -> None:
    """MB per second, from the first byte to the last; into one, without what the command takes for no byte at all."""
    environment = {"CORRAL_ADDRESS": daemon.address}
    ways = {
        f"corral, {driver}": ([str(CORRAL), "run", "--rm", "--log-driver", driver], environment)
        for driver in ("json-file", "cri", "none")
    }
    for peer in peers:
        if isinstance(peer, Docker):
            ways["docker, json-file"] = ([*peer.command, "run", "--rm", "--log-driver", "json-file"], {})
        if isinstance(peer, Podman):
            ways["podman, k8s-file"] = ([*peer.command, "run", "--rm", "--log-driver", "k8s-file"], {})
    with tempfile.TemporaryDirectory(prefix="corral-bench-") as scratch:
        data, nothing = Path(scratch) / "data", Path(scratch) / "nothing"
        nothing.touch()
        block = os.urandom(BLOCK)
        with data.open("wb") as file:
            file.writelines(block for _ in range(MB * 1_000_000 // BLOCK))
        size = data.stat().st_size
        rates = {name: ([], []) for name in ways}
        for _ in range(ROUNDS):
            for name, (run, env) in ways.items():
                out, into = rates[name]
                out.append(size / 1e6 / _out(run, env, data))
                into.append(size / 1e6 / (_into(run, env, data) - _into(run, env, nothing)))
    print(f"\n{size // 1_000_000} MB of random bytes through `run`")
    for name, (out, into) in rates.items():
        print(f"  {name:<28} out {max(out):9.1f} MB/s   into {max(into):9.1f} MB/s")


def _out(run: list[str], env: dict[str, str], data: Path) -> float:
    command = [*run, "--network", "none", "-v", f"{data}:/data:ro", "busybox", "cat", "/data"]
    with subprocess.Popen(command, env=os.environ | env, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        taken = len(os.read(process.stdout.fileno(), 1))
        began = time.monotonic()
        while block := os.read(process.stdout.fileno(), BLOCK):
            taken += len(block)
        took = time.monotonic() - began
    if (process.returncode, taken) != (0, data.stat().st_size):
        raise RuntimeError(f"{' '.join(command)}: {taken} bytes came, rc {process.returncode}")
    return took


def _into(run: list[str], env: dict[str, str], data: Path) -> float:
    command = [*run, "-i", "--network", "none", "busybox", "sh", "-c", "cat >/dev/null"]  # busybox's wc is slower
    began = time.monotonic()
    with (
        data.open("rb") as file,
        subprocess.Popen(["cat"], stdin=file, stdout=subprocess.PIPE) as cat,
        subprocess.Popen(command, env=os.environ | env, stdin=cat.stdout) as process,
    ):
        assert cat.stdout is not None
        cat.stdout.close()
        if process.wait():
            raise RuntimeError(f"{' '.join(command)}: rc {process.returncode}")
    return time.monotonic() - began
