"""The pool of unpacking processes, and the pipe between the event loop and a thread."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest
from support.tars import archive, member, packed

from corral.images.archives.chunks import PIECE_BYTES, Cancelled, ChunkPipe
from corral.images.layers.errors import BadLayer
from corral.images.workers import Workers
from corral.rpc.errors import Internal


@pytest.fixture
async def workers() -> AsyncIterator[Workers]:
    made = Workers(2, idle_s=0.2, max_entries=1000, max_bytes=1 << 20)
    yield made
    await made.stop()


def job(tmp_path: Path, data: bytes, name: str = "0") -> dict[str, object]:
    (tmp_path / f"{name}.tar").write_bytes(data)
    (tmp_path / name).mkdir()
    return {
        "op": "apply",
        "blob": f"{tmp_path}/{name}.tar",
        "target": f"{tmp_path}/{name}",
        "bottom": True,
        "diff_id": "",
    }


def ignore(_done: int) -> None:
    pass


def pid_of(workers: Workers) -> int:
    [(process, _)] = workers._idle
    return process.pid


def is_alive(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


async def test_a_job_is_done_and_its_process_waits_for_the_next(workers: Workers, tmp_path: Path) -> None:
    answer = await workers.run(job(tmp_path, packed({"f": b"x" * 100})), ignore)
    assert answer["size_bytes"] == 100
    assert (tmp_path / "0/f").stat().st_size == 100
    first = pid_of(workers)
    await workers.run(job(tmp_path, packed({"g": b""}), "1"), ignore)
    assert pid_of(workers) == first


async def test_an_idle_process_ends(workers: Workers, tmp_path: Path) -> None:
    await workers.run(job(tmp_path, packed({"f": b""})), ignore)
    pid = pid_of(workers)
    await asyncio.sleep(0.3)
    await workers.stop()
    assert not is_alive(pid)
    assert workers._idle == []


async def test_what_is_wrong_comes_back_as_what_it_is(workers: Workers, tmp_path: Path) -> None:
    with pytest.raises(BadLayer, match="climbs"):
        await workers.run(job(tmp_path, archive(member(b"../x"))), ignore)
    with pytest.raises(BadLayer, match="more than 1000 entries"):
        await workers.run(job(tmp_path, packed({str(i): b"" for i in range(1001)}), "1"), ignore)
    with pytest.raises(FileNotFoundError):
        await workers.run({**job(tmp_path, b"", "2"), "blob": "/none"}, ignore)
    with pytest.raises(Internal, match="a fault of corral: KeyError"):
        await workers.run({"op": "apply"}, ignore)
    assert (await workers.run(job(tmp_path, packed({"f": b"x"}), "3"), ignore))["inodes"] == 1


async def test_a_process_that_is_killed_is_told_and_replaced(workers: Workers, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "stuck")
    stuck = asyncio.ensure_future(workers.run({**job(tmp_path, b""), "blob": f"{tmp_path}/stuck"}, ignore))
    os.kill(await child(), signal.SIGKILL)
    with pytest.raises(Internal, match="killed by signal 9"):
        await stuck
    await workers.run(job(tmp_path, packed({"f": b""}), "1"), ignore)


async def child() -> int:
    """The only child process that lives, when there is one."""
    async with asyncio.timeout(20):
        while not (living := children()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    [pid] = living
    return pid


def children() -> list[int]:
    """Of this process, without those that have ended."""
    pids = map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())
    return [pid for pid in pids if " Z " not in Path(f"/proc/{pid}/stat").read_text()]


async def test_a_cancelled_job_kills_its_process(workers: Workers, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "stuck")
    stuck = asyncio.ensure_future(workers.run({**job(tmp_path, b""), "blob": f"{tmp_path}/stuck"}, ignore))
    pid = await child()
    stuck.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stuck
    assert not is_alive(pid)


async def test_no_more_run_at_once_than_there_may(workers: Workers, tmp_path: Path) -> None:
    jobs = [job(tmp_path, packed({"f": b"x" * 1000}), str(i)) for i in range(8)]
    await asyncio.gather(*[workers.run(one, ignore) for one in jobs])
    assert len(workers._idle) <= 2


# The pipe


async def source(*chunks: bytes, then: BaseException | None = None) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk
    if then is not None:
        raise then


async def test_a_thread_reads_what_the_loop_receives() -> None:
    pipe = ChunkPipe()
    reading = asyncio.to_thread(lambda: list(pipe.read()))
    chunks = [bytes([i]) * 100 for i in range(100)]
    _, found = await asyncio.gather(pipe.feed(source(*chunks)), reading)
    assert found == chunks


async def test_a_sender_faster_than_the_reader_is_held_back() -> None:
    pipe = ChunkPipe()
    feeding = asyncio.ensure_future(pipe.feed(source(*[b"x"] * 100)))
    await asyncio.sleep(0.05)
    assert not feeding.done()
    assert pipe._chunks.qsize() <= 8
    assert len(await asyncio.to_thread(lambda: list(pipe.read()))) == 100
    await feeding


async def test_what_a_sender_sends_at_once_waits_in_small_pieces() -> None:
    pipe = ChunkPipe()
    large = os.urandom(20 << 20)
    feeding = asyncio.ensure_future(pipe.feed(source(large)))
    await asyncio.sleep(0.05)
    assert not feeding.done()
    pieces = await asyncio.to_thread(lambda: list(pipe.read()))
    assert max(map(len, pieces)) <= PIECE_BYTES
    assert b"".join(pieces) == large
    await feeding


async def test_a_sender_that_breaks_off_ends_the_reader() -> None:
    pipe = ChunkPipe()
    reading = asyncio.ensure_future(asyncio.to_thread(lambda: list(pipe.read())))
    with pytest.raises(ConnectionError):
        await pipe.feed(source(b"x", then=ConnectionError()))
    with pytest.raises(Cancelled):
        await reading


async def test_a_reader_that_has_enough_frees_the_sender() -> None:
    pipe = ChunkPipe()
    feeding = asyncio.ensure_future(pipe.feed(source(*[b"x"] * 100)))
    await asyncio.sleep(0.02)
    pipe.close_reader()
    await asyncio.wait_for(feeding, 1)
