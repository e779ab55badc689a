"""Fixtures of the engine's tests over gRPC; a test module imports those it uses.

def test_x(one): ...    a whole corrald with busybox, which the test may kill and start with failpoints
def test_y(five): ...   the same as five processes
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from support import sweep
from support.corrald import Corrald, running
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


@pytest.fixture(scope="module")
def lasting_one(busybox_archive: Path) -> Iterator[Corrald]:
    with running(split=False) as daemon:
        asyncio.run(import_image(daemon, busybox_archive))
        yield daemon


@pytest.fixture(scope="module")
def lasting_five(busybox_archive: Path) -> Iterator[Corrald]:
    with running(split=True) as daemon:
        asyncio.run(import_image(daemon, busybox_archive))
        yield daemon


@pytest.fixture
def one(lasting_one: Corrald) -> Iterator[Corrald]:
    """All services in one process, with busybox."""
    yield from _lent(lasting_one)


@pytest.fixture
def five(lasting_five: Corrald) -> Iterator[Corrald]:
    """Five processes, with busybox."""
    yield from _lent(lasting_five)


def _lent(daemon: Corrald) -> Iterator[Corrald]:
    """To one test after the other: each finds it as it was started, and without containers."""
    yield daemon
    daemon.start()
    failed = sweep.delete_containers(daemon)
    if altered := [name for name in daemon.processes if name in daemon.altered]:
        daemon.restart(*altered)
    assert not failed, failed
