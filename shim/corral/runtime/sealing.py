"""The command runs from an interpreter that no container can write to, see corral.shim.seal (CVE-2019-5736).

Only what makes processes in a container needs it. The way there is to execute oneself once more, before anything was
done; an option of the interpreter, which no argument of the command can imitate, tells that it was tried. Most
containers do without, for their init is no longer the interpreter when they begin: see corral.oci.stepping_stone.
"""

import posix
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from corral.oci.spec import Spec

_MARK = "corral_sealed"
_SELF = "/proc/self/exe"


def begin() -> None:
    """Become a process whose interpreter is on a read-only mount, or else sealed in memory, unless it is already.

    Loads next to nothing, not even os: it is all loaded once more by the process that this becomes.
    """
    if _MARK in sys._xoptions:  # noqa: SLF001 - the documented name
        return
    from corral.kernel import bare

    fd = bare.read_only(posix.readlink(_SELF.encode()))
    if fd < 0:  # an ordinary user may not mount
        from corral.shim import seal

        fd = seal.sealed_copy(_SELF)
    # By its first argument, not by the file that is executed, does the interpreter find its library.
    posix.execve(fd, [sys.orig_argv[0], "-X", _MARK, *sys.orig_argv[1:]], posix.environ)


def ensure_sealed() -> None:
    """Return in a process that is sealed, and that nobody can look into; else raise CommandError."""
    from corral.runtime.errors import CommandError
    from corral.shim import seal

    if not seal.is_sealed():
        raise CommandError("the interpreter could not be sealed against the container")
    _hide()


def sealed_unless_left(spec: "Spec") -> bool:
    """Return in a process that can make the container: whether its init is to leave the interpreter by a stone."""
    from corral.oci import stepping_stone

    by_stone = _MARK not in sys._xoptions and stepping_stone.suits(spec)  # noqa: SLF001 - the documented name
    if by_stone:
        _hide()
    else:
        begin()
        ensure_sealed()
    return by_stone


def _hide() -> None:
    from corral.kernel import process

    if posix.geteuid() == 0:  # an ordinary user's /proc/self would no longer be theirs
        process.set_dumpable(False)
