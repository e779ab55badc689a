"""What the design lets be unknown, and never invented: the end of a process that nobody was there to see.

Who sees an end: the process's shim; if that was killed the zygote that made it; or the tasks service, which keeps
pidfds. A container's exit may be unknown only if all of them were dead at one time.
"""

import threading
import time

# A tasks service that was started again has found every shim that is missing within this.
FOUND_S = 2.0


class Excuses:
    """Written by who kills, read by the workers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blind: set[str] = set()
        self._shim_killed_at: dict[str, float] = {}
        self._armed = False

    def unattended(self, container: str) -> None:
        """Its shim, its zygote and the tasks service were all dead at one time."""
        with self._lock:
            self._blind.add(container)

    def shim_killed(self, container: str) -> None:
        """About to be killed, in fact."""
        with self._lock:
            self._shim_killed_at[container] = time.monotonic()

    def armed(self) -> None:
        """Shims of this storm kill themselves, too."""
        self._armed = True

    def for_unknown_exit(self, container: str) -> str:
        """Why a container's own exit code may be unknown; empty if it may not."""
        with self._lock:
            return "everything was killed at once" if container in self._blind else ""

    def for_missing_end(self, container: str) -> str:
        """Why the last of its output may be missing, if its exit says so."""
        with self._lock:
            armed = "each shim killed itself" if self._armed else ""
        return self.for_unknown_exit(container) or armed

    def for_missed_bytes(self, container: str, since: float) -> str:
        """Why a client, attached at `since`, may have missed some: a shim had read them, and not passed them on."""
        with self._lock:
            killed = self._armed or self._shim_killed_at.get(container, 0.0) >= since
        return "the shim was killed" if killed else ""

    def for_unknown_exec(self, container: str, since: float) -> str:
        """Why that of an exec may be, which was made at `since`."""
        if why := self.for_unknown_exit(container):
            return why
        with self._lock:
            killed = self._armed or self._shim_killed_at.get(container, 0.0) > since - FOUND_S
        return "the shim was killed" if killed else ""
