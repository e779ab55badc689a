"""Create, start, wait, kill and delete over gRPC, on real containers."""
# ruff: noqa: ASYNC110, ASYNC240 (these tests wait for the kernel, and share their loop with nobody)

import asyncio
import contextlib
import signal
from pathlib import Path

import pytest
from support.corrald import Corrald
from support.requirements import needs
from support.tasks import TaskClient, spec

from corral.api.tasks.v1 import tasks_pb2 as pb
from corral.api.types.v1 import types_pb2 as types_pb
from corral.rpc.context import in_namespace
from corral.rpc.errors import (
    AlreadyExists,
    CorralError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
)

pytestmark = needs("root", "busybox")


async def test_a_program_runs_and_its_end_is_told(tasks: TaskClient):
    task_id = await tasks.create("echo", "hello")
    created = await tasks.get(task_id)
    assert created.status == pb.STATUS_CREATED
    assert Path(f"/proc/{created.pid}").exists()
    assert await tasks.start(task_id) == created.pid
    exited = await tasks.wait(task_id)
    assert (exited.code, exited.signal, exited.known, exited.reason) == (0, 0, True, "")
    stopped = await tasks.get(task_id)
    assert (stopped.status, stopped.pid) == (pb.STATUS_STOPPED, 0)
    assert Path(stopped.log_path).read_text().startswith('{"log":"hello\\n","stream":"stdout"')
    assert (await tasks.delete(task_id)).exit == exited
    assert not Path(stopped.bundle).exists()
    assert not Path(stopped.log_path).parent.exists()
    assert await tasks.topics(task_id) == ["task.created", "task.started", "task.exited", "task.deleted"]


async def test_exit_codes_and_signals_are_kept(tasks: TaskClient):
    assert (await tasks.wait(await tasks.run("sh", "-c", "exit 42"))).code == 42
    task_id = await tasks.run("sleep", "100")
    await tasks.kill(task_id, signal.SIGKILL)
    exited = await tasks.wait(task_id)
    assert (exited.code, exited.signal) == (137, signal.SIGKILL)


async def test_any_number_may_wait_and_a_late_one_is_answered_at_once(tasks: TaskClient):
    task_id = await tasks.run("sh", "-c", "usleep 200000; exit 5")
    waiting = [asyncio.create_task(tasks.wait(task_id)) for _ in range(20)]
    assert {(await each).code for each in waiting} == {5}
    async with asyncio.timeout(5):
        assert (await tasks.wait(task_id)).code == 5


@pytest.mark.parametrize(
    ("program", "kind", "reason", "code"),
    [
        ("nosuchprogram", NotFound, "EXEC_NOT_FOUND", 127),
        ("/bin/notexecutable", PermissionDenied, "EXEC_DENIED", 126),
    ],
)
async def test_a_program_that_cannot_run_says_why(
    tasks: TaskClient, program: str, kind: type[CorralError], reason: str, code: int
):
    task_id = await tasks.create(program)
    with pytest.raises(kind, match=f'exec: "{program}"') as caught:
        await tasks.start(task_id)
    assert caught.value.reason == reason
    assert (await tasks.wait(task_id)).code == code
    assert "task.started" not in await tasks.topics(task_id)


async def test_a_taken_id_is_refused_and_the_first_task_stays(tasks: TaskClient):
    task_id = await tasks.run("sleep", "100")
    with pytest.raises(AlreadyExists, match=task_id):
        await tasks.create("true", task_id=task_id)
    assert (await tasks.get(task_id)).status == pb.STATUS_RUNNING


async def test_a_create_that_fails_leaves_nothing(tasks: TaskClient, tasks_daemon: Corrald):
    nowhere = [types_pb.Mount(type="bind", source="/nonexistent/corral", options=["rbind"])]
    with pytest.raises(CorralError, match="/nonexistent/corral"):
        await tasks.stub.Create(pb.CreateTaskRequest(id="broken", spec=spec("true"), rootfs=nowhere))
    with pytest.raises(CorralError, match="nobodyhere"):
        await tasks.create("true", task_id="broken", user="nobodyhere")
    with pytest.raises(NotFound):
        await tasks.get("broken")
    assert not list(tasks_daemon.state.glob("shim/*/broken"))
    assert not list(tasks_daemon.root.glob("tasks/logs/*/broken"))
    assert await tasks.topics("broken") == []
    await tasks.create("true", task_id="broken")


@pytest.mark.parametrize("bad", [b"", b"{", b"[]", b"{}", b'{"ociVersion":"1.0.0","process":{"args":"x"}}'])
async def test_a_spec_that_is_none_is_refused(tasks: TaskClient, bad: bytes):
    with pytest.raises(InvalidArgument):
        await tasks.create(spec=bad)


