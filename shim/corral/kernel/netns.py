"""Network namespaces that live without a process: made, pinned by a bind mount, entered and removed.

Safe in a threaded process: the calling thread never changes its namespace; a thread of its own does, and ends.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterable

from corral.kernel import mount
from corral.kernel.namespaces import Kind, join, leave, open_namespace
from corral.kernel.syscalls import Path as AnyPath


def create_pinned(path: AnyPath, prepare: Callable[[], object] | None = None) -> None:
    """Make a new network namespace and pin it at path, which must not exist; its directory must.

    `prepare` runs inside it first. Raises FileExistsError where path is taken. On any failure nothing is left behind.
    """
    create_each_pinned((path,), prepare)


def create_each_pinned(paths: Iterable[AnyPath], prepare: Callable[[], object] | None = None) -> None:
    """create_pinned() for one path after the other, all on one thread, which also asks for them.

    Raises for the first that fails; those before it stay.
    """

    def work() -> None:
        for path in paths:
            _create_pinned_here(path, prepare)

    in_own_thread(work)


def _create_pinned_here(path: AnyPath, prepare: Callable[[], object] | None) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDONLY | os.O_CLOEXEC, 0o444))
    try:
        leave(Kind.NETWORK.flag)
        if prepare is not None:
            prepare()
        mount.bind("/proc/thread-self/ns/net", path)
    except BaseException:
        os.unlink(path)  # noqa: PTH108 - whatever kind of path it is
        raise


def remove_pinned(path: AnyPath) -> None:
    """Unpin the namespace at path and remove the file. What runs inside keeps the namespace until it ends.

    Removing what is not there (or not pinned) is no error.
    """
    try:
        mount.umount(path, mount.MNT_DETACH)
    except FileNotFoundError:
        return
    except OSError as e:
        if e.errno != 22:  # EINVAL: a plain file, not a mount: made, but never pinned
            raise
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)  # noqa: PTH108 - likewise


def in_namespace[T](path: AnyPath, work: Callable[[], T]) -> T:
    """Run work inside the network namespace at path, on a thread of its own, and return what it returns."""

    def enter() -> T:
        fd = open_namespace(path)
        try:
            join(fd, Kind.NETWORK.flag, what=path)
        finally:
            os.close(fd)
        return work()

    return in_own_thread(enter)


def in_own_thread[T](work: Callable[[], T]) -> T:
    """Run work on a new thread, wait for it, and return or raise what it did.

    A thread's namespaces die with it, so whatever work changes with setns or unshare touches nobody else.
    """
    outcome: list[T] = []
    problem: list[BaseException] = []

    def body() -> None:
        try:
            outcome.append(work())
        except BaseException as e:  # noqa: BLE001 - raised again on the caller's thread
            problem.append(e)

    thread = threading.Thread(target=body, name="corral-netns")
    thread.start()
    thread.join()
    if problem:
        raise problem[0]
    return outcome[0]
