"""The way of corral.oci.join as a list of system calls, so that no Python has to be forked to go it.

    runtime --vfork--> the calls of corral.kernel.sequence, outside of the container
                         --> born in its v2 cgroup, if there is one
                               --> born in its PID namespace --execve--> the program

Each of them tells the runtime who comes after it, who waits until that is known.

It is taken for who joined the container before by Python, and so is known: as whom, and what the files that say so
looked like. Whatever is not as it was expected to be, or fails, ends it, and then it is Python that finds out and says
why. So nothing is decided here; and the order, and what each process has by the time that it is born, is that of join
and of corral.oci.program.
"""

import _socket as socket  # as corral.oci.channel
import contextlib
import errno
import os
import resource
import signal
import stat
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from functools import cache

from corral.kernel import capabilities, paths, process, rlimits
from corral.kernel.paths import RESOLVE_IN_ROOT, RESOLVE_NO_MAGICLINKS
from corral.kernel.seccomp import Filter
from corral.kernel.sequence import MACHINES, RESULT, SCRATCH, Argument, Call, How, Words, image
from corral.kernel.syscalls import AT_FDCWD, MACHINE
from corral.oci import program as programs
from corral.oci.attendance import ProcessHandle, becomes_program, heeded, kill_and_reap, patience, reap_predecessor
from corral.oci.cgroups import Membership
from corral.oci.channel import START, EndedEarly, ParentEnd, make_pair
from corral.oci.crossing import sealed
from corral.oci.errors import ExecFailed
from corral.oci.program import Program
from corral.oci.seccomp import asks, lets_pass
from corral.oci.spec import Seccomp
from corral.oci.stdio import Stdio
from corral.oci.users import DATABASES, Sighting

# Source: the kernel's syscall_64.tbl.
_WRITE, _CLOSE, _FSTAT, _SIGPROCMASK, _READ, _DUP2, _RECVFROM, _CLONE, _EXECVE = 1, 3, 5, 14, 0, 33, 45, 56, 59
_FCNTL, _GETCWD, _FCHDIR, _UMASK, _SETSID, _SETGROUPS, _SETRESUID, _SETRESGID = 72, 79, 81, 95, 112, 116, 117, 119
_PRCTL, _EXIT_GROUP, _KEYCTL, _OPENAT, _PRLIMIT, _SETNS, _SECCOMP, _CLONE3 = 157, 231, 250, 257, 302, 308, 317, 435
_CAPSET, _CLOSE_RANGE, _OPENAT2 = 126, 436, 437
_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE, _PR_SET_KEEPCAPS, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 4, 8, 24, 38, 47
_AMBIENT_RAISE, _AMBIENT_CLEAR_ALL = 2, 4
_JOIN_SESSION_KEYRING = 1
_SECCOMP_SET_MODE_FILTER = 1
_FD_CLOEXEC = 1
_F_SETFD = 2
_LAST_FD = 0xFFFFFFFF
_BEHIND_THE_FILTER = (
    asks("clone", first=process.CLONE_PARENT),
    asks("prctl", first=_PR_SET_PDEATHSIG),
    asks("read", "recvfrom", "setsid", "fcntl", "rt_sigprocmask", "execve", "write", "exit_group"),
)
_WITHOUT_NO_NEW_PRIVS = asks("prctl", "setgroups", "setresgid", "setresuid", "capset", "close_range")
"""What is behind it then as well, since to load it needs a capability."""

# Source: struct stat of x86-64: what it has at which place.
_ST_DEV_INO, _ST_MODE, _ST_RDEV, _ST_SIZE, _ST_MTIM_CTIM = 0, 24, 40, 48, 88
_NULL_MODE, _NULL_DEVICE = stat.S_IFCHR | 0o666, os.makedev(1, 3)
_SECOND = 1_000_000_000

SETUP_S = 10.0


def suits(program: Program, seccomp: Seccomp | None, stdio: Stdio) -> bool:
    """Whether there is nothing to be done that these calls do not do."""
    return (
        MACHINE in MACHINES
        and not program.terminal
        and not program.in_user_namespace
        and program.allotment is None
        and program.labels is None
        and not stdio.kept
        and all(fd > 2 for fd in stdio.given())
        and _passes(seccomp, program.no_new_privs)
    )


@cache
def _passes(profile: Seccomp | None, no_new_privs: bool) -> bool:
    return lets_pass(profile, (*_BEHIND_THE_FILTER, *([] if no_new_privs else [_WITHOUT_NO_NEW_PRIVS])))


