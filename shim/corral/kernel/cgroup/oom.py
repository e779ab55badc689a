"""Counting the OOM kills of a cgroup; the count outlives it.

    v2   `memory.events` oom_kill counts the whole subtree; a change makes the file report EPOLLPRI
    v1   `memory.oom_control` oom_kill counts one cgroup; an eventfd registered in `cgroup.event_control` is
         signalled at every OOM in it, below or above it, before the kill, and once more when the cgroup is removed

So signals count nothing, they say when to look; who removes a cgroup looks before. Of what systemd removes see
corral.kernel.cgroup.systemd.removal.

Source: kernel cgroup-v2.rst "memory.events"; cgroup-v1/memory.rst "OOM Control".
"""

import contextlib
import os
import select
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Self

from corral.kernel.cgroup import files, membership
from corral.kernel.cgroup.v1.oom_kills import OOM_CONTROL as V1_OOM_CONTROL
from corral.kernel.cgroup.v1.oom_kills import Below

if TYPE_CHECKING:
    from pathlib import Path

V2_EVENTS = "memory.events"
V1_EVENT_CONTROL = "cgroup.event_control"
V2_OOM_GROUP = "memory.oom.group"
OOM_KILL = b"\noom_kill "
COUNTED_BEFORE = "trusted.corral.oom.before"
"""An attribute of a cgroup: how many kills there had been in those that were at its place before, and are gone."""


