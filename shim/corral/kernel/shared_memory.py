"""Keeping the pages of a process that forks shared with its children, long after the fork.

A forked Python process loses shared pages to five habits of the interpreter, each stopped here before the fork:

    counting references    of every object it only looks at: make_immortal(), which is what PEP 683 is for
    writing into code      counters and caches, whenever it runs: gather_code() puts what will run side by side
    filling holes          in half-used pages with new objects: fill_holes() and fill_heap_holes(), so that new
                           objects get pages of their own
    finding code again     a fork inherits no page table of the interpreter's own code: inherit_code_pages()
    keeping free memory    that was needed while starting: release_free_memory()

And what stays shared is quicker to fork, and to take apart, where it lies in one piece: collapse_pages(). A child that
has nothing else to do meanwhile takes copies of what it will write to at once: learn_what_is_written(), own_pages().
All of it is an optimisation: where the interpreter is not built as expected, nothing is done.
"""

import array
import contextlib
import ctypes
import gc
import mmap
import os
import sys
import time
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from corral.kernel import process
from corral.kernel.syscalls import libc

_GRANULE = 16
_OBJECT_SIZES = range(16, 513, _GRANULE)  # size classes of the allocator for small objects
_LARGER_SIZES = range(1104, 512, -_GRANULE)  # of code; what is larger still finds larger holes, one after the other
_HOLE_SIZES = range((64 << 10) - 8, 23, -_GRANULE)  # of chunks without their header
_POOL_SIZE = 16 << 10
_WORTH_COPYING = 64 << 10
_POOL_HEADER = 48
_BYTES_OVERHEAD = 33
_MAX_FILL = 20_000
_SURELY_FREE = 12
_SURELY_AT_THE_TOP = 3
_MAX_NOTES = 4096
_FLAGS_AT, _IMMORTAL = 6, 1
_MADV_COLLAPSE = 25
"""Since Linux 6.1."""
_MADV_POPULATE_WRITE = 23
_ALONE = 1 << 63 | 1 << 56
_LEARNED = 32 << 10
"""Bytes about what is written that a pipe takes: 4,096 pages."""
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")


class _MallocInfo(ctypes.Structure):
    """struct mallinfo2; keepcost is the size of the free chunk on top of the heap."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks"),
            "keepcost",
        )
    )


def make_immortal() -> int:
    """Stop counting references to every object that exists now, and return how many there are; they are never freed.

    The mark is the one that None carries. It is tried on one object first: if counting goes on, nothing is marked.
    """
    if sys.version_info >= (3, 15) or sys.byteorder != "little" or sys.maxsize < 1 << 32 or _is_free_threaded():
        return 0
    if not _mark_works():
        return 0
    # All are found before any is marked: a reference taken when its object was mortal is counted down once more.
    found = _mortals()
    _mark(found)
    return len(found)


def _mortals() -> dict[int, object]:
    """All objects that are counted, by their addresses, but for those that this function makes."""
    count_of, immortal = ctypes.c_uint32.from_address, _count_of_none()
    found: dict[int, object] = {}
    pending: list[object] = gc.get_objects()
    while pending:
        item = pending.pop()
        address = id(item)
        if address in found or count_of(address).value == immortal:
            continue
        if item is pending or item is found or isinstance(item, types.FrameType | types.GeneratorType):
            continue
        found[address] = item
        pending.extend(gc.get_referents(item))
        if isinstance(item, types.CodeType):
            pending.extend(_parts_of(item))
    return found


def _is_free_threaded() -> bool:
    is_gil_enabled: Callable[[], bool] | None = getattr(sys, "_is_gil_enabled", None)
    return is_gil_enabled is not None and not is_gil_enabled()


def _count_of_none() -> int:
    return ctypes.c_uint32.from_address(id(None)).value


def _mark(addresses: Iterable[int]) -> None:
    """Source: Include/object.h, refcount.h: the count's lower half, and since 3.14 a flag at the word's other end."""
    count_at, flags_at, immortal = ctypes.c_uint32.from_address, ctypes.c_uint16.from_address, _count_of_none()
    for address in addresses:
        count_at(address).value = immortal
        if sys.version_info >= (3, 14):
            flags_at(address + _FLAGS_AT).value |= _IMMORTAL


def _mark_works() -> bool:
    """Whether a marked object's word stays as it is while references to it come and go, in containers and variables."""
    holder = [["probe"]]
    word = ctypes.c_uint64.from_address(id(holder[0]))
    _mark([id(holder[0])])
    before = word.value
    for _ in range(10):
        probe = holder[0]
        holders = [probe] * 10
        if word.value != before:
            return False
        del probe, holders
    return word.value == before


