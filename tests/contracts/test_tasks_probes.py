"""Processes that are run for their exit and the beginning of their output: one request, one transaction, no row."""

import asyncio
import contextlib
import json
import os
import signal
import time
from pathlib import Path

import pytest
from support.requirements import needs
from support.tasks import TaskClient, beside_older_shims

from corral.api.tasks.v1 import tasks_pb2 as pb
from corral.rpc.errors import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, Unavailable

pytestmark = needs("root", "busybox")


@pytest.fixture
async def running(tasks: TaskClient) -> str:
    return await tasks.run("sleep", "1000")


async def probe(
    tasks: TaskClient, task_id: str, *args: str, exec_id: str = "p", timeout_s: float = 0.0, output_bytes: int = 4096
) -> pb.ProbeResponse:
    request = pb.ProbeRequest(
        id=task_id, exec_id=exec_id, process=json.dumps({"args": list(args)}).encode(), output_bytes=output_bytes
    )
    if timeout_s:
        request.timeout.FromNanoseconds(round(timeout_s * 1e9))
    return await tasks.stub.Probe(request)


async def began(tasks: TaskClient, task_id: str, last_arg: str) -> int:
    """The pid of a process of a task, once it is there."""
    async with asyncio.timeout(30):
        while True:
            for pid in (await tasks.stub.Pids(pb.PidsRequest(id=task_id))).pids or children(await tasks.get(task_id)):
                with contextlib.suppress(OSError):
                    if Path(f"/proc/{pid}/cmdline").read_bytes().endswith(f"\0{last_arg}\0".encode()):  # noqa: ASYNC240
                        return pid
            await asyncio.sleep(0.01)


def children(task: pb.Task) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{task.shim_pid}/task/{task.shim_pid}/children").read_text().split()]