class OomWatch:
    """A count of OOM kills that an open file keeps reachable. Close it, or use it as a context manager."""

    __slots__ = ("_below", "_directory", "_epoll", "_eventfd", "_fd", "_last", "_uncounted")

    def __init__(
        self,
        directory: str,
        fd: int,
        eventfd: int,
        *,
        since_creation: bool,
        uncounted: int | None,
        known: int,
        is_new: bool = False,
    ) -> None:
        """Take over both fds; an eventfd of -1 means v2, a fd of -1 that there is nothing to watch.

        is_new: nobody has died in it.
        """
        self._directory, self._fd, self._eventfd = directory, fd, eventfd
        self._below = Below(directory)
        # On v2 this first look also quiets the file, which has news until it was read once.
        self._last = 0 if fd < 0 or (is_new and eventfd >= 0) else self._kills()
        if since_creation:
            uncounted = -_counted_before(directory)
        self._uncounted = self._last if uncounted is None else uncounted
        self._uncounted = min(self._uncounted, self._last - known)
        self._epoll: select.epoll | None = None
        if eventfd < 0:
            # An epoll fd is itself readable when a file in it has news: any selector can wait for it.
            self._epoll = select.epoll()
            if fd >= 0:
                self._epoll.register(fd, select.EPOLLPRI)

    @classmethod
    def open(
        cls,
        paths: "Iterable[Path | str]",
        *,
        since_creation: bool = False,
        uncounted: int | None = None,
        known: int = 0,
    ) -> Self:
        """Watch the one of a cgroup's directories that has a memory controller; without one count() is 0.

        A cgroup may outlive those who ran in it: without since_creation only kills from now on count, or those after
        the ones that an earlier watch found there (uncounted). known: so many an earlier one has counted, some of them
        in what is gone since.
        """
        # A v1 hierarchy is called after its controllers: there is no need to look for the file in all others first.
        likely_first = sorted(map(str, paths), key=lambda path: "memory" not in path)
        names = ((path, name) for path in likely_first for name in (V2_EVENTS, V1_OOM_CONTROL))
        return cls._first(names, since_creation=since_creation, uncounted=uncounted, known=known)

    @classmethod
    def of(cls, directory: str, version: int, *, known: int = 0) -> Self:
        """Watch a new cgroup, where the directory and the version of its memory controller are known.

        known: as in open(), and who opens it has them counted in.
        """
        name = V2_EVENTS if version == 2 else V1_OOM_CONTROL
        # Nobody has died in it, and what has been counted at its place is known.
        watch = cls._first([(directory, name)], since_creation=False, uncounted=0, known=known, is_new=True)
        if watch.uncounted < 0 and watch.directory:
            with contextlib.suppress(OSError):  # where there can be no such attribute, what is not looked for is lost
                os.setxattr(directory, COUNTED_BEFORE, b"%d" % -watch.uncounted)
        return watch

    @classmethod
    def _first(
        cls,
        names: Iterable[tuple[str, str]],
        *,
        since_creation: bool,
        uncounted: int | None = None,
        known: int = 0,
        is_new: bool = False,
    ) -> Self:
        made = partial(cls, since_creation=since_creation, uncounted=uncounted, known=known, is_new=is_new)
        for directory, name in names:
            where = _lasting(directory) if name == V2_EVENTS else directory
            try:
                fd = os.open(f"{where}/{name}", os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            eventfd = -1
            try:
                if name != V2_EVENTS:
                    eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                    files.write(f"{directory}/{V1_EVENT_CONTROL}", f"{eventfd} {fd}")
                return made(directory, fd, eventfd)
            except BaseException:
                os.close(fd)
                if eventfd >= 0:
                    os.close(eventfd)
                raise
        return made("", -1, -1)

    @property
    def uncounted(self) -> int:
        """How many kills there had been before those that count."""
        return self._uncounted

    @property
    def known(self) -> int:
        """What count() said last."""
        return self._last - self._uncounted

    @property
    def wakes_before_the_kill(self) -> bool:
        """Whether fileno() is readable once memory has run out, and not once more when somebody was killed for it."""
        return self._eventfd >= 0

    def fileno(self) -> int:
        """A file descriptor that is readable when count() may have changed; call count() to quiet it."""
        return self._eventfd if self._epoll is None else self._epoll.fileno()

    def has_news(self) -> bool:
        """Whether fileno() is readable."""
        if self._epoll is not None:
            return bool(self._epoll.poll(0))
        poll = select.poll()
        poll.register(self._eventfd, select.POLLIN)
        return bool(poll.poll(0))

    @property
    def directory(self) -> str:
        """The cgroup's, in the hierarchy of the memory controller; "" if there is nothing to watch."""
        return self._directory

    def takes_all(self) -> bool:
        """Whether the OOM killer takes everybody in here at once."""
        try:
            return files.read(f"{self._directory}/{V2_OOM_GROUP}") == "1"
        except OSError as e:
            if not membership.gone(e):
                raise
            return False

    def count(self) -> int:
        """How many processes the OOM killer took here; the last known answer once the cgroup is gone."""
        self._drain()  # also of one that is gone, which is signalled a moment later
        return self.last_count()

    def last_count(self) -> int:
        """count(), of who does not wait for fileno() any more."""
        if self._fd >= 0:
            try:
                self._last = max(self._last, self._kills())
            except OSError as e:
                if not membership.gone(e):
                    raise
                self._release()
        return self._last - self._uncounted

    def close(self) -> None:
        """Let go of the cgroup. count() keeps its last answer."""
        if self._epoll is not None:
            self._epoll.close()  # first: then nothing has to be taken out of it
        self._release()
        if self._eventfd >= 0:
            os.close(self._eventfd)
            self._eventfd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _kills(self) -> int:
        _, _, found = os.pread(self._fd, 4096, 0).partition(OOM_KILL)  # which is neither file's first line
        kills = int(found.partition(b"\n")[0] or 0)
        return kills + self._below.count() if self._eventfd >= 0 else kills

    def _drain(self) -> None:
        if self._eventfd >= 0:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._eventfd)

    def _release(self) -> None:
        """Forget the file but keep what fileno() tells, which the caller's selector may hold."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            if self._epoll is not None and not self._epoll.closed:
                # A removed file reports an error to every poll; a forked child may still hold it open.
                with contextlib.suppress(FileNotFoundError):
                    self._epoll.unregister(fd)
            os.close(fd)


def _counted_before(directory: str) -> int:
    try:
        return int(os.getxattr(directory, COUNTED_BEFORE)) if directory else 0
    except OSError:
        return 0


def _lasting(directory: str) -> str:
    """Where the kills of a v2 cgroup are counted beyond its end, if that is as long as systemd likes."""
    if directory.endswith(".scope"):
        from corral.kernel.cgroup.systemd.names import has_slice_of_its_own

        if has_slice_of_its_own(directory):
            return directory.rpartition("/")[0]
    return directory
