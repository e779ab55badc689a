"""Network namespaces kept ready: making one takes a millisecond or more, taking one from here nothing.

Each is pinned by a bind mount under our directory, with its loopback up. A namespace is used once; what an endpoint
leaves behind in it is nobody's to inherit, so it is never put back.
"""

import fcntl
import os
import socket
import struct
import threading
from collections import deque
from pathlib import Path

import structlog

from corral.kernel.netns import create_pinned, remove_pinned

log = structlog.get_logger()

# Whoever took one starts a container now, and making the next would compete with it for RTNL and the interpreter. So
# that waits, while half of them are still there.
PAUSE_S = 0.05

_SIOCSIFFLAGS = 0x8914
_IFF_UP = 0x1
# Interfaces get IPv6 only in networks that have it: no link-local addresses, no router solicitations on the bridge.
_NO_IPV6 = Path("/proc/sys/net/ipv6/conf/default/disable_ipv6")


class NetnsPool:
    """Ready namespaces in `directory`. All methods may be called from any thread; they block."""

    def __init__(self, directory: Path, size: int) -> None:
        self.directory = directory
        self._size = size
        self._ready: deque[str] = deque()
        self._wanted = threading.Event()
        self._urgent = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._keep_filled, name="netns-pool", daemon=True)

    def start(self) -> None:
        """Begin to fill it, in the background."""
        self._wanted.set()
        self._urgent.set()
        self._thread.start()

    def take(self) -> str | None:
        """The name of a ready namespace, the caller's from now on; None if there is none: make() one then. Never
        blocks."""
        name = self._ready.popleft() if self._ready else None
        self._wanted.set()
        if len(self._ready) <= self._size // 2:
            self._urgent.set()
        return name

    def give_back(self, name: str) -> None:
        """A namespace that was taken and then not used."""
        self._ready.append(name)

    @property
    def ready(self) -> int:
        """How many can be taken now."""
        return len(self._ready)

    def path(self, name: str) -> Path:
        """Where a namespace is pinned."""
        return self.directory / name

    def discard(self, name: str) -> None:
        """Unpin a namespace; it ends with the last process in it. No error if it is gone."""
        remove_pinned(self.path(name))

    def sweep(self, keep: set[str]) -> list[str]:
        """Unpin all but those to be kept and return their names; before start(), so they are those of a dead daemon."""
        stale = [path.name for path in self.directory.iterdir() if path.name not in keep]
        for name in stale:
            self.discard(name)
        return stale

    def close(self) -> None:
        """Stop filling and unpin what is ready."""
        self._stopping = True
        self._wanted.set()
        self._urgent.set()
        if self._thread.is_alive():
            self._thread.join()
        while self._ready:
            self.discard(self._ready.popleft())

    def _keep_filled(self) -> None:
        while True:
            self._wanted.wait()
            self._urgent.wait(PAUSE_S)
            self._wanted.clear()
            self._urgent.clear()
            while len(self._ready) < self._size and not self._stopping:
                try:
                    self._ready.append(self.make())
                except OSError as e:
                    # make() meets the same error and tells the one who asked.
                    log.warning("netns.pool_not_filled", error=str(e))
                    break
            if self._stopping:
                return

    def make(self) -> str:
        """A new namespace, pinned, for the caller. Raises OSError."""
        name = f"ns-{os.urandom(6).hex()}"
        create_pinned(self.path(name), _prepare)
        return name


def is_pinned(path: Path) -> bool:
    """Whether a namespace is pinned at path: it lies on the file system of namespaces."""
    try:
        return path.stat().st_dev == Path("/proc/self/ns/net").stat().st_dev
    except OSError:
        return False


def _prepare() -> None:
    """Inside a new namespace: loopback up, IPv6 off for interfaces to come."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", _IFF_UP))
    if _NO_IPV6.exists():
        _NO_IPV6.write_text("1")