def _parts_of(code: types.CodeType) -> Iterable[object]:
    """A code object hides its parts from the collector."""
    yield from (code.co_consts, code.co_names, code.co_name, code.co_qualname, code.co_filename)
    yield from (code.co_linetable, code.co_exceptiontable)


def gather_code(run: Callable[[], None]) -> None:
    """Call run(), and give every function that it executed a copy of its code, all copies close together.

    So are functions of which only a fork has executed something, one at a time.
    The copies are as if never run: run again before the fork, so that the interpreter has done its rewriting.
    """
    executed: dict[int, types.CodeType] = {}
    in_forks, process = _ForkNotes(), os.getpid()

    def note(frame: types.FrameType, event: str, _argument: object) -> None:
        if event != "call":
            return
        if os.getpid() != process:
            in_forks.add(id(frame.f_code))
        else:
            executed[id(frame.f_code)] = frame.f_code

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    elsewhere = in_forks.all()
    fill_holes()
    held = _take_large_holes()
    functions = [f for f in gc.get_objects() if isinstance(f, types.FunctionType)]
    executed.update((id(f.__code__), f.__code__) for f in functions if id(f.__code__) in elsewhere)
    functions = [f for f in functions if id(f.__code__) in executed]
    functions.sort(key=lambda function: -sys.getsizeof(function.__code__))  # so that holes left between them get used
    copies: dict[int, types.CodeType] = {}
    for function in functions:
        function.__code__ = _copy_code(function.__code__, executed, copies)
    del held


class _ForkNotes:
    """Numbers that forks of this process have noted, in memory that is theirs too. The first one is how many."""

    def __init__(self) -> None:
        self._numbers = memoryview(mmap.mmap(-1, 8 * _MAX_NOTES)).cast("Q")
        self._known: set[int] = set()

    def add(self, number: int) -> None:
        """In a fork. What two of them note at once may get lost."""
        at = self._numbers[0] + 1
        if number not in self._known and at < _MAX_NOTES:
            self._known.add(number)
            self._numbers[0], self._numbers[at] = at, number

    def all(self) -> set[int]:
        """Those that are there."""
        return set(self._numbers[1 : self._numbers[0] + 1])


def _copy_code(
    code: types.CodeType, wanted: Mapping[int, types.CodeType], copies: dict[int, types.CodeType]
) -> types.CodeType:
    """A copy, in which the code of functions that it makes when it runs is replaced by copies too."""
    found = copies.get(id(code))
    if found is None:
        constants = tuple(
            _copy_code(item, wanted, copies) if isinstance(item, types.CodeType) and id(item) in wanted else item
            for item in code.co_consts
        )
        found = copies[id(code)] = code.replace(co_consts=constants)
    return found


_filler: list[object] = []


def fill_holes() -> None:
    """Take the free blocks of half-used pages, for ever, so that objects made later lie close together elsewhere."""
    for size in _OBJECT_SIZES:
        taken: list[object] = []
        at, in_order = 0, 0
        while in_order < _SURELY_FREE and len(taken) < _MAX_FILL:
            block = _block(size)
            taken.append(block)
            before, at = at, id(block)
            # From a pool that was all free blocks come in order, from its first one on; others use up half-used pools.
            follows = in_order and before < at <= before + 4 * size
            in_order = in_order + 1 if follows or at % _POOL_SIZE == _POOL_HEADER else 0
        del taken[-in_order:]
        _filler.extend(taken)


def fill_heap_holes() -> None:
    """Take the free chunks between used ones on the C library's heap, for ever: what comes later lies on top of it.

    Only their headers are written, so memory given back before stays so.
    """
    own = ctypes.CDLL(None)
    try:
        malloc = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t)(("malloc", own))
        free = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(("free", own))
        sbrk = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_ssize_t)(("sbrk", own))
        mallinfo = ctypes.CFUNCTYPE(_MallocInfo)(("mallinfo2", own))
    except AttributeError:  # not glibc, or one before 2.33
        return
    top = sbrk(0) - mallinfo().keepcost
    for size in _HOLE_SIZES:
        for _ in range(_MAX_FILL):
            chunk = malloc(size)
            if chunk is None or chunk >= top:
                free(chunk)
                break


def inherit_code_pages() -> None:
    """Let a fork inherit the page tables of programs and libraries, instead of faulting them in anew, a few at a time.

    fork(2) copies them only where a mapping has a private page. So each gets one: a byte is written over itself.
    """
    with contextlib.suppress(OSError):  # a kernel may be set to refuse it
        maps = Path("/proc/self/maps").read_text()
        with open("/proc/self/mem", "r+b", buffering=0) as memory:
            for start, end in _code_mappings(maps):
                if end - start >= _WORTH_COPYING:
                    memory.seek(start)
                    byte = memory.read(1)
                    memory.seek(start)
                    memory.write(byte)


