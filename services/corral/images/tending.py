"""Trees made ahead of their use and removed after it, beside the requests: many of them in one hop to a thread.

An active tree of an image needs three directories, whose making and removal would be most of what a container waits for
here. So a few are kept ready, and those that are done with wait a moment for others. Neither has a row: a crash leaves
them as trees that nothing describes, which the next start removes.
"""

import asyncio
from collections import deque
from collections.abc import Iterable, Mapping

import structlog

from corral.images.drivers import Drivers
from corral.images.snapshotter import TreeId
from corral.images.unpacker import TreeIds
from corral.rpc.blocking import run_blocking

log = structlog.get_logger()

READY = 16
PAUSE_S = 0.1  # whoever took a tree starts a container now; what is done here would compete with that


class Tending:
    """Begins with start(); on the event loop."""

    def __init__(self, drivers: Drivers, ids: TreeIds) -> None:
        self._drivers = drivers
        self._ids = ids
        self._ready: deque[TreeId] = deque()
        self._doomed: list[TreeId] = []
        self._going: set[TreeId] = set()
        self._stuck: dict[TreeId, str] = {}
        self._making = 0
        self._running: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._started = self._stopping = False

    def start(self) -> None:
        """Begin to make trees ahead; the ids must be known by now."""
        self._started = True
        self._begin()

    def take(self) -> TreeId | None:
        """A tree that was made ready, the caller's from now on; None if there is none: make one then."""
        if not self._ready:
            return None
        tree = self._ready.popleft()
        self._soon()
        return tree

    def remove(self, trees: Iterable[TreeId]) -> None:
        """Remove trees that have no row any more. A large one takes seconds; the next start does what is not done."""
        trees = list(trees)
        self._doomed += trees
        self._going.update(trees)
        if self._doomed:
            self._soon()

    def is_going(self, tree: TreeId) -> bool:
        """Whether it is on its way out."""
        return tree in self._going

    @property
    def stuck(self) -> Mapping[TreeId, str]:
        """Those that could not be removed, and why."""
        return dict(self._stuck)

    async def done(self) -> None:
        """Wait for all removals that were asked for."""
        while self._doomed or self._running:
            self._begin()
            await asyncio.wait(set(self._running))

    async def stop(self) -> None:
        """End; what is left of large trees is removed after the next start."""
        self._stopping = True
        while self._ready or self._doomed or self._running:
            self._doomed += self._ready
            self._ready.clear()
            await self.done()

    def _soon(self) -> None:
        if self._stopping or len(self._ready) < READY // 2:
            self._begin()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(PAUSE_S, self._begin)

    def _begin(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        doomed, self._doomed = self._doomed, []
        count = READY - len(self._ready) - self._making if self._started and not self._stopping else 0
        if not doomed and count <= 0:
            return
        self._making += max(count, 0)
        wanted = [self._ids.new() for _ in range(count)]
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(run_blocking(self._make_and_remove, loop, wanted, doomed))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    def _make_and_remove(self, loop: asyncio.AbstractEventLoop, wanted: list[TreeId], doomed: list[TreeId]) -> None:
        if wanted:
            loop.call_soon_threadsafe(self._made, self._make(wanted), len(wanted))
        for tree in doomed:
            self._remove(tree)

    def _made(self, trees: list[TreeId], asked: int) -> None:
        self._ready += trees
        self._making -= asked

    def _make(self, wanted: list[TreeId]) -> list[TreeId]:
        """Make them; as many as can be made."""
        made: list[TreeId] = []
        try:
            for tree in wanted:
                self._drivers.default.make_ready(tree)
                made.append(tree)
        except OSError as e:
            log.warning("images.tree_not_made_ready", error=str(e))  # prepare() meets the same, and tells who asked
        return made

    def _remove(self, tree: TreeId) -> None:
        try:
            self._drivers.remove(tree, go_on=self._goes_on)
            self._stuck.pop(tree, None)
        except OSError as e:
            self._stuck[tree] = str(e)
            log.warning("images.tree_not_removed", error=str(e))  # a check, or the next start, tries again
        self._going.discard(tree)

    def _goes_on(self) -> bool:
        return not self._stopping
