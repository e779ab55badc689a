"""Logs over gRPC, of containers that write, rotate and end."""
# ruff: noqa: ASYNC110 (the test waits for the kernel, and shares its loop with nobody)

import asyncio
import time
from pathlib import Path

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from support.corrald import Corrald
from support.requirements import needs
from support.tasks import TaskClient

from corral.api.tasks.v1 import tasks_pb2 as pb
from corral.rpc.errors import FailedPrecondition, NotFound

pytestmark = needs("root", "busybox")


def lines(entries: list[pb.LogEntry]) -> list[str]:
    return [entry.line.decode().rstrip("\n") for entry in entries]


def at(time_ns: int) -> Timestamp:
    stamp = Timestamp()
    stamp.FromNanoseconds(time_ns)
    return stamp


async def test_both_streams_with_their_times(tasks: TaskClient):
    began = time.time_ns()
    task_id = await tasks.run("sh", "-c", "echo one; usleep 20000; echo two >&2; usleep 20000; printf three")
    await tasks.wait(task_id)
    entries = await tasks.logs(task_id)
    assert lines(entries) == ["one", "two", "three"]
    assert [entry.stream for entry in entries] == [1, 2, 1]
    assert [entry.partial for entry in entries] == [False, False, True]
    times = [entry.time.ToNanoseconds() for entry in entries]
    assert began < times[0] < times[1] < times[2] < time.time_ns()
    assert lines(await tasks.logs(task_id, stderr=True)) == ["two"]
    assert lines(await tasks.logs(task_id, tail=1)) == ["three"]
    assert lines(await tasks.logs(task_id, since=at(times[1]))) == ["two", "three"]
    assert lines(await tasks.logs(task_id, until=at(times[1]))) == ["one", "two"]


@pytest.mark.parametrize("driver", [pb.LogOptions.DRIVER_JSON_FILE, pb.LogOptions.DRIVER_CRI])
async def test_following_over_rotations_misses_nothing_and_ends_with_the_task(
    tasks: TaskClient, driver: pb.LogOptions.Driver
):
    options = pb.LogOptions(driver=driver, max_size_bytes=20_000, max_files=3)
    script = "i=0; while [ $i -lt 3000 ]; do i=$((i+1)); echo line $i; [ $((i%50)) != 0 ] || usleep 10000; done"
    task_id = await tasks.create("sh", "-c", script, log=options)
    following = asyncio.create_task(tasks.logs(task_id, follow=True))
    await asyncio.sleep(0.05)
    await tasks.start(task_id)
    async with asyncio.timeout(60):
        assert lines(await following) == [f"line {number}" for number in range(1, 3001)]
    kept = lines(await tasks.logs(task_id))
    assert kept == [f"line {number}" for number in range(1, 3001)][-len(kept) :]
    log_path = Path((await tasks.get(task_id)).log_path)
    assert sorted(path.name for path in log_path.parent.iterdir()) == ["log.json", "log.json.1", "log.json.2"]


async def test_a_followed_line_arrives_at_once(tasks: TaskClient):
    task_id = await tasks.run("sh", "-c", "while read x; do echo $x; done", stdin=True)
    async with tasks.attached(task_id, stdin=True) as attached:
        call = tasks.stub.Logs(pb.LogsRequest(id=task_id, follow=True))
        took = []
        for number in range(10):
            began = time.monotonic()
            await attached.send(b"%d\n" % number)
            response = await call.read()
            took.append(time.monotonic() - began)
            assert [entry.line for entry in response.entries] == [b"%d\n" % number]
        call.cancel()
    assert min(took) < 0.1, "it is told of the line, and does not look now and then"


async def test_following_ends_when_until_has_passed(tasks: TaskClient):
    task_id = await tasks.run("sh", "-c", "echo early; sleep 1000")
    began = time.monotonic()
    entries = await tasks.logs(task_id, follow=True, until=at(time.time_ns() + 500_000_000))
    assert lines(entries) == ["early"]
    assert 0.4 < time.monotonic() - began < 20


async def test_following_ends_when_the_task_is_deleted(tasks: TaskClient):
    task_id = await tasks.run("sh", "-c", "echo here; sleep 1000")
    responses = aiter(tasks.stub.Logs(pb.LogsRequest(id=task_id, follow=True)))
    assert lines((await anext(responses)).entries) == ["here"]
    await tasks.delete(task_id, force=True)
    async with asyncio.timeout(20):
        assert [response async for response in responses] == []


async def test_a_task_without_log_says_so(tasks: TaskClient):
    task_id = await tasks.create("true", log=pb.LogOptions(driver=pb.LogOptions.DRIVER_NONE))
    with pytest.raises(FailedPrecondition, match="keeps no log"):
        await tasks.logs(task_id)
    with pytest.raises(NotFound):
        await tasks.logs("nosuchtask")


async def test_a_log_at_a_path_of_the_callers_choice(tasks: TaskClient, tmp_path: Path):
    path = tmp_path / "chosen.log"
    options = pb.LogOptions(driver=pb.LogOptions.DRIVER_CRI, path=str(path))
    task_id = await tasks.run("echo", "hello", log=options)
    await tasks.wait(task_id)
    assert path.read_text().endswith(" stdout F hello\n")
    assert lines(await tasks.logs(task_id)) == ["hello"]
    await tasks.delete(task_id)
    assert path.exists()  # the caller's file is the caller's


async def test_followers_that_go_away_leave_no_descriptors(tasks: TaskClient, tasks_daemon: Corrald):
    def open_files() -> int:
        return len(list(Path(f"/proc/{tasks_daemon.processes['corrald'].pid}/fd").iterdir()))

    task_id = await tasks.run("sh", "-c", "echo here; sleep 1000")
    before = open_files()
    for _ in range(20):
        call = tasks.stub.Logs(pb.LogsRequest(id=task_id, follow=True))
        assert (await call.read()).entries
        call.cancel()
    async with asyncio.timeout(5):
        while open_files() > before + 1:  # inotify's own stays
            await asyncio.sleep(0.02)
