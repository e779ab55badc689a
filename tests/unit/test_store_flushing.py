"""Logs of databases reach the disk when somebody asks, all who ask at once with one wait."""

import asyncio
import errno
import threading
from pathlib import Path

import pytest

from corral.store.flushing import Flushing


async def test_all_who_ask_at_once_are_told(tmp_path: Path):
    log = tmp_path / "x.db-wal"
    log.write_bytes(b"frames")
    flushing = Flushing(log)
    await asyncio.gather(*(flushing.flush() for _ in range(200)))
    flushing.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("flush-")]


async def test_everybody_hears_of_a_failure_and_the_next_attempt_is_a_new_one(tmp_path: Path):
    log = tmp_path / "x.db-wal"
    flushing = Flushing(log)
    outcomes = await asyncio.gather(*(flushing.flush() for _ in range(3)), return_exceptions=True)
    assert [getattr(outcome, "errno", None) for outcome in outcomes] == [errno.ENOENT] * 3
    log.write_bytes(b"frames")
    await flushing.flush()
    flushing.close()


async def test_who_has_asked_is_told_though_it_is_closed(tmp_path: Path):
    log = tmp_path / "x.db-wal"
    log.write_bytes(b"frames")
    flushing = Flushing(log)
    asked = asyncio.ensure_future(flushing.flush())
    await asyncio.sleep(0)
    flushing.close()
    flushing.close()
    await asked


async def test_who_does_not_wait_any_more_disturbs_nobody(tmp_path: Path):
    log = tmp_path / "x.db-wal"
    log.write_bytes(b"frames")
    flushing = Flushing(log)
    gone, stays = asyncio.ensure_future(flushing.flush()), asyncio.ensure_future(flushing.flush())
    await asyncio.sleep(0)
    gone.cancel()
    await stays
    with pytest.raises(asyncio.CancelledError):
        await gone
    flushing.close()
