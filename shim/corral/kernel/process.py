"""Processes: made with clone or clone3, named by pidfd or by pid and start time, and the prctl(2) switches of oneself.

The only place of corral that forks.
"""

import _signal  # type: ignore[import-not-found]
import contextlib
import ctypes
import errno
import fcntl
import os
import signal
import struct
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from corral.kernel.syscalls import MACHINE, PROC_SUPER_MAGIC, check, filesystem_magic, libc, syscall

CLONE_PIDFD = 0x00001000
CLONE_PARENT = 0x00008000
CLONE_INTO_CGROUP = 0x200000000

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_KEEPCAPS = 8
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38


_CLONE_ARGS = struct.Struct("=11Q")
"""struct clone_args: flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid, set_tid_size,
cgroup."""

_ulong = ctypes.c_ulong
_prctl = libc("prctl", ctypes.c_int, _ulong, _ulong, _ulong, _ulong)
_prctl_name = libc("prctl", ctypes.c_int, ctypes.c_char_p, _ulong, _ulong, _ulong)
# Through PyDLL the interpreter lock stays held over the call, so parent and child both return holding it.
_python = ctypes.PyDLL(None, use_errno=True)
_clone3 = _python["syscall"]
_clone3.argtypes = (ctypes.c_long, ctypes.c_char_p, ctypes.c_size_t)
_clone3.restype = ctypes.c_long
_clone = _python["syscall"]
_clone.argtypes = (ctypes.c_long, _ulong, _ulong, ctypes.c_void_p, _ulong, _ulong)
_clone.restype = ctypes.c_long
_before_fork = _python["PyOS_BeforeFork"]
_after_fork_parent = _python["PyOS_AfterFork_Parent"]
_after_fork_child = _python["PyOS_AfterFork_Child"]
_close_range = syscall("close_range", ctypes.c_uint, ctypes.c_uint, ctypes.c_int)
_close = libc("close", ctypes.c_int)
_LAST_FD = 0xFFFFFFFF
_NR_OPEN = 1 << 20
"""No fd is higher, unless the host's fs.nr_open was raised."""
_SYS_CLONE3 = 435
_SYS_CLONE = {"x86_64": 56, "aarch64": 220}[MACHINE]
_SIGNALS = tuple(int(number) for number in signal.valid_signals())


def fork() -> int:
    """os.fork(), for the single-threaded processes of the shim."""
    return os.fork()


def clone(flags: int, *, cgroup: int | None = None) -> tuple[int, int]:
    """Fork with CLONE_NEW* flags: (pid, pidfd) in the parent, (0, -1) in the child.

    The caller must be single-threaded. cgroup: an fd of a cgroup v2 directory in which the child is born, which saves
    the wait for an RCU grace period that moving a process there costs. With CLONE_PARENT it is a sibling, not a child.
    Without a cgroup it is clone(2), whose flags a filter can see, and only that.
    """
    pidfd = ctypes.c_int(-1)
    place = ctypes.addressof(pidfd)
    exit_signal = 0 if flags & CLONE_PARENT else signal.SIGCHLD  # a sibling's exit signals as the caller's own does
    every = flags | CLONE_PIDFD | (0 if cgroup is None else CLONE_INTO_CGROUP)
    args = clone_arguments(every, cgroup=cgroup or 0, pidfd_at=place, exit_signal=exit_signal)
    _before_fork()
    if cgroup is None:
        pid = _clone(_SYS_CLONE, every | exit_signal, 0, place, 0, 0)
    else:
        pid = _clone3(_SYS_CLONE3, args, _CLONE_ARGS.size)
    if pid == 0:
        _after_fork_child()
        return 0, -1
    code = ctypes.get_errno()
    _after_fork_parent()
    ctypes.set_errno(code)
    if pid < 0 and cgroup is not None:
        check(pid, f"clone3 flags={flags:#x} into cgroup", os.readlink(f"/proc/self/fd/{cgroup}"))  # noqa: PTH115 - no Path
    check(pid, f"clone flags={flags:#x}")
    return pid, pidfd.value


def clone_arguments(flags: int, *, cgroup: int = 0, pidfd_at: int = 0, pid_at: int = 0, exit_signal: int = 0) -> bytes:
    """A struct clone_args."""
    return _CLONE_ARGS.pack(flags, pidfd_at, 0, pid_at, exit_signal, 0, 0, 0, 0, 0, cgroup)


def spawn(executable: int, kept: Iterable[int]) -> int:
    """A child that is another program from the start, which nothing of this process has to be copied for; its pid.

    It has fds 0, 1 and 2, those that are kept, and signals that are blocked as they are here; none is ignored.
    """
    return os.posix_spawn(
        f"/proc/self/fd/{executable}",
        ("corral-exec",),
        {},
        file_actions=[(os.POSIX_SPAWN_DUP2, fd, fd) for fd in kept],  # which makes it inheritable
        setsigdef=_SIGNALS,
    )


