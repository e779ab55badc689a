"""File systems that a program serves (FUSE), mounted before the program is started, and nowhere.

The program is given the connection, open: it needs no privilege to mount and no place. It ends when the last mount of
its file system goes, because the connection ends then; and if it ends first, whoever uses the mount gets ENOTCONN.

It stays in the cgroup of who started it, and not in that of the container it serves: a container that is frozen, or out
of memory, would stop or kill it, and who waits for an answer of it can't be frozen. What it may allocate, which is for
each file that the container looks at, is limited all the same: beyond that it answers with ENOMEM.
Source: Documentation/filesystems/fuse.rst; fuse_session_mount of libfuse 3, "/dev/fd/N" as mount point.
"""

import contextlib
import errno
import fcntl
import os
import select
import signal
from collections.abc import Sequence

from corral.kernel import mount, process, rlimits

_CONNECTION = 3
"""The descriptor that the program finds its connection at."""
START_S = 10.0
"""How long it may take until it answers."""
MEMORY_BYTES = 1 << 30
_WORDS_BYTES = 4096
"""As many of what it writes to its stderr are kept; what comes after finds no room."""
_SEALS = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


def mount_served(program: str, options: Sequence[str], *, subtype: str, attributes: int = 0) -> int:
    """A new, detached mount, and the program, a child of the caller, that serves it: an fd of the mount's root.

    options: the program's own, for its -o. It has answered once when this returns. Raises OSError with what it wrote to
    its stderr; then it has ended.
    """
    words = _memory_for_words()
    try:
        tree, pid = _mount(program, options, subtype, attributes, words)
        pidfd = process.pidfd_open(pid)  # our child, not reaped: the pid is its
        try:
            rlimits.limit_process(pid, "RLIMIT_DATA", MEMORY_BYTES)
            _await_answer(tree, pidfd, program)
        except BaseException as e:
            os.close(tree)
            _end(pidfd)
            if isinstance(e, OSError):
                raise _with_words(e, program, words) from e
            raise
        finally:
            os.close(pidfd)
        return tree
    finally:
        os.close(words)


def _mount(program: str, options: Sequence[str], subtype: str, attributes: int, words: int) -> tuple[int, int]:
    """The mount's root, and the program's pid."""
    connection = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        # The kernel checks modes and owners, as with any other file system, for whoever is in the container.
        ours = (f"fd={connection}", "rootmode=40000", "user_id=0", "group_id=0", "allow_other", "default_permissions")
        tree = mount.new_mount("fuse", subtype, (*ours, f"subtype={subtype}"), attributes=attributes)
        try:
            return tree, _start(program, ",".join(options), connection, words)
        except BaseException:
            os.close(tree)
            raise
    finally:
        os.close(connection)  # else it would not end with the program


def _start(program: str, options: str, connection: int, words: int) -> int:
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    try:
        pid = os.posix_spawn(
            program,
            [os.path.basename(program), "-f", "-o", options, f"/dev/fd/{_CONNECTION}"],  # noqa: PTH119 - a string
            {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
            file_actions=[
                (os.POSIX_SPAWN_DUP2, connection, _CONNECTION),
                (os.POSIX_SPAWN_DUP2, null, 0),
                (os.POSIX_SPAWN_DUP2, null, 1),
                (os.POSIX_SPAWN_DUP2, words, 2),
            ],
            setsid=True,
            setsigmask=(),
        )
        process.lose_oom_protection(pid)
        return pid
    finally:
        os.close(null)


def _await_answer(tree: int, server: int, program: str) -> None:
    """Ask for the root's attributes, by a process that can be killed: who asks can't be interrupted."""
    asking, asker = process.clone(0)
    if asking == 0:
        code = errno.EIO
        try:
            os.fstat(tree)
            code = 0
        except OSError as e:
            code = e.errno or code
        finally:
            os._exit(code)
    try:
        ready = select.select([server, asker], [], [], START_S)[0]
        if not ready:
            raise OSError(errno.ETIMEDOUT, f"it has not answered within {START_S:g} s", program)
        if server in ready:
            raise OSError(errno.ENOTCONN, "it ended", program)
    finally:
        code = _end(asker)
        os.close(asker)
    if code:
        raise OSError(code, f"it does not serve its root: {os.strerror(code).lower()}", program)


def _end(pidfd: int) -> int:
    """Kill a child, if it has not ended yet, and reap it: its exit code, 0 if a signal ended it."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(pidfd, signal.SIGKILL)
    ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    return ended.si_status if ended is not None and ended.si_code == os.CLD_EXITED else 0


def _memory_for_words() -> int:
    """A file of a size that stays, which nobody has to read while the program runs."""
    fd = os.memfd_create("stderr", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.truncate(fd, _WORDS_BYTES)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    return fd


def _with_words(error: OSError, program: str, words: int) -> OSError:
    said = os.pread(words, _WORDS_BYTES, 0).rstrip(b"\0").decode("utf-8", "replace")
    lines = "; ".join(line.strip() for line in said.splitlines() if line.strip())
    return OSError(error.errno, f"{error.strerror}{': ' if lines else ''}{lines}", program)
