"""What is left of a container whose shim was killed first, kept by whoever inherited its processes: output, exit."""

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from corral.shim import records
from corral.shim.process import Ended
from corral.shim.records import Exit, Record
from corral.shim.spool import STREAMS

REASON = "its shim was killed before it could report the exit"


@dataclass(slots=True)
class Orphaned:
    """A bundle without a shim. While its FIFOs are held open, what was written to them stays, whoever wrote it ends."""

    shim_pid: int
    fifos: tuple[int, ...]

    @classmethod
    def of(cls, bundle: Path, shim_pid: int) -> Self:
        """Hold what there is; a terminal has no FIFOs."""
        fifos = []
        for name in STREAMS:
            with contextlib.suppress(OSError):
                fifos.append(os.open(bundle / name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC))
        return cls(shim_pid, tuple(fifos))

    def has_heir(self, bundle: Path) -> bool:
        """Whether another shim has taken over since, or nobody will because the bundle is gone."""
        try:
            directory = os.open(bundle, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return True
        try:
            record = _record(directory)
            return record is None or record.shim_pid != self.shim_pid
        finally:
            os.close(directory)

    def close(self) -> None:
        """Let go of it."""
        for fifo in self.fifos:
            os.close(fifo)
        self.fifos = ()


def write_exit(bundles: Iterable[Path], pid: int, ended: Ended) -> None:
    """Write exit.json into the bundle whose record names this pid as init, if there is one and it has none.

    The caller has just reaped it, so the pid is that process's.
    """
    for bundle in bundles:
        try:
            directory = os.open(bundle, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            continue  # deleted
        try:
            record = _record(directory)
            if record is not None and record.init_pid == pid:
                _write(directory, record, ended)
                return
        finally:
            os.close(directory)


def _record(directory: int) -> Record | None:
    with contextlib.suppress(OSError, ValueError):
        return Record.from_json(records.read_json(directory, records.RECORD))
    return None


def _write(directory: int, record: Record, ended: Ended) -> None:
    with contextlib.suppress(OSError):  # that it is there already, written by a shim, among others
        how = Exit(
            exec_id="",
            code=ended.code,
            signal=ended.signal,
            oom=False,
            started_at_ns=record.started_at_ns,
            exited_at_ns=ended.at_ns,
            pid=record.init_pid,
            start_time=record.init_start_time,
            reason=REASON,
        )
        records.write_json(directory, records.EXIT, how.to_json(), step="zygote.orphan", replace=False)
