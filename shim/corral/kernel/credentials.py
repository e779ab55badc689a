"""User and group ids of the calling thread, set by the bare system calls.

libc's functions of these names set the ids of all threads: they walk a list of threads, and in a process that clone3
made that list still holds the threads of its parent, for which they would wait for ever.
"""

import array
import ctypes
from collections.abc import Sequence

from corral.kernel.syscalls import check, syscall

_id = ctypes.c_uint32
_setgroups = syscall("setgroups", ctypes.c_size_t, ctypes.c_void_p)
_setresgid = syscall("setresgid", _id, _id, _id)
_setresuid = syscall("setresuid", _id, _id, _id)


def set_groups(groups: Sequence[int]) -> None:
    """Replace the supplementary groups."""
    data = array.array("I", groups)
    check(_setgroups(len(data), data.buffer_info()[0] if data else None), "setgroups")


def become_root() -> None:
    """Take the ids 0 of the user namespace that was entered: what is made from here on belongs to them."""
    set_gid(0)
    set_uid(0)


def set_gid(gid: int) -> None:
    """Set the real, effective and saved group id."""
    check(_setresgid(gid, gid, gid), f"setresgid {gid}")


def set_uid(uid: int) -> None:
    """Set the real, effective and saved user id. From root to another, the effective capabilities go."""
    check(_setresuid(uid, uid, uid), f"setresuid {uid}")
