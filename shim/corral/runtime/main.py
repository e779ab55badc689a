"""The entry. What happens here is in the order it is for the time it takes to start: a command is over in milliseconds.

Nothing is imported before it is known that this process stays; modules are loaded many at once; for those of the
standard library that are slow to load there are stand-ins; and what is allocated is not searched for garbage.
"""

import _signal  # type: ignore[import-not-found]  # the part in C, which is there already
import gc
import posix
import sys

# An ordinary user's create and run do not get away from the interpreter, see corral.oci.stepping_stone.
_SEALED_FIRST = frozenset(("exec",) if posix.geteuid() == 0 else ("create", "run", "exec"))
_NO_READER = 141
"""As if SIGPIPE had ended it."""


def main_and_exit() -> None:
    """main(), and the end of the process without the interpreter's clearing up, which nobody is left to profit from."""
    code = main()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = _NO_READER
    except OSError as e:
        sys.stderr.write(f"standard output can't be written: {e.strerror}\n")
        code = code or 1
    sys.stderr.flush()
    posix._exit(code)  # noqa: SLF001 - os._exit, without loading os


def _interrupt(number: int, _frame: object) -> None:
    """Undo what was begun, and be done with it: who presses Ctrl-C again would interrupt the undoing."""
    _signal.signal(number, _signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    """Run the command of sys.argv; the exit code."""
    gc.disable()
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:  # else it is ignored, in the background
        _signal.signal(_signal.SIGINT, _interrupt)
    if not _SEALED_FIRST.isdisjoint(sys.argv):  # or what is named so, which costs but time
        from corral.runtime import sealing

        sealing.begin()
    from corral.runtime import index

    index.load("standins")
    from corral.runtime import standins

    standins.install()
    index.load("commands")
    from corral.runtime import commands

    return commands.run()
