"""Clients that were sent away by an upgrade and come back."""

import asyncio
from typing import Any

from corral.engine.absence import Absences, Key

BOX: Key = ("default", "box")


async def test_two_that_are_back_in_the_same_moment_are_both_back() -> None:
    attached: dict[Key, set[asyncio.Task[Any]]] = {}
    absences = Absences(attached)
    absences.begin(BOX)
    absences.begin(BOX)
    away = [*attached[BOX]]
    absences.end(BOX)
    assert len(attached[BOX]) == 1
    absences.end(BOX)
    assert attached == {}
    await asyncio.wait(away)
    assert all(task.cancelled() for task in away)