def lives(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


async def until_gone(pid: int) -> None:
    async with asyncio.timeout(10):
        while lives(pid):  # noqa: ASYNC110 (the kernel tells nobody)
            await asyncio.sleep(0.01)


async def told(tasks: TaskClient, task_id: str) -> list[tuple[str, object, object]]:
    """Of the journal what is about execs: topic, exec and code."""
    events = [event for event in await tasks.events(task_id) if event.topic.startswith("task.exec.")]
    return [
        (event.topic.removeprefix("task.exec."), event.payload["exec_id"], dict(event.payload).get("code"))
        for event in events
    ]


async def test_its_end_and_output_are_the_answer_and_both_of_its_events_are_journalled(
    tasks: TaskClient, running: str
) -> None:
    for n in range(3):
        ran = await probe(tasks, running, "sh", "-c", "echo out; echo err >&2; exit 3", exec_id=f"p{n}")
        assert (ran.exit.code, ran.exit.known, ran.output) == (3, True, "out\nerr\n")
    assert await told(tasks, running) == [
        (topic, f"p{n}", code) for n in range(3) for topic, code in (("started", None), ("exited", 3))
    ]
    assert not (await tasks.get(running)).execs
    assert (await probe(tasks, running, "sh", "-c", "echo much", output_bytes=2)).output == "mu"


async def test_one_that_takes_too_long_is_killed(tasks: TaskClient, running: str) -> None:
    ran = await probe(tasks, running, "sh", "-c", "echo before; sleep 1000 & sleep 1001", timeout_s=0.3)
    assert (ran.exit.code, ran.exit.timed_out, ran.output) == (137, True, "before\n")


async def test_what_cannot_be_run_says_why(tasks: TaskClient, running: str) -> None:
    for _ in range(2):
        with pytest.raises(NotFound, match='"nosuchprogram"') as caught:
            await probe(tasks, running, "nosuchprogram")
        assert caught.value.reason == "EXEC_NOT_FOUND"
    with pytest.raises(PermissionDenied):
        await probe(tasks, running, "/bin/notexecutable")
    assert await told(tasks, running) == [("exited", "p", 127), ("exited", "p", 127), ("exited", "p", 126)]
    with pytest.raises(InvalidArgument, match="output_bytes"):
        await probe(tasks, running, "true", output_bytes=1 << 20)
    with pytest.raises(FailedPrecondition, match="not running"):
        await probe(tasks, await tasks.create("true"), "true")
    with pytest.raises(NotFound):
        await probe(tasks, "nosuchtask", "true")


async def test_it_ends_with_whoever_asked_and_is_journalled_all_the_same(tasks: TaskClient, running: str) -> None:
    asked = asyncio.ensure_future(probe(tasks, running, "sleep", "5004"))
    pid = await began(tasks, running, "5004")
    asked.cancel()
    await until_gone(pid)
    async with asyncio.timeout(10):
        while await told(tasks, running) != [("started", "p", None), ("exited", "p", 137)]:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_what_its_container_took_along_is_told_from_what_ended_otherwise(tasks: TaskClient, running: str) -> None:
    assert (await probe(tasks, running, "sh", "-c", "kill -9 $$")).exit.code == 137
    asked = asyncio.ensure_future(probe(tasks, running, "sleep", "5005"))
    await began(tasks, running, "5005")
    os.kill((await tasks.get(running)).pid, signal.SIGKILL)
    with pytest.raises(FailedPrecondition, match="it has ended") as caught:
        await asked
    assert caught.value.reason == "NOT_RUNNING"


async def test_it_ends_with_the_service_and_with_its_shim(tasks: TaskClient, running: str) -> None:
    first = asyncio.ensure_future(probe(tasks, running, "sleep", "5001"))
    pid = await began(tasks, running, "5001")
    tasks.daemon.kill9()
    await until_gone(pid)
    with pytest.raises(Unavailable):
        await first
    tasks.daemon.start()
    assert (await tasks.get(running)).status == pb.STATUS_RUNNING
    second = asyncio.ensure_future(probe(tasks, running, "sleep", "5002"))
    pid = await began(tasks, running, "5002")
    os.kill((await tasks.get(running)).shim_pid, signal.SIGKILL)
    with pytest.raises(Unavailable):
        await second
    await until_gone(pid)
    assert (await _once_settled(tasks, running)).exit.code == 0  # by the heir
    assert await told(tasks, running) == [("started", "p", None), ("exited", "p", 0)]


async def _once_settled(tasks: TaskClient, task_id: str) -> pb.ProbeResponse:
    async with asyncio.timeout(10):
        while True:
            with contextlib.suppress(Unavailable):
                return await probe(tasks, task_id, "true")
            await asyncio.sleep(0.02)


async def test_a_stop_does_not_wait_for_one(tasks: TaskClient, running: str) -> None:
    asked = asyncio.ensure_future(probe(tasks, running, "sleep", "5003"))
    pid = await began(tasks, running, "5003")
    before = time.monotonic()
    await asyncio.to_thread(tasks.daemon.stop)
    assert time.monotonic() - before < 8, "nor for its end"
    tasks.daemon.start()
    with pytest.raises(Unavailable):
        await asked
    await until_gone(pid)


async def test_beside_a_shim_of_an_earlier_version_it_is_an_exec_as_any_other(tmp_path: Path, rootfs: Path) -> None:
    async with beside_older_shims(tmp_path, rootfs, {"server.py": ('"run": self._run,', "")}) as tasks:
        await _as_any_other(tasks)


async def _as_any_other(tasks: TaskClient) -> None:
    running = await tasks.run("sleep", "1000")
    ran = await probe(tasks, running, "sh", "-c", "echo out; exit 4")
    assert (ran.exit.code, ran.output) == (4, "out\n")
    ran = await probe(tasks, running, "sh", "-c", "echo before; exec sleep 1000", timeout_s=3)
    assert (ran.exit.code, ran.exit.timed_out, ran.output) == (137, True, "before\n")
    with pytest.raises(NotFound, match='"nosuchprogram"'):
        await probe(tasks, running, "nosuchprogram")
    asked = asyncio.ensure_future(probe(tasks, running, "sleep", "5006"))
    pid = await began(tasks, running, "5006")
    asked.cancel()
    await until_gone(pid)
    async with asyncio.timeout(10):
        while (await tasks.get(running)).execs:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert await told(tasks, running) == [
        ("started", "p", None),
        ("exited", "p", 4),
        ("started", "p", None),
        ("exited", "p", 137),
        ("exited", "p", 127),
        ("started", "p", None),
        ("exited", "p", 137),
    ]
    assert not (await tasks.get(running)).execs
