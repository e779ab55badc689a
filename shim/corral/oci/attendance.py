"""Attending a child of the runtime while it is set up, and doing for it what only the host can."""

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from corral.kernel import capabilities, namespaces, paths, process
from corral.kernel.namespaces import Kind
from corral.oci.cgroups import Membership
from corral.oci.channel import ChildEnd, EndedEarly, ParentEnd, make_pair
from corral.oci.errors import SETUP, ExecFailed
from corral.oci.init import InitPlan
from corral.oci.spec import Spec
from corral.oci.stage import IdMap
from corral.oci.state import CREATING, RUNNING
from corral.oci.stdio import Stdio
from corral.oci.users import Sighting

if TYPE_CHECKING:
    from corral.oci.allotment import Allotment
    from corral.oci.container import Container


@dataclass(slots=True)
class ProcessHandle:
    """A process in a container. The caller owns the fds.

    pid is the host's; with start_time (field 22 of /proc/<pid>/stat) it names the process for good. console is the pty
    master, opened inside the container's devpts; None without a terminal.
    """

    pid: int
    pidfd: int
    start_time: int
    console: int | None


SETUP_S = 60.0
"""How long init may take to set itself up: its root may lie on a slow disk."""
DYING_S = 1.0
"""How long a child that was killed is waited for. A file system that does not answer, or a freezer, can keep it."""


def patience(pid: int, pidfd: int, limit_s: float) -> Callable[[], None]:
    """What to ask while a child is waited for: once it is stopped, or takes too long, kills it and raises ExecFailed.

    Who is root in its PID namespace can signal it while it is not yet one of theirs, or trace it, of which its parent
    is told nothing. It must not hold up the caller, who has the container to look after. Somebody else's child, such as
    an init left at its gate, has but its time.
    """
    give_up_at = time.monotonic() + limit_s

    def check() -> None:
        if _is_stopped(pidfd):
            reason = "the process was stopped by a signal during its set-up"
        elif process.is_traced_from_below(pid):
            reason = "the process was traced during its set-up"
        elif time.monotonic() > give_up_at:
            reason = f"the process was not set up within {limit_s:g} seconds"
        else:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(pidfd, signal.SIGKILL)
        raise ExecFailed(SETUP, reason)

    return check


class _Executed(Exception):
    """A process has become its program."""


def becomes_program(handle: ProcessHandle, hear: Callable[[Callable[[], None]], object], limit_s: float) -> bool:
    """Whether a process that was told to start, and was born no program of its own, becomes one; if not, it is ended.

    hear: waits for what is said of it, and asks what it is given meanwhile. Raises what that does, of one that does not
    become its program. Who may trace it can have taken its end of the channel (pidfd_getfd(2)), which then is not
    closed by execve, and can say anything: so the kernel's word counts. What has run, be it until it was killed
    here, is never taken for what has not.
    """
    patient = patience(handle.pid, handle.pidfd, limit_s)

    def check() -> None:
        if process.has_executed(handle.pid, handle.start_time):
            raise _Executed
        patient()

    try:
        hear(check)
    except _Executed:
        return True
    except BaseException:
        if not _has_executed_before_its_end(handle):
            raise
        return True
    return _has_executed_before_its_end(handle)


def _has_executed_before_its_end(handle: ProcessHandle) -> bool:
    """Of one that has not executed anything, that is its end."""
    if not process.has_executed(handle.pid, handle.start_time):
        _end(handle.pidfd)
    return process.has_executed(handle.pid, handle.start_time) is True


