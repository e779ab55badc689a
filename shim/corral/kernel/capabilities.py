"""Capabilities: names, sets as bit masks, and giving them up.

Source: capabilities(7).
"""

import array
import ctypes
import struct
from collections.abc import Iterable

from corral.kernel.syscalls import check, libc, syscall

NAMES = (
    *("CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP"),
    *("LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER"),
    *("SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE"),
    *("SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP"),
    *("MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF"),
    "CHECKPOINT_RESTORE",
)
"""By number, without the CAP_ in front."""

_NUMBERS = {f"CAP_{name}": number for number, name in enumerate(NAMES)}

ALL = (1 << len(NAMES)) - 1
"""What the first process of a user namespace has, in it."""

SETGID = _NUMBERS["CAP_SETGID"]
SETUID = _NUMBERS["CAP_SETUID"]
SYS_ADMIN = _NUMBERS["CAP_SYS_ADMIN"]
SYS_PTRACE = _NUMBERS["CAP_SYS_PTRACE"]
SYS_RESOURCE = _NUMBERS["CAP_SYS_RESOURCE"]

_VERSION_3 = 0x20080522
_PR_CAPBSET_READ, _PR_CAPBSET_DROP, _PR_CAP_AMBIENT = 23, 24, 47
_AMBIENT_RAISE, _AMBIENT_CLEAR_ALL = 2, 4


_HEADER = struct.pack("=Ii", _VERSION_3, 0)
"""struct __user_cap_header_struct: version, and the pid, of oneself."""
_DATA = struct.Struct("=6I")
"""struct __user_cap_data_struct, twice: effective, permitted and inheritable, the lower halves first."""

_ulong = ctypes.c_ulong
_capget = syscall("capget", ctypes.c_char_p, ctypes.c_void_p)
_capset = syscall("capset", ctypes.c_char_p, ctypes.c_char_p)
_prctl = libc("prctl", ctypes.c_int, _ulong, _ulong, _ulong, _ulong)
# For those that take but one: it is called for each capability, and converting others takes longer than the call.
_prctl_one = libc("prctl", ctypes.c_int, _ulong)


def mask_of(names: Iterable[str]) -> int:
    """CAP_* names as a bit mask; those that are unknown() are left out."""
    mask = 0
    for name in names:
        if (number := _NUMBERS.get(name.upper())) is not None:
            mask |= 1 << number
    return mask


def unknown(names: Iterable[str]) -> list[str]:
    """Those that are no capabilities, or only will be in some later kernel; each once."""
    return sorted({name for name in names if name.upper() not in _NUMBERS})


def names_of(mask: int) -> list[str]:
    """The CAP_* names in a mask, by number; bits that have no name yet are left out."""
    return [f"CAP_{name}" for number, name in enumerate(NAMES) if mask >> number & 1]


def bounding() -> int:
    """The caller's bounding set."""
    mask = 0
    for number in range(64):
        present = _prctl_one(_PR_CAPBSET_READ, number)
        if present < 0:  # EINVAL: past the last capability of this kernel
            break
        mask |= present << number
    return mask


def effective() -> int:
    """The caller's effective set."""
    return _get()[0]


def permitted() -> int:
    """The caller's permitted set."""
    return _get()[1]


def _get() -> tuple[int, int, int]:
    data = array.array("B", bytes(_DATA.size))
    check(_capget(_HEADER, data.buffer_info()[0]), "capget")
    halves = _DATA.unpack(data)
    return halves[0] | halves[3] << 32, halves[1] | halves[4] << 32, halves[2] | halves[5] << 32


def limit_bounding(keep: int) -> None:
    """Drop from the bounding set what is not in keep, up to the last capability this kernel knows."""
    for number in range(64):
        if keep >> number & 1:
            continue
        if _prctl_one(_PR_CAPBSET_DROP, number) < 0:
            if number < len(NAMES) - 1 or ctypes.get_errno() != 22:
                check(-1, f"prctl PR_CAPBSET_DROP {number}")
            return


def set_process(*, effective: int, permitted: int, inheritable: int) -> None:
    """capset(2) on the caller."""
    arguments = capset_arguments(effective=effective, permitted=permitted, inheritable=inheritable)
    check(_capset(*arguments), "capset")


def capset_arguments(*, effective: int, permitted: int, inheritable: int) -> tuple[bytes, bytes]:
    """What capset(2) takes for the caller to have these."""
    sets = effective, permitted, inheritable
    return _HEADER, _DATA.pack(*(mask & 0xFFFFFFFF for mask in sets), *(mask >> 32 for mask in sets))


def set_ambient(mask: int) -> None:
    """Make mask the ambient set; each must be permitted and inheritable."""
    check(_prctl(_PR_CAP_AMBIENT, _AMBIENT_CLEAR_ALL, 0, 0, 0), "prctl PR_CAP_AMBIENT_CLEAR_ALL")
    for number in range(64):
        if mask >> number & 1:
            check(_prctl(_PR_CAP_AMBIENT, _AMBIENT_RAISE, number, 0, 0), f"prctl PR_CAP_AMBIENT_RAISE {number}")
