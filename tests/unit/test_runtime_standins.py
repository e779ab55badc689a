"""The stand-ins for modules of the standard library do what those do, for what the core uses of them."""

import contextlib
import ctypes
import enum
import errno
import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from corral.runtime import standins
from corral.runtime.standins import contextlib as our_contextlib
from corral.runtime.standins import ctypes as our_ctypes
from corral.runtime.standins import enum as our_enum
from corral.runtime.standins import functools as our_functools

OS_PROGRAM = """
import os
print(os.path.join("a", "b"), os.fsencode("\\udc80/x"), os.fsdecode(b"\\x80/x") == "\\udc80/x", os.fsencode(b"y"))
print(os.environ["SAMPLE"] == "\\udcff", os.environ.get("MISSING"), os.devnull, os.O_CLOEXEC, os.SEEK_END)
for mode, exist_ok in ((0o700, False), (0o700, True)):
    os.makedirs("one/two/three", mode, exist_ok=exist_ok)
print([oct(os.stat(name).st_mode) for name in ("one", "one/two", "one/two/three")])
for name in ("one/two/three", "file", "file/below"):
    open("file", "w").close()
    try:
        os.makedirs(name, exist_ok=name != "one/two/three")
    except OSError as e:
        print(type(e).__name__)
print(sorted(os.walk("one"))[0][:2], isinstance(__import__("pathlib").Path("x"), os.PathLike))
"""

REPO = Path(__file__).resolve().parents[2]
NAMES = ("os", "types", "typing", "collections", "functools", "contextlib", "dataclasses", "enum", "signal", "ctypes")


def either(standard: ModuleType, ours: ModuleType) -> pytest.MarkDecorator:
    """Each test must hold for both."""
    return pytest.mark.parametrize("module", [standard, ours], ids=["standard", "ours"])


def run(program: str) -> str:
    """What a bare interpreter prints that has the stand-ins."""
    head = f"import sys; sys.path.insert(0, {str(REPO / 'shim')!r})\n"
    command = [
        sys.executable,
        "-IS",
        "-c",
        head + "from corral.runtime import standins; standins.install()\n" + program,
    ]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_what_a_stand_in_lacks_comes_from_the_standard_module() -> None:
    program = (
        "import typing; print(typing.OrderedDict, hasattr(typing, 'nothing'))\n"
        "from typing import NamedTuple\n"
        "class Pair(NamedTuple):\n    a: int\n    b: int = 2\n"
        "print(Pair(1), hasattr(typing, '__file__') and 'standins' in typing.__file__)\n"
        "from collections import Counter, deque; from enum import IntFlag; from signal import Signals\n"
        "print(Counter('aab').most_common(1), Signals.SIGKILL.name, IntFlag('F', 'A B').B.value)\n"
    )
    assert run(program) == "typing.OrderedDict False\nPair(a=1, b=2) True\n[('a', 2)] SIGKILL 2\n"


def test_classes_and_functions_may_be_generic() -> None:
    program = (
        "class Box[T]:\n    def __init__(self, held: T) -> None:\n        self.held = held\n"
        "def same[T](x: T) -> T:\n    return x\n"
        "print(Box[int](3).held, same(4))\n"
    )
    assert run(program) == "3 4\n"


def test_real_ones_that_are_there_already_stay() -> None:
    program = "for name in standins._NAMES:\n    sys.modules.pop(name)\n    __import__(name)\n"
    program += "standins.install(); print(any('standins' in sys.modules[name].__file__ for name in standins._NAMES))"
    assert run(program) == "False\n"


def test_the_standard_library_gets_on_with_them() -> None:
    program = (
        "import argparse, json, random, re, shutil, socket, subprocess, tempfile, threading, traceback\n"
        "import ast, importlib.util, inspect, logging, pathlib, pwd, selectors\n"
        "print(re.sub('b+', 'c', 'abba'), json.loads('[1]'), pathlib.Path('/a/b').name)\n"
    )
    assert run(program) == "aca [1] b\n"


def test_an_error_is_told_with_its_lines() -> None:
    program = "def f():\n    raise KeyError(3)\ntry:\n    f()\nexcept KeyError:\n    import traceback\n"
    assert run(program + "    print(traceback.format_exc())").count("line") == 2


