"""What cgroups cost: making and removing one, reading its counters, reading those of many once a second.

And how long the engine takes to answer beside containers that take all they can get.
"""

import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import grpc
from peers import Peer
from support.cgroups_leaf import LIMITS
from support.corrald import Corrald
from support.hogs import run_hogs

from corral.api.cgroups.v1 import cgroups_pb2
from corral.api.cgroups.v1.cgroups_pb2_grpc import CgroupsStub

MEASURED = int(os.environ.get("CORRAL_BENCH_MEASURED", "500"))
SECONDS = 10
SETTLING_S = 4
"""After which nothing that began with the containers still goes on."""
ROUNDS = 200
BESIDE_HOGS = 50
CREATE = cgroups_pb2.CreateCgroupRequest(id="bench", resources=LIMITS)
DELETE = cgroups_pb2.DeleteCgroupRequest(id="bench")
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def bench_resources(daemon: Corrald, peers: list[Peer]) -> None:
    """All of the above."""
    print("\ncgroups and statistics")
    _bench_cgroup(daemon)
    _bench_statistics(daemon)
    _bench_hogs(daemon)


def _bench_cgroup(daemon: Corrald) -> None:
    """With limits of CPU, memory, processes and devices: by the typed client, and by gRPC's library alone, in turns."""
    ours: list[float] = []
    plain: list[float] = []
    reading: list[float] = []
    with daemon.client() as client, grpc.insecure_channel(daemon.address.replace("unix://", "unix:")) as channel:
        leaf = client.leaf("cgroups")
        stub, library = CgroupsStub(leaf.channel), CgroupsStub(channel)
        for number in range(ROUNDS):
            life = _cgroup_life(partial(leaf.unary, stub.Create), partial(leaf.unary, stub.Delete))
            without = _cgroup_life(library.Create, library.Delete)
            leaf.unary(stub.Create, CREATE)
            began = time.perf_counter()
            [answer] = leaf.stream(stub.Stats, cgroups_pb2.StatsRequest(ids=[CREATE.id]))
            assert len(answer.stats) == 1
            read = time.perf_counter() - began
            leaf.unary(stub.Delete, DELETE)
            if number:
                ours.append(life)
                plain.append(without)
                reading.append(read)
    _figure("create + delete over gRPC", statistics.median(ours) * 1000, "ms")
    _figure("the same by gRPC's library", statistics.median(plain) * 1000, "ms")
    _figure("statistics of one over gRPC", statistics.median(reading) * 1000, "ms")


def _cgroup_life(create: Callable[..., object], delete: Callable[..., object]) -> float:
    return _timed(lambda: (create(CREATE), delete(DELETE)))


def _bench_statistics(daemon: Corrald) -> None:
    with daemon.client() as client:
        made = [client.containers.run("busybox", ["sleep", "1000"], network="none").id for _ in range(MEASURED)]
        try:
            took = [_timed(lambda: list(client.containers.stats())) for _ in range(5)]
            _figure(f"reading each of {MEASURED}", statistics.median(took) * 1000 / MEASURED, "ms")
            time.sleep(SETTLING_S)
            began, cpu_s = time.monotonic(), _cpu_s(daemon)
            for answer in client.containers.stats(interval_ms=1000):
                assert len(answer.stats) == MEASURED
                if time.monotonic() - began >= SECONDS:
                    break
            used = (_cpu_s(daemon) - cpu_s) / (time.monotonic() - began)
            _figure(f"{MEASURED} once a second, of one core", used * 100, "%")
        finally:
            for container in made:
                client.containers.remove(container, force=True)


def _bench_hogs(daemon: Corrald) -> None:
    """Each of them on half a CPU."""
    with daemon.client() as client:
        jobs: dict[str, Callable[[], object]] = {
            "ps": lambda: daemon.corral("ps", check=True),
            "list over gRPC": client.containers.list,
        }
        quiet = {name: [_timed(job) for _ in range(BESIDE_HOGS)] for name, job in jobs.items()}
        with run_hogs(daemon):
            time.sleep(3)
            beside = {name: [_timed(job) for _ in range(BESIDE_HOGS)] for name, job in jobs.items()}
    for name in jobs:
        for where, samples in (("", quiet[name]), (" beside hogs", beside[name])):
            _figure(f"{name}{where}", statistics.median(samples) * 1000, "ms", f"  worst {max(samples) * 1000:.1f}")


def _timed(job: Callable[[], object]) -> float:
    began = time.perf_counter()
    job()
    return time.perf_counter() - began


def _cpu_s(daemon: Corrald) -> float:
    """CPU seconds of the daemon so far. Source: proc_pid_stat(5)."""
    used = 0
    for process in daemon.processes.values():
        fields = Path(f"/proc/{process.pid}/stat").read_text("ascii").rpartition(")")[2].split()
        used += int(fields[11]) + int(fields[12])
    return used / TICKS_PER_S


def _figure(what: str, value: float, unit: str, more: str = "") -> None:
    print(f"  {what:<36} {value:9.2f} {unit:<3}{more}", flush=True)