def _is_stopped(pidfd: int) -> bool:
    try:
        return os.waitid(os.P_PIDFD, pidfd, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # only its parent is told
        return False


def born(flags: int, membership: Membership, live: Callable[[ChildEnd], NoReturn]) -> tuple[ParentEnd, int, int]:
    """A child, whose life is live(): the channel to it, its pid and its pidfd."""
    parent, child = make_pair()
    try:
        pid, pidfd = process.clone(flags, cgroup=membership.unified)
        if pid == 0:
            live(child)
    except BaseException:
        parent.close()
        raise
    finally:
        child.close()
    return parent, pid, pidfd


def await_ready(
    container: "Container",
    allotment: "Allotment | None",
    parent: ParentEnd,
    pid: int,
    pidfd: int,
    limit_s: float,
    *,
    creating: bool,
    note: Callable[[Sighting], None] | None = None,
) -> ProcessHandle:
    """See a child to the end of its set-up, and where it has a successor go on with that. If it fails, it is reaped.

    allotment: whose scheduler is set from here. note: as for receive_ready(). A seccomp listener is told of who will be
    the program, unless one that comes before waits for its answer.
    """
    limited = patience(pid, pidfd, limit_s)
    listener: list[int] = []
    is_last = creating and not any(each.type is Kind.PID and each.path for each in container.spec.linux.namespaces)

    def tell_listener(whose: int) -> None:
        if not listener:
            return
        from corral.oci.listener import pass_to_listener

        state = container.state.at(CREATING, whose) if creating else container.state.at(RUNNING, container.init.pid)
        assert container.spec.linux.seccomp is not None
        with paths.opened(listener.pop()) as fd:
            pass_to_listener(container.spec.linux.seccomp, fd, whose, state)

    def pass_listener(fd: int) -> None:
        listener.append(os.dup(fd))
        if is_last:
            tell_listener(pid)

    def patient() -> None:
        if listener and select.select(listener, [], [], 0)[0]:
            tell_listener(pid)
        limited()

    def run_hooks() -> None:
        from corral.oci import hooks

        assert container.spec.hooks is not None
        for point in ("prestart", "create_runtime"):
            state = container.state.at(CREATING, pid)
            hooks.run_hooks(container.spec.hooks, point, state, env=os.environ, directory=container.bundle)

    with contextlib.ExitStack() as unless_ready:
        unless_ready.callback(lambda: [*map(os.close, listener)])
        with heeded(parent, pidfd):
            started = process.start_time(pid)  # while it is at work
            console, succeeded = parent.receive_ready(pid, patient, pass_listener, run_hooks, note)
            if console is not None:
                unless_ready.callback(os.close, console)
            # Our own child, by the word of its predecessor, and not reaped yet: the pid is still its.
            successor = parent.receive_successor(pid, patient) if succeeded else None
            follower = None if successor is None else process.pidfd_open(successor)
        if successor is not None and follower is not None:
            reap_predecessor(pidfd)
            pid, pidfd = successor, follower
        with heeded(parent, pidfd):
            if successor is not None:
                started = process.start_time(pid)
            tell_listener(pid)
            if allotment is not None:
                allotment.schedule(pid)
            handle = ProcessHandle(pid, pidfd, started, console)
        unless_ready.pop_all()
        return handle


def reap_predecessor(pidfd: int) -> None:
    """See to the end of a child that has but to end, which whoever can signal it may have stopped."""
    try:
        _kill(pidfd)
    finally:
        os.close(pidfd)


def _kill(pidfd: int) -> int | None:
    """End a child and reap it: its exit code, or the signal that killed it.

    None of one that does not end within DYING_S, which is left to whoever collects the children of this process.
    """
    _end(pidfd)
    result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    return result.si_status if result else None


def _end(pidfd: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(pidfd, signal.SIGKILL)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.poll(DYING_S * 1000)


def await_exec(parent: ParentEnd, handle: ProcessHandle, limit_s: float, *, by_child: bool = False) -> None:
    """Return once a process that was told to start has executed its program; EndedEarly if it was killed before.

    Both close the channel. Of somebody else's child, which may be reaped by then, the kernel tells little more than
    what ended it (Linux 6.15): SIGKILL is taken for what came before the program. Else raises as wait_for_exec().

    by_child: it is a child of the process that executes the program, of which nothing more is known.
    """
    parent.wait_for_exec(patience(handle.pid, handle.pidfd, limit_s))
    if by_child:
        return
    executed = process.has_executed(handle.pid, handle.start_time)
    if executed is None:
        with contextlib.suppress(OSError):
            executed = process.pidfd_info(handle.pidfd).exit_status != signal.SIGKILL
    if executed is False:
        raise EndedEarly


def how_it_ended(status: int | None) -> str:
    """A sentence about a process that ended before it could say why; None: it may not even have ended."""
    if status is None:
        return "the process broke off its set-up"
    if status == signal.SIGKILL:
        return "the process was killed during its set-up: the memory limit may be too small to start in"
    if status == signal.SIGSYS:
        return "the process was killed during its set-up: linux.seccomp kills what calls one of those that it needs"
    return f"the process ended during its set-up (status {status})"


def kill_and_reap(parent: ParentEnd, pidfd: int) -> int | None:
    """End a child. Its exit code or, if it was killed, the signal; None where somebody else reaps it, now or later."""
    parent.close()
    try:
        return _kill(pidfd)
    except ChildProcessError:
        return None
    finally:
        os.close(pidfd)


@contextlib.contextmanager
def heeded(parent: ParentEnd, pidfd: int) -> Iterator[None]:
    """Talk with a child; if that fails it is ended, and ExecFailed says how it ended if it did by itself."""
    try:
        yield
    except (EndedEarly, BrokenPipeError, ConnectionResetError) as e:
        raise ExecFailed(SETUP, how_it_ended(kill_and_reap(parent, pidfd))) from e
    except BaseException:
        kill_and_reap(parent, pidfd)
        raise


def follow_guide(
    parent: ParentEnd, pid: int, pidfd: int, spec: Spec, stdio: Stdio, cgroups: Sequence[str]
) -> tuple[int, int]:
    """Serve a guide (see corral.oci.passage), and go on with init: its pid and pidfd."""
    from corral.oci.passage import serve_guide

    with heeded(parent, pidfd):
        patient = patience(pid, pidfd, SETUP_S)
        parent.receive(pid, "entered", patient)
        serve_guide(pid, spec, stdio, cgroups)
        parent.send_answer(True, patient)
        born = parent.receive(pid, "born", patient)
        assert isinstance(born, int)
        # Our own child, not reaped yet: the pid is still its.
        follower = process.pidfd_open(born)
    reap_predecessor(pidfd)
    with heeded(parent, follower):
        parent.send_answer(True, patience(born, follower, SETUP_S))
    return born, follower


def give_devices(parent: ParentEnd, pid: int, pidfd: int, spec: Spec) -> None:
    """Give init the network devices it is to have."""
    from corral.oci.net_devices import move_devices

    with heeded(parent, pidfd):
        patient = patience(pid, pidfd, SETUP_S)
        taken = parent.receive(pid, "devices", patient)
        parent.send_answer(move_devices(spec.linux.net_devices, pid, taken), patient)


def idmap_namespaces(plan: InitPlan, stack: contextlib.ExitStack) -> dict[IdMap, int]:
    """User namespaces for the id-mapped mounts of a plan; the stack closes them."""
    from corral.kernel import user_namespaces

    if not capabilities.effective() >> capabilities.SYS_ADMIN & 1:
        raise ValueError(f"{plan.idmaps[0].where}: an ordinary user can't map the ids of a mount")
    made: dict[object, int] = {}
    for idmap in plan.idmaps:
        key = idmap.uids, idmap.gids, idmap.path
        if key not in made:
            if idmap.path:
                made[key] = namespaces.open_namespace(idmap.path)
            else:
                made[key] = user_namespaces.new_uninhabited(idmap.uids, idmap.gids)
            stack.callback(os.close, made[key])
    return {idmap: made[idmap.uids, idmap.gids, idmap.path] for idmap in plan.idmaps}
