"""Why a command failed, as one sentence."""

import os

USAGE_CODE = 1
UNKNOWN_COMMAND_CODE = 3
"""As runc's command line has it."""
EXEC_CODE = 255
"""What exec ends with if its program never ran, as clients of runc expect."""


class CommandError(Exception):
    """The sentence for the user, and the exit code."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def not_there(container_id: str) -> CommandError:
    """There is no container of this id; clients look for these words."""
    return CommandError(f"container {container_id!r} does not exist")


def sentence(error: OSError) -> str:
    """What a failed call says, lower case as clients look for it: "no such file or directory"."""
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    text = error.strerror or str(error)
    known = os.strerror(error.errno) if error.errno else ""
    if known:
        text = text.replace(known, known[:1].lower() + known[1:])
    return f"{text}: {' -> '.join(names)}" if names else text