class Files:
    """The programs that a container's execs were. One that is wanted again, a health check, say, is there already.

    But each exec has a file of its own: at one that was executed a container may get, and then, by a lease or by
    fanotify, have whoever executes it again wait.
    """

    __slots__ = ("_content", "_wanted", "of_use")

    def __init__(self) -> None:
        self.of_use = True
        """Whether they can be executed here, as far as is known."""
        self._wanted: object = None
        self._content = b""

    def of(self, program: Program, sighting: Sighting, stdio: Stdio, descriptors: "Descriptors", flags: int) -> int:
        """The file of an exec."""
        wanted = program, sighting, stdio, descriptors, flags
        if wanted != self._wanted:
            calls = _calls(program, sighting, stdio, descriptors, flags)
            self._content, self._wanted = image(calls, descriptors.channel), wanted
        return sealed(self._content)


@dataclass(frozen=True, slots=True)
class Descriptors:
    """What the first process is given, but for its stdio."""

    channel: int
    init: int
    """The pidfd of the container's."""
    tasks: tuple[int, ...]
    unified: int | None


def begin(
    files: Files,
    program: Program,
    sighting: Sighting,
    stdio: Stdio,
    cgroups: Sequence[str],
    *,
    init: int,
    flags: int,
    before_start: Callable[[ProcessHandle], None],
) -> ProcessHandle | None:
    """A process that has executed its program, in the container of the pidfd init; None if it is Python's turn.

    flags: CLONE_NEW* of the namespaces to enter. before_start: as for Container.exec(). Raises ExecFailed for
    what Python would fail with as well.
    """
    try:
        with contextlib.closing(Membership.open(cgroups)) as membership:
            parent, child = make_pair()
            with contextlib.closing(child), contextlib.ExitStack() as unless_born:
                unless_born.callback(parent.close)
                tasks = tuple(fd for fd, _ in membership.tasks)
                descriptors = Descriptors(child.fileno(), init, tasks, membership.unified)
                program = program.start_as(sighting.identity)
                _give_stdio(stdio, program.uid)
                with paths.opened(files.of(program, sighting, stdio, descriptors, flags)) as file:
                    pid = process.spawn(file, [child.fileno(), init, *membership.fds, *stdio.given()])
                unless_born.pop_all()
    except OSError:
        return None
    try:
        last = _last_born(parent, pid, births=1 if membership.unified is None else 2)
    except (ExecFailed, _NeverBegan) as e:
        files.of_use = isinstance(e, ExecFailed)  # the host, say, lets no such program run: neither will it next time
        return None
    return None if last is None else _executed(parent, *last, before_start)


class _NeverBegan(Exception):
    """The first one, of whom nobody inside has any part yet, ended without a word."""


def _last_born(parent: ParentEnd, pid: int, *, births: int) -> tuple[int, int] | None:
    """See it through its births; each time the one before has but to end. The pid and pidfd of the last, who waits."""
    pidfd = process.pidfd_open(pid)  # our own child, not reaped yet: the pid is still its
    for birth in range(births):
        with heeded(parent, pidfd):
            if birth:
                parent.send_start()
            try:
                successor = parent.receive_number(pid, patience(pid, pidfd, SETUP_S))
            except EndedEarly as e:
                if birth:
                    raise
                raise _NeverBegan from e
            follower = process.pidfd_open(successor) if successor > 0 else -1  # likewise
        if follower < 0:
            kill_and_reap(parent, pidfd)
            return None
        reap_predecessor(pidfd)
        pid, pidfd = successor, follower
    return pid, pidfd


def _executed(
    parent: ParentEnd, pid: int, pidfd: int, before_start: Callable[[ProcessHandle], None]
) -> ProcessHandle | None:
    """Have it execute its program."""
    with heeded(parent, pidfd):
        handle = ProcessHandle(pid, pidfd, process.start_time(pid), None)
        before_start(handle)
        parent.send_start()
        if becomes_program(handle, lambda check: parent.receive_number(pid, check), SETUP_S):
            parent.close()
            return handle
    kill_and_reap(parent, pidfd)
    return None


def _give_stdio(stdio: Stdio, uid: int) -> None:
    """As corral.oci.program.hand_over_stdio(), from outside."""
    for fd in stdio.given():
        status = os.fstat(fd)
        if stat.S_ISFIFO(status.st_mode) and status.st_uid != uid:
            with contextlib.suppress(PermissionError):
                os.fchown(fd, uid, -1)


class _Numbers:
    """Which number the next descriptor gets: the lowest that is free."""

    def __init__(self, taken: Iterable[int]) -> None:
        self._taken = set(taken)

    def open(self, number: int, *arguments: Argument) -> tuple[Call, int]:
        """A call that opens one, and which it is."""
        fd = next(fd for fd in range(len(self._taken) + 1) if fd not in self._taken)
        self._taken.add(fd)
        return Call(number, arguments, How.GIVES, fd), fd

    def close(self, fd: int) -> Call:
        self._taken.discard(fd)
        return Call(_CLOSE, (fd,))


