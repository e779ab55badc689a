"""Loads the modules that a command needs all at once: the interpreter takes longer to find each than to run it.

The launcher writes a file for each group of modules, in the order in which they are to be run. What has changed since,
and what is in no group, is left to the interpreter and its own way.

    magic number of the interpreter | marshal of [(name, source, mtime in ns, size, directory if it is a package, code)]
                                                  (name, shared library, mtime in ns, size, "", None)
                                                  (name, "", 0, 0, directory, None) of a package without a file

Nothing is imported here that a bare interpreter has not loaded.
"""

from __future__ import annotations

import _imp
import marshal
import posix
import sys
from _frozen_importlib import ModuleSpec
from _frozen_importlib_external import MAGIC_NUMBER, ExtensionFileLoader

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import CodeType, ModuleType

    type Entry = tuple[str, str, int, int, str, CodeType | None]

_Module = type(sys)
_files = ""


def begin(files: str) -> None:
    """Use the files whose paths begin so. For who executes this text, before there is such a module."""
    global _files  # noqa: PLW0603 - until then there are none
    _files = files
    load("main")
    if "corral.runtime" in sys.modules:
        name = "corral.runtime.index"
        vars(_add(name, _Module(name))).update(globals())


def load(group: str) -> None:
    """Load the modules of a group that are what they were when its file was written."""
    if not _files:
        return
    try:
        entries = _read(_files + group)
    except OSError:
        return
    # All of them are there before the first is run: a package is run after those of its modules that it imports.
    made = {entry[0]: _made(*entry) for entry in sorted(entries) if _is_wanted(entry[0])}
    for name, _, _, _, _, code in entries:
        if code is not None and name in made:
            exec(code, vars(made[name]))  # noqa: S102 - as the interpreter does


def _read(path: str) -> list[Entry]:
    """What of a file is not out of date."""
    fd = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC)
    try:
        data = posix.read(fd, posix.fstat(fd).st_size)
    finally:
        posix.close(fd)
    if data[: len(MAGIC_NUMBER)] != MAGIC_NUMBER:
        return []
    entries: list[Entry] = marshal.loads(memoryview(data)[len(MAGIC_NUMBER) :])  # noqa: S302 - trusted as pyc files are
    return [entry for entry in entries if _is_current(*entry[1:4])]


def _is_current(source: str, mtime: int, size: int) -> bool:
    if not source:
        return True
    try:
        found = posix.stat(source)
    except OSError:
        return False
    return found.st_mtime_ns == mtime and found.st_size == size


def _is_wanted(name: str) -> bool:
    """It is not there yet, and its package is, or is made: names are gone through in their order."""
    parent = name.rpartition(".")[0]
    return name not in sys.modules and (not parent or parent in sys.modules)


def _made(name: str, path: str, _mtime: int, _size: int, directory: str, code: CodeType | None) -> ModuleType:
    """A module whose code is still to be run."""
    if path and code is None:
        spec = ModuleSpec(name, ExtensionFileLoader(name, path), origin=path)
        library = _add(name, _imp.create_dynamic(spec))
        _imp.exec_dynamic(library)
        return library
    module = _Module(name)
    module.__file__ = path
    module.__package__ = name if directory else name.rpartition(".")[0]
    if directory:
        module.__path__ = [directory]
    return _add(name, module)


def _add(name: str, module: ModuleType) -> ModuleType:
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)
    return module
