"""Staying pid 1 of a container whose program is no init: its zombies are reaped, and it gets the signals that are sent.

    init --fork--> the program, in a process group of its own, the terminal's foreground
         <-- every child that ends; the program's end is the container's

Init is then a fork of the runtime as before, with the program's own view, identity and capabilities. The program is
told of in the usual way: the channel ends when it was executed.
"""

import contextlib
import os
import signal
from typing import NoReturn

from corral.kernel import capabilities, process
from corral.kernel.title import set_title
from corral.oci import program as programs
from corral.oci.channel import ChildEnd
from corral.oci.program import Program

OWN = "dev.corral."
"""What annotations begin with that steer the runtime."""
ANNOTATION = f"{OWN}init"
"""Of a specification: "true" asks for it."""
_NAME = "corral-init"
_BY_SIGNAL = 128
_NOT_PASSED_ON = frozenset((signal.SIGCHLD, signal.SIGTTIN, signal.SIGTTOU))


def stay(channel: ChildEnd, program: Program) -> NoReturn:
    """Execute the program in a child, and end as it does: with its exit code, or 128 + N if signal N ended it.

    Raises what keeps the child from being born; what keeps it from its program it reports itself.
    """
    waits, goes = os.pipe()
    program = programs.filtered(program)
    signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
    # Before there is a child: where one may have run, has_begun() must say so, and it may look at once.
    process.set_name(_NAME)
    set_title((_NAME, "--", *program.args))  # not where the host keeps what
    pid, _ = process.clone(0)
    if pid == 0:
        os.close(goes)
        os.read(waits, 1)  # until nobody holds the other end
        os.close(waits)
        _become(channel, program)
    if os.getuid() != 0:  # what an execve would have taken away; the child needs it until its own
        sets = program.capabilities
        capabilities.set_process(effective=sets.ambient, permitted=sets.ambient, inheritable=sets.inheritable)
    channel.close()
    process.close_fds(range(3))  # goes as well: the child may look
    while True:
        number = signal.sigwait(signal.valid_signals())
        if number == signal.SIGCHLD:
            _reap(pid)
        elif number not in _NOT_PASSED_ON:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def has_begun(pid: int, started: int) -> bool | None:
    """Whether the init of a pid and start time has become its program, or stays beside it; None if it is reaped.

    Of one that runs, False may be out of date by the time it is returned.
    """
    executed = process.has_executed(pid, started)
    if executed is False:
        try:
            return process.name_of(pid) == _NAME
        except (FileNotFoundError, ProcessLookupError):
            return None
    return executed


def _become(channel: ChildEnd, program: Program) -> NoReturn:
    from corral.oci.init import report_and_exit  # which has imported this

    try:
        os.setpgid(0, 0)
        if program.terminal:
            os.tcsetpgrp(0, os.getpid())  # SIGTTOU is blocked, so it is allowed to
        programs.execute(program)
    except BaseException as e:  # noqa: BLE001 - a fork of init must not run on in its code
        report_and_exit(channel, e)


def _reap(program: int) -> None:
    """All that have ended; does not return if the program has."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        if pid == program:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else _BY_SIGNAL - code)
