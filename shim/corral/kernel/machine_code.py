"""Code of this machine as functions: bytes that are written to memory which is executable, and not writable by then."""

import ctypes

from corral.kernel.syscalls import libc

_PROT_READ, _PROT_WRITE, _PROT_EXEC = 1, 2, 4
_MAP_PRIVATE, _MAP_ANONYMOUS = 0x02, 0x20
_FAILED = ctypes.c_void_p(-1).value


def place(code: bytes) -> int:
    """Where it lies, for as long as this process lives; 0 where that is not allowed."""
    function = ctypes.CDLL(None)["mmap"]
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    function.restype = ctypes.c_void_p
    address: int = function(None, len(code), _PROT_READ | _PROT_WRITE, _MAP_PRIVATE | _MAP_ANONYMOUS, -1, 0)
    if address == _FAILED:
        return 0
    ctypes.memmove(address, code, len(code))
    protect = libc("mprotect", ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return address if protect(address, len(code), _PROT_READ | _PROT_EXEC) == 0 else 0
