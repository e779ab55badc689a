"""Writes the file that is executed as `corral`: `python -m corral.cli.launcher FILE`.

What an installer makes of the entry point starts Python with its site module, which looks for packages anew each time
and takes a third of the interpreter's start. This file names where they are instead, so it is written where that is
known. Without it `corral` works as well, a little later.
"""

import site
import sys
from pathlib import Path

_LONGEST_LINE = 255
"""Of a `#!` line. Source: execve(2)."""
_SCRIPT = """\
#!{interpreter} -IS
import sys
sys.path += {places!r}
from corral.cli.command import main
main()
"""


def script(interpreter: str, places: list[str]) -> str:
    """The text of the file. Raises ValueError if the interpreter's path can't stand in a `#!` line."""
    if any(character.isspace() for character in interpreter) or len(interpreter) + 8 > _LONGEST_LINE:
        raise ValueError(f"{interpreter}: this path can't stand in a #! line")
    return _SCRIPT.format(interpreter=interpreter, places=places)


def places() -> list[str]:
    """Where this interpreter finds packages, besides its own: the site module has put them behind those."""
    first = min(sys.path.index(place) for place in site.getsitepackages() if place in sys.path)
    return sys.path[first:]


def main() -> None:
    """Write it, for the interpreter that runs this."""
    path = Path(sys.argv[1])
    new = path.with_name(f".{path.name}.new")
    new.write_text(script(sys.executable, places()), "utf-8")
    new.chmod(0o755)
    new.replace(path)


if __name__ == "__main__":
    main()
