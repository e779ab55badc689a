"""The exit of a container whose shim was killed first, told by whoever inherited its process."""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from corral.shim import records
from corral.shim.process import Ended
from corral.shim.records import Exit, Record

REASON = "its shim was killed before it could report the exit"


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
    with contextlib.suppress(OSError):
        if records.exists(directory, records.EXIT):
            return
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
        records.write_json(directory, records.EXIT, how.to_json(), step="zygote.orphan")
