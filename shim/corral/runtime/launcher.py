"""Writes the file that is executed as `corral-oci`, and those it reads: `python -m corral.runtime.launcher FILE`.

What an installer makes of an entry point starts Python with its site module, which takes half as long again as starting
it without. This file names the interpreter and the place of the package instead, so it is written where they are known.
"""

from __future__ import annotations

import json
import marshal
import os
import sys
from importlib.util import MAGIC_NUMBER
from pathlib import Path
from typing import TYPE_CHECKING

from corral.runtime.bare_code import bare_code

if TYPE_CHECKING:
    from corral.runtime.index import Entry

_LONGEST_LINE = 255
"""Of a `#!` line. Source: execve(2)."""

INTERRUPTED = 130
"""What a command ends with that Ctrl-C ended, as shells have it. Until main() it could be in the middle of anything."""
_OPTIONS = ("-I", "-S", "-Xutf8")
"""Nothing from the environment, no site module, and text is UTF-8 whatever the locale, which is not asked then."""
_SCRIPT = """\
#!{interpreter} -ISXutf8
import marshal, sys
place = {place!r}
sys.path.insert(0, place)
files = place + {files!r} % sys.implementation.cache_tag
try:
    try:
        with open(files + "index", "rb") as file:
            exec(marshal.load(file), names := {{"__name__": "corral.runtime.index"}})
        names["begin"](files)
    except OSError:
        pass
    from corral.runtime.main import main_and_exit
    main_and_exit()
except KeyboardInterrupt:
    sys.exit({interrupted})
"""
_FILES = "/corral/runtime/__pycache__/corral-oci.%s."
"""Below the place of the package, of one version of Python; then comes the name of the group."""

_FIRST = {
    "main": ("corral.runtime.main", "corral.runtime.sealing", "corral.kernel.bare"),
    "standins": ("corral.runtime.standins",),
    "commands": ("corral.runtime.commands",),
}
"""What every command loads, one group after the other. Its own comes then, named after its module."""
_COMMANDS: dict[str, tuple[str, ...]] = {
    "create": ("corral.oci.limits", "corral.oci.stepping_stone"),
    "execute": ("corral.oci.joining", "corral.shim.seal"),
    "remove": (),
    "show": (),
    "start": (),
}
"""Those that are to start fast, and what they load on their way."""


def script(interpreter: str, place: str) -> str:
    """The text of the file. Raises ValueError if the interpreter's path can't stand in a `#!` line."""
    if any(character.isspace() for character in interpreter) or len(interpreter) + 12 > _LONGEST_LINE:
        raise ValueError(f"{interpreter}: this path can't stand in a #! line")
    return _SCRIPT.format(interpreter=interpreter, place=place, files=_FILES, interrupted=INTERRUPTED)


def groups(place: Path) -> dict[str, list[Entry]]:
    """What is to be loaded together, see corral.runtime.index."""
    found: dict[str, list[Entry]] = {}
    for command, more in _COMMANDS.items():
        for group, loaded in _loaded(place, _FIRST | {command: (f"corral.runtime.{command}", *more)}).items():
            found[group] = [_entry(*each) for each in loaded]
    packages = {"corral": f"{place}/corral", "corral.runtime": f"{place}/corral/runtime"}
    found["main"] += [(name, "", 0, 0, directory, None) for name, directory in packages.items()]
    return found


def _loaded(place: Path, wanted: dict[str, tuple[str, ...]]) -> dict[str, list[tuple[str, str, str]]]:
    """What a bare interpreter loads for each group, its name, file and directory."""
    program = (
        f"import sys; sys.path.insert(0, {str(place)!r}); from corral.runtime.recorder import main; main({wanted!r})"
    )
    reading, writing = os.pipe()
    with open(reading, encoding="utf-8") as answer:
        command = [sys.executable, *_OPTIONS, "-c", program]
        actions = [(os.POSIX_SPAWN_DUP2, writing, 1)]
        child = os.posix_spawn(sys.executable, command, os.environ, file_actions=actions)
        os.close(writing)
        text = answer.read()
    if status := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise RuntimeError(f"what the commands load could not be recorded: exit code {status}")
    found: dict[str, list[tuple[str, str, str]]] = json.loads(text)
    return found


def _entry(name: str, path: str, directory: str) -> Entry:
    status = Path(path).stat()
    code = bare_code(path) if path.endswith(".py") else None
    return name, path, status.st_mtime_ns, status.st_size, directory, code


def _write(path: Path, data: bytes, mode: int) -> None:
    path.parent.mkdir(exist_ok=True)  # __pycache__, in a fresh clone
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_bytes(data)
    temporary.chmod(mode)
    temporary.replace(path)


def main() -> None:
    """Write them all, for the interpreter that runs this."""
    place = Path(__file__).resolve().parents[2]
    files = f"{place}{_FILES % sys.implementation.cache_tag}"
    _write(Path(f"{files}index"), marshal.dumps(bare_code(f"{place}/corral/runtime/index.py")), 0o644)
    for group, entries in groups(place).items():
        _write(Path(files + group), MAGIC_NUMBER + marshal.dumps(entries), 0o644)
    _write(Path(sys.argv[1]), script(sys.executable, str(place)).encode(), 0o755)


if __name__ == "__main__":
    main()
