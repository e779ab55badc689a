"""The command line that others see of this process. Source: proc_pid_cmdline(5)."""

import ctypes
import os
import sys
from collections.abc import Sequence


def _room() -> tuple[int, int]:
    """Where the kernel put the arguments, and how many bytes they take; 0 of them where that can't be told."""
    words = b"".join(os.fsencode(word) + b"\0" for word in sys.orig_argv)
    try:
        address = ctypes.c_void_p.in_dll(ctypes.CDLL(None), "program_invocation_name").value
    except ValueError:  # a libc without it
        return 0, 0
    if not address or ctypes.string_at(address, len(words)) != words:
        return 0, 0
    return address, len(words)


def set_title(words: Sequence[str]) -> None:
    """Be seen as run with these words, cut to the room that the real ones took."""
    at, size = _room()
    if size:
        text = b"".join(os.fsencode(word) + b"\0" for word in words)[: size - 1]
        ctypes.memmove(at, text.ljust(size, b"\0"), size)
