"""Base64, RFC 4648, section 4, at the speed of memory: Python's encoder, and the C library's, take longer than all else
that is done with what is no text on its way into a log.
"""

import ctypes
from binascii import b2a_base64
from collections.abc import Callable

from corral.kernel.vectors import ENCODED_IN, ENCODED_OUT, LOOPS, READ_AT_ONCE

type Encode = Callable[[bytes], tuple[bytes, bytes]]

_LIBRARY = "libresolv.so.2"


def by_vectors() -> Encode | None:
    """Twelve bytes at a time; None where this machine can't."""
    if LOOPS is None:
        return None
    encode = LOOPS.encode

    def encoded(data: bytes) -> tuple[bytes, bytes]:
        groups = max(0, len(data) - (READ_AT_ONCE - ENCODED_IN)) // ENCODED_IN  # nothing behind data is read
        target = bytes(groups * ENCODED_OUT)  # filled in place: nobody has these bytes yet
        encode(data, target, groups)
        return target, b2a_base64(data[groups * ENCODED_IN :], newline=False)

    return encoded


def by_library() -> Encode | None:
    """glibc's b64_ntop, byte by byte; None where it is not to be had. Source: <resolv.h>."""
    try:
        function = ctypes.CDLL(_LIBRARY)["__b64_ntop"]
    except (OSError, AttributeError):  # no glibc
        return None
    function.argtypes = (ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t)

    def encoded(data: bytes) -> tuple[bytes, bytes]:
        length = (len(data) + 2) // 3 * 4
        target = bytes(length)  # what is written behind them, a NUL, is there already
        function(data, len(data), target, length + 1)
        return target, b""

    return encoded


def by_interpreter(data: bytes) -> tuple[bytes, bytes]:
    """Python's own."""
    return b2a_base64(data, newline=False), b""


encoded: Encode = by_vectors() or by_library() or by_interpreter
"""In two parts, of which the second follows the first."""
