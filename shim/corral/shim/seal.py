"""Running from an interpreter that nobody inside a container can write to, though it can be reached as /proc/self/exe.

CVE-2019-5736: a container whose program is a link to /proc/self/exe makes the runtime execute itself inside, and from
there its file can be opened for writing. So the zygote executes itself once more, from a private read-only mount of
the interpreter that is no longer attached anywhere (nobody can make it writable), or from a sealed copy in memory.
The mount is tried first: its pages are shared with every other Python on the host.
"""

import contextlib
import fcntl
import os
import sys
from typing import NoReturn

from corral.kernel import mount
from corral.kernel.syscalls import AT_FDCWD

SEALED = "--sealed"
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def be_sealed() -> None:
    """Go on sealed: as the same program from its beginning, so whatever it has loaded by then it loads twice.

    Raises OSError, SystemExit.
    """
    if SEALED not in sys.argv:
        execute_sealed(SEALED)
    if not is_sealed():
        raise SystemExit("corral zygote: the interpreter could not be sealed")


def execute_sealed(marker: str) -> NoReturn:
    """Replace this process by the same one, sealed, with `marker` as one more argument. Raises OSError."""
    interpreter = os.readlink("/proc/self/exe")  # noqa: PTH115 - pathlib takes long to load
    arguments = [interpreter, *sys.orig_argv[1:], marker]
    # argv[0] is the real path: from it the interpreter finds its standard library.
    with contextlib.suppress(OSError):
        os.execve(read_only_mount(interpreter), arguments, os.environ)  # noqa: S606 - no shell is wanted
    os.execve(sealed_copy(interpreter), arguments, os.environ)  # noqa: S606 - no shell is wanted


def read_only_mount(path: str) -> int:
    """A descriptor of the file on a detached, read-only mount. Raises OSError."""
    fd = mount.clone_tree(AT_FDCWD, path)
    try:
        mount.set_attributes(fd, attr_set=mount.MOUNT_ATTR_RDONLY, where=path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def sealed_copy(path: str) -> int:
    """A descriptor of a copy in memory that can't be changed any more. Raises OSError."""
    copy = os.memfd_create("corral-python", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(path, "rb") as source:
            while os.sendfile(copy, source.fileno(), None, 1 << 30):
                pass
        fcntl.fcntl(copy, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(copy)
        raise
    return copy


def is_sealed() -> bool:
    """Whether the running interpreter's file can be written by nobody, root included."""
    fd = os.open("/proc/self/exe", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if os.fstatvfs(fd).f_flag & os.ST_RDONLY:
            return True
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS
    except OSError:
        return False
    finally:
        os.close(fd)
