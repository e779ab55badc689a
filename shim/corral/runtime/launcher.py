"""Writes the file that is executed as `corral-oci`, and the index it reads: `python -m corral.runtime.launcher FILE`.

What an installer makes of an entry point starts Python with its site module, which takes half as long again as starting
it without. This file names the interpreter and the place of the package instead, so it is written where they are known.
"""

import marshal
import sys
from importlib import import_module
from importlib.machinery import ExtensionFileLoader, SourceFileLoader
from importlib.util import cache_from_source
from pathlib import Path

from corral.runtime.index import Index

_LONGEST_LINE = 255
"""Of a `#!` line. Source: execve(2)."""

_SCRIPT = """\
#!{interpreter} -IS
import marshal
import sys

place = {place!r}
sys.path.insert(0, place)
try:
    with open(place + {index!r} % sys.implementation.cache_tag, "rb") as file:
        exec(marshal.load(file), names := {{"__name__": "corral.runtime.index"}})
        names["install"](marshal.load(file))
except OSError:
    pass
from corral.runtime.main import main_and_exit

main_and_exit()
"""
_INDEX = "/corral/runtime/__pycache__/corral-oci.%s.index"
"""Below the place of the package, of one version of Python."""
_COMMANDS = ("create", "execute", "remove", "show", "start")
"""Those that are to start fast, with all that they need; the others share most of it."""
_WHEN_NEEDED = (
    "corral.kernel.bare",
    "corral.oci.joining",
    "corral.oci.limits",
    "corral.runtime.terminal",
    "corral.shim.seal",
)
"""What commands load on their way."""


def script(interpreter: str, place: str) -> str:
    """The text of the file. Raises ValueError if the interpreter's path can't stand in a `#!` line."""
    if any(character.isspace() for character in interpreter) or len(interpreter) + 6 > _LONGEST_LINE:
        raise ValueError(f"{interpreter}: this path can't stand in a #! line")
    return _SCRIPT.format(interpreter=interpreter, place=place, index=_INDEX)


def index(place: Path) -> bytes:
    """The index, see corral.runtime.index, of what the commands load: of ours, and of the standard library."""
    for name in ("main", "sealing", "hints", "records", "commands", *_COMMANDS):
        import_module(f"corral.runtime.{name}")
    for name in _WHEN_NEEDED:
        import_module(name)
    places: Index = {"corral": ("", "", str(place / "corral"))}
    for name, module in sorted(sys.modules.items()):
        # Not all of them are modules: Python 3.12's typing.io is a class.
        loader = getattr(getattr(module, "__spec__", None), "loader", None)
        if name.partition(".")[0] not in {"corral", *sys.stdlib_module_names}:
            continue
        if isinstance(loader, SourceFileLoader):
            directory = str(Path(loader.path).parent) if loader.is_package(name) else ""
            places[name] = (loader.path, cache_from_source(loader.path), directory)
        elif isinstance(loader, ExtensionFileLoader):
            places[name] = (loader.path, "", "")
    name = "corral.runtime.index"
    return marshal.dumps(SourceFileLoader(name, places[name][0]).get_code(name)) + marshal.dumps(places)


def _write(path: Path, data: bytes, mode: int) -> None:
    path.parent.mkdir(exist_ok=True)  # __pycache__, in a fresh clone
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_bytes(data)
    temporary.chmod(mode)
    temporary.replace(path)


def main() -> None:
    """Write both, for the interpreter that runs this."""
    place = Path(__file__).resolve().parents[2]
    _write(Path(f"{place}{_INDEX % sys.implementation.cache_tag}"), index(place), 0o644)
    _write(Path(sys.argv[1]), script(sys.executable, str(place)).encode(), 0o755)


if __name__ == "__main__":
    main()
