"""A cgroup that nobody can remove as long as this process wants to read of it.

On v1 a cgroup may have threads of a process whose others are elsewhere. One of ours that does nothing is in it, so it
is not empty. Of memory that has no other effect: what a process takes is charged to where its first thread is, and the
OOM killer looks at first threads alone. But the cgroup lists this process.

Source: kernel cgroup-v1/cgroups.rst "Attaching processes"; mm/memcontrol.c mem_cgroup_scan_tasks().
"""

import _thread
import errno
import os

from corral.kernel.cgroup import files

TASKS = "tasks"
_ITSELF = "0"
_STACK_BYTES = 64 << 10


class Foothold:
    """A thread in a cgroup, until close() or the end of this process."""

    __slots__ = ("_leave",)

    def __init__(self, directory: str) -> None:
        """Raises OSError: ENOENT or ENODEV if it is gone."""
        waits, self._leave = os.pipe2(os.O_CLOEXEC)
        has_come, failed = _thread.allocate_lock(), []

        def stay() -> None:
            try:
                files.write(f"{directory}/{TASKS}", _ITSELF)
            except OSError as e:
                failed.append(e)
            finally:
                has_come.release()
            if not failed:
                os.read(waits, 1)
            os.close(waits)

        has_come.acquire()
        size = _thread.stack_size(_STACK_BYTES)
        try:
            _thread.start_new_thread(stay, ())
        except RuntimeError as e:
            os.close(waits)
            os.close(self._leave)
            raise OSError(errno.EAGAIN, str(e), directory) from e
        finally:
            _thread.stack_size(size)
        has_come.acquire()
        if failed:
            os.close(self._leave)
            raise failed[0]

    def close(self) -> None:
        """Let it be removed, a moment later."""
        if self._leave >= 0:
            os.write(self._leave, b"\0")  # a forked child may have the pipe, too
            os.close(self._leave)
            self._leave = -1