@pytest.mark.parametrize("bad", ["", "..", "a/b", "-a", "x" * 129])
async def test_an_id_that_is_no_id_is_refused(tasks: TaskClient, bad: str):
    for call in (tasks.get(bad), tasks.delete(bad), tasks.start(bad), tasks.wait(bad)):
        with pytest.raises(InvalidArgument, match="container id"):
            await call


async def test_a_running_task_is_deleted_only_by_force(tasks: TaskClient):
    task_id = await tasks.run("sleep", "100")
    pid = (await tasks.get(task_id)).pid
    with pytest.raises(FailedPrecondition, match="running"):
        await tasks.delete(task_id)
    assert (await tasks.delete(task_id, force=True)).exit.code == 137
    assert not Path(f"/proc/{pid}").exists()
    assert (await tasks.topics(task_id))[-2:] == ["task.exited", "task.deleted"]


async def test_delete_can_be_repeated(tasks: TaskClient):
    task_id = await tasks.create("true")
    assert (await tasks.delete(task_id)).exit.code == 137
    assert not (await tasks.delete(task_id)).HasField("exit")
    with pytest.raises(NotFound):
        await tasks.delete(task_id, must_exist=True)


async def test_a_second_start_is_refused(tasks: TaskClient):
    task_id = await tasks.run("sleep", "100")
    with pytest.raises(FailedPrecondition, match="started already"):
        await tasks.start(task_id)


async def test_signals_reach_a_process_while_it_runs(tasks: TaskClient):
    task_id = await tasks.create("sh", "-c", "trap 'exit 7' USR1; echo ready; while :; do usleep 10000; done")
    async with tasks.attached(task_id, stdout=True) as attached:
        await tasks.start(task_id)
        await attached.read_until(b"ready")
        await tasks.kill(task_id, signal.SIGUSR1)
        assert (await attached.drain()).code == 7
    with pytest.raises(FailedPrecondition, match="not running"):
        await tasks.kill(task_id, signal.SIGTERM)


async def test_namespaces_do_not_see_each_other(tasks: TaskClient):
    await tasks.run("sleep", "100", task_id="same")
    with in_namespace("blue"):
        with pytest.raises(NotFound):
            await tasks.get("same")
        await tasks.run("sleep", "100", task_id="same")
        blue = await tasks.get("same")
        assert [task.id for task in (await tasks.stub.List(pb.ListTasksRequest())).tasks] == ["same"]
        await tasks.delete("same", force=True)
    assert (await tasks.get("same")).pid != blue.pid
    assert (await tasks.get("same")).status == pb.STATUS_RUNNING


async def test_pids_are_those_inside(tasks: TaskClient):
    task_id = await tasks.run("sh", "-c", "sleep 100 & sleep 100 & wait")
    init = (await tasks.get(task_id)).pid
    async with asyncio.timeout(10):
        while len(pids := (await tasks.stub.Pids(pb.PidsRequest(id=task_id))).pids) < 3:
            await asyncio.sleep(0.02)
    assert init in pids
    assert len(pids) == 3


async def test_a_caller_that_goes_away_leaves_whole_tasks_or_none(tasks: TaskClient):
    """Cancelled at any moment a create is finished all the same, so that delete finds what there is."""
    for delay_ms in range(0, 16, 2):
        task_id = f"gone{delay_ms}"
        creating = asyncio.create_task(tasks.create("sleep", "100", task_id=task_id))
        await asyncio.sleep(delay_ms / 1000)
        creating.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await creating
        await tasks.delete(task_id)
        with pytest.raises(NotFound):
            await tasks.get(task_id)
    assert not list(tasks.daemon.state.glob("shim/default/gone*"))


async def test_events_follow_what_happens(tasks: TaskClient):
    seen = []
    task_id = "followed"
    request = types_pb.EventsRequest(subjects=[task_id])
    following = tasks.stub.Events(request)
    await tasks.run("true", task_id=task_id)
    await tasks.wait(task_id)
    await tasks.delete(task_id)
    async for response in following:
        seen += response.events
        if seen[-1].topic == "task.deleted":
            break
    assert [event.topic for event in seen] == ["task.created", "task.started", "task.exited", "task.deleted"]
    assert [event.seq for event in seen] == sorted(event.seq for event in seen)
    assert seen[2].payload["code"] == 0


async def test_two_hundred_tasks_run_at_once_and_one_more_is_as_quick(tasks: TaskClient):
    await asyncio.gather(*(tasks.run("sleep", "1000") for _ in range(200)))
    listed = (await tasks.stub.List(pb.ListTasksRequest())).tasks
    assert sum(task.status == pb.STATUS_RUNNING for task in listed) >= 200
    await asyncio.gather(*(tasks.delete(task_id, force=True) for task_id in tasks.created))
    assert (await tasks.stub.List(pb.ListTasksRequest())).tasks == []
