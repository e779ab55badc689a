"""The one binding to libc: typed prototypes, made once at import, whose failures are OSErrors naming call and paths.

A prototype is an ordinary callable; `check` turns its -1 into an OSError. Every system call that glibc does not wrap
is bound by number, for x86_64 and aarch64.
"""

import array
import ctypes
import os
from collections.abc import Callable

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000
AT_SYMLINK_NOFOLLOW = 0x100

type Path = str | bytes | os.PathLike[str]

# Calls from 424 on have one number on every architecture.
_COMMON = {
    "pidfd_send_signal": 424,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "fspick": 433,
    "pidfd_open": 434,
    "clone3": 435,
    "close_range": 436,
    "openat2": 437,
    "mount_setattr": 442,
    "quotactl_fd": 443,
}
_NUMBERS = {
    "x86_64": {
        "setgroups": 116,
        "setresuid": 117,
        "setresgid": 119,
        "capget": 125,
        "capset": 126,
        "personality": 135,
        "pivot_root": 155,
        "set_mempolicy": 238,
        "keyctl": 250,
        "ioprio_set": 251,
        "sched_setattr": 314,
        "seccomp": 317,
    },
    "aarch64": {
        "ioprio_set": 30,
        "pivot_root": 41,
        "capget": 90,
        "capset": 91,
        "personality": 92,
        "setresuid": 147,
        "setresgid": 149,
        "setgroups": 159,
        "keyctl": 219,
        "set_mempolicy": 237,
        "sched_setattr": 274,
        "seccomp": 277,
    },
}

MACHINE = os.uname().machine
if MACHINE not in _NUMBERS:
    raise ImportError(f"corral runs on x86_64 and aarch64; this machine is {MACHINE}")
_BY_NAME = _COMMON | _NUMBERS[MACHINE]

_libc = ctypes.CDLL(None, use_errno=True)

type Call = Callable[..., int]
# Structures are packed bytes here and in the modules around: a class of ctypes for each, and one for each pointer and
# prototype, would be a good part of what a command does from its start to its end.


def libc(name: str, *argument_types: object) -> Call:
    """A libc function returning int, with its own prototype."""
    function = _libc[name]
    function.argtypes = argument_types  # type: ignore[assignment]
    return function


def syscall(name: str, *argument_types: object) -> Call:
    """A system call by name, bound to this machine's number."""
    number = _BY_NAME[name]
    function = _libc["syscall"]
    function.argtypes = (ctypes.c_long, *argument_types)  # type: ignore[arg-type]
    function.restype = ctypes.c_long

    def call(*arguments: object) -> int:
        result: int = function(number, *arguments)
        return result

    return call


def check(result: int, call: str, path: Path | None = None, path2: Path | None = None) -> int:
    """The result of a call, or the OSError that errno stands for, naming the call and the paths."""
    if result >= 0:
        return result
    raise failure(ctypes.get_errno(), call, path, path2)


def failure(code: int, call: str, path: Path | None = None, path2: Path | None = None) -> OSError:
    """An OSError that names the call and the paths."""
    text = f"{call}: {os.strerror(code)}"
    if path is None:
        return OSError(code, text)
    if path2 is None:
        return OSError(code, text, os.fsdecode(path))
    return OSError(code, text, os.fsdecode(path), None, os.fsdecode(path2))


_fstatfs = libc("fstatfs", ctypes.c_int, ctypes.c_void_p)

PROC_SUPER_MAGIC = 0x9FA0
SYSFS_MAGIC = 0x62656572
TMPFS_MAGIC = 0x01021994
DEVPTS_SUPER_MAGIC = 0x1CD1
CGROUP2_SUPER_MAGIC = 0x63677270


def filesystem_magic(fd: int) -> int:
    """f_type of the file system that fd, however opened, lies on."""
    status = array.array("l", bytes(256))  # more than a struct statfs, whose first member it is
    check(_fstatfs(fd, status.buffer_info()[0]), "fstatfs", f"fd {fd}")
    return status[0]
