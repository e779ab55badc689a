"""Work of the engine that no call waits for."""

import asyncio

import pytest

from corral.engine.core import Background
from corral.rpc.errors import NotFound


async def test_endless_work_that_fails_by_a_fault_of_ours_is_logged(capsys: pytest.CaptureFixture[str]) -> None:
    async def work(failure: Exception) -> None:
        raise failure

    background = Background()
    for failure in (NotFound("it is gone"), RuntimeError("never thought of")):
        await asyncio.wait([background.spawn_endless(work(failure))])
    await asyncio.sleep(0)
    said = capsys.readouterr().out
    assert said.count("engine.background_failed") == 1
    assert "never thought of" in said