def _calls(program: Program, sighting: Sighting, stdio: Stdio, descriptors: Descriptors, flags: int) -> list[Call]:
    """All of it; see corral.oci.join.run_joined(), which has the reasons."""
    channel, init, tasks, unified = astuple(descriptors)
    kept = [0, 1, 2, channel, init, *tasks, *([] if unified is None else [unified]), *stdio.given()]
    fds = _Numbers(kept)
    calls = [
        Call(_PRCTL, (_PR_SET_DUMPABLE, 0)),
        *_close_all_but(kept),
        *(Call(_DUP2, (fd, n)) for n, fd in enumerate((stdio.stdin, stdio.stdout, stdio.stderr)) if fd is not None),
        Call(_SETSID),
        *(Call(_WRITE, (fd, b"0", 1)) for fd in tasks),
        *_adjust_oom_score(program.oom_score_adj, fds),
        Call(_SETNS, (init, flags)),
        Call(_KEYCTL, (_JOIN_SESSION_KEYRING, 0)),
    ]
    call, root = fds.open(_OPENAT, AT_FDCWD, b"/\0", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    calls.append(call)
    calls += _use_own_null(root, stdio, fds)
    calls += _see_again(root, sighting, fds)
    calls += _enter_directory(root, program.cwd, fds)
    calls += [Call(_PRLIMIT, (0, number, limit, 0)) for number, limit in _limits(program)]
    calls.append(Call(_UMASK, (program.umask,)))
    load = _load(program.seccomp)
    if program.no_new_privs:
        calls.append(Call(_PRCTL, (_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)))
    else:
        calls += load
    calls += _drop_privileges(program)
    calls += _close_all_but([0, 1, 2, channel])
    if program.no_new_privs:
        calls += load
    calls += _have_successor(
        Call(_CLONE, (process.CLONE_PARENT,)), channel, _execute(program, channel), mortal=program.dies_with_runtime
    )
    if unified is None:
        return calls
    born = process.clone_arguments(process.CLONE_PARENT | process.CLONE_INTO_CGROUP, cgroup=unified)
    return _have_successor(Call(_CLONE3, (born, len(born))), channel, calls)


def _have_successor(birth: Call, channel: int, child: list[Call], *, mortal: bool = False) -> list[Call]:
    """Be followed by a child that is the runtime's, and tell that its pid; the child waits until it was heard.

    mortal: it is killed when the runtime ends.
    """
    told = [Call(_READ, (channel, SCRATCH, len(START) + 1), How.GIVES, len(START))]
    if mortal:  # the runtime may have ended before that, and have said start
        told.insert(0, Call(_PRCTL, (_PR_SET_PDEATHSIG, signal.SIGKILL)))
        told.append(Call(_RECVFROM, (channel, SCRATCH, 1, socket.MSG_DONTWAIT, 0, 0), How.GIVES, -errno.EAGAIN))
    forks = Call(birth.number, birth.arguments, How.FORKS, child=[*told, *child])
    return [forks, Call(_WRITE, (channel, RESULT, 8)), Call(_EXIT_GROUP, (0,))]


def _execute(program: Program, channel: int) -> list[Call]:
    """What the successor does, who may be in the hands of the container."""
    env = Words([*(os.fsencode(f"{name}={value}") + b"\0" for name, value in program.env.items()), 0])
    args = Words([*(os.fsencode(argument) + b"\0" for argument in program.args), 0])
    calls = [
        Call(_SETSID),
        Call(_FCNTL, (channel, _F_SETFD, _FD_CLOEXEC)),
        Call(_SIGPROCMASK, (signal.SIG_SETMASK, bytes(8), 0, 8)),
    ]
    paths = [os.fsencode(path) + b"\0" for path in programs.candidates(program)]
    calls += [Call(_EXECVE, (path, args, env), How.TRIES) for path in paths]
    return [*calls, Call(_EXECVE, (b"\0", args, env))]  # which there is not


def _load(program: Filter | None) -> list[Call]:
    if program is None:
        return []
    code = program.instructions
    return [Call(_SECCOMP, (_SECCOMP_SET_MODE_FILTER, program.flags, Words([len(code) // 8, code])))]


def _close_all_but(fds: Iterable[int]) -> list[Call]:
    calls, low = [], 0
    for fd in (*sorted(set(fds)), _LAST_FD + 1):
        if fd > low:
            calls.append(Call(_CLOSE_RANGE, (low, fd - 1, 0)))
        low = fd + 1
    return calls


def _adjust_oom_score(wanted: int | None, fds: _Numbers) -> list[Call]:
    if wanted is None:
        return []
    call, fd = fds.open(_OPENAT, AT_FDCWD, b"/proc/self/oom_score_adj\0", os.O_RDWR | os.O_CLOEXEC)
    text = b"%d" % wanted
    return [call, Call(_WRITE, (fd, text, len(text)), How.MAY), fds.close(fd)]


def _in_root(root: int, path: str, flags: int) -> tuple[Argument, ...]:
    how = struct.pack("=3Q", flags | os.O_CLOEXEC, 0, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)
    return root, os.fsencode(path) + b"\0", how, len(how)


def _is(fd: int, place: int, content: bytes) -> Call:
    """That fstat(2) has this content at a place."""
    return Call(_FSTAT, (fd, SCRATCH, 0, SCRATCH + place, content, len(content)), How.WRITES)


def _use_own_null(root: int, stdio: Stdio, fds: _Numbers) -> list[Call]:
    places = [place for place, fd in enumerate((stdio.stdin, stdio.stdout, stdio.stderr)) if fd is None]
    if not places:
        return []
    call, fd = fds.open(_OPENAT2, *_in_root(root, "/dev/null", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK))
    return [
        call,
        _is(fd, _ST_MODE, struct.pack("=I", _NULL_MODE)),
        _is(fd, _ST_RDEV, struct.pack("=Q", _NULL_DEVICE)),
        *(Call(_DUP2, (fd, place)) for place in places),
        fds.close(fd),
    ]


def _see_again(root: int, sighting: Sighting, fds: _Numbers) -> list[Call]:
    calls: list[Call] = []
    for path, look in zip(DATABASES, sighting.looks, strict=True):
        where = _in_root(root, path, os.O_PATH)
        if look is None:
            calls.append(Call(_OPENAT2, where, How.GIVES, -errno.ENOENT))
            continue
        device, inode, size, mtime_ns, ctime_ns = look
        times = *divmod(mtime_ns, _SECOND), *divmod(ctime_ns, _SECOND)
        call, fd = fds.open(_OPENAT2, *where)
        calls += [
            call,
            _is(fd, _ST_DEV_INO, struct.pack("=2Q", device, inode)),
            _is(fd, _ST_SIZE, struct.pack("=q", size)),
            _is(fd, _ST_MTIM_CTIM, struct.pack("=4q", *times)),
            fds.close(fd),
        ]
    return calls


def _enter_directory(root: int, cwd: str, fds: _Numbers) -> list[Call]:
    call, fd = fds.open(_OPENAT2, *_in_root(root, cwd, os.O_PATH | os.O_DIRECTORY))
    # What is not below the root begins otherwise: CVE-2024-21626.
    inside = Call(_GETCWD, (SCRATCH, 4096, 0, SCRATCH, b"/", 1), How.WRITES)
    return [call, Call(_FCHDIR, (fd,)), inside, fds.close(fd)]


def _limits(program: Program) -> Iterable[tuple[int, bytes]]:
    """As far as they can be raised."""
    unbounded = capabilities.effective() >> capabilities.SYS_RESOURCE & 1
    for limit in program.rlimits:
        number = rlimits.NAMES[limit.type]
        _, allowed = resource.getrlimit(number)
        ceiling = rlimits.UNLIMITED if unbounded or allowed < 0 else allowed
        yield number, struct.pack("=2Q", min(limit.soft, ceiling), min(limit.hard, ceiling))


@cache
def _bounding() -> int:
    return capabilities.bounding()


def _drop_privileges(program: Program) -> list[Call]:
    sets, groups = program.capabilities, program.groups
    dropped = _bounding() & ~sets.bounding
    return [
        *(Call(_PRCTL, (_PR_CAPBSET_DROP, number, 0, 0, 0)) for number in range(64) if dropped >> number & 1),
        Call(_PRCTL, (_PR_SET_KEEPCAPS, 1, 0, 0, 0)),
        Call(_SETGROUPS, (len(groups), struct.pack(f"={len(groups)}I", *groups))),
        Call(_SETRESGID, (program.gid,) * 3),
        Call(_SETRESUID, (program.uid,) * 3),
        Call(_PRCTL, (_PR_SET_KEEPCAPS, 0, 0, 0, 0)),
        Call(
            _CAPSET,
            capabilities.capset_arguments(
                effective=sets.effective, permitted=sets.permitted, inheritable=sets.inheritable
            ),
        ),
        Call(_PRCTL, (_PR_CAP_AMBIENT, _AMBIENT_CLEAR_ALL, 0, 0, 0)),
        *(
            Call(_PRCTL, (_PR_CAP_AMBIENT, _AMBIENT_RAISE, number, 0, 0))
            for number in range(64)
            if sets.ambient >> number & 1
        ),
    ]
