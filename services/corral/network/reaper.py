"""Veth pairs that outlive their endpoint because somebody still holds the namespace.

Detach takes a pair off its bridge and leaves its deletion to the kernel, which deletes it with its namespace (see
corral.network.netlink). What is still there after a while is deleted here.
"""

import asyncio
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from corral.network.links import NetlinkThread, link_exists

if TYPE_CHECKING:
    from corral.network.netlink import Netlink

GRACE_S = 0.5


class Reaper:
    """Deletes links in the background."""

    def __init__(self, thread: NetlinkThread) -> None:
        self._thread = thread
        self._dying: list[str] = []
        self._task: asyncio.Task[None] | None = None

    def watch(self, host_names: Iterable[str]) -> None:
        """See to it that these links end."""
        self._dying += host_names
        if self._dying and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._reap())

    @property
    def dying(self) -> Sequence[str]:
        """Those that are on their way out."""
        return list(self._dying)

    async def close(self) -> None:
        """Delete at once what is left."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))
        await self._delete()

    async def _reap(self) -> None:
        while self._dying:
            await asyncio.sleep(GRACE_S)
            await self._delete()

    async def _delete(self) -> None:
        names, self._dying = self._dying, []

        def delete(netlink: "Netlink") -> None:
            for name in names:
                if link_exists(name):
                    netlink.delete_link(name)

        if names:
            await self._thread.run(delete)
