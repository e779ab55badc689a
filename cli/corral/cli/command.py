"""The command `corral` as a process. It is started often and lives briefly: it begins and ends with that in mind.

What is allocated while modules load is not searched for garbage, and at the end nothing is taken down that ends with
the process anyway: together that is a quarter of what a short command takes.
"""

import gc
import os
import sys
from typing import NoReturn

from corral.cli.deferred import defer

INTERRUPTED = 130
"""What a command ends with that Ctrl-C ended, as shells have it."""
_LESS_GARBAGE_THAN = 100_000
"""Objects to be allocated before it is collected: twice as many as a verb has when it is loaded. A verb that stays for
long, and makes cycles, thus holds some megabytes of them and no more."""


def main() -> NoReturn:
    """Runs one command and ends the process with its code."""
    gc.set_threshold(_LESS_GARBAGE_THAN)
    defer()
    try:
        from corral.cli.main import main as run

        leave(run())
    except KeyboardInterrupt:
        leave(INTERRUPTED)


def leave(code: int) -> NoReturn:
    """Ends the process, without the interpreter's clearing up. What was written still goes out; if it cannot, a success
    is none.

    Whatever else has to happen has happened: a terminal is restored by whom it was changed, and a call that still runs
    ends for the daemon when the kernel closes its connection.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            code = code or 1
    os._exit(code)


if __name__ == "__main__":
    main()
