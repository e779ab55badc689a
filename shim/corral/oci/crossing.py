"""Leaving Python before the program: becoming a stone (corral.kernel.stone), which becomes the program.

A stone that has a successor is how a process gets into a PID namespace that others live in with nothing of the runtime
in its memory, environment and arguments: what is a host's there, and the program has not, nobody can read.
"""

import contextlib
import errno
import fcntl
import os
from typing import NoReturn

from corral.kernel import capabilities, process, stone
from corral.kernel.stone import Succession
from corral.kernel.syscalls import MACHINE
from corral.oci import program as programs
from corral.oci.channel import error_message
from corral.oci.errors import SETUP, ExecFailed
from corral.oci.program import Program

_ERRNOS = (
    *(errno.EPERM, errno.ENOENT, errno.EIO, errno.E2BIG, errno.ENOEXEC, errno.EAGAIN, errno.ENOMEM, errno.EACCES),
    *(errno.EFAULT, errno.EISDIR, errno.EINVAL, errno.ENFILE, errno.EMFILE, errno.ETXTBSY, errno.ENAMETOOLONG),
    *(errno.ELOOP, errno.ELIBBAD),
)
"""What execve(2) fails with."""
_OF_USE_AT_EXECVE = capabilities.mask_of(("CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH"))
_NAME = "corral-init"
_NO_TERMINAL = "the terminal can't be made the controlling one of the process"
_MFD_EXEC = 0x10
"""Since Linux 6.3, where a sysctl can say that without it nothing is executable."""
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def can_be_made() -> bool:
    """Whether this host has executables in memory."""
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


def make(name: str, channel: int, gate: int | None, succession: Succession | None = None) -> int:
    """The descriptor of a stone that waits at these descriptors, for a program that is called so. Raises OSError."""
    answers = [(code, _answer(name, code)) for code in (*_ERRNOS, 0)]
    return sealed(stone.image(channel, gate, answers, succession))


def make_for_successor(program: Program, channel: int, gate: int | None = None) -> int | None:
    """The same for a stone that has a successor; None where it has to be Python. To be made before become()."""
    if not (program.args and program.passes and program.labels is None and MACHINE in stone.MACHINES):
        return None
    with contextlib.suppress(OSError):
        refusal = error_message(ExecFailed(SETUP, _NO_TERMINAL)) if program.terminal else None
        return make(program.args[0], channel, gate, Succession(refusal, program.dies_with_runtime))
    return None


def is_executed_alike(program: Program) -> bool:
    """Whether an execve takes away no capability by virtue of which the next one finds the program."""
    return program.uid == 0 or not program.capabilities.effective & _OF_USE_AT_EXECVE


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
    """Execute the stone, for it to become the program. Raises OSError: the host, say, lets no such program run."""
    waited_at = [each for each in (channel, gate) if each is not None]
    for each in waited_at:
        os.set_inheritable(each, True)
    process.unblock_signals()
    program = programs.filtered(program)
    paths = programs.candidates(program)
    try:
        os.execve(fd, [*paths, "", *program.args], program.env)  # noqa: S606
    finally:
        for each in waited_at:
            os.set_inheritable(each, False)
