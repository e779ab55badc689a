"""The command runs from an interpreter that no container can write to, see corral.shim.seal (CVE-2019-5736).

Only what makes processes in a container needs it. The way there is to execute oneself once more, before anything was
done; an option of the interpreter, which no argument of the command can imitate, tells that it was tried.
"""

import contextlib
import os
import sys
from pathlib import Path

from corral.kernel import process
from corral.runtime.errors import CommandError
from corral.shim import seal

_MARK = "corral_sealed"


def ensure_sealed() -> None:
    """Return in a sealed process that nobody can look into; raises CommandError where that can't be had."""
    if not seal.is_sealed():
        if _MARK in sys._xoptions:  # noqa: SLF001 - the documented name
            raise CommandError("the interpreter could not be sealed against the container")
        _execute_sealed()
    if os.geteuid() == 0:  # an ordinary user's /proc/self would no longer be theirs
        process.set_dumpable(False)


def _execute_sealed() -> None:
    interpreter = os.fspath(Path("/proc/self/exe").readlink())
    # By its first argument, not by the file that is executed, does the interpreter find its library.
    arguments = [sys.orig_argv[0], "-X", _MARK, *sys.orig_argv[1:]]
    with contextlib.suppress(OSError):
        os.execve(seal.read_only_mount(interpreter), arguments, os.environ)  # noqa: S606 - no shell is wanted
    os.execve(seal.sealed_copy(interpreter), arguments, os.environ)  # noqa: S606 - no shell is wanted
