"""The pages that a forked Python process keeps sharing with its parent."""

import subprocess
import sys
from pathlib import Path

import corral.kernel

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
