"""Where modules are: a command loads a hundred, and looking for one among all directories takes longer than loading it.

The launcher writes the index, and the script it writes reads it. It holds places only: the code is in the pyc files of
the interpreter, and taken as long as it belongs to the source as it is now. Whatever else there is to say about a
module, that it is new, was changed or moved, is left to the interpreter's own way of loading it.

    marshal of this module's code | marshal of {name: (source, pyc, directory if it is a package)}
                                                      (shared library, "", "")
                                                      ("", "", directory) of a package without a file

Nothing is imported here that a bare interpreter has not loaded.
"""

import marshal
import posix
import sys
from _frozen_importlib import ModuleSpec
from _frozen_importlib_external import MAGIC_NUMBER, ExtensionFileLoader

type Index = dict[str, tuple[str, str, str]]

_HEADER_SIZE = 16
_BY_MTIME = bytes(4)
_32_BITS = 0xFFFFFFFF


class Finder:
    """For sys.meta_path: finds what is in the index, and loads it."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._code: dict[str, memoryview] = {}

    def find_spec(self, name: str, _path: object = None, _target: object = None) -> ModuleSpec | None:
        """How to load a module; None for what must be looked for."""
        if (places := self._index.get(name)) is None:
            return None
        source, compiled, directory = places
        loader: Finder | ExtensionFileLoader | None = self
        try:
            if compiled:
                self._code[name] = _code_of(source, compiled)
            elif source:
                posix.stat(source)
                loader = ExtensionFileLoader(name, source)
            else:
                loader = None
        except (OSError, ValueError):
            return None
        spec = ModuleSpec(name, loader, origin=source or None, is_package=bool(directory))  # type: ignore[arg-type]
        spec.has_location = bool(source)
        if spec.submodule_search_locations is not None:
            spec.submodule_search_locations.append(directory)
        return spec

    def create_module(self, _spec: ModuleSpec) -> None:
        """An ordinary one."""

    def exec_module(self, module: object) -> None:
        """Run its code."""
        names = vars(module)
        exec(marshal.loads(self._code.pop(names["__name__"])), names)  # noqa: S102, S302 - as the interpreter does


def _code_of(source: str, compiled: str) -> memoryview:
    """What a pyc file holds. Raises ValueError if it is not that of the source. Source: PEP 552."""
    found = posix.stat(source)
    fd = posix.open(compiled, posix.O_RDONLY | posix.O_CLOEXEC)
    try:
        data = posix.read(fd, posix.fstat(fd).st_size)
    finally:
        posix.close(fd)
    made_from = (int(found.st_mtime) & _32_BITS).to_bytes(4, "little") + (found.st_size & _32_BITS).to_bytes(
        4, "little"
    )
    if data[:_HEADER_SIZE] != MAGIC_NUMBER + _BY_MTIME + made_from:
        raise ValueError(compiled)
    return memoryview(data)[_HEADER_SIZE:]


def install(index: Index) -> None:
    """Look here first for what is imported from now on."""
    sys.meta_path.insert(0, Finder(index))
