"""Files that outlive a process, and locks that do not."""

import fcntl
import os
import secrets
import time
from pathlib import Path
from types import TracebackType
from typing import Self


def atomic_write(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Make `path` hold exactly `data`, durably: a reader, and the machine after a power loss, sees old or new content.

    Raises OSError; then `path` is unchanged and no temporary file remains.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        try:
            _write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def fsync_directory(path: Path) -> None:
    """Make creations, renames and removals in the directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


class LockHeld(Exception):
    """Somebody else holds the lock; `holder` is the pid it wrote down, or None."""

    def __init__(self, path: Path, holder: int | None) -> None:
        super().__init__(f"{path} is locked by process {holder}" if holder else f"{path} is locked by another process")
        self.path = path
        self.holder = holder


LEFT_BEHIND_S, TRY_AGAIN_S = 5.0, 0.02


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(fd: int) -> int | None:
    text = os.pread(fd, 32, 0).strip()
    return int(text) if text.isdigit() else None


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def is_locked(path: Path) -> bool:
    """Whether somebody holds the Lock of this path now; nobody does of a file that is not there. Raises OSError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


class Lock:
    """An exclusive lock on a file, for one daemon per root; freed by release(), or by the kernel when the process dies.

    flock(2), so two locks exclude each other also inside one process. The file itself stays: removing it would let a
    third process lock a new file of the same name.
    """

    def __init__(self, path: Path, *, inherited: int = -1) -> None:
        """Raises LockHeld if it is taken, OSError if the file cannot be made.

        That is at once while who took it lives; children that a killed process had just forked hold it a moment longer.

        inherited: a descriptor that holds it already, from before this program was executed.
        """
        self.path = path
        self._fd = inherited if inherited >= 0 else os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        give_up_at = time.monotonic() + LEFT_BEHIND_S
        while not _try_lock(self._fd):
            holder = _holder(self._fd)
            if holder is None or _lives(holder) or time.monotonic() > give_up_at:
                os.close(self._fd)
                raise LockHeld(path, holder)
            time.sleep(TRY_AGAIN_S)
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def fileno(self) -> int:
        """What holds it, across execve if it is made inheritable."""
        return self._fd

    def release(self) -> None:
        """Free the lock; harmless when repeated."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.release()
