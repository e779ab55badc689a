"""Threads that take one function after the other, so many at most.

Who has become idle last works next: what it needs is still in its caches, and no more threads are made than are busy at
one time. A function costs half of what it does in a ThreadPoolExecutor, which makes a future, a condition and a lock
for each.
"""

import _thread
import atexit
import threading
from collections import deque
from collections.abc import Callable

import structlog

log = structlog.get_logger()

type Work = Callable[[], Callable[[], object]]
"""Returns what tells of its end: that is called once the thread can have the next work."""


class Threads:
    """A pool of them. At the end of the program it is waited for all that was submitted."""

    def __init__(self, most: int, name: str) -> None:
        self._most, self._name = most, name
        self._lock = _thread.allocate_lock()
        self._all: list[_Worker] = []
        self._idle: list[_Worker] = []
        self._waiting: deque[Work] = deque()
        self.has_ended = False
        atexit.register(self._end)

    def submit(self, work: Work) -> None:
        """Have it run soon, by the first thread that is free. It must not raise.

        Raises RuntimeError if one more is needed, and there can be none.
        """
        with self._lock:
            if self._idle:
                worker = self._idle.pop()
            elif len(self._all) < self._most:
                worker = _Worker(self, f"{self._name}_{len(self._all)}")
                self._all.append(worker)
            else:
                self._waiting.append(work)
                return
        try:
            worker.give(work)
        except RuntimeError:  # there are as many threads as there may be
            with self._lock:
                self._all.remove(worker)
            raise

    def next_for(self, worker: "_Worker") -> Work | None:
        """What has waited longest; if nothing does, the worker is idle."""
        with self._lock:
            if self._waiting:
                return self._waiting.popleft()
            self._idle.append(worker)
            return None

    def _end(self) -> None:
        with self._lock:
            self.has_ended = True
            busy = [worker for worker in self._all if worker not in self._idle]
        for worker in busy:
            worker.join()


class _Worker:
    """One thread, made with its first work."""

    def __init__(self, threads: Threads, name: str) -> None:
        self._threads = threads
        self._work: Work | None = None
        self._bell = _thread.allocate_lock()
        self._bell.acquire()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._has_begun = False

    def give(self, work: Work) -> None:
        """It is idle, or new."""
        self._work = work
        self._bell.release()
        if not self._has_begun:
            self._has_begun = True
            self._thread.start()

    def join(self) -> None:
        """Once the threads have ended: wait until this one has nothing to do any more."""
        self._thread.join()

    def _run(self) -> None:
        while self._work is not None or not self._threads.has_ended:
            self._bell.acquire()
            work, self._work = self._work, None
            while work is not None:
                tell = work()
                work = self._threads.next_for(self)
                try:
                    tell()  # whoever hears of it may have more for this very thread
                except Exception:
                    log.exception("thread.told_nobody")
                del tell  # with what came of it
