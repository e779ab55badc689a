"""Writes the file that is executed as `corral`: `python -m corral.cli.launcher FILE`.

What an installer makes of the entry point starts Python with its site module, which looks for packages anew each time
and takes a third of the interpreter's start. This file names where they are instead, so it is written where that is
known. Without it `corral` works as well, a little later; so one that does not run replaces nothing.
"""

import os
import sys
from pathlib import Path

_LONGEST_LINE = 255
"""Of a `#!` line. Source: execve(2)."""
_SCRIPT = """\
#!{interpreter} -PS
import sys
sys.path += [place for place in {places!r} if place not in sys.path]
from corral.cli.command import main
main()
"""
"""Not -I: PYTHONPATH, PYTHONUTF8 and their like hold for the installer's, too."""


def script(interpreter: str, places: list[str]) -> str:
    """The text of the file. Raises ValueError if the interpreter's path can't stand in a `#!` line."""
    if any(character.isspace() for character in interpreter) or len(interpreter) + 8 > _LONGEST_LINE:
        raise ValueError(f"{interpreter}: this path can't stand in a #! line")
    return _SCRIPT.format(interpreter=interpreter, places=places)


def places() -> list[str]:
    """Where this interpreter finds modules, its own and those of packages wherever they were installed to.

    Not where it was started: python -m puts that first.
    """
    return sys.path if sys.flags.safe_path else sys.path[1:]


def write(path: Path) -> None:
    """Write it, for the interpreter that runs this, and replace what is there once the new one has run.

    Raises ValueError if it would not run, OSError; what is there stays then.
    """
    text = script(sys.executable, places())
    new = path.with_name(f".{path.name}.new")
    try:
        new.write_text(text, "utf-8")
        new.chmod(0o755)
        if not _runs(new):
            raise ValueError(f"a new one that looks for packages in {':'.join(places())} does not run")
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def _runs(file: Path) -> bool:
    """Whether it does for anybody, who may have another environment than this one's; its traceback goes to stderr."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "CORRAL"))}
    silent = (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)
    child = os.posix_spawn(file.absolute(), [str(file), "--help"], environment, file_actions=[silent])
    return os.waitpid(child, 0)[1] == 0


def main() -> None:
    """Write it where the command line says."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m corral.cli.launcher FILE")
    try:
        write(Path(sys.argv[1]))
    except (OSError, ValueError) as e:
        sys.exit(f"{sys.argv[1]} was not written, and what is there stays: {e}")


if __name__ == "__main__":
    main()
