"""What containers use: counters of their cgroups and interfaces, and the processes inside."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from pathlib import Path

from corral.api.cgroups.v1.cgroups_pb2 import StatsRequest
from corral.api.engine.v1.engine_pb2 import ContainerStats, ContainerStatsResponse, Process, TopResponse
from corral.api.tasks.v1.tasks_pb2 import PidsRequest
from corral.engine import interfaces, ps, store
from corral.engine.core import Core, require_alive
from corral.engine.records import ALIVE, ContainerRecord, from_ns
from corral.engine.sizes import Sizes
from corral.rpc.blocking import run_blocking
from corral.rpc.context import current_namespace
from corral.rpc.errors import InvalidArgument, NotFound

MIN_INTERVAL_MS = 100
IDLE_MAX_AGE_MS = 5000
"""In a stream, of a container none of whose processes ran since."""
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_NS = 1_000_000_000


class Usage:
    """See the module."""

    def __init__(self, core: Core, sizes: Sizes) -> None:
        self._core = core
        self._sizes = sizes

    async def stats(self, references: Sequence[str], interval_ms: int) -> AsyncIterator[ContainerStatsResponse]:
        """One reading, or one each interval. Containers that have ended drop out.

        Raises NotFound, FailedPrecondition for a named one that does not run, InvalidArgument.
        """
        if interval_ms and interval_ms < MIN_INTERVAL_MS:
            raise InvalidArgument(f"an interval of {interval_ms} ms is too short: use {MIN_INTERVAL_MS} ms or more")
        named = [self._core.resolve(reference) for reference in references]
        for record in named:
            require_alive(record, "measured")
        next_time, max_age_ms = time.monotonic(), 0
        alive = _Alive(self._core, current_namespace())
        while True:
            found = await alive.now()
            wanted = {r.id: found[r.id] for r in named if r.id in found} if references else found
            yield await self._reading(wanted, max_age_ms)
            if not interval_ms:
                return
            max_age_ms = IDLE_MAX_AGE_MS
            next_time = max(next_time + interval_ms / 1000, time.monotonic())
            await asyncio.sleep(next_time - time.monotonic())

    async def _reading(self, wanted: Mapping[str, ContainerRecord], max_age_ms: int) -> ContainerStatsResponse:
        response = ContainerStatsResponse()
        if not wanted:
            return response
        try:
            async for answer in self._core.leaves.cgroups.Stats(StatsRequest(ids=wanted, max_age_ms=max_age_ms)):
                for stats in answer.stats:
                    if (record := wanted.get(stats.id)) is not None:
                        reading = response.stats.add(id=record.id, name=record.name, cgroup=stats)
                        await self._sizes.measure(record, reading)
                break
        except NotFound:  # one of them was removed this moment: the next reading is without it
            pass
        await run_blocking(_add_interfaces, response.stats, wanted)
        return response

    async def top(self, reference: str) -> list[Process]:
        """The processes inside, by pid. Raises FailedPrecondition unless it runs."""
        return await run_blocking(_processes, await self._pids(reference))

    async def ps(self, reference: str, options: Sequence[str]) -> TopResponse:
        """The same, as ps(1) of the host tells it. Raises InvalidArgument for options that it does not take."""
        return await ps.table(await self._pids(reference), options)

    async def _pids(self, reference: str) -> list[int]:
        record = self._core.resolve(reference)
        require_alive(record, "looked into")
        response = await self._core.leaves.tasks.Pids(PidsRequest(id=record.id))
        return sorted(response.pids)


class _Alive:
    """The containers of a namespace that run, by id; read again once something has happened."""

    def __init__(self, core: Core, namespace: str) -> None:
        self._core, self._namespace = core, namespace
        self._seq = -1
        self._records: Mapping[str, ContainerRecord] = {}

    async def now(self) -> Mapping[str, ContainerRecord]:
        database = self._core.database
        if (seq := database.journal.last_seq()) != self._seq:  # a row and its event are written together
            found = await database.read(lambda view: store.containers(view, self._namespace))
            self._records = {record.id: record for record in found if record.status in ALIVE}
            self._seq = seq
        return self._records


def _add_interfaces(readings: Iterable[ContainerStats], records: Mapping[str, ContainerRecord]) -> None:
    for reading in readings:
        reading.interfaces.extend(interfaces.of(records[reading.id]))


def _processes(pids: Sequence[int]) -> list[Process]:
    boot_ns = time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    found = (_process(pid, boot_ns) for pid in pids)
    return [process for process in found if process is not None]


def _process(pid: int, boot_ns: int) -> Process | None:
    """One process; None if it has ended meanwhile. Source: proc_pid_stat(5)."""
    directory = Path("/proc", str(pid))
    try:
        # The command's name may hold anything, ")" too; what follows the last one is numbers.
        head, _, tail = (directory / "stat").read_bytes().rpartition(b")")
        words = (directory / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
        uid = directory.stat().st_uid
    except OSError:
        return None
    fields = tail.split()
    name = head.partition(b"(")[2]
    command = b" ".join(words).decode(errors="replace") or f"[{name.decode(errors='replace')}]"
    started_ns = boot_ns + int(fields[19]) * _NS // _TICKS_PER_S
    return Process(
        pid=pid,
        parent_pid=int(fields[1]),
        uid=uid,
        command=command,
        started_at=from_ns(started_ns),
        cpu_ns=(int(fields[11]) + int(fields[12])) * _NS // _TICKS_PER_S,
    )
