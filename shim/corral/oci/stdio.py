"""File descriptors 0, 1 and 2 of a container process."""

import fcntl
import os
from dataclasses import dataclass

from corral.kernel import paths, tty
from corral.oci.errors import SETUP, ExecFailed
from corral.oci.masks import is_null


@dataclass(frozen=True, slots=True)
class Stdio:
    """fds for 0, 1 and 2; None is the container's own /dev/null. With a terminal they are not used.

    The caller keeps its fds; the process gets copies.
    """

    stdin: int | None = None
    stdout: int | None = None
    stderr: int | None = None
    kept: tuple[int, ...] = ()
    """Further fds, inheritable, which the process has under the same numbers."""
    newlines: bool = False
    """What the process writes to its terminal gets no carriage returns: no terminal is there to read them."""

    def given(self) -> list[int]:
        """The fds that are there."""
        return [*(fd for fd in (self.stdin, self.stdout, self.stderr) if fd is not None), *self.kept]


def take_places(stdio: Stdio) -> None:
    """Put the fds on 0, 1 and 2; for those not given the host's /dev/null holds the place."""
    given = (stdio.stdin, stdio.stdout, stdio.stderr)
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    if null > 2 and all(fd is None or fd > 2 for fd in given):
        for place, fd in enumerate(given):
            os.dup2(null if fd is None else fd, place, inheritable=True)
        os.close(null)
        return
    # Copied out of the way first: one of them may itself be 0, 1 or 2.
    wanted = [fcntl.fcntl(null if fd is None else fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in given]
    for place, fd in enumerate(wanted):
        os.dup2(fd, place, inheritable=True)
        os.close(fd)
    if null > 2:
        os.close(null)


def use_own_null(root: int, stdio: Stdio) -> None:
    """Put the container's own /dev/null where nothing was given: its holder may do to it what it likes."""
    places = [i for i, fd in enumerate((stdio.stdin, stdio.stdout, stdio.stderr)) if fd is None]
    if not places:
        return
    try:
        fd = paths.open_in_root(root, "/dev/null", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError as e:
        raise ExecFailed(SETUP, f"the container's /dev/null can't be opened: {e.strerror}") from e
    with paths.opened(fd):
        if not is_null(fd):
            raise ExecFailed(SETUP, "the container's /dev/null is not the null device")
        for place in places:
            os.dup2(fd, place, inheritable=True)


def use_terminal(slave: int, stdio: Stdio, *, controlling: bool = True) -> None:
    """Make a pty slave all of 0, 1 and 2, and the controlling terminal of this session leader."""
    if stdio.newlines:
        tty.leave_newlines(slave)
    if controlling:
        tty.make_controlling(slave)
    for place in range(3):
        os.dup2(slave, place, inheritable=True)
    os.close(slave)
