"""Tables of the old iptables, by the libraries that iptables-legacy itself has.

    with locked(), Table(4, "filter") as table:      or without the lock, to read
        table.append_accepting("FORWARD", 0x1234)
        table.commit()

Needs libip4tc.so.2 or libip6tc.so.2 (Debian: libip4tc2, libip6tc2, which iptables brings). Acts on the network
namespace of the calling thread. A change replaces the whole table: whoever makes one holds the lock of iptables.

Source: libiptc/libiptc.h; iptables(8), "XTABLES_LOCKFILE"; linux/netfilter_ipv4/ip_tables.h ("struct ipt_entry"),
linux/netfilter_ipv6/ip6_tables.h ("struct ip6t_entry"), linux/netfilter/x_tables.h ("struct xt_entry_match"),
linux/netfilter/xt_mark.h.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

_LOADED = {4: Path("/proc/thread-self/net/ip_tables_names"), 6: Path("/proc/thread-self/net/ip6_tables_names")}
_TARGET_OFFSET = struct.Struct("=H")
_MARK_MATCH = struct.Struct("=H29sBIIB7x")  # size, name, revision, then mark, mask, and whether the others are meant
_MARK_TARGET = struct.Struct("=H29sBi4x")  # size, name, revision, verdict: the library puts in what the name says
_EVERY_BIT = 0xFFFFFFFF
_LOCK = "/run/xtables.lock"
_LOCK_WAIT_S, _LOCK_POLL_S = 0.1, 0.02


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the fields of an entry are."""

    library: str
    prefix: str
    target_offset: int  # what is in front of it, but for 4 bytes, says for which packets it is
    size: int


_LAYOUTS = {4: _Layout("libip4tc.so.2", "iptc", 88, 112), 6: _Layout("libip6tc.so.2", "ip6tc", 140, 168)}


@dataclass(frozen=True, slots=True)
class Rule:
    """What is told here of a rule: where it leads, and the mark, if it is for all packets with exactly that mark."""

    target: str
    mark: int | None = None


def is_loaded(version: int, table: str) -> bool:
    """Whether the table is there; opening one that is not makes the kernel load it."""
    try:
        return table in _LOADED[version].read_text().split()
    except OSError:
        return False


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """Hold the lock of all who change tables. Raises OSError: EAGAIN after 0.1 s, if another one does not let go."""
    fd = os.open(os.environ.get("XTABLES_LOCKFILE", _LOCK), os.O_CREAT | os.O_RDONLY | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + _LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_LOCK_POLL_S)
        yield
    finally:
        os.close(fd)


class Table:
    """One table as it was when it was opened, and what is changed in it before commit()."""

    def __init__(self, version: int, name: str) -> None:
        """Raises OSError: the library is missing, or the kernel has no such table."""
        self._layout = _LAYOUTS[version]
        self._library = _load(self._layout)
        self._handle: int | None = self._number("init", name.encode()) or None
        if self._handle is None:
            raise _error(f"{self._layout.prefix}_init {name}")

    def policy(self, chain: str) -> str:
        """Of a builtin chain: "ACCEPT" or "DROP"; "" if there is none of that name."""
        counters = (ctypes.c_uint64 * 2)()
        return self._text("get_policy", chain.encode(), counters, self._handle)

    def has_chain(self, chain: str) -> bool:
        return bool(self._number("is_chain", chain.encode(), self._handle))

    def rules(self, chain: str) -> Sequence[Rule]:
        """In order; none if there is no such chain."""
        found = []
        entry = self._number("first_rule", chain.encode(), self._handle) if self.has_chain(chain) else 0
        while entry:
            target = self._text("get_target", entry, self._handle)
            found.append(Rule(target, self._mark(entry)))
            entry = self._number("next_rule", entry, self._handle)
        return found

    def _mark(self, entry: int) -> int | None:
        layout = self._layout
        fixed = ctypes.string_at(entry, layout.size)
        (end,) = _TARGET_OFFSET.unpack_from(fixed, layout.target_offset)
        matches = ctypes.string_at(entry + layout.size, end - layout.size)
        if any(fixed[: layout.target_offset - 4]) or len(matches) < _MARK_MATCH.size:
            return None
        size, name, revision, mark, mask, inverted = _MARK_MATCH.unpack_from(matches)
        is_mark = name.partition(b"\0")[0] == b"mark" and revision == 1 and size == len(matches)
        return mark if is_mark and mask == _EVERY_BIT and not inverted else None

    def append_accepting(self, chain: str, mark: int) -> None:
        """A rule at the end that accepts packets with exactly that mark. Raises OSError."""
        layout = self._layout
        match = _MARK_MATCH.pack(_MARK_MATCH.size, b"mark", 1, mark, _EVERY_BIT, 0)
        target = _MARK_TARGET.pack(_MARK_TARGET.size, b"ACCEPT", 0, 0)
        entry = bytearray(layout.size)
        end = layout.size + len(match)
        struct.pack_into("=HH", entry, layout.target_offset, end, end + len(target))
        self._change("append_entry", chain.encode(), bytes(entry) + match + target)

    def delete(self, chain: str, number: int) -> None:
        """Delete the rule with that number, from 0. Raises OSError."""
        self._change("delete_num_entry", chain.encode(), number)

    def commit(self) -> None:
        """Make it the table of the kernel. Raises OSError: EAGAIN if that has changed since this was opened."""
        self._change("commit")

    def _change(self, name: str, *arguments: object) -> None:
        if not self._number(name, *arguments, self._handle):
            raise _error(f"{self._layout.prefix}_{name}")

    def close(self) -> None:
        """Free the copy; harmless when repeated."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._number("free", handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _number(self, name: str, *arguments: object) -> int:
        """What a function of the library returns: a number, or a pointer, or 0 for none."""
        return int(getattr(self._library, f"{self._layout.prefix}_{name}")(*arguments) or 0)

    def _text(self, name: str, *arguments: object) -> str:
        found = getattr(self._library, f"{self._layout.prefix}_{name}")(*arguments)
        return bytes(found or b"").decode("utf-8", "replace")


def _error(what: str) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, f"{what}: {os.strerror(code)}")


def _load(layout: _Layout) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(layout.library, use_errno=True)
    except OSError as e:
        raise OSError(errno.ELIBACC, f"{layout.library} cannot be loaded: install iptables ({e})") from e
    pointer, string, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
    for name, result, *arguments in (
        ("init", pointer, string),
        ("free", None, pointer),
        ("is_chain", number, string, pointer),
        ("first_rule", pointer, string, pointer),
        ("next_rule", pointer, pointer, pointer),
        ("get_target", string, pointer, pointer),
        ("get_policy", string, string, pointer, pointer),
        ("append_entry", number, string, string, pointer),
        ("delete_num_entry", number, string, ctypes.c_uint, pointer),
        ("commit", number, pointer),
    ):
        try:
            function = getattr(library, f"{layout.prefix}_{name}")
        except AttributeError as e:
            raise OSError(errno.ELIBBAD, f"{layout.library} is another one than that of iptables: {e}") from e
        function.restype, function.argtypes = result, arguments
    return library
