"""Tables of the old iptables, by the libraries that iptables-legacy itself has: read as a whole, replaced as a whole.

Needs libip4tc.so.2 or libip6tc.so.2 (Debian: libip4tc2, libip6tc2, which iptables brings). Acts on the network
namespace of the calling thread. Whoever changes a table holds iptables' own lock, or one change would undo another.

Source: libiptc/libiptc.h; linux/netfilter_ipv4/ip_tables.h, linux/netfilter_ipv6/ip6_tables.h ("struct ipt_entry",
"struct ip6t_entry"), linux/netfilter/x_tables.h ("struct xt_standard_target"); iptables(8), "--wait".
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

LOCK = Path("/run/xtables.lock")
LOCK_TRIES, LOCK_PAUSE_S = 50, 0.02
_LOADED = {4: Path("/proc/thread-self/net/ip_tables_names"), 6: Path("/proc/thread-self/net/ip6_tables_names")}
_IFNAMSIZ = 16
_TARGET_BYTES = 40  # struct xt_standard_target, aligned
_CHAIN_BYTES = 29


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the fields of an entry are."""

    library: str
    prefix: str
    interfaces: int  # names of the input and output interface, then their masks
    target_offset: int  # and next_offset
    size: int


_LAYOUTS = {4: _Layout("libip4tc.so.2", "iptc", 16, 88, 112), 6: _Layout("libip6tc.so.2", "ip6tc", 64, 140, 168)}


@dataclass(frozen=True, slots=True)
class Rule:
    """What is told here of a rule: where it leads, and the interfaces that it is for ("": any)."""

    target: str
    input: str = ""
    output: str = ""


def is_loaded(version: int, table: str) -> bool:
    """Whether the table is there; opening one that is not makes the kernel load it."""
    try:
        return table in _LOADED[version].read_text().split()
    except OSError:
        return False


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """Nobody else changes a table within the block. Raises OSError(EAGAIN) if another program holds it for long."""
    fd = os.open(LOCK, os.O_CREAT | os.O_RDONLY | os.O_CLOEXEC, 0o600)
    try:
        _lock(fd)
        yield
    finally:
        os.close(fd)


def _lock(fd: int) -> None:
    for _ in range(LOCK_TRIES):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(LOCK_PAUSE_S)
        else:
            return
    raise OSError(errno.EAGAIN, f"another program holds {LOCK}")


class Table:
    """One table as it was when it was opened, with the changes made to this copy; commit() has the kernel take it."""

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
            names = ctypes.string_at(entry + self._layout.interfaces, 2 * _IFNAMSIZ)
            found.append(Rule(target, _name(names[:_IFNAMSIZ]), _name(names[_IFNAMSIZ:])))
            entry = self._number("next_rule", entry, self._handle)
        return found

    def create(self, chain: str) -> None:
        """Raises OSError."""
        self._change("create_chain", chain.encode())

    def flush(self, chain: str) -> None:
        """Raises OSError."""
        self._change("flush_entries", chain.encode())

    def remove(self, chain: str) -> None:
        """Of an empty chain that nothing leads to. Raises OSError."""
        self._change("delete_chain", chain.encode())

    def append(self, chain: str, rule: Rule) -> None:
        """Raises OSError."""
        self._change("append_entry", chain.encode(), _entry(self._layout, rule))

    def delete(self, chain: str, number: int) -> None:
        """Of a rule by its number from 0. Raises OSError."""
        self._change("delete_num_entry", chain.encode(), number)

    def commit(self) -> None:
        """Raises OSError; then nothing was done, EAGAIN if others changed it meanwhile."""
        self._change("commit")

    def close(self) -> None:
        """Free the copy; harmless when repeated."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._number("free", handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _change(self, name: str, *arguments: bytes | int) -> None:
        if not self._number(name, *arguments, self._handle):
            raise _error(f"{self._layout.prefix}_{name} {arguments[0] if arguments else ''!r}")

    def _number(self, name: str, *arguments: object) -> int:
        """What a function of the library returns: a number, or a pointer, or 0 for none."""
        return int(getattr(self._library, f"{self._layout.prefix}_{name}")(*arguments) or 0)

    def _text(self, name: str, *arguments: object) -> str:
        found = getattr(self._library, f"{self._layout.prefix}_{name}")(*arguments)
        return bytes(found or b"").decode("utf-8", "replace")


_SIZES = struct.Struct("=HH")  # target_offset, next_offset
_TARGET = struct.Struct(f"=H{_CHAIN_BYTES}sBi")  # size, name, revision, verdict, which the library fills in


def _entry(layout: _Layout, rule: Rule) -> bytes:
    """struct ipt_entry, or ip6t_entry, with a standard target."""
    entry = bytearray(layout.size)
    names = (rule.input.encode(), rule.output.encode())
    masks = (b"\xff" * (len(name) + 1) if name else b"" for name in names)
    for number, one in enumerate((*names, *masks)):
        at = layout.interfaces + number * _IFNAMSIZ
        entry[at : at + len(one)] = one
    _SIZES.pack_into(entry, layout.target_offset, layout.size, layout.size + _TARGET_BYTES)
    target = _TARGET.pack(_TARGET_BYTES, rule.target.encode(), 0, 0)
    return bytes(entry) + target.ljust(_TARGET_BYTES, b"\0")


def _name(padded: bytes) -> str:
    return padded.partition(b"\0")[0].decode("utf-8", "replace")


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
        ("flush_entries", number, string, pointer),
        ("create_chain", number, string, pointer),
        ("delete_chain", number, string, pointer),
        ("commit", number, pointer),
    ):
        function = getattr(library, f"{layout.prefix}_{name}")
        function.restype, function.argtypes = result, arguments
    return library
