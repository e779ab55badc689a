"""Changes to a cgroup as data: all planned before the first is made, undone in reverse if one is refused."""

import contextlib
import errno
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

from corral.kernel.cgroup import files


class Step(Protocol):
    """One change."""

    def describe(self) -> str:
        """What apply() would do, on one line."""
        ...

    def apply(self) -> "Step":
        """Make the change and return the step that undoes it; raises OSError if nothing was changed."""
        ...


@dataclass(frozen=True, slots=True)
class Write:
    """Write a value to an interface file. Undone by writing back what it held."""

    path: str
    value: str
    undo: str | None = None
    """What to write instead, for files that do not take their own content back."""
    undo_path: str | None = None

    def describe(self) -> str:
        """As a shell would do it."""
        return f"echo {self.value!r} > {self.path}"

    def apply(self) -> Self:
        """Write, having read the old content."""
        try:
            # An empty write would never reach the kernel; a newline clears a list such as cpuset.cpus.
            old = self.undo if self.undo is not None else files.read(self.path) or "\n"
            files.write(self.path, self.value)
        except OSError as e:
            if e.errno not in (errno.ENOENT, errno.ENODEV) or not Path(self.path).parent.exists():
                raise
            # It is not the cgroup that is missing.
            if e.errno == errno.ENODEV:
                raise invalid(self.path, f"cannot write {self.value!r}: there is no such device") from e
            raise unsupported(self.path, f"this kernel cannot set {Path(self.path).name}") from e
        return type(self)(self.undo_path or self.path, old, self.value, self.path)


def run(steps: Sequence[Step]) -> None:
    """Make all changes or none.

    Raises the OSError of the one that was refused, after the ones before it were taken back.
    """
    undo: list[Step] = []
    try:
        for step in steps:
            undo.append(step.apply())  # noqa: PERF401 - what was done must be in the list when one fails
    except OSError:
        for step in reversed(undo):
            with contextlib.suppress(OSError):  # a cgroup removed meanwhile must not hide the cause
                step.apply()
        raise


def invalid(path: str, why: str) -> OSError:
    """A value that is refused before the kernel sees it."""
    return OSError(errno.EINVAL, why, path)


def unsupported(path: str, why: str) -> OSError:
    """A limit that this host cannot give."""
    return OSError(errno.EOPNOTSUPP, why, path)


def check_range(path: str, value: int, low: int, high: int, *, what: str) -> None:
    """Raise OSError(EINVAL) unless low <= value <= high."""
    if not low <= value <= high:
        raise invalid(path, f"{what} must lie between {low} and {high}, not {value}")


def check_limit(path: str, value: int, *, what: str) -> None:
    """Raise OSError(EINVAL) unless value is UNLIMITED or at least 0."""
    if value < files.UNLIMITED:
        raise invalid(path, f"{what} must be -1 (no limit) or at least 0, not {value}")
