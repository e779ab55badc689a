"""Bundles: the directory that a task and its shim share, and the task's directory of logs.

    <state>/shim/<namespace>/<id>/   config.json                   written here, before the shim is spawned
                                     socket                        listening before the shim runs
                                     record.json starting exit.json execs/  written by the shim
    <root>/logs/<namespace>/<id>/    log.json, log.json.1 …        written by the shim
    <state>/trash/ <root>/trash/     either of them, on its way out

The directory is also the intent to create: it is made first, and one that no row describes is undone at the next start.
The state directory is a tmpfs as a rule, and nothing in it waits for a disk in any case: making and discarding a bundle
is done on the event loop. What reads whole files, or is about logs, belongs on a thread.
"""

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from corral.rpc.context import ID_PATTERN
from corral.store import Trash
from corral.tasks.identity import Identity
from corral.tasks.model import Exit, TaskKey, optional_int

CONFIG, SOCKET = "config.json", "socket"
RECORD, EXIT, EXECS, STARTING = "record.json", "exit.json", "execs", "starting"
LOGS, LOG = "logs", "log.json"
BACKLOG = 128


def default_log(root: Path, key: TaskKey) -> str:
    """The log of a task whose maker named no place for it."""
    return f"{root}/{LOGS}/{key.namespace}/{key.id}/{LOG}"


@dataclass(frozen=True, slots=True)
class Record:
    """What record.json tells."""

    shim: Identity | None
    init: Identity | None
    started_at_ns: int | None


@dataclass(frozen=True, slots=True)
class Bundle:
    """The directories of one task; they need not exist."""

    key: TaskKey
    path: Path
    logs: Path
    trash: Trash
    logs_trash: Trash

    def make(self, config: bytes) -> socket.socket:
        """Create the directory and config.json; returns the socket that the shim shall listen on.

        Raises FileExistsError if the bundle is there already, OSError; then nothing of it is left.
        """
        _make_directory(self.path)
        try:
            _write(f"{self.path}/{CONFIG}", config)
            return self._bound()
        except BaseException:
            self.discard()
            raise

    def make_logs(self) -> None:
        """Create the directory of logs. Blocks."""
        self.logs.mkdir(mode=0o700, parents=True, exist_ok=True)

    def listen(self) -> socket.socket:
        """Bind the bundle's socket anew and listen on it."""
        with suppress(FileNotFoundError):
            (self.path / SOCKET).unlink()
        return self._bound()

    def _bound(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with self._opened() as directory:
                listener.bind(f"/proc/self/fd/{directory}/{SOCKET}")
            listener.listen(BACKLOG)
        except BaseException:
            listener.close()
            raise
        return listener

    def connect(self) -> socket.socket:
        """A non-blocking connection to whoever holds the listening socket.

        Raises ConnectionRefusedError if nobody does, so no shim lives or is about to; FileNotFoundError without a
        socket.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            with self._opened() as directory:
                connection.connect(f"/proc/self/fd/{directory}/{SOCKET}")
        except BaseException:
            connection.close()
            raise
        return connection

    def process(self) -> dict[str, object]:
        """The process object of config.json. Raises OSError."""
        process = _read(self.path / CONFIG).get("process")
        return process if isinstance(process, dict) else {}

    def exists(self) -> bool:
        return self.path.is_dir()

    def record(self) -> Record:
        """record.json; empty if it was not written yet."""
        content = _read(self.path / RECORD)
        return Record(_identity(content, "shim"), _identity(content, "init"), optional_int(content, "started_at_ns"))

    def exit(self) -> Exit | None:
        """How init ended, if its shim wrote that down."""
        return _exit(self.path / EXIT)

    def may_have_run(self) -> bool:
        """Whether a shim may have told init to become its program."""
        return (self.path / STARTING).exists()

    def exec_exit(self, exec_id: str) -> Exit | None:
        """How an exec ended, if the shim wrote that down."""
        return _exit(self.path / EXECS / f"{exec_id}.json")

    def discard(self) -> None:
        """Free both names for a new task at once; harmless when they are gone."""
        if os.path.lexists(self.logs):  # as a rule the log is elsewhere
            self.logs_trash.throw(self.logs)
        self.trash.throw(self.path)

    @contextmanager
    def _opened(self) -> Iterator[int]:
        # A socket's path may have 107 bytes; through the directory's descriptor any bundle's is short.
        fd = os.open(self.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)


class Bundles:
    """Where all bundles are."""

    def __init__(self, state: Path, root: Path) -> None:
        self._shims, self._logs = state / "shim", root / LOGS
        self._trash, self._logs_trash = Trash(state / "trash"), Trash(root / "trash")

    def of(self, key: TaskKey) -> Bundle:
        below = f"{key.namespace}/{key.id}"
        path, logs = Path(f"{self._shims}/{below}"), Path(f"{self._logs}/{below}")
        return Bundle(key, path, logs, self._trash, self._logs_trash)

    def empty_trash(self) -> None:
        """Remove what an earlier process threw away and did not get to remove. Blocks."""
        self._trash.empty_or_report()
        self._logs_trash.empty_or_report()

    async def close(self) -> None:
        """Remove what was thrown away just now."""
        await self._trash.close()
        await self._logs_trash.close()

    def found(self) -> set[TaskKey]:
        """Every task that has a bundle or a directory of logs."""
        return set(_keys(self._shims)) | set(_keys(self._logs))


def _make_directory(path: Path) -> None:
    """With its parents, which are there as a rule. Raises FileExistsError."""
    try:
        os.mkdir(path, 0o700)  # noqa: PTH102 - in the path of every creation
    except FileNotFoundError:
        for parent in (path.parent.parent, path.parent):  # mkdir()'s mode is not that of the parents it makes
            parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.mkdir(mode=0o700)


def _write(path: str, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        while data:
            data = data[os.write(fd, data) :]
    finally:
        os.close(fd)


def _keys(parent: Path) -> Iterator[TaskKey]:
    for namespace in _names(parent):
        for task_id in _names(parent / namespace):
            yield TaskKey(namespace, task_id)


def _names(parent: Path) -> list[str]:
    try:
        return [entry.name for entry in os.scandir(parent) if entry.is_dir() and ID_PATTERN.fullmatch(entry.name)]
    except FileNotFoundError:
        return []


def _read(path: Path) -> dict[str, object]:
    """The JSON object in a file; empty if there is none. A shim renames its files into place, so none is half there;
    where power was lost, one may be that has nothing in it."""
    try:
        content = json.loads(path.read_bytes() or b"{}")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError as e:
        raise OSError(errno.EIO, f"not JSON: {e}", str(path)) from e
    return content if isinstance(content, dict) else {}


def _identity(record: dict[str, object], who: str) -> Identity | None:
    pid, start_time = optional_int(record, f"{who}_pid"), optional_int(record, f"{who}_start_time")
    return Identity(pid, start_time) if pid and start_time else None


def _exit(path: Path) -> Exit | None:
    content = _read(path)
    try:
        return Exit.from_shim(content) if content else None
    except ValueError as e:
        raise OSError(errno.EIO, str(e), str(path)) from e
