"""Counting the OOM kills of a cgroup, also after it was removed.

    v2   `memory.events` oom_kill counts the whole subtree; a change makes the file report EPOLLPRI
    v1   `memory.oom_control` oom_kill counts one cgroup; an eventfd registered in `cgroup.event_control` is
         signalled at every OOM, before the kill, and once more when the cgroup is removed

Source: kernel cgroup-v2.rst "memory.events"; cgroup-v1/memory.rst "OOM Control".
"""

import contextlib
import os
import select
from collections.abc import Iterable
from typing import TYPE_CHECKING, Self

from corral.kernel.cgroup import files, membership

if TYPE_CHECKING:
    from pathlib import Path

V2_EVENTS = "memory.events"
V1_OOM_CONTROL = "memory.oom_control"
V1_EVENT_CONTROL = "cgroup.event_control"
V2_OOM_GROUP = "memory.oom.group"
OOM_KILL = "oom_kill"

_REMOVAL_S = 0.1
"""How long the kernel's worker may take to signal that a v1 cgroup was removed."""


class OomWatch:
    """A count of OOM kills that an open file keeps reachable. Close it, or use it as a context manager."""

    __slots__ = ("_before", "_directory", "_epoll", "_eventfd", "_fd", "_last", "_signals", "_uncounted")

    def __init__(
        self, directory: str, fd: int, eventfd: int, *, since_creation: bool, uncounted: int | None = None
    ) -> None:
        """Take over both fds; an eventfd of -1 means v2, a fd of -1 that there is nothing to watch."""
        self._directory, self._fd, self._eventfd = directory, fd, eventfd
        self._signals = 0
        # On v2 this first look also quiets the file, which has news until it was read once.
        self._before = self._last = self._kills() if fd >= 0 else 0
        self._uncounted = 0 if since_creation else self._before if uncounted is None else uncounted
        # An epoll fd is itself readable when a file in it has news: any selector can wait for it.
        self._epoll = select.epoll()
        if eventfd >= 0:
            self._epoll.register(eventfd, select.EPOLLIN)
        elif fd >= 0:
            self._epoll.register(fd, select.EPOLLPRI)

    @classmethod
    def open(cls, paths: "Iterable[Path]", *, since_creation: bool = False, uncounted: int | None = None) -> Self:
        """Watch the one of a cgroup's directories that has a memory controller; without one count() is 0.

        A cgroup may outlive those who ran in it: without since_creation only kills from now on count, or those after
        the ones that an earlier watch found there (uncounted).
        """
        names = ((str(path), name) for path in paths for name in (V2_EVENTS, V1_OOM_CONTROL))
        return cls._first(names, since_creation=since_creation, uncounted=uncounted)

    @classmethod
    def of(cls, directory: str, version: int) -> Self:
        """Watch a new cgroup, where the directory and the version of its memory controller are known."""
        return cls._first([(directory, V2_EVENTS if version == 2 else V1_OOM_CONTROL)], since_creation=True)

    @classmethod
    def _first(cls, names: Iterable[tuple[str, str]], *, since_creation: bool, uncounted: int | None = None) -> Self:
        for directory, name in names:
            try:
                fd = os.open(f"{directory}/{name}", os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            with contextlib.ExitStack() as fds:
                fds.callback(os.close, fd)
                eventfd = -1 if name == V2_EVENTS else _register(directory, fd, fds)
                watch = cls(directory, fd, eventfd, since_creation=since_creation, uncounted=uncounted)
                fds.pop_all()  # the watch has them now
            return watch
        return cls("", -1, -1, since_creation=since_creation)

    @property
    def uncounted(self) -> int:
        """How many kills there had been before those that count."""
        return self._uncounted

    @property
    def wakes_before_the_kill(self) -> bool:
        """Whether fileno() is readable once memory has run out, and not once more when somebody was killed for it."""
        return self._eventfd >= 0

    def fileno(self) -> int:
        """A file descriptor that is readable when count() may have changed; call count() to quiet it."""
        return self._epoll.fileno()

    def has_news(self) -> bool:
        """Whether fileno() is readable."""
        return bool(self._epoll.poll(0))

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
        if self._fd >= 0:
            self._drain()
            try:
                kills = self._kills()
            except OSError as e:
                if not membership.gone(e):
                    raise
                kills = self._after_removal()
            self._last = max(self._last, kills)
        return self._last - self._uncounted

    def close(self) -> None:
        """Let go of the cgroup. count() keeps its last answer."""
        if not self._epoll.closed:
            self._release()
            self._epoll.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _kills(self) -> int:
        kills = files.flat_keyed(os.pread(self._fd, 4096, 0).decode()).get(OOM_KILL, 0)
        return kills + self._below() if self._eventfd >= 0 else kills

    def _below(self) -> int:
        """v1 counts each cgroup apart: add the sub-cgroups that the container made."""
        total = 0
        for fd in membership.below(self._directory):
            try:
                total += files.flat_keyed(files.read(f"/proc/self/fd/{fd}/{V1_OOM_CONTROL}")).get(OOM_KILL, 0)
            except OSError as e:
                if not membership.gone(e):
                    raise
        return total

    def _drain(self) -> None:
        if self._eventfd >= 0:
            with contextlib.suppress(BlockingIOError):
                self._signals += os.eventfd_read(self._eventfd)

    def _after_removal(self) -> int:
        """What the eventfd still tells: one signal is the removal, which may come late; more are OOMs."""
        if self._eventfd >= 0 and self._signals < 2:
            while self._signals < 2 and self._epoll.poll(_REMOVAL_S):
                self._drain()
        self._release()
        return self._before + max(0, self._signals - 1)

    def _release(self) -> None:
        """Forget the files but keep the epoll fd, which the caller's selector may hold."""
        for fd in (self._fd, self._eventfd):
            if fd >= 0:
                # A removed file reports an error to every poll; a forked child may still hold it open.
                with contextlib.suppress(FileNotFoundError):
                    self._epoll.unregister(fd)
                os.close(fd)
        self._fd = self._eventfd = -1


def _register(path: str, fd: int, fds: contextlib.ExitStack) -> int:
    eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    fds.callback(os.close, eventfd)
    files.write(f"{path}/{V1_EVENT_CONTROL}", f"{eventfd} {fd}")
    return eventfd
