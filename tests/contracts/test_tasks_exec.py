"""More processes in a running container."""
# ruff: noqa: ASYNC240 (these tests wait for the kernel, and share their loop with nobody)

import asyncio
import os
import signal
from pathlib import Path

import pytest
from support.requirements import needs
from support.tasks import TaskClient

from corral.api.tasks.v1 import tasks_pb2 as pb
from corral.api.types.v1 import types_pb2 as types_pb
from corral.rpc.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unavailable,
)

pytestmark = needs("root", "busybox")


@pytest.fixture
async def running(tasks: TaskClient) -> str:
    return await tasks.run("sleep", "1000")


async def test_an_exec_runs_inside_and_its_exit_is_its_own(tasks: TaskClient, running: str):
    await tasks.exec(running, "e1", "sh", "-c", "echo $0 $(id -u) pid $$; tr '\\0' ' ' < /proc/1/cmdline; exit 12")
    async with tasks.attached(running, "e1", stdout=True, stderr=True) as attached:
        pid = await tasks.start(running, "e1")
        assert pid > 0
        assert (await attached.drain()).code == 12
    assert b"sh 0 pid " in attached.stdout
    assert b"sleep 1000" in attached.stdout
    assert (await tasks.wait(running, "e1")).code == 12
    [exec_process] = (await tasks.get(running)).execs
    assert (exec_process.id, exec_process.status, exec_process.exit.code) == ("e1", pb.STATUS_STOPPED, 12)
    await tasks.stub.DeleteExec(pb.DeleteExecRequest(id=running, exec_id="e1"))
    task = await tasks.get(running)
    assert (task.status, list(task.execs)) == (pb.STATUS_RUNNING, [])
    assert (await tasks.topics(running))[-2:] == ["task.exec.started", "task.exec.exited"]


async def test_user_environment_and_stdin_of_an_exec(tasks: TaskClient, running: str):
    data = os.urandom(1 << 20)
    await tasks.exec(running, "e2", "sh", "-c", "id -u >&2; cat", user="app", stdin=True)
    async with tasks.attached(running, "e2", stdin=True, stdout=True, stderr=True, lossless=True) as attached:
        await tasks.start(running, "e2")
        sending = asyncio.create_task(attached.send(data))
        await asyncio.sleep(0.05)
        await sending
        await attached.end_stdin()
        assert (await attached.drain()).code == 0
    assert attached.stderr == b"1000\n"
    assert attached.stdout == data


async def test_who_waits_for_one_that_could_not_be_made_is_told_so(tasks: TaskClient, running: str):
    shim = (await tasks.get(running)).shim_pid
    os.kill(shim, signal.SIGSTOP)
    making = asyncio.create_task(tasks.exec(running, "e", "true"))
    await asyncio.sleep(0.2)
    waiting = asyncio.create_task(tasks.wait(running, "e"))
    await asyncio.sleep(0.2)
    assert not waiting.done()
    os.kill(shim, signal.SIGKILL)
    with pytest.raises(Unavailable):
        await making
    with pytest.raises(NotFound, match="could not be made"):
        await asyncio.wait_for(waiting, 10)
    await tasks.exec(running, "e", "true")


async def test_an_exec_that_is_to_be_forgotten_is_so_whoever_serves_when_it_ends(tasks: TaskClient, running: str):
    """Its client has left long since."""
    await tasks.exec(running, "e", "sh", "-c", "while ! test -e /tmp/end; do usleep 10000; done")
    async with tasks.attached(running, "e", stdout=True, start=True, forget=True):
        pass
    await asyncio.sleep(0.2)
    assert [each.id for each in (await tasks.get(running)).execs] == ["e"]
    tasks.daemon.kill9()
    tasks.daemon.start()
    (tasks.rootfs / "tmp/end").touch()
    async with asyncio.timeout(10):
        while (await tasks.get(running)).execs:  # noqa: ASYNC110 (no event tells it)
            await asyncio.sleep(0.02)
    (tasks.rootfs / "tmp/end").unlink()


