"""Pseudo terminals, opened through a devpts mount's own root and never through a path that a container could bend."""

import fcntl
import os
import stat
import struct

from corral.kernel.syscalls import DEVPTS_SUPER_MAGIC, filesystem_magic

_TCGETS, _TCSETS = 0x5401, 0x5402
_TERMIOS = struct.Struct("=4I20s")
"""struct termios: the flags of input, output, control and line discipline, and which characters do what."""
_ONLCR = 0o4
_TIOCSPTLCK = 0x40045431
_TIOCGPTPEER = 0x5441
TIOCSCTTY = 0x540E
_TIOCGWINSZ, _TIOCSWINSZ = 0x5413, 0x5414
_PTMX = os.makedev(5, 2)


def open_master(devpts: int) -> int:
    """A new pty master of the devpts instance whose root is devpts (an fd), unlocked.

    What was opened is checked to be a ptmx on a devpts: a container may have put anything there.
    """
    master = os.open("ptmx", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=devpts)
    try:
        status = os.fstat(master)
        if not (
            stat.S_ISCHR(status.st_mode) and status.st_rdev == _PTMX and filesystem_magic(master) == DEVPTS_SUPER_MAGIC
        ):
            raise OSError(19, "the container's /dev/pts/ptmx is not a pseudo terminal multiplexer")
        fcntl.ioctl(master, _TIOCSPTLCK, struct.pack("i", 0))
    except BaseException:
        os.close(master)
        raise
    return master


def open_slave(master: int) -> int:
    """The other end of a master, without looking up its name."""
    return fcntl.ioctl(master, _TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)


def set_window_size(fd: int, *, width: int, height: int) -> None:
    """Columns and rows of a terminal; its foreground processes get SIGWINCH."""
    fcntl.ioctl(fd, _TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))


def window_size(fd: int) -> tuple[int, int]:
    """(columns, rows) of a terminal."""
    height, width, _, _ = struct.unpack("HHHH", fcntl.ioctl(fd, _TIOCGWINSZ, bytes(8)))
    return width, height


def leave_newlines(fd: int) -> None:
    """Have no carriage return put before a newline that is written to a terminal."""
    inward, outward, *rest = _TERMIOS.unpack(fcntl.ioctl(fd, _TCGETS, bytes(_TERMIOS.size)))
    fcntl.ioctl(fd, _TCSETS, _TERMIOS.pack(inward, outward & ~_ONLCR, *rest))


def make_controlling(slave: int) -> None:
    """Make a terminal the controlling one of this session leader."""
    fcntl.ioctl(slave, TIOCSCTTY, 0)