@pytest.mark.parametrize("prelude", ["", "from corral.runtime import standins; standins.install()\n"])
def test_os(prelude: str, tmp_path: Path) -> None:
    program = f"import sys; sys.path.insert(0, {str(REPO / 'shim')!r})\n{prelude}{OS_PROGRAM}"
    command = [sys.executable, "-ISXutf8", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env={b"SAMPLE": b"\xff"})
    assert done.stdout.splitlines() == [
        "a/b b'\\x80/x' True b'y'",
        f"True None /dev/null {os.O_CLOEXEC} 2",
        "['0o40755', '0o40755', '0o40700']",
        "FileExistsError",
        "FileExistsError",
        "NotADirectoryError",
        "('one', ['two']) True",
    ]


def test_abstract_classes_are_the_real_ones_to_who_does_more_than_annotate() -> None:
    program = (
        "import array; from collections.abc import Callable, Iterable, Mapping, MutableSequence\n"
        "def f(x: Mapping[str, int] | None, y: Callable[[int], str]) -> Iterable[int]: ...\n"
        "print('_collections_abc' in sys.modules)\n"
        "from collections.abc import Sized\n"
        "class Map(Mapping):\n"
        "    def __getitem__(self, key): return 1\n"
        "    def __len__(self): return 1\n"
        "    def __iter__(self): return iter('a')\n"
        "print(dict(Map()), isinstance({}, Mapping), isinstance(3, Iterable), issubclass(Map, Mapping), Sized)\n"
        "print(isinstance(array.array('i'), MutableSequence))\n"
    )
    first = "{'a': 1} True False True <class 'collections.abc.Sized'>"
    assert run(program) == f"False\n{first}\nTrue\n"


@either(enum, our_enum)
def test_an_enumeration(module: ModuleType) -> None:
    class Colour(module.Enum):  # type: ignore[misc,name-defined]
        RED = "red"
        BLUE = "blue"
        AZURE = "blue"

        @property
        def upper(self) -> str:
            return str(self.value).upper()

        def is_red(self) -> bool:
            return self is Colour.RED

    assert [each.name for each in Colour] == ["RED", "BLUE"]
    assert len(Colour) == 2
    assert Colour("red") is Colour["RED"] is Colour.RED
    assert Colour.AZURE is Colour.BLUE
    assert (Colour.RED.value, Colour.RED.upper, Colour.RED.is_red(), Colour.BLUE.is_red()) == (
        "red",
        "RED",
        True,
        False,
    )
    assert isinstance(Colour.RED, Colour)
    assert {Colour.RED: 1}[Colour("red")] == 1
    assert (str(Colour.RED), repr(Colour.BLUE)) == ("Colour.RED", "<Colour.BLUE: 'blue'>")
    with pytest.raises(ValueError, match="'green' is not a valid"):
        Colour("green")
    with pytest.raises(KeyError):
        Colour["GREEN"]


@either(functools, our_functools)
def test_caches(module: ModuleType) -> None:
    calls = []

    @module.cache
    def one(x: int) -> int:
        calls.append(x)
        return x + 1

    @module.lru_cache
    def third(x: int) -> int:
        calls.append(x)
        return x + 1

    @module.lru_cache(maxsize=1)
    def other(x: int) -> int:
        calls.append(x)
        return x + 1

    assert [one(1), one(1), one(2), one(1)] == [2, 2, 3, 2]
    assert [other(5), other(5), other(6), other(5)] == [6, 6, 7, 6]
    assert [third(7), third(7)] == [8, 8]
    assert calls == [1, 2, 5, 6, 5, 7]
    assert module.partial(divmod, 7)(2) == (3, 1)


@either(contextlib, our_contextlib)
def test_a_block_of_a_generator(module: ModuleType) -> None:
    seen: list[object] = []

    @module.contextmanager
    def block(name: str, *, quiet: bool = False) -> Iterator[str]:
        seen.append(f"begin {name}")
        try:
            yield name
        except KeyError:
            if not quiet:
                raise
        finally:
            seen.append("end")

    with block("a") as given:
        seen.append(given)
    assert seen == ["begin a", "a", "end"]
    with block("b", quiet=True):
        raise KeyError
    for error in (KeyError(1), ValueError(2), StopIteration(3), RuntimeError(4)):
        with pytest.raises(type(error)) as raised, block("c"):
            raise error
        assert raised.value is error


