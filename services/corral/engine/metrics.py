"""What containers use, for Prometheus: GET /metrics, text or OpenMetrics as is asked for.

The library serves from threads of its own; a reading is made on the event loop. Names and labels stay as they are over
versions: others have alerts on them.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from corral.api.cgroups.v1 import cgroups_pb2
from corral.api.engine.v1.engine_pb2 import InterfaceStats
from corral.engine import interfaces, store
from corral.engine.core import Core
from corral.engine.records import ALIVE, ContainerRecord, Status
from corral.rpc.blocking import run_blocking
from corral.rpc.context import in_namespace
from corral.rpc.errors import FailedPrecondition, InvalidArgument

if TYPE_CHECKING:
    from threading import Thread
    from wsgiref.simple_server import WSGIServer

READING_TIMEOUT_S = 10.0
LABELS = ("namespace", "id", "name", "image")


@dataclass(frozen=True, slots=True)
class Reading:
    """One container that runs."""

    record: ContainerRecord
    stats: cgroups_pb2.Stats
    interfaces: Sequence[InterfaceStats] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """In the order of LABELS."""
        record = self.record
        return record.namespace, record.id, record.name, record.config.image


@dataclass(frozen=True, slots=True)
class Readings:
    """All of one moment; and how many containers there are, by namespace and status."""

    running: Sequence[Reading]
    counts: Sequence[tuple[str, str, int]]


type _Value = Callable[[cgroups_pb2.Stats], float]
type _Values = Callable[[cgroups_pb2.Stats], Iterable[tuple[tuple[str, ...], float]]]

NS, US = 1e-9, 1e-6

COUNTERS: tuple[tuple[str, str, _Value], ...] = (
    ("cpu_seconds", "CPU time used", lambda s: s.cpu.usage_ns * NS),
    ("cpu_user_seconds", "CPU time used in user mode", lambda s: s.cpu.user_ns * NS),
    ("cpu_system_seconds", "CPU time used in the kernel", lambda s: s.cpu.system_ns * NS),
    ("cpu_periods", "Periods of the CPU quota", lambda s: s.cpu.periods),
    ("cpu_throttled_periods", "Periods in which the quota was used up", lambda s: s.cpu.throttled_periods),
    ("cpu_throttled_seconds", "Time stopped by the quota", lambda s: s.cpu.throttled_ns * NS),
    ("memory_page_faults", "Page faults", lambda s: s.memory.page_faults),
    ("memory_major_page_faults", "Page faults that waited for a disk", lambda s: s.memory.major_page_faults),
    ("memory_limit_hits", "Allocations that met the memory limit", lambda s: s.memory.limit_hits),
    ("memory_oom_kills", "Processes killed for want of memory", lambda s: s.memory.oom_kills),
)
GAUGES: tuple[tuple[str, str, _Value], ...] = (
    ("memory_usage_bytes", "Memory, page cache included", lambda s: s.memory.usage_bytes),
    ("memory_working_set_bytes", "Memory less inactive page cache", lambda s: s.memory.working_set_bytes),
    ("memory_limit_bytes", "Memory limit; 0 for none", lambda s: s.memory.limit_bytes),
    ("memory_peak_bytes", "The most memory used so far", lambda s: s.memory.peak_bytes),
    ("memory_swap_bytes", "Swap", lambda s: s.memory.swap_bytes),
    ("memory_anon_bytes", "Anonymous memory", lambda s: s.memory.anon_bytes),
    ("memory_file_bytes", "Page cache", lambda s: s.memory.file_bytes),
    ("memory_kernel_bytes", "Memory of the kernel", lambda s: s.memory.kernel_bytes),
    ("memory_shmem_bytes", "Shared memory and tmpfs", lambda s: s.memory.shmem_bytes),
    ("pids", "Processes and threads", lambda s: s.pids.current),
    ("pids_limit", "The most of them; 0 for no limit", lambda s: s.pids.limit),
)


def _device(io: cgroups_pb2.IoStats) -> tuple[str]:
    return (f"{io.major}:{io.minor}",)


def _stalls(stats: cgroups_pb2.Stats) -> Iterator[tuple[tuple[str, ...], float]]:
    for resource, known, pressure in (
        ("cpu", stats.cpu.HasField("pressure"), stats.cpu.pressure),
        ("memory", stats.memory.HasField("pressure"), stats.memory.pressure),
        ("io", stats.HasField("io_pressure"), stats.io_pressure),
    ):
        if known:
            yield (resource, "some"), pressure.some_total_us * US
            yield (resource, "full"), pressure.full_total_us * US


COUNTERS_BY: tuple[tuple[str, str, tuple[str, ...], _Values], ...] = (
    ("io_read_bytes", "Read from a block device", ("device",), lambda s: [(_device(i), i.read_bytes) for i in s.io]),
    ("io_write_bytes", "Written to one", ("device",), lambda s: [(_device(i), i.write_bytes) for i in s.io]),
    ("io_reads", "Read operations", ("device",), lambda s: [(_device(i), i.read_ops) for i in s.io]),
    ("io_writes", "Write operations", ("device",), lambda s: [(_device(i), i.write_ops) for i in s.io]),
    ("hugetlb_failures", "Huge pages refused", ("size",), lambda s: [((h.page_size,), h.failures) for h in s.hugetlb]),
    ("stalled_seconds", "Time that some, or all, processes waited", ("resource", "share"), _stalls),
)


type _Traffic = Callable[[InterfaceStats], int]

TRAFFIC: tuple[tuple[str, str, _Traffic], ...] = (
    ("network_receive_bytes", "Received by an interface", lambda i: i.rx_bytes),
    ("network_receive_packets", "Packets received", lambda i: i.rx_packets),
    ("network_receive_errors", "Packets received damaged", lambda i: i.rx_errors),
    ("network_receive_dropped", "Packets received and dropped", lambda i: i.rx_dropped),
    ("network_transmit_bytes", "Sent by an interface", lambda i: i.tx_bytes),
    ("network_transmit_packets", "Packets sent", lambda i: i.tx_packets),
    ("network_transmit_errors", "Packets that could not be sent", lambda i: i.tx_errors),
    ("network_transmit_dropped", "Packets dropped before they were sent", lambda i: i.tx_dropped),
)


def families(readings: Readings) -> Iterator[Metric]:
    """All metrics of one moment."""
    counts = GaugeMetricFamily("corral_containers", "Containers by status", labels=("namespace", "status"))
    for namespace, status, count in readings.counts:
        counts.add_metric((namespace, status), count)
    yield counts
    started = _gauge("start_time_seconds", "When it was started, since the epoch")
    for reading in readings.running:
        started.add_metric(reading.labels, reading.record.started_ns * NS)
    yield started
    for name, help_, value in COUNTERS:
        yield _filled(_counter(name, help_), readings, value)
    for name, help_, value in GAUGES:
        yield _filled(_gauge(name, help_), readings, value)
    for name, help_, labels, values in COUNTERS_BY:
        family = _counter(name, help_, *labels)
        for reading in readings.running:
            for further, amount in values(reading.stats):
                family.add_metric((*reading.labels, *further), amount)
        yield family
    for name, help_, traffic in TRAFFIC:
        family = _counter(name, help_, "interface")
        for reading in readings.running:
            for interface in reading.interfaces:
                family.add_metric((*reading.labels, interface.name), traffic(interface))
        yield family


def _counter(name: str, help_: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(f"corral_container_{name}", help_, labels=(*LABELS, *labels))


def _gauge(name: str, help_: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"corral_container_{name}", help_, labels=LABELS)


def _filled[Family: (CounterMetricFamily, GaugeMetricFamily)](
    family: Family, readings: Readings, value: _Value
) -> Family:
    for reading in readings.running:
        family.add_metric(reading.labels, value(reading.stats))
    return family


async def read(core: Core) -> Readings:
    """What every container of every namespace uses now. Raises CorralError."""
    records = await core.database.read(lambda view: store.containers_in(view, Status))
    counts = Counter((record.namespace, record.status.word) for record in records)
    alive = [record for record in records if record.status in ALIVE]
    running: list[Reading] = []
    for namespace in sorted({record.namespace for record in alive}):
        wanted = {record.id: record for record in alive if record.namespace == namespace}
        with in_namespace(namespace):
            # Of all, not of those that are wanted: one that has just gone is no error then.
            async for answer in core.leaves.cgroups.Stats(cgroups_pb2.StatsRequest()):
                read = [(wanted[stats.id], stats) for stats in answer.stats if stats.id in wanted]
                running += await run_blocking(_with_interfaces, read)
                break
    return Readings(running, [(*key, count) for key, count in sorted(counts.items())])


def _with_interfaces(read: Iterable[tuple[ContainerRecord, cgroups_pb2.Stats]]) -> list[Reading]:
    return [Reading(record, stats, interfaces.of(record)) for record, stats in read]


class Exporter(Collector):
    """Serves at one address, from start() to stop()."""

    def __init__(self, address: str, readings: Callable[[], Coroutine[Any, Any, Readings]]) -> None:
        """`address` is HOST:PORT. Raises InvalidArgument."""
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
            raise InvalidArgument(f"[engine] metrics_address {address!r} is no address: give HOST:PORT, 127.0.0.1:9323")
        self._address, self._host, self._port = address, host.removeprefix("[").removesuffix("]"), int(port)
        self._readings = readings
        self._loop = asyncio.get_running_loop()
        self._served: tuple[WSGIServer, Thread] | None = None

    def start(self) -> None:
        """Raises FailedPrecondition if it cannot listen there."""
        registry = CollectorRegistry()
        registry.register(self)
        ProcessCollector(namespace="corral", registry=registry)
        try:
            self._served = start_http_server(self._port, self._host, registry)
        except OSError as e:
            raise FailedPrecondition(
                f"cannot listen at {self._address}, [engine] metrics_address: {e.strerror or e}"
            ) from e

    def stop(self) -> None:
        """Blocks until the last answer is given."""
        if self._served is not None:
            server, thread = self._served
            server.shutdown()
            server.server_close()
            thread.join()

    def describe(self) -> Iterable[Metric]:
        """Nothing is read when it is registered."""
        return families(Readings((), ()))

    def collect(self) -> Iterator[Metric]:
        """On a thread of the server."""
        reading = asyncio.run_coroutine_threadsafe(self._readings(), self._loop)
        try:
            yield from families(reading.result(READING_TIMEOUT_S))
        finally:
            reading.cancel()
