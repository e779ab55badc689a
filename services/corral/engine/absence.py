"""Attached clients that were sent away by an upgrade, and will be back: as long as that may take, their container,
should it end, is not removed on its own (--rm). The streams they come back for are parked by tasks."""

import asyncio
from typing import Any

from corral.rpc.handover import Kept, inherited, keep

PURPOSE = "engine.absence"
RETURN_S = 15.0

type Key = tuple[str, str]


class Absences:
    """Of one engine; use from its event loop."""

    def __init__(self, attached: dict[Key, set[asyncio.Task[Any]]]) -> None:
        """attached: those that are here, by container; one that is away is a task among them. With whom an earlier
        program has sent away."""
        self._attached = attached
        self._away: dict[Key, list[asyncio.Task[None]]] = {}
        for kept in inherited(PURPOSE):
            self.begin((str(kept.facts["namespace"]), str(kept.facts["id"])))

    def begin(self, key: Key) -> None:
        """One was sent away."""
        away = asyncio.create_task(asyncio.sleep(RETURN_S), name="absence")
        self._away.setdefault(key, []).append(away)
        self._attached.setdefault(key, set()).add(away)
        away.add_done_callback(lambda _: self._forget(key, away))

    def end(self, key: Key) -> None:
        """One is back, and attached again."""
        if away := self._away.get(key):
            back = away[-1]
            back.cancel()
            self._forget(key, back)  # now: another one may be back before the task has ended

    def close(self) -> None:
        """Tell the program that may follow."""
        for (namespace, container_id), away in tuple(self._away.items()):
            for task in tuple(away):
                keep(Kept(PURPOSE, {"namespace": namespace, "id": container_id}, {}))
                task.cancel()

    def _forget(self, key: Key, away: asyncio.Task[None]) -> None:
        for tasks in (self._away, self._attached):
            if (some := tasks.get(key)) is not None and away in some:
                some.remove(away)
                if not some:
                    del tasks[key]
