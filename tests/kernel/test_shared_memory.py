"""The pages that a forked Python process keeps sharing with its parent."""

import subprocess
import sys
from pathlib import Path

import corral.kernel
from corral.kernel import shared_memory

SCRIPT = """
import ctypes, sys
sys.path.insert(0, sys.argv[1])
from corral.kernel import shared_memory

class Ordinary:
    pass

def words(things):
    return [ctypes.c_uint64.from_address(id(thing)).value for thing in things]

def use(things):
    for thing in things:
        held = [thing] * 10
        held.append(thing.__class__)

things = [Ordinary(), [], {}, use, Ordinary, "not a constant".upper(), 2.5 * len(sys.argv)]
marked = shared_memory.make_immortal()
before = words(things)
use(things)
print(marked, before == words(things))
"""


def test_looking_at_an_immortal_object_writes_nothing_into_it():
    place = str(Path(next(iter(corral.kernel.__path__))).parents[1])
    command = [sys.executable, "-I", "-S", "-c", SCRIPT, place]
    marked, unchanged = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert int(marked) > 1000
    assert unchanged == "True"


HUGE_PAGES = """
import mmap, os, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from corral.kernel import shared_memory

shared_memory._HUGE_PAGES = Path(sys.argv[2])

def huge_kib():
    [line] = [line for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if "AnonHugePages:" in line]
    return int(line.split()[1])

used = mmap.mmap(-1, 16 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
sparse = mmap.mmap(-1, 16 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
sparse.madvise(mmap.MADV_NOHUGEPAGE)  # it is a mapping of its own then
used[:] = bytes([7]) * len(used)
sparse[0] = sparse[9 << 20] = 7
shared_memory.collapse_pages()
have = huge_kib()
if os.fork() == 0:
    used[8 << 20] = 8
    os._exit(used[8 << 20] != 8)
_, status = os.wait()
print(have >> 10, status, set(used[:]) == {7}, sparse[9 << 20])
"""


def test_memory_that_is_in_use_is_in_huge_pages_and_a_fork_has_its_own_all_the_same() -> None:
    have_mib = _huge_mib(shared_memory._HUGE_PAGES)
    if wants_huge_pages():
        assert 12 <= have_mib < 28


def test_a_host_that_never_wants_huge_pages_gets_none(tmp_path: Path) -> None:
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    (tmp_path / "hpage_pmd_size").write_text("2097152\n")
    have_mib = _huge_mib(tmp_path)
    if wants_huge_pages() != "always":
        assert have_mib == 0


def _huge_mib(settings: Path) -> int:
    """How much a process has in them after it has asked for it, on a host with these settings."""
    place = str(Path(next(iter(corral.kernel.__path__))).parents[1])
    command = [sys.executable, "-I", "-S", "-c", HUGE_PAGES, place, str(settings)]
    have_mib, *rest = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert rest == ["0", "True", "7"]
    return int(have_mib)


def wants_huge_pages() -> str:
    """When this host wants them; "" for never."""
    try:
        setting = (shared_memory._HUGE_PAGES / "enabled").read_text()
    except FileNotFoundError:  # a kernel without them
        return ""
    return setting.partition("[")[2].partition("]")[0].replace("never", "")


GATHERED = """
import os, sys
sys.path.insert(0, sys.argv[1])
from corral.kernel import shared_memory

def here():
    return 1

def in_a_fork():
    return 2

def nowhere():
    return 3

def run():
    here()
    if os.fork() == 0:
        in_a_fork()
        os._exit(0)
    os.wait()

before = [f.__code__ for f in (here, in_a_fork, nowhere)]
shared_memory.gather_code(run)
print([f.__code__ is not code for f, code in zip((here, in_a_fork, nowhere), before)], here(), in_a_fork(), nowhere())
"""


def test_code_that_only_a_fork_has_executed_is_gathered_too() -> None:
    place = str(Path(next(iter(corral.kernel.__path__))).parents[1])
    command = [sys.executable, "-I", "-S", "-c", GATHERED, place]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert told == "[True, True, False] 1 2 3"


OWN_PAGES = """
import ctypes, mmap, os, struct, sys
sys.path.insert(0, sys.argv[1])
from corral.kernel import process, shared_memory

block = bytearray(b"x") * (1 << 20)
begin = ctypes.addressof(ctypes.c_char.from_buffer(block))

def alone(offset):
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek((begin + offset) // mmap.PAGESIZE * 8)
        return struct.unpack("Q", pagemap.read(8))[0] >> 56 & 1

def habit():
    block[300_000] = 7

shared_memory.learn_what_is_written(habit)
if process.fork() == 0:
    before = alone(300_000)
    shared_memory.own_pages()
    print(before, alone(300_000), alone(600_000), block[300_000], flush=True)
    os._exit(0)
os.wait()
"""


def test_pages_that_a_habit_writes_to_are_had_alone_and_no_others():
    place = str(Path(next(iter(corral.kernel.__path__))).parents[1])
    command = [sys.executable, "-I", "-S", "-c", OWN_PAGES, place]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == ["0", "1", "0", "120"]
