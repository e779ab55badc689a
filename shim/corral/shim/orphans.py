"""What is left of a container whose shim was killed first, kept by whoever inherited its processes: output, exit."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from corral.kernel import process
from corral.oci.reaper import has_begun
from corral.oci.runtime import ProcessHandle
from corral.shim import records
from corral.shim.adoption import EndWatch, hold
from corral.shim.keeping import Counter, Kept
from corral.shim.loop import Loop
from corral.shim.process import UNKNOWN, Ended
from corral.shim.records import Exit, Record
from corral.shim.requests import PIDFD
from corral.shim.spool import STREAMS


class Orphaned:
    """A bundle without a shim. While its FIFOs are held open, what was written to them stays, whoever wrote it ends.

    Its container's end is written down, also if somebody else reaps it.
    """

    __slots__ = ("_bundle", "_counter", "_fifos", "_init", "_kept", "_loop", "_recorded")

    def __init__(self, loop: Loop, bundle: Path, kept: Kept) -> None:
        """Hold what there is, and what its shim gave away; a terminal has no FIFOs."""
        self._loop, self._bundle, self._kept = loop, bundle, kept
        self._counter: Counter | None = None
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
                pidfd = kept.streams.get("", {}).pop(PIDFD, -1)
                self._watch(hold(record.init_pid, record.init_start_time, pidfd))
                self._counter = Counter(loop, bundle, kept)

    def exec_ended(self, pid: int, ended: Ended) -> bool:
        """Write down how an exec of it ended; whether the pid is one's."""
        return write_exec_exit(self._bundle, self._kept, pid, ended)

    @property
    def is_held(self) -> bool:
        """Whether there is anything of it."""
        return bool(self._fifos) or self._init >= 0 or any(self._kept.streams.values())

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
        self._kept.close()
        if self._counter is not None:
            self._counter.close()
            self._counter = None
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

    The caller is about to reap it, or held it by a pidfd: the pid is that process's.
    """
    for bundle in bundles:
        with contextlib.suppress(OSError), _opened(bundle) as directory:  # else it is deleted
            record = _record(directory)
            if record is not None and record.init_pid == pid:
                _write(directory, record, ended)
                return


def write_exec_exit(bundle: Path, kept: Kept, pid: int, ended: Ended) -> bool:
    """Write down how an exec ended that its shim has told of; whether it has.

    The caller is about to reap it.
    """
    known = kept.execs.pop(pid, None)
    if known is None:
        return False
    how = _exit(ended, pid, known.start_time, known.started_at_ns, exec_id=known.exec_id)
    if process.has_executed(pid, known.start_time) is False:
        how = replace(how, code=UNKNOWN, signal=None, known=False, started_at_ns=None, reason=records.UNSTARTED)
    with contextlib.suppress(OSError), _opened(bundle) as directory:  # else it is deleted, or was written by the shim
        name = records.exit_file(known.exec_id)
        records.write_json(directory, name, how.to_json(), step="zygote.orphan_exec", replace=False)
    return True


def _record(directory: int) -> Record | None:
    with contextlib.suppress(OSError, ValueError):
        return Record.from_json(records.read_json(directory, records.RECORD))
    return None


def _is_told(directory: int) -> bool:
    """Whether a shim wrote exit.json: what is written in its place has this module's reason."""
    with contextlib.suppress(OSError, ValueError):
        return records.read_json(directory, records.EXIT).get("reason") not in (records.BY_ZYGOTE, records.UNSTARTED)
    return False


def _write(directory: int, record: Record, ended: Ended) -> None:
    how = _exit(ended, record.init_pid, record.init_start_time, record.started_at_ns)
    with contextlib.suppress(OSError):  # an end that can't be looked into is written down all the same
        if has_begun(record.init_pid, record.init_start_time) is False:
            how = replace(how, reason=records.UNSTARTED)
    with contextlib.suppress(OSError):  # that it is there already, written by a shim, among others
        records.write_json(directory, records.EXIT, how.to_json(), step="zygote.orphan", replace=False)


def _exit(ended: Ended, pid: int, start_time: int, started_at_ns: int | None, *, exec_id: str = "") -> Exit:
    return Exit(
        exec_id=exec_id,
        code=ended.code,
        signal=ended.signal,
        oom=False,
        started_at_ns=started_at_ns,
        exited_at_ns=ended.at_ns,
        pid=pid,
        start_time=start_time,
        reason=records.BY_ZYGOTE,
    )
