"""The command `corral` against a daemon of the tests: what it says where nothing may go wrong."""

import json
import time
from collections.abc import Callable

from support.corrald import Corrald


def ok(box: Corrald, *args: str, stdin: bytes | None = None) -> str:
    """What the command prints. Raises AssertionError, with all that was said, if it fails."""
    result = box.corral(*args, stdin=stdin)
    assert result.returncode == 0, (args, result.stderr.decode(), box.log()[-4000:])
    return result.stdout.decode()


def state(box: Corrald, name: str) -> dict[str, object]:
    """What `inspect` shows of a container."""
    found: dict[str, object] = json.loads(ok(box, "inspect", name))[0]
    return found


def eventually(check: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait until a condition comes true. Raises AssertionError if it does not."""
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)