async def test_an_exec_with_a_terminal(tasks: TaskClient, running: str):
    size = types_pb.WindowSize(width=120, height=40)
    await tasks.exec(running, "tty", "stty", "size", terminal=True, console_size=size)
    async with tasks.attached(running, "tty", stdin=True, stdout=True) as attached:
        assert attached.terminal
        await tasks.start(running, "tty")
        assert (await attached.drain()).code == 0
    assert attached.stdout == b"40 120\r\n"


async def test_an_exec_that_cannot_run_says_why_and_has_ended(tasks: TaskClient, running: str):
    await tasks.exec(running, "missing", "nosuchprogram")
    with pytest.raises(NotFound, match='exec: "nosuchprogram"') as caught:
        await tasks.start(running, "missing")
    assert caught.value.reason == "EXEC_NOT_FOUND"
    assert (await tasks.wait(running, "missing")).code == 127
    await tasks.exec(running, "denied", "/bin/notexecutable")
    with pytest.raises(PermissionDenied) as denied:
        await tasks.start(running, "denied")
    assert denied.value.reason == "EXEC_DENIED"
    assert (await tasks.wait(running, "denied")).code == 126
    assert (await tasks.get(running)).status == pb.STATUS_RUNNING


async def test_execs_are_refused_where_they_make_no_sense(tasks: TaskClient, running: str):
    created = await tasks.create("true")
    with pytest.raises(FailedPrecondition, match="not running"):
        await tasks.exec(created, "e", "true")
    with pytest.raises(NotFound):
        await tasks.exec("nosuchtask", "e", "true")
    with pytest.raises(InvalidArgument, match="exec id"):
        await tasks.exec(running, "", "true")
    with pytest.raises(InvalidArgument, match="JSON"):
        await tasks.stub.Exec(pb.ExecRequest(id=running, exec_id="bad", process=b"{"))
    await tasks.exec(running, "taken", "true")
    with pytest.raises(AlreadyExists):
        await tasks.exec(running, "taken", "true")
    with pytest.raises(NotFound, match="no exec"):
        await tasks.start(running, "unknown")


async def test_an_exec_is_killed_alone(tasks: TaskClient, running: str):
    await tasks.exec(running, "victim", "sleep", "1000")
    await tasks.start(running, "victim")
    with pytest.raises(FailedPrecondition, match="running"):
        await tasks.stub.DeleteExec(pb.DeleteExecRequest(id=running, exec_id="victim"))
    await tasks.kill(running, signal.SIGTERM, "victim")
    assert (await tasks.wait(running, "victim")).signal == signal.SIGTERM
    assert (await tasks.get(running)).status == pb.STATUS_RUNNING


async def test_deleting_an_exec_by_force_kills_it(tasks: TaskClient, running: str):
    await tasks.exec(running, "forced", "sleep", "1000")
    pid = await tasks.start(running, "forced")
    await tasks.stub.DeleteExec(pb.DeleteExecRequest(id=running, exec_id="forced", force=True))
    assert not Path(f"/proc/{pid}").exists()
    assert not (await tasks.get(running)).execs
    await tasks.stub.DeleteExec(pb.DeleteExecRequest(id=running, exec_id="forced"))


async def test_execs_end_with_their_container_and_every_waiter_is_told(tasks: TaskClient, running: str):
    await tasks.exec(running, "one", "sleep", "1000")
    await tasks.exec(running, "never", "sleep", "1000")
    await tasks.start(running, "one")
    waiting = asyncio.create_task(tasks.wait(running, "one"))
    never = asyncio.create_task(tasks.wait(running, "never"))
    await asyncio.sleep(0.05)
    await tasks.kill(running, signal.SIGKILL)
    async with asyncio.timeout(10):
        assert (await tasks.wait(running)).code == 137
        assert (await waiting).code == 137
        await never


async def test_fifty_execs_at_once(tasks: TaskClient, running: str):
    async def one(number: int) -> int:
        await tasks.exec(running, f"x{number}", "sh", "-c", f"exit {number}")
        await tasks.start(running, f"x{number}")
        code = (await tasks.wait(running, f"x{number}")).code
        await tasks.stub.DeleteExec(pb.DeleteExecRequest(id=running, exec_id=f"x{number}"))
        return code

    assert await asyncio.gather(*(one(number) for number in range(50))) == list(range(50))