@either(contextlib, our_contextlib)
def test_a_generator_that_does_not_yield_once_is_told(module: ModuleType) -> None:
    @module.contextmanager
    def block(count: int) -> Iterator[None]:
        for _ in range(count):
            with contextlib.suppress(KeyError):
                yield

    with pytest.raises(RuntimeError, match="didn't yield"), block(0):
        pass
    with pytest.raises(RuntimeError, match="didn't stop"), block(2):
        pass
    with pytest.raises(RuntimeError, match="didn't stop after throw"), block(2):
        raise KeyError


@either(contextlib, our_contextlib)
def test_an_error_in_the_end_of_a_block_has_the_first_as_its_context(module: ModuleType) -> None:
    @module.contextmanager
    def block() -> Iterator[None]:
        try:
            yield
        finally:
            raise ValueError("second")

    with pytest.raises(ValueError, match="second") as raised, block():
        raise KeyError
    assert isinstance(raised.value.__context__, KeyError)


@either(contextlib, our_contextlib)
def test_suppress_closing_and_nullcontext(module: ModuleType) -> None:
    with module.suppress(KeyError, OSError):
        raise FileNotFoundError
    with pytest.raises(ValueError, match="x"), module.suppress(KeyError):
        raise ValueError("x")
    closed = []

    class Thing:
        def close(self) -> None:
            closed.append(self)

    with module.closing(Thing()) as thing:
        assert closed == []
    assert closed == [thing]
    with module.nullcontext(3) as given:
        assert given == 3


@either(contextlib, our_contextlib)
def test_a_stack_is_undone_from_its_end_whatever_fails(module: ModuleType) -> None:
    seen: list[object] = []

    def fail(error: Exception) -> None:
        seen.append(type(error))
        raise error

    stack, first = module.ExitStack(), KeyError("first")
    stack.callback(seen.append, "last")
    stack.callback(fail, ValueError("second"))
    stack.enter_context(module.suppress(OSError))
    with pytest.raises(ValueError, match="second") as raised, stack:
        raise first
    assert seen == [ValueError, "last"]
    assert raised.value.__context__ is first


@either(contextlib, our_contextlib)
def test_a_stack_lets_a_block_end_an_error_and_hands_over(module: ModuleType) -> None:
    seen: list[object] = []
    with module.ExitStack() as stack:
        stack.callback(seen.append, 1)
        stack.enter_context(module.suppress(KeyError))
        raise KeyError
    assert seen == [1]
    with module.ExitStack() as stack:
        stack.callback(seen.append, 2)
        other = stack.pop_all()
    assert seen == [1]
    other.close()
    other.close()
    assert seen == [1, 2]
    stack, error = module.ExitStack(), ValueError("same")
    stack.callback(seen.append, 3)
    with pytest.raises(ValueError, match="same") as raised, stack:
        raise error
    assert raised.value is error


@either(ctypes, our_ctypes)
def test_calls_of_c(module: ModuleType) -> None:
    library = module.CDLL(None, use_errno=True)
    call = library["open"]
    call.argtypes = (module.c_char_p, module.c_int)
    assert call(b"/nowhere/at/all", 0) == -1
    assert module.get_errno() == errno.ENOENT
    length = library["strlen"]
    length.argtypes, length.restype = (module.c_char_p,), module.c_size_t
    assert length(b"four") == 4
    with pytest.raises(ctypes.ArgumentError):
        call("text", 0)
    assert [module.sizeof(getattr(module, f"c_{name}")) for name in ("int", "uint64", "size_t", "void_p")] == [
        4,
        8,
        8,
        8,
    ]
    version = module.PyDLL(None)["Py_GetVersion"]
    version.restype = module.c_char_p
    assert version().decode() == sys.version


def test_each_name_that_a_stand_in_is_for_is_that_of_a_standard_module() -> None:
    assert standins._NAMES == NAMES
    assert set(NAMES) <= sys.stdlib_module_names
