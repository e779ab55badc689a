"""Writes the file that is executed as `corral-oci`: `python -m corral.runtime.launcher FILE`.

What an installer makes of an entry point starts Python with its site module, which takes half as long again as starting
it without. This file names the interpreter and the place of the package instead, so it is written where they are known.
"""

import sys
from pathlib import Path

_LONGEST_LINE = 255
"""Of a `#!` line. Source: execve(2)."""

_SCRIPT = """\
#!{interpreter} -IS
import sys

sys.path.insert(0, {place!r})
from corral.runtime.main import main_and_exit

main_and_exit()
"""


def script(interpreter: str, place: str) -> str:
    """The text of the file. Raises ValueError if the interpreter's path can't stand in a `#!` line."""
    if any(character.isspace() for character in interpreter) or len(interpreter) + 6 > _LONGEST_LINE:
        raise ValueError(f"{interpreter}: this path can't stand in a #! line")
    return _SCRIPT.format(interpreter=interpreter, place=place)


def write(path: Path) -> None:
    """Write the file, for the interpreter that runs this."""
    place = Path(__file__).resolve().parents[2]
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(script(sys.executable, str(place)), "utf-8")
    temporary.chmod(0o755)
    temporary.replace(path)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
