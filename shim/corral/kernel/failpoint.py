"""Named places at which a test can kill, fail or delay this process.

    CORRAL_FAILPOINTS="tasks.create.after_clone=kill,images.import.commit=error@2,store.before_commit=sleep:0.5"

`name=ACTION[@N]`: ACTION is `kill` (SIGKILL to this process, once the place's name is on stderr), `error` (OSError EIO)
or `sleep:SECONDS`; with @N only the N-th time the place is reached, else every time. The variable is read once, at
import; when it is unset a failpoint is one empty call.
"""

import errno
import os
import signal
import time
from collections import Counter
from dataclasses import dataclass

VARIABLE = "CORRAL_FAILPOINTS"


@dataclass(frozen=True, slots=True)
class Trigger:
    """What to do at one named place."""

    action: str
    seconds: float = 0.0
    only_hit: int | None = None

    def fire(self, name: str) -> None:
        if self.action == "kill":
            os.write(2, f"failpoint {name}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.action == "error":
            raise OSError(errno.EIO, f"failpoint {name}")
        else:
            time.sleep(self.seconds)


def parse(text: str) -> dict[str, Trigger]:
    """The triggers that a value of CORRAL_FAILPOINTS describes. Raises ValueError, naming the entry."""
    return dict(_parse_entry(entry.strip()) for entry in text.split(",") if entry.strip())


def _parse_entry(entry: str) -> tuple[str, Trigger]:
    name, _, rest = entry.partition("=")
    action, _, hit = rest.partition("@")
    action, _, seconds = action.partition(":")
    if not name or action not in ("kill", "error", "sleep") or (action == "sleep") != bool(seconds):
        raise ValueError(f"{VARIABLE}: {entry!r} is not of the form name=kill|error|sleep:SECONDS[@N]")
    try:
        return name, Trigger(action, float(seconds or 0), int(hit) if hit else None)
    except ValueError as e:
        raise ValueError(f"{VARIABLE}: {entry!r} is not of the form name=kill|error|sleep:SECONDS[@N]") from e


_triggers = parse(os.environ.get(VARIABLE, ""))
_hits: Counter[str] = Counter()


def _off(name: str) -> None:
    """A place to fail at; nothing is asked to fail."""


def _armed(name: str) -> None:
    """A place to fail at, if CORRAL_FAILPOINTS names it."""
    trigger = _triggers.get(name)
    if trigger is None:
        return
    _hits[name] += 1
    if trigger.only_hit in (None, _hits[name]):
        trigger.fire(name)


failpoint = _armed if _triggers else _off
