"""Loading a seccomp filter.

Source: seccomp(2).
"""

import ctypes
from dataclasses import dataclass

from corral.kernel.seccomp.rules import NEW_LISTENER
from corral.kernel.syscalls import check, syscall

_SET_MODE_FILTER = 1


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


_seccomp = syscall("seccomp", ctypes.c_uint, ctypes.c_uint, ctypes.POINTER(_Program))


@dataclass(frozen=True, slots=True)
class Filter:
    """A compiled filter: struct sock_filter instructions of 8 bytes each, and SECCOMP_FILTER_FLAG_* flags."""

    instructions: bytes
    flags: int = 0

    @property
    def has_listener(self) -> bool:
        """Whether somebody is to answer some of the calls."""
        return bool(self.flags & NEW_LISTENER)


def load(program: Filter) -> int:
    """Filter this process's system calls from here on. With NEW_LISTENER: the fd, close-on-exec, to answer calls by.

    Needs no_new_privs or CAP_SYS_ADMIN: else OSError(EACCES).
    """
    code = program.instructions
    arguments = _Program(len(code) // 8, code)
    result = _seccomp(_SET_MODE_FILTER, program.flags, ctypes.byref(arguments))
    return check(result, "seccomp SECCOMP_SET_MODE_FILTER")
