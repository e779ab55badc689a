"""The stand-in for typing."""

import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]


def run(program: str) -> str:
    """What a bare interpreter prints that has the stand-in."""
    head = (
        f"import sys; sys.path.insert(0, {str(REPO / 'shim')!r})\nfrom corral.runtime import hints; hints.install()\n"
    )
    command = [sys.executable, "-IS", "-c", head + program]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_what_the_stand_in_lacks_comes_from_the_standard_module() -> None:
    program = (
        "import typing; print(typing.OrderedDict, hasattr(typing, 'nothing'))\n"
        "from typing import NamedTuple\n"
        "class Pair(NamedTuple):\n    a: int\n    b: int = 2\n"
        "print(Pair(1), hasattr(typing, '__file__'))\n"
    )
    assert run(program) == "typing.OrderedDict False\nPair(a=1, b=2) False\n"


def test_classes_and_functions_may_be_generic() -> None:
    program = (
        "class Box[T]:\n    def __init__(self, held: T) -> None:\n        self.held = held\n"
        "def same[T](x: T) -> T:\n    return x\n"
        "print(Box[int](3).held, same(4))\n"
    )
    assert run(program) == "3 4\n"


def test_a_real_one_that_is_there_already_stays() -> None:
    program = "del sys.modules['typing']; import typing; hints.install(); print(typing.__file__ != '')"
    assert run(program) == "True\n"
