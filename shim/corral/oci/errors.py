"""The one error of the runtime core that is about the container and not about the host."""

EXEC_NOT_FOUND = "exec_not_found"
EXEC_DENIED = "exec_denied"
SETUP = "setup"

HOOK_FAILED = "error running "
"""How the message begins if it is a hook that failed."""


class ExecFailed(Exception):
    """The container's program can't be run; message is a sentence for the user.

    kind is `exec_not_found` (docker's 127), `exec_denied` (126) or `setup`: what was asked of the container can't be
    set up (a bad user, a missing mount source, a link where /proc should be).
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
