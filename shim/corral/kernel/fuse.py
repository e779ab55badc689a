"""File systems that a program serves (FUSE), mounted before the program is started, and nowhere.

The program is given the connection, open: it needs no privilege to mount and no place. It ends when the last mount of
its file system goes, because the connection ends then; and if it ends first, whoever uses the mount gets ENOTCONN.
Source: Documentation/filesystems/fuse.rst; fuse_session_mount of libfuse 3, "/dev/fd/N" as mount point.
"""

import os
from collections.abc import Sequence

from corral.kernel import mount, process

_CONNECTION = 3
"""The descriptor that the program finds its connection at."""


def mount_served(program: str, options: Sequence[str], *, subtype: str, attributes: int = 0) -> int:
    """A new, detached mount, and the program, a child of the caller, that serves it: an fd of the mount's root.

    options: the program's own, for its -o. Raises OSError.
    """
    connection = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        # The kernel checks modes and owners, as with any other file system, for whoever is in the container.
        ours = (f"fd={connection}", "rootmode=40000", "user_id=0", "group_id=0", "allow_other", "default_permissions")
        tree = mount.new_mount("fuse", subtype, (*ours, f"subtype={subtype}"), attributes=attributes)
        try:
            _start(program, ",".join(options), connection)
        except BaseException:
            os.close(tree)
            raise
        return tree
    finally:
        os.close(connection)


def _start(program: str, options: str, connection: int) -> None:
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    try:
        pid = os.posix_spawn(
            program,
            [os.path.basename(program), "-f", "-o", options, f"/dev/fd/{_CONNECTION}"],  # noqa: PTH119 - a string
            {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
            file_actions=[
                (os.POSIX_SPAWN_DUP2, connection, _CONNECTION),
                *((os.POSIX_SPAWN_DUP2, null, fd) for fd in range(3)),
            ],
            setsid=True,
            setsigmask=(),
        )
        process.lose_oom_protection(pid)  # our child, not reaped: the pid is its
    finally:
        os.close(null)
