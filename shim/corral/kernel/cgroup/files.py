"""Reading and writing cgroup interface files: one open, read or write and close a call; errors name the file.

Source: kernel cgroup-v2.rst "Interface Files", cgroup-v1/cgroups.rst "Usage Examples and Syntax".
"""

import os
from collections.abc import Iterable, Iterator

_CHUNK = 65536
_PAGE = 4096

UNLIMITED = -1
"""What this library calls "no limit", as the OCI runtime-spec does."""

_V1_UNLIMITED = 0x7FFF_FFFF_FFFF_0000
"""v1 page counters say "no limit" as LONG_MAX rounded down to a page, whose size is at most 64 KiB."""


def read(path: str) -> str:
    """The whole content of an interface file, without the newline at its end."""
    return read_bytes(path).decode().rstrip("\n")


def read_bytes(path: str) -> bytes:
    """The whole content of an interface file.

    Raises OSError with the path: ENOENT if it does not exist, ENODEV if its cgroup was removed meanwhile.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # A short read need not be the end: of many records the kernel gives what fits in a page of its own. But
        # one this short is, and saves a call for most files. (And a buffer of a page saves the room for a long one.)
        content = part = os.read(fd, _PAGE)
        while len(part) >= _PAGE // 2:
            part = os.read(fd, _CHUNK)
            content += part
        return content
    except OSError as e:
        raise OSError(e.errno, f"cannot read: {e.strerror}", path) from e
    finally:
        os.close(fd)


def write(path: str, value: str) -> None:
    """Write value in one write(2), as cgroup files demand.

    Raises OSError with the kernel's errno, the value and the path in its message.
    """
    write_each(path, (value,))


def write_each(path: str, values: Iterable[str]) -> None:
    """Write the values one after the other, each in one write(2), to a file that is opened once.

    Raises as write() does, for the first that is refused; those before it were written.
    """
    value = ""
    fd = -1
    try:
        for value in values:
            if fd < 0:
                fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            os.write(fd, value.encode())
    except OSError as e:
        raise _refused(e, path, value) from e
    finally:
        if fd >= 0:
            os.close(fd)


def _refused(error: OSError, path: str, value: str) -> OSError:
    return OSError(error.errno, f"cannot write {value.strip()!r}: {error.strerror}", path)


def number(text: str) -> int:
    """The integer of a limit file; "max" and v1's LONG_MAX in pages both mean UNLIMITED.

    >>> number("max"), number("9223372036854771712"), number("42")
    (-1, -1, 42)
    """
    if text == "max":
        return UNLIMITED
    value = int(text)
    return UNLIMITED if value >= _V1_UNLIMITED else value


def read_number(path: str, default: int | None = None) -> int:
    """number() of a file's content; default, if given, when the kernel has no such file."""
    try:
        return number(read(path))
    except FileNotFoundError:
        if default is None:
            raise
        return default


def read_count(path: str, default: int | None = None) -> int:
    """The number in a counter, which knows no "max"; default, if given, when the kernel has no such file."""
    try:
        return int(read_bytes(path))
    except FileNotFoundError:
        if default is None:
            raise
        return default


def read_counts(path: str) -> dict[bytes, bytes]:
    """The "KEY VALUE" lines of a file of counters, as they are: of dozens a reader wants a few.

    That, and read_count(), is what statistics are read by, of hundreds of cgroups every second.
    """
    words = read_bytes(path).split()
    return dict(zip(words[::2], words[1::2], strict=False))


def flat_keyed(text: str) -> dict[str, int]:
    """Parse "KEY VALUE" lines. "max" reads as UNLIMITED.

    >>> flat_keyed("oom 3\\noom_kill 1\\n")
    {'oom': 3, 'oom_kill': 1}
    """
    values = {}
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        if value:
            values[key] = number(value.strip())
    return values


def nested_keyed(text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Parse "KEY SUB=VALUE SUB=VALUE" lines, in order.

    >>> list(nested_keyed("8:0 rbytes=1 wbytes=2"))
    [('8:0', {'rbytes': '1', 'wbytes': '2'})]
    """
    for line in text.splitlines():
        key, *pairs = line.split()
        yield key, dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def limit(value: int) -> str:
    """A limit as v2 files spell it.

    >>> limit(UNLIMITED), limit(7)
    ('max', '7')
    """
    return "max" if value == UNLIMITED else str(value)