def pidfd_open(pid: int) -> int:
    """A pidfd, close-on-exec. Compare start_time afterwards: the pid may have been reused before.

    Raises ProcessLookupError if no process has that pid, also if a thread has (EINVAL, later ENOENT).
    """
    try:
        return os.pidfd_open(pid)
    except OSError as e:
        if e.errno in (errno.EINVAL, errno.ENOENT):
            raise ProcessLookupError(errno.ESRCH, f"pidfd_open {pid}: no process has this pid") from e
        raise


def send_signal(pidfd: int, number: int) -> None:
    """Signal the process of a pidfd; raises ProcessLookupError when it has been reaped."""
    signal.pidfd_send_signal(pidfd, number)


def check_unreaped(pidfd: int) -> None:
    """Raise ProcessLookupError if the process was reaped; if not, what was read by its pid before was about it."""
    send_signal(pidfd, 0)


def start_time(pid: int | str) -> int:
    """Field 22 of /proc/<pid>/stat: clock ticks after boot; with the pid it names a process for good.

    Raises FileNotFoundError (or ProcessLookupError) if there is no such process.
    """
    return int(_stat(pid)[_START_TIME])


def has_executed(pid: int, started: int) -> bool | None:
    """Whether the process of a pid and start time has become another program since it was made; None if it is reaped.

    Source: proc_pid_stat(5), field 9; PF_FORKNOEXEC of the kernel's sched.h, which execve takes away before it closes
    what is close-on-exec.
    """
    try:
        fields = _stat(pid)
    except (FileNotFoundError, ProcessLookupError):
        return None
    return not int(fields[_FLAGS]) & _PF_FORKNOEXEC if int(fields[_START_TIME]) == started else None


def is_dying(pid: int) -> bool:
    """Whether a process has begun to end, was sent a SIGKILL, or is gone.

    Source: proc_pid_stat(5), field 9, PF_EXITING; proc_pid_status(5), ShdPnd: no SIGKILL is ever taken out of there.
    """
    try:
        fields = _stat(pid)
        if fields[_STATE] in _ENDED or int(fields[_FLAGS]) & _PF_EXITING:
            return True
        return bool(int(_status(pid, b"ShdPnd:")[0], 16) >> signal.SIGKILL - 1 & 1)
    except (FileNotFoundError, ProcessLookupError):
        return True


def is_traced_from_below(pid: int) -> bool:
    """Whether a process has a tracer in a PID namespace below that of /proc: who traces us with our children has not.

    Source: proc_pid_status(5), TracerPid and NSpid.
    """
    try:
        tracer = int(_status(pid, b"TracerPid:")[0])
        return tracer != 0 and len(_status(tracer, b"NSpid:")) > 1
    except (FileNotFoundError, ProcessLookupError):
        return False


def lineage(pid: int) -> tuple[int, int]:
    """The parent of a process, and its session.

    Raises FileNotFoundError or ProcessLookupError if it is gone. Source: proc_pid_stat(5), fields 4 and 6.
    """
    fields = _stat(pid)
    return int(fields[_PARENT]), int(fields[_SESSION])


def zombie_status(pid: int, started: int) -> int | None:
    """How the process of a pid and start time ended, as wait(2) would tell, if it has and nobody has reaped it.

    0 to a caller who lacks CAP_SYS_PTRACE over it. Raises FileNotFoundError (or ProcessLookupError) if it is gone.
    Source: proc_pid_stat(5), field 52.
    """
    fields = _stat(pid)
    if fields[_STATE] != b"Z" or int(fields[_START_TIME]) != started:
        return None
    return int(fields[_EXIT_CODE])


_STATE, _PARENT, _SESSION, _FLAGS, _START_TIME, _EXIT_CODE = 0, 1, 3, 6, 19, 49
_PF_EXITING, _PF_FORKNOEXEC = 0x4, 0x40
_ENDED = frozenset((b"Z", b"X"))


def _stat(pid: int | str) -> list[bytes]:
    """The fields of /proc/<pid>/stat from the third one on."""
    fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    try:
        stat = os.read(fd, 4096)
    finally:
        os.close(fd)
    # The name in parentheses may hold spaces and parentheses itself: count from the last one.
    return stat[stat.rindex(b")") + 2 :].split()


def _status(pid: int, name: bytes) -> list[bytes]:
    """What /proc/<pid>/status says behind a name."""
    with open(f"/proc/{pid}/status", "rb") as status:
        return next((line.split()[1:] for line in status if line.startswith(name)), [b"0"])


@dataclass(frozen=True, slots=True)
class ProcessInfo:
    """What a pidfd tells. exit_status is in the form of wait(2), None while the process lives."""

    pid: int
    ppid: int
    uid: int
    gid: int
    exit_status: int | None


