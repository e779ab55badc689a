"""A process that joins a running container (exec), from its birth to execve.

Two processes, one after the other. The first one is born outside and enters the container by the pidfd of init; nobody
inside sees it. It does all there is to do, and its last act is to make the second one, in the container's PID
namespace (see corral.oci.init.go_on). Everything in there, /dev and /proc included, may have been exchanged by the
container since.
"""

import os
import signal
from typing import TYPE_CHECKING, NoReturn

from corral.kernel import credentials, namespaces, paths, process, rlimits, tty
from corral.kernel.namespaces import Kind
from corral.kernel.syscalls import DEVPTS_SUPER_MAGIC, filesystem_magic
from corral.oci import program as programs
from corral.oci.cgroups import Membership
from corral.oci.channel import ChildEnd
from corral.oci.crossing import make_for_successor
from corral.oci.errors import SETUP, ExecFailed
from corral.oci.init import enter_privately, go_on, report_and_exit
from corral.oci.program import Program
from corral.oci.stdio import Stdio, use_own_null, use_terminal
from corral.oci.users import Sighting, look

if TYPE_CHECKING:  # loaded for those who ask for it
    from corral.oci.allotment import Affinity


def run_joined(
    program: Program,
    channel: ChildEnd,
    stdio: Stdio,
    membership: Membership,
    *,
    init: int,
    flags: int,
    root_of: int | None,
    terminal: tuple[int, int] | None,
    affinity: "Affinity | None" = None,
) -> NoReturn:
    """Be a process in the container of the pidfd init; never returns.

    flags: CLONE_NEW* of the namespaces to enter. root_of: init's pid, if its mount namespace does not lead to its root.
    terminal: the size of the pty to make, (0, 0) for no particular one.
    affinity: of which the final CPUs are still to be set.
    """
    try:
        enter_privately(channel, stdio, [*stdio.given(), init, *membership.fds])
        membership.join_v1()
        if affinity is not None:
            affinity.set_final()
        programs.begin(program)
        shared = -1 if root_of is None else _root_of(root_of, init)
        if flags & Kind.USER.flag:
            for limit in program.rlimits:
                rlimits.raise_hard(limit.type, limit.hard)
        namespaces.join(init, flags, what="the container's init")
        if flags & Kind.USER.flag:
            credentials.become_root()
        if shared >= 0:
            os.fchdir(shared)
            os.chroot(".")
            os.close(shared)
        programs.leave_keyring(program)
        root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        master: int | None = None
        if terminal is not None:
            master, slave = _open_terminal(root, terminal)
            use_terminal(slave, stdio, controlling=False)
        else:
            use_own_null(root, stdio)
        looks = look(root)
        identity = programs.identity_of(program, root)
        if looks is not None and looks == look(root):  # it was by these files
            channel.send_sighting(Sighting(identity, looks))
        stone = make_for_successor(program, channel.fileno())
        program = programs.become(program, root, identity, channel.send_listener)
        go_on(program, channel, master, stdio.kept, stone)
        mortal = program.dies_with_runtime
        if mortal:
            process.set_parent_death_signal(signal.SIGKILL)
        if not channel.wait_for_start() or (mortal and channel.is_deserted()):  # before there was that signal
            os._exit(1)
        programs.execute(program)
    except BaseException as e:  # noqa: BLE001 - a fork of the runtime must not run on in its code
        report_and_exit(channel, e)


def _root_of(pid: int, pidfd: int) -> int:
    """The root of a process that is in the runtime's own mount namespace, unless it was reaped by now."""
    root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    process.check_unreaped(pidfd)
    return root


def _open_terminal(root: int, size: tuple[int, int]) -> tuple[int, int]:
    try:
        devpts = paths.open_in_root(root, "/dev/pts", os.O_PATH | os.O_DIRECTORY)
    except OSError as e:
        raise ExecFailed(SETUP, f"a terminal needs the container's /dev/pts: {e.strerror}") from e
    with paths.opened(devpts):
        if filesystem_magic(devpts) != DEVPTS_SUPER_MAGIC:
            raise ExecFailed(SETUP, "a terminal needs a devpts on the container's /dev/pts")
        master = tty.open_master(devpts)
    if size != (0, 0):
        tty.set_window_size(master, width=size[0], height=size[1])
    return master, tty.open_slave(master)
