"""What is left of a container whose shim was killed first, kept by whoever inherited its processes: output, exit."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from corral.oci.runtime import ProcessHandle
from corral.shim import records
from corral.shim.adoption import EndWatch, hold
from corral.shim.loop import Loop
from corral.shim.process import Ended
from corral.shim.records import Exit, Record
from corral.shim.spool import STREAMS

REASON = "its shim was killed before it could report the exit"


class Orphaned:
    """A bundle without a shim. While its FIFOs are held open, what was written to them stays, whoever wrote it ends.

    Its container's end is written down, also if somebody else reaps it.
    """

    __slots__ = ("_bundle", "_fifos", "_init", "_loop", "_recorded")

    def __init__(self, loop: Loop, bundle: Path) -> None:
        """Hold what there is; a terminal has no FIFOs."""
        self._loop, self._bundle = loop, bundle
        self._fifos: list[int] = []
        self._recorded: tuple[int, int] | None = None  # pid and start time of its shim
        self._init = -1
        for name in STREAMS:
            with contextlib.suppress(OSError):
                self._fifos.append(os.open(bundle / name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC))
        with contextlib.suppress(OSError), _opened(bundle) as directory:
            record = _record(directory)
            if record is not None:
                self._recorded = record.shim_pid, record.shim_start_time
                self._watch(hold(record.init_pid, record.init_start_time))

    @property
    def is_held(self) -> bool:
        """Whether there is anything of it."""
        return bool(self._fifos) or self._init >= 0

    def has_heir(self) -> bool:
        """Whether another shim has taken over since, or nobody will: the bundle is gone, or its shim wrote the exit."""
        try:
            with _opened(self._bundle) as directory:
                record = _record(directory)
                if record is None or (record.shim_pid, record.shim_start_time) != self._recorded:
                    return True
                return _is_told(directory)
        except OSError:
            return True

    def close(self) -> None:
        """Let go of it; harmless when repeated."""
        while self._fifos:
            os.close(self._fifos.pop())
        if self._init >= 0:
            self._loop.forget(self._init)
            os.close(self._init)
            self._init = -1

    def _watch(self, init: ProcessHandle) -> None:
        self._init = init.pidfd
        if init.pidfd >= 0:
            EndWatch(self._loop, init, written=lambda: None, on_end=lambda ended: self._ended(init, ended))

    def _ended(self, init: ProcessHandle, ended: Ended) -> None:
        if self._init < 0:
            return
        os.close(self._init)
        self._init = -1
        if ended.status is not None:
            write_exit([self._bundle], init.pid, ended)


@contextlib.contextmanager
def _opened(bundle: Path) -> Iterator[int]:
    directory = os.open(bundle, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield directory
    finally:
        os.close(directory)


def write_exit(bundles: Iterable[Path], pid: int, ended: Ended) -> None:
    """Write exit.json into the bundle whose record names this pid as init, if there is one and it has none.

    The caller has just reaped it, or held it by a pidfd: the pid is that process's.
    """
    for bundle in bundles:
        with contextlib.suppress(OSError), _opened(bundle) as directory:  # else it is deleted
            record = _record(directory)
            if record is not None and record.init_pid == pid:
                _write(directory, record, ended)
                return


def _record(directory: int) -> Record | None:
    with contextlib.suppress(OSError, ValueError):
        return Record.from_json(records.read_json(directory, records.RECORD))
    return None


def _is_told(directory: int) -> bool:
    """Whether a shim wrote exit.json: what is written in its place has this module's reason."""
    with contextlib.suppress(OSError, ValueError):
        return records.read_json(directory, records.EXIT).get("reason") != REASON
    return False


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
