"""What init is between Python and its program, so that no container gets at an interpreter that is not sealed.

A program that is a link to /proc/self/exe, or a script that asks to be run by it, executes what its process was before:
the runtime, whose file it can write to from then on (CVE-2019-5736). An interpreter that was sealed (corral.shim.seal)
may be written to by nobody, but has to be started once more for that, which takes longer than all the rest.

So init executes a few hundred bytes (corral.kernel.stone) first, in a sealed file of their own in memory. They wait for
start in its place, and then execute the program: all that a container gets at is those bytes, which it may have.

    init --execve--> stone: wait for start, at the gate if there is one --execve--> the program
                                                                        --fails---> an answer on corral.oci.channel

An execve more is not quite nothing: see suits().
"""

import errno
import fcntl
import os
from typing import NoReturn

from corral.kernel import process, stone
from corral.kernel.namespaces import Kind
from corral.kernel.privilege import is_hosts_root
from corral.oci import program as programs
from corral.oci.channel import error_message
from corral.oci.plan import created
from corral.oci.program import Program
from corral.oci.reaper import ANNOTATION
from corral.oci.spec import Process, Seccomp, Spec

_OF_USE_AT_EXECVE = frozenset(("CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH"))
_ERRNOS = (
    *(errno.EPERM, errno.ENOENT, errno.EIO, errno.E2BIG, errno.ENOEXEC, errno.EAGAIN, errno.ENOMEM, errno.EACCES),
    *(errno.EFAULT, errno.EISDIR, errno.EINVAL, errno.ENFILE, errno.EMFILE, errno.ETXTBSY, errno.ENAMETOOLONG),
    *(errno.ELOOP, errno.ELIBBAD),
)
"""What execve(2) fails with."""
_NAME = "corral-init"
_MFD_EXEC = 0x10
"""Since Linux 6.3, where a sysctl can say that without it nothing is executable."""
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def suits(spec: Spec) -> bool:
    """Whether a container is the same with one execve more, and nobody can see its init before that.

    It is not where a filter stands in the way, or tells somebody; where each execve changes the label; where the
    program may be executed by virtue of capabilities only that an execve takes away; where Python itself executes hooks
    inside. And others see init where they are in its PID namespace, or it is in an ordinary user's hands.
    """
    new, hooks = created(spec), spec.hooks
    return (
        spec.process is not None
        and os.uname().machine in stone.MACHINES
        and {Kind.PID, Kind.MOUNT} <= new
        and not any(namespace.type in (Kind.USER, Kind.TIME) for namespace in spec.linux.namespaces)
        and is_hosts_root()
        and _is_executed_alike(spec.process)
        and ANNOTATION not in spec.annotations
        and not (hooks is not None and (hooks.create_container or hooks.start_container))
        and _passes(spec.linux.seccomp)
        and _can_be_made()
    )


def _is_executed_alike(spec: Process) -> bool:
    if not spec.args or spec.apparmor_profile or spec.selinux_label:
        return False
    return spec.user.uid == 0 or spec.capabilities is None or _OF_USE_AT_EXECVE.isdisjoint(spec.capabilities.effective)


def _passes(profile: Seccomp | None) -> bool:
    if profile is None:
        return True
    from corral.oci.seccomp import asks, lets_pass

    return lets_pass(profile, [asks(*stone.CALLS, "execveat")])


def _can_be_made() -> bool:
    try:
        os.close(_file())
    except OSError:
        return False
    return True


def _file() -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create(_NAME, flags | _MFD_EXEC)
    except OSError as e:
        if e.errno != errno.EINVAL:
            raise
        return os.memfd_create(_NAME, flags)


def make(name: str, channel: int, gate: int | None) -> int:
    """The descriptor of a stone that waits at these descriptors, for a program that is called so."""
    answers = [(code, _answer(name, code)) for code in (*_ERRNOS, 0)]
    return sealed(stone.image(channel, gate, answers))


def sealed(content: bytes) -> int:
    """The descriptor of an executable that nobody can write to."""
    fd = _file()
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(content)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _answer(name: str, code: int) -> bytes:
    text = os.strerror(code) if code else "it can't be executed"
    return error_message(programs.refusal(name, OSError(code, text)))


def cross(fd: int, program: Program, channel: int, gate: int | None) -> NoReturn:
    """Execute the stone, for it to become the program. Raises OSError."""
    for kept in (channel, gate):
        if kept is not None:
            os.set_inheritable(kept, True)
    process.unblock_signals()
    program = programs.filtered(program)
    paths = programs.candidates(program)
    os.execve(fd, [*paths, "", *program.args], program.env)  # noqa: S606