def _code_mappings(maps: str) -> Iterable[tuple[int, int]]:
    """Where files are mapped, private and not to be written."""
    for line in maps.splitlines():
        addresses, mode, _, _, inode, *_ = line.split()
        if mode in ("r-xp", "r--p") and inode != "0":
            start, _, end = addresses.partition("-")
            yield int(start, 16), int(end, 16)


def collapse_pages() -> None:
    """Have the memory of this process in huge pages, so that it lies in one piece.

    Mapped as such they are until either side writes to one after a fork, which is soon, and takes a copy of but a small
    page, as ever. But what is left of one is the same folio, whose many entries the kernel (since Linux 6.9) copies and
    takes apart together. A host that never wants huge pages is left alone: here the kernel does not see to that.
    Source: madvise(2), transhuge.rst.
    """
    with contextlib.suppress(OSError, ValueError):  # a kernel without them
        if "[never]" in (_HUGE_PAGES / "enabled").read_text():
            return
        size = int((_HUGE_PAGES / "hpage_pmd_size").read_text())
        madvise = libc("madvise", ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for start, end in _mappings():
            for at in range(-(-start // size) * size, end - size + 1, size):
                madvise(at, size, _MADV_COLLAPSE)  # what can't be stays as it is


def _used_mappings(smaps: str) -> Iterable[tuple[int, int]]:
    """Where there is memory of no file, most of which is in use: not stacks."""
    start = end = 0
    for line in smaps.splitlines():
        name, *fields = line.split()
        if not name.endswith(":"):
            start, end = (int(address, 16) for address in name.split("-"))
            mode, _, _, inode, *_ = fields
            if mode != "rw-p" or inode != "0":
                start = end = 0
        elif name == "Rss:" and int(fields[0]) << 10 > (end - start) // 2:
            yield start, end


def _take_large_holes() -> list[object]:
    """Blocks for the holes among what is too large for pools: while they are held, new ones come from one place."""
    taken: list[object] = []
    for size in _LARGER_SIZES:
        at, in_order = 0, 0
        while in_order < _SURELY_AT_THE_TOP and len(taken) < _MAX_FILL:
            block = bytes(size - _BYTES_OVERHEAD)
            taken.append(block)
            before, at = at, id(block)
            in_order = in_order + 1 if before < at <= before + size + 2 * _GRANULE else 0
    return taken


def _block(size: int) -> object:
    """An object that takes one block of this size class, and no reference to any other."""
    if size == 16:
        return object()
    if size == 32:
        return time.monotonic_ns() | 1 << 40
    return bytes(size - _BYTES_OVERHEAD)


def release_free_memory() -> None:
    """Give back what the C library's allocator holds but does not use."""
    try:
        malloc_trim = libc("malloc_trim", ctypes.c_size_t)
    except AttributeError:  # not glibc
        return
    malloc_trim(0)


def learn_what_is_written(habit: Callable[[], None]) -> None:
    """Find out, in a fork, which shared pages a habit writes to: those that own_pages() takes.

    Source: pagemap.rst, bit 56, set of pages that nobody else has mapped.
    """
    reader, writer = os.pipe()
    if (pid := process.fork()) == 0:
        with contextlib.suppress(Exception):  # without it there is less to gain
            habit()
            places = array.array("Q", [address for start, end in _mappings() for address in _alone(start, end)])
            os.write(writer, places.tobytes()[:_LEARNED])
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as told:
        _written.frombytes(told.read())
    os.waitpid(pid, 0)


def own_pages() -> None:
    """Have copies of the shared pages that are written to, all at once, by who has time for that now and not later.

    Source: madvise(2), MADV_POPULATE_WRITE, since Linux 5.14.
    """
    madvise = libc("madvise", ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for address in _written:
        madvise(address, mmap.PAGESIZE, _MADV_POPULATE_WRITE)


_written = array.array("Q")


def _mappings() -> Iterable[tuple[int, int]]:
    return _used_mappings(Path("/proc/self/smaps").read_text())


def _alone(start: int, end: int) -> Iterable[int]:
    """The pages between two addresses that are there and nobody else's."""
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(start // mmap.PAGESIZE * 8)
        entries = array.array("Q", pagemap.read((end - start) // mmap.PAGESIZE * 8))
    return (start + at * mmap.PAGESIZE for at, entry in enumerate(entries) if entry & _ALONE == _ALONE)
