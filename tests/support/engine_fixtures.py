"""Fixtures of the engine's tests over gRPC; a test module imports those it uses."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from support.corrald import Corrald
from support.engine import EngineClient, engine_of, import_image


@pytest.fixture(scope="module")
def loaded(daemon: Corrald, busybox_archive: Path) -> Corrald:
    """The module's daemon, with busybox imported."""
    asyncio.run(import_image(daemon, busybox_archive))
    return daemon


@pytest.fixture
async def engine(loaded: Corrald) -> AsyncIterator[EngineClient]:
    """A client of the engine that deletes what it made."""
    async with engine_of(loaded) as client:
        yield client
