"""Changes to a cgroup as data: all planned before the first is made, undone in reverse if one is refused."""

import contextlib
import errno
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from corral.kernel.cgroup import files


class Step(Protocol):
    """One change."""

    def describe(self) -> str:
        """What apply() would do, on one line."""
        ...

    def inverse(self) -> "Step | None":
        """The step that undoes this one, asked for before it is made; None if there is none."""
        ...

    def apply(self) -> None:
        """Make the change. Raises OSError, and then nothing has changed."""
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

    def inverse(self) -> "Write":
        """The write of what the file holds now."""
        with _missing(self):
            # An empty write would never reach the kernel; a newline clears a list such as cpuset.cpus.
            old = self.undo if self.undo is not None else files.read(self.path) or "\n"
        return Write(self.undo_path or self.path, old)

    def apply(self) -> None:
        """Write."""
        with _missing(self):
            files.write(self.path, self.value)


@contextlib.contextmanager
def _missing(step: Write) -> Iterator[None]:
    """Tell a file or device that is missing from a cgroup that is."""
    try:
        yield
    except OSError as e:
        if (meaning := _meaning(step, e)) is not None:
            raise meaning from e
        raise


def _meaning(step: Write, e: OSError) -> OSError | None:
    """What a refusal means; None: what it says."""
    directory, _, name = step.path.rpartition("/")
    if e.errno not in (errno.ENOENT, errno.ENODEV) or not os.path.exists(directory):  # noqa: PTH110 - a string
        return None
    if e.errno == errno.ENODEV:
        return invalid(step.path, f"cannot write {step.value!r}: there is no such device")
    why = "this kernel does not have it, or its controller is not turned on for this cgroup"
    return unsupported(step.path, f"cannot set {name}: {why}")


def run(steps: Sequence[Step], *, undo: bool = True) -> None:
    """Make all changes or none; with undo=False, for what is thrown away if it fails, spare the preparation.

    Raises the OSError of the one that was refused, after the ones before it were taken back.
    """
    if not undo:
        _run_once(steps)
        return
    back: list[Step] = []
    try:
        for step in steps:
            inverse = step.inverse()
            step.apply()
            if inverse:
                back.append(inverse)
    except OSError:
        for step in reversed(back):
            with contextlib.suppress(OSError):  # a cgroup removed meanwhile must not hide the cause
                step.apply()
        raise


def _run_once(steps: Sequence[Step]) -> None:
    """Make the changes, in order. A file that several of them write one after the other is opened once."""
    for path, group in itertools.groupby(steps, lambda step: step.path if isinstance(step, Write) else ""):
        if path:
            write_each(path, [step.value for step in group if isinstance(step, Write)])
        else:
            for step in group:
                step.apply()


def write_each(path: str, values: Iterable[str]) -> None:
    """Write the values to one file, in order. Raises OSError as Write.apply() does."""
    reached = ""

    def each() -> Iterator[str]:
        nonlocal reached
        for value in values:
            reached = value
            yield value

    try:
        files.write_each(path, each())
    except OSError as e:
        if (meaning := _meaning(Write(path, reached), e)) is not None:
            raise meaning from e
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
