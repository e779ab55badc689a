"""Network namespaces kept ready: making one takes a millisecond or more, taking one from here nothing.

Each is pinned by a bind mount under our directory, with its loopback up. A namespace is used once; what an endpoint
leaves behind in it is nobody's to inherit, so it is never put back.
"""

import fcntl
import functools
import os
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import structlog

from corral.kernel.netns import create_each_pinned, create_pinned, remove_pinned
from corral.network.files import FileStore

log = structlog.get_logger()

# Whoever took one starts a container now, and making the next would compete with it for RTNL and the interpreter. So
# that waits, while half of them are still there.
PAUSE_S = 0.1

_SIOCSIFFLAGS = 0x8914
_IFF_UP = 0x1
# Interfaces get IPv6 only in networks that have it: no link-local addresses, no router solicitations on the bridge.
_NO_IPV6 = "/proc/sys/net/ipv6/conf/default/disable_ipv6"


class NetnsPool:
    """Ready namespaces in `directory`. All methods may be called from any thread; they block."""

    def __init__(self, directory: Path, size: int, files: FileStore | None = None) -> None:
        """`files`: with each namespace, the files of an endpoint are made ready there, under its name."""
        self.directory = directory
        self._size = size
        self._files = files
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
        remove_pinned(f"{self.directory}/{name}")
        if self._files is not None:
            self._files.drop_ready(name)

    def pinned(self) -> tuple[set[str], set[str]]:
        """The names of all that are pinned, and of those that are ready to be taken."""
        pinned = {path.name for path in self.directory.iterdir()}
        return pinned, set(self._ready)

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
            try:
                create_each_pinned(self._missing(), _prepare)
            except OSError as e:
                # make() meets the same error and tells the one who asked.
                log.warning("netns.pool_not_filled", error=str(e))
            if self._stopping:
                return

    def _missing(self) -> Iterator[str]:
        """Where to make one, as long as there is one to be made; who asks for the next has made the one before."""
        while len(self._ready) < self._size and not self._stopping:
            name = _new_name()
            yield f"{self.directory}/{name}"
            self._add_files(name)
            self._ready.append(name)

    def make(self) -> str:
        """A new namespace, pinned, for the caller. Raises OSError."""
        name = _new_name()
        create_pinned(f"{self.directory}/{name}", _prepare)
        self._add_files(name)
        return name

    def make_kept(self, name: str, prepare: Callable[[], object]) -> None:
        """A namespace under a name of its own, which stays until it is discarded; `prepare` runs inside first, so that
        what is pinned is whole. Raises OSError."""
        remove_pinned(f"{self.directory}/{name}")  # of a process that died before it was

        def inside() -> None:
            _prepare()
            prepare()

        create_pinned(f"{self.directory}/{name}", inside)

    def _add_files(self, name: str) -> None:
        if self._files is not None:
            try:
                self._files.make_ready(name)
            except OSError as e:  # who writes them meets the same error, and tells the one who asked
                log.warning("netns.files_not_ready", error=str(e))


def is_pinned(path: Path | str) -> bool:
    """Whether a namespace is pinned at path: it lies on the file system of namespaces."""
    try:
        return os.stat(path).st_dev == _namespaces_device()  # noqa: PTH116 - a string
    except OSError:
        return False


@functools.cache
def _namespaces_device() -> int:
    return Path("/proc/self/ns/net").stat().st_dev


def _new_name() -> str:
    return f"ns-{os.urandom(6).hex()}"


def _prepare() -> None:
    """Inside a new namespace: loopback up, IPv6 off for interfaces to come."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", _IFF_UP))
    try:
        fd = os.open(_NO_IPV6, os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:  # a kernel without IPv6
        return
    try:
        os.write(fd, b"1")
    finally:
        os.close(fd)
