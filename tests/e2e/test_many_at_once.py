"""Containers by the hundred, asked for at the same moment, each with a network of its own: all of them run."""

import asyncio
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.amounts import amount
from support.corrald import PATIENCE, Corrald
from support.requirements import needs
from support.sweep import forgotten

from corral.client.aio import AsyncClient

pytestmark = needs("root", "overlayfs", "busybox", "netns")

# A peer of ours is reported to break at 800. CI makes fewer: it has other things to prove in its time.
MANY = int(os.environ.get("CORRAL_TEST_MANY") or amount(800, in_ci=100))
CLIENTS = 8
SECONDS_EACH = 1.0


@pytest.fixture
def daemon(busybox_archive: Path) -> Iterator[Corrald]:
    with Corrald() as daemon:
        daemon.start()
        daemon.corral("image", "import", str(busybox_archive), check=True)
        yield daemon


@pytest.mark.timeout(120 + round(MANY * SECONDS_EACH * PATIENCE))
async def test_every_one_of_hundreds_of_concurrent_creates_and_starts_succeeds(daemon: Corrald) -> None:
    clients = [AsyncClient(daemon.address) for _ in range(CLIENTS)]

    async def live(number: int) -> str:
        client = clients[number % CLIENTS]
        made = await client.containers.run("busybox", ["sh", "-c", f"sleep 1000 & wait $!; exit {number % 200}"])
        return made.id

    async def end(number: int, container: str) -> int:
        client = clients[number % CLIENTS]
        await client.containers.remove(container, force=True)
        return number

    began = time.monotonic()
    made = await asyncio.gather(*(live(n) for n in range(MANY)), return_exceptions=True)
    took_s = time.monotonic() - began
    failed = Counter(f"{type(e).__name__}: {e}"[:200] for e in made if isinstance(e, BaseException))
    ids = [each for each in made if isinstance(each, str)]
    try:
        assert not failed, failed.most_common(5)
        print(f"{MANY} containers created and started in {took_s:.1f} s")
        listed = await clients[0].containers.list()
        assert {c.id for c in listed} == set(ids)
        addresses = Counter(link.ipv4_address for c in listed for link in c.endpoint.interfaces)
        assert addresses.total() == MANY
        assert max(addresses.values()) == 1
        for container in listed:
            os.kill(container.pid, 0)
    finally:
        gone = await asyncio.gather(*(end(n, id_) for n, id_ in enumerate(ids)), return_exceptions=True)
        for client in clients:
            await client.close()
    assert [each for each in gone if isinstance(each, BaseException)] == []
    assert forgotten(daemon) == []
    assert [line for line in daemon.log().splitlines() if '"level": "error"' in line] == []
