"""shim.log in the bundle: what a shim has to say that no client asked for. Opened only when there is something."""

import contextlib
import os
import time

from corral.shim.logs import timestamp

NAME = "shim.log"
MAX_SIZE = 256 << 10


def describe(error: BaseException) -> str:
    """The error and where it came from, innermost last. (The traceback module would import others when it is used.)"""
    lines = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        lines.append(f"  {code.co_filename}:{trace.tb_lineno} {code.co_qualname}")
        trace = trace.tb_next
    return "\n".join([f"{type(error).__name__}: {error}", *lines])


def write(directory: int, text: str) -> None:
    """Append one entry to the bundle's shim.log, unless that is large already; never fails."""
    with contextlib.suppress(OSError):
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(NAME, flags, 0o600, dir_fd=directory)
        try:
            if os.fstat(fd).st_size < MAX_SIZE:
                os.write(fd, f"{timestamp(time.time_ns())} {os.getpid()} {text}\n".encode("utf-8", "replace"))
        finally:
            os.close(fd)