# struct pidfd_info, version 0: mask, cgroupid, pid tgid ppid, r/e/s/fs uid and gid in pairs, exit_code.
_INFO = struct.Struct("=QQ11Ii")
_PIDFD_GET_INFO = 0xC000FF0B | _INFO.size << 16
_INFO_PID, _INFO_CREDS, _INFO_EXIT = 1, 2, 8


def pidfd_info(pidfd: int) -> ProcessInfo:
    """PIDFD_GET_INFO, with the exit status even after somebody else reaped the process (Linux >= 6.15).

    Raises OSError(ESRCH) when the process is gone and its status with it; ENOTTY or EINVAL where the kernel lacks it.
    """
    request = _INFO.pack(_INFO_PID | _INFO_CREDS | _INFO_EXIT, *[0] * 13)
    fields = _INFO.unpack(fcntl.ioctl(pidfd, _PIDFD_GET_INFO, request))
    status = fields[13] if fields[0] & _INFO_EXIT else None
    return ProcessInfo(pid=fields[2], ppid=fields[4], uid=fields[5], gid=fields[6], exit_status=status)


def close_fds(keep: Iterable[int]) -> None:
    """Close every fd but those in keep."""
    kept, low = sorted(set(keep)), 0
    for fd in (*kept, _LAST_FD + 1):
        if fd > low and _close_range(low, fd - 1, 0) < 0:
            _close_singly(kept)  # a filter of the container's refuses it
            return
        low = fd + 1


def _close_singly(kept: Collection[int]) -> None:
    """The same, one fd after the other: those above a limit that was lowered since, too.

    os.closerange() leaves these to libc's closefrom(), which closes what is kept with them, and aborts without a /proc.
    """
    try:
        found: Iterable[int] = _open_fds()
    except OSError:
        found = range(_NR_OPEN)
    for fd in found:
        if fd not in kept:
            _close(fd)  # most of a million are not open: what os.close() raised would take a second


def _open_fds() -> list[int]:
    """This process's fds. Raises OSError where they can't be read: in an image /proc may be any directory."""
    fd = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if filesystem_magic(fd) != PROC_SUPER_MAGIC:
            raise OSError(errno.ENOENT, "no procfs is mounted", "/proc")
        return [int(name) for name in os.listdir(fd)]  # noqa: PTH208 - by fd
    finally:
        os.close(fd)


def set_child_subreaper() -> None:
    """Orphans below this process become its children."""
    check(_prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl PR_SET_CHILD_SUBREAPER")


def set_dumpable(dumpable: bool) -> None:
    """Non-dumpable: only a fully privileged process can ptrace this one or follow its /proc/<pid>/{exe,fd,root}."""
    check(_prctl(_PR_SET_DUMPABLE, int(dumpable), 0, 0, 0), "prctl PR_SET_DUMPABLE")


def set_no_new_privs() -> None:
    """No exec of this process or its children gains privilege."""
    check(_prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl PR_SET_NO_NEW_PRIVS")


def set_keep_capabilities(keep: bool) -> None:
    """Keep the permitted capabilities over a change from uid 0 to another (until exec)."""
    check(_prctl(_PR_SET_KEEPCAPS, int(keep), 0, 0, 0), "prctl PR_SET_KEEPCAPS")


def set_parent_death_signal(number: int) -> None:
    """Get a signal when the thread that made this process ends."""
    check(_prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0), "prctl PR_SET_PDEATHSIG")


def set_name(name: str) -> None:
    """The name ps shows (15 bytes of it)."""
    check(_prctl_name(_PR_SET_NAME, name.encode(), 0, 0, 0), "prctl PR_SET_NAME")


def name_of(pid: int) -> str:
    """The name ps shows, also of one that nobody has reaped yet.

    Raises FileNotFoundError (or ProcessLookupError) if there is no such process.
    """
    fd = os.open(f"/proc/{pid}/comm", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 64).decode(errors="replace").removesuffix("\n")
    finally:
        os.close(fd)


def lose_oom_protection(pid: int | str = "self") -> None:
    """Raise an OOM score adjustment below 0 to 0; it stays where /proc does not allow that. Source: proc(5)."""
    with contextlib.suppress(OSError):
        fd = os.open(f"/proc/{pid}/oom_score_adj", os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.read(fd, 16).startswith(b"-"):
                os.pwrite(fd, b"0", 0)
        finally:
            os.close(fd)


def reset_signals() -> None:
    """Every signal back to its default action: an ignored one would stay so over exec (Python ignores SIGPIPE)."""
    # By the part in C, here and below: the other makes an enum's member of each.
    for number in _SIGNALS:
        if _signal.getsignal(number) not in (_signal.SIG_DFL, None):
            _signal.signal(number, _signal.SIG_DFL)


def unblock_signals() -> None:
    """An empty signal mask; what was pending is delivered now."""
    _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
