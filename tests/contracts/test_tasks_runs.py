"""Execs that are made, attached to and started in one."""
# ruff: noqa: ASYNC110 (these tests wait for the kernel, and share their loop with nobody)

import asyncio
import contextlib
import json
from pathlib import Path

import pytest
from support.requirements import needs
from support.tasks import TaskClient, beside_older_shims

from corral.api.tasks.v1 import tasks_pb2 as pb
from corral.api.types.v1 import types_pb2 as types_pb
from corral.rpc.errors import AlreadyExists, FailedPrecondition, NotFound, PermissionDenied, Unavailable

pytestmark = needs("root", "busybox")


@pytest.fixture
async def running(tasks: TaskClient) -> str:
    return await tasks.run("sleep", "1000")


def begun(tasks: TaskClient, task_id: str, *args: str, terminal: bool = False, **more: object):
    made = {name: more.pop(name) for name in ("user", "stdin", "console_size") if name in more}
    process = json.dumps({"args": list(args), "terminal": terminal}).encode()
    request = pb.ExecRequest(process=process, **made)  # type: ignore[arg-type]
    options = {"stdout": True, "stderr": not terminal, "stdin": "stdin" in made, **more}
    exec_id = str(options.pop("exec_id", "e"))
    return tasks.attached(task_id, exec_id, exec=request, **options)  # type: ignore[arg-type]


async def output(tasks: TaskClient, task_id: str, *args: str, **more: object) -> tuple[int, bytes, bytes]:
    async with begun(tasks, task_id, *args, **more) as attached:  # type: ignore[arg-type]
        code = (await attached.drain()).code
    return code, bytes(attached.stdout), bytes(attached.stderr)


async def forgotten(tasks: TaskClient, task_id: str) -> None:
    async with asyncio.timeout(10):
        while (await tasks.get(task_id)).execs:
            await asyncio.sleep(0.01)


async def topics(tasks: TaskClient, task_id: str) -> list[str]:
    return [topic for topic in await tasks.topics(task_id) if topic.startswith("task.exec.")]


async def test_its_client_misses_nothing_and_it_is_forgotten_in_the_end(tasks: TaskClient, running: str) -> None:
    for _ in range(3):
        assert await output(tasks, running, "sh", "-c", "echo out; echo err >&2; exit 3") == (3, b"out\n", b"err\n")
        await forgotten(tasks, running)
    assert await topics(tasks, running) == ["task.exec.started", "task.exec.exited"] * 3
    async with begun(tasks, running, "cat", stdin=True) as attached:
        [listed] = (await tasks.get(running)).execs
        assert (listed.id, listed.status, list(listed.args)) == ("e", pb.STATUS_RUNNING, ["cat"])
        assert listed.pid
        with pytest.raises(AlreadyExists):
            await output(tasks, running, "true")
        await attached.send(b"in")
        await attached.end_stdin()
        assert (await attached.drain()).code == 0
        assert bytes(attached.stdout) == b"in"
    await forgotten(tasks, running)
    size = types_pb.WindowSize(width=120, height=40)
    assert (await output(tasks, running, "stty", "size", terminal=True, console_size=size))[1] == b"40 120\r\n"
    await forgotten(tasks, running)
    assert (await output(tasks, running, "id", "-u", user="app"))[1] == b"1000\n"
    await forgotten(tasks, running)
    assert (await output(tasks, running, "true", stdout=False, stderr=False))[0] == 0


async def test_one_that_cannot_run_says_why_and_is_forgotten(tasks: TaskClient, running: str) -> None:
    with pytest.raises(NotFound, match='exec: "nosuchprogram"') as caught:
        await output(tasks, running, "nosuchprogram")
    assert caught.value.reason == "EXEC_NOT_FOUND"
    await forgotten(tasks, running)
    with pytest.raises(PermissionDenied):
        await output(tasks, running, "/bin/notexecutable")
    await forgotten(tasks, running)
    assert await topics(tasks, running) == ["task.exec.exited"] * 2
    with pytest.raises(FailedPrecondition, match="not running"):
        await output(tasks, await tasks.create("true"), "true")
    with pytest.raises(NotFound):
        await output(tasks, "nosuchtask", "true")


async def test_it_goes_on_without_its_client_and_with_the_next_service(tasks: TaskClient, running: str) -> None:
    async with begun(tasks, running, "sh", "-c", "while ! test -e /tmp/on; do usleep 10000; done"):
        pass
    tasks.daemon.kill9()
    tasks.daemon.start()
    assert [each.status for each in (await tasks.get(running)).execs] == [pb.STATUS_RUNNING]
    (tasks.rootfs / "tmp/on").touch()
    await forgotten(tasks, running)
    (tasks.rootfs / "tmp/on").unlink()
    assert await topics(tasks, running) == ["task.exec.started", "task.exec.exited"]


@pytest.mark.parametrize(("failpoint", "began"), [("tasks.exec.after_row", False), ("tasks.exec.after_shim", True)])
async def test_killed_while_it_begins_the_service_finds_how_far_it_got(
    tasks: TaskClient, running: str, failpoint: str, began: bool
) -> None:
    tasks.daemon.restart_with({"CORRAL_FAILPOINTS": f"{failpoint}=kill"})
    with pytest.raises(Unavailable):
        await output(tasks, running, "sh", "-c", "while ! test -e /tmp/late; do usleep 10000; done")
    tasks.daemon.revive()
    if began:
        [listed] = (await tasks.get(running)).execs
        assert listed.status == pb.STATUS_RUNNING
    (tasks.rootfs / "tmp/late").touch()
    await forgotten(tasks, running)
    (tasks.rootfs / "tmp/late").unlink()
    assert await topics(tasks, running) == (["task.exec.started"] if began else []) + ["task.exec.exited"]
    assert await output(tasks, running, "echo", "again") == (0, b"again\n", b"")


async def test_a_client_that_leaves_while_it_begins_leaves_nothing(tasks: TaskClient, running: str) -> None:
    for _ in range(20):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.002):
                await output(tasks, running, "true")
        await forgotten(tasks, running)
    assert await output(tasks, running, "echo", "well") == (0, b"well\n", b"")


async def test_an_older_shim_takes_the_steps(tmp_path: Path, rootfs: Path) -> None:
    now, once = 'start, attach = flag(fields, "start"), mapping(fields, "attach")', "start, attach = False, {}"
    async with beside_older_shims(tmp_path, rootfs, {"requests.py": (now, once)}) as tasks:
        running = await tasks.run("sleep", "1000")
        for _ in range(2):
            async with begun(tasks, running, "cat", stdin=True, lossless=True) as attached:
                await attached.send(b"in")
                await attached.end_stdin()
                assert ((await attached.drain()).code, attached.stdout) == (0, b"in")
            await forgotten(tasks, running)
            assert await output(tasks, running, "sh", "-c", "echo out; echo err >&2") == (0, b"out\n", b"err\n")
            await forgotten(tasks, running)
        with pytest.raises(NotFound, match='exec: "nosuchprogram"'):
            await output(tasks, running, "nosuchprogram")
        await forgotten(tasks, running)
