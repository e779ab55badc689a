"""Signals read from a descriptor, so that one selector waits for them too. Source: signalfd(2)."""

import ctypes
import os
import signal
from collections.abc import Iterable

from corral.kernel.syscalls import check, libc

_SFD_NONBLOCK, _SFD_CLOEXEC = os.O_NONBLOCK, os.O_CLOEXEC
_INFO_SIZE = 128  # struct signalfd_siginfo, which begins with ssi_signo
_SET_SIZE = 128  # sigset_t of glibc and musl

_signalfd = libc("signalfd", ctypes.c_int, ctypes.c_char_p, ctypes.c_int)


def open_signalfd(signals: Iterable[int]) -> int:
    """Block these signals and return a non-blocking descriptor that delivers them.

    The mask is inherited over fork and exec: a child has to empty it.
    """
    numbers = set(signals)
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    mask = sum(1 << (number - 1) for number in numbers).to_bytes(_SET_SIZE, "little")
    return check(_signalfd(-1, mask, _SFD_NONBLOCK | _SFD_CLOEXEC), "signalfd")


def read_signals(fd: int) -> list[int]:
    """The numbers of the signals that came since the last call, each at most once for standard signals."""
    try:
        data = os.read(fd, 16 * _INFO_SIZE)
    except BlockingIOError:
        return []
    return [int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), _INFO_SIZE)]
