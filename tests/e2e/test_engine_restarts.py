"""Restart policies, as a user meets them, and over the end of the daemon."""

import asyncio
import os
import signal
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path

import pytest
from support.corrald import Corrald
from support.engine import EngineClient, engine_of, eventually, import_image
from support.engine_fixtures import engine, five, lasting_five, lasting_one, loaded, one
from support.requirements import needs

from corral.api.engine.v1 import engine_pb2 as pb
from corral.api.types.v1.types_pb2 import ExitStatus
from corral.engine.records import Status
from corral.rpc.errors import CorralError, FailedPrecondition

__all__ = ["engine", "five", "lasting_five", "lasting_one", "loaded", "one"]
pytestmark = needs("root", "overlayfs", "busybox", "netns")

Start = Callable[..., Corrald]
FOR_EVER = "trap 'exit 0' TERM; echo up >> /runs; while :; do sleep 0.05; done"


def policy(mode: str, retries: int = 0) -> pb.RestartPolicy:
    return pb.RestartPolicy(mode=pb.RestartPolicy.Mode.Value(f"MODE_{mode.upper()}"), max_retries=retries)


async def _until(engine: EngineClient, name: str, test: Callable[[pb.Container], bool]) -> pb.Container:
    found = pb.Container()

    async def holds() -> bool:
        nonlocal found
        found = await engine.get(name)
        return test(found)

    await eventually(holds)
    return found


async def test_on_failure_tries_as_often_as_it_may_and_then_leaves_it(engine: EngineClient) -> None:
    await engine.run("sh", "-c", "echo run >> /runs; cat /runs; exit 3", name="fails", restart=policy("on_failure", 2))
    ended = await _until(engine, "fails", lambda c: c.status == pb.STATUS_EXITED and c.restart_count == 2)
    assert ended.exit.code == 3
    await asyncio.sleep(1)
    assert (await engine.get("fails")).restart_count == 2
    # Its tree is the same one all the time, and so is its log.
    assert (await engine.output("fails")).count(b"run\n") == 1 + 2 + 3
    await engine.start("fails")
    await _until(engine, "fails", lambda c: c.status == pb.STATUS_EXITED and c.restart_count == 2)


async def test_on_failure_does_not_mind_success(engine: EngineClient) -> None:
    await engine.run("true", name="succeeds", restart=policy("on_failure"))
    await engine.wait("succeeds")
    await asyncio.sleep(0.5)
    assert (await engine.get("succeeds")).status == pb.STATUS_EXITED


async def test_what_is_always_restarted_is_seen_to_be_so_until_it_is_stopped(engine: EngineClient) -> None:
    await engine.run("false", name="loops", restart=policy("always"))
    seen = await _until(engine, "loops", lambda c: c.status == pb.STATUS_RESTARTING and c.restart_count >= 4)
    assert (seen.exit.code, seen.pid) == (1, 0)
    # It may just be made again: a pause of seconds comes after that.
    await _until(engine, "loops", lambda c: c.status == pb.STATUS_RESTARTING and c.finished_at != seen.finished_at)
    assert [c.name for c in await engine.listed(everything=False) if c.name == "loops"] == ["loops"]
    assert [c.name for c in await engine.listed(status="restarting")] == ["loops"]
    with pytest.raises(FailedPrecondition, match="restarting"):
        await engine.delete("loops")
    stopped = await engine.stop("loops")
    assert stopped.status == pb.STATUS_EXITED
    count = (await engine.get("loops")).restart_count
    await asyncio.sleep(2)
    left = await engine.get("loops")
    assert (left.status, left.restart_count) == (pb.STATUS_EXITED, count)
    await engine.delete("loops")


@pytest.mark.parametrize("how", ["stop", "kill", "kill TERM"])
async def test_what_a_user_ends_stays_so(engine: EngineClient, how: str) -> None:
    await engine.run_script(f"echo ready; {FOR_EVER}", name="ended", restart=policy("always"))
    if how == "stop":
        await engine.stop("ended")
    else:
        await engine.kill("ended", how.partition(" ")[2])
    await _until(engine, "ended", lambda c: c.status == pb.STATUS_EXITED)
    await asyncio.sleep(0.5)
    assert (await engine.get("ended")).status == pb.STATUS_EXITED
    await engine.start("ended")
    os.kill((await engine.get("ended")).pid, signal.SIGKILL)  # not by a user of corral
    await _until(engine, "ended", lambda c: c.restart_count == 1 and c.status == pb.STATUS_RUNNING)


async def test_a_restart_by_hand_is_no_stop(engine: EngineClient) -> None:
    await engine.run_script(f"echo ready; {FOR_EVER}", name="again", restart=policy("unless_stopped"))
    await engine.containers.Restart(pb.StopContainerRequest(container="again"))
    found = await engine.get("again")
    assert (found.status, found.restart_count) == (pb.STATUS_RUNNING, 0)
    os.kill(found.pid, signal.SIGKILL)
    await _until(engine, "again", lambda c: c.restart_count == 1 and c.status == pb.STATUS_RUNNING)


async def test_force_removes_what_is_restarting(engine: EngineClient) -> None:
    await engine.run("false", name="gone", restart=policy("always"))
    await _until(engine, "gone", lambda c: c.status == pb.STATUS_RESTARTING)
    await engine.delete("gone", force=True)
    await asyncio.sleep(0.5)
    assert await engine.listed(name="gone") == []


async def test_a_policy_can_be_changed_meanwhile(engine: EngineClient) -> None:
    await engine.run("false", name="changed", restart=policy("always"))
    await _until(engine, "changed", lambda c: c.status == pb.STATUS_RESTARTING)
    await engine.containers.Update(pb.UpdateContainerRequest(container="changed", restart=policy("no")))
    await _until(engine, "changed", lambda c: c.status == pb.STATUS_EXITED)
    count = (await engine.get("changed")).restart_count
    await asyncio.sleep(1)
    assert (await engine.get("changed")).restart_count == count


async def test_what_cannot_be_started_again_is_tried_again(engine: EngineClient, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    mount = pb.VolumeMount(type=pb.VolumeMount.TYPE_BIND, source=str(source), target="/data")
    await engine.run("sleep", "0.3", name="mounts", restart=policy("always"), mounts=[mount])
    source.rmdir()
    await _until(engine, "mounts", lambda c: c.status == pb.STATUS_RESTARTING)
    await asyncio.sleep(0.5)
    assert (await engine.get("mounts")).status == pb.STATUS_RESTARTING
    source.mkdir()
    await _until(engine, "mounts", lambda c: c.status == pb.STATUS_RUNNING)


# Over the end of the daemon


def play(daemon: Corrald, scene: Callable[[EngineClient], Awaitable[object]]) -> None:
    async def act() -> None:
        async with engine_of(daemon) as engine:
            try:
                await scene(engine)
            finally:
                engine.made.clear()

    asyncio.run(act())


async def _until_it_runs_anew(engine: EngineClient, name: str, pid_before: int) -> pb.Container:
    """Its program, that is: a row may only tell of the intent."""

    def is_anew(container: pb.Container) -> bool:
        if container.status != pb.STATUS_RUNNING or container.pid == pid_before:
            return False
        return b"up" in Path(f"/proc/{container.pid}/cmdline").read_bytes()

    return await _until(engine, name, is_anew)


def test_what_never_ran_is_not_told_to_have_run_by_the_next_daemon(one: Corrald) -> None:
    ids: list[str] = []

    async def before(engine: EngineClient) -> None:
        for _ in range(5):
            ids.append(await engine.create("/no/such/program"))
            with pytest.raises(CorralError):
                await engine.start(ids[-1])

    async def after(engine: EngineClient) -> None:
        for id_ in ids:
            assert await engine.topics_of(id_) == ["container.created", "container.died"]
            await engine.delete(id_)

    play(one, before)
    one.kill9()
    one.start()
    play(one, after)


@pytest.mark.parametrize("split", [False, True])
def test_policies_hold_over_kill_9_of_everything(start_daemon: Start, busybox_archive: Path, split: bool) -> None:
    daemon = start_daemon(split=split)
    asyncio.run(import_image(daemon, busybox_archive))
    names = {"always": "always", "stopped": "unless_stopped", "always-stopped": "always", "dies": "unless_stopped"}
    pids: list[int] = []

    async def before(engine: EngineClient) -> None:
        for name, mode in names.items():
            await engine.run_script(f"echo ready; {FOR_EVER}", name=name, restart=policy(mode))
        await engine.run("false", name="loops", restart=policy("always"))
        for name in ("stopped", "always-stopped"):
            await engine.stop(name)
        await _until(engine, "loops", lambda c: c.status == pb.STATUS_RESTARTING and c.restart_count >= 4)
        pids.append((await engine.get("dies")).pid)
        pids.append((await engine.get("always")).pid)

    async def after(engine: EngineClient) -> None:
        count = (await engine.get("loops")).restart_count
        for name in ("dies", "always-stopped"):
            await _until(engine, name, lambda c: c.status == pb.STATUS_RUNNING)
        found = {c.name: c for c in await engine.listed()}
        assert (found["always"].pid, found["always"].restart_count) == (pids[1], 0)
        assert found["stopped"].status == pb.STATUS_EXITED
        await _until(engine, "loops", lambda c: c.restart_count > count)
        for name in found:
            await engine.delete(name, force=True)

    play(daemon, before)
    daemon.kill9()
    os.kill(pids[0], signal.SIGKILL)
    daemon.restart()
    play(daemon, after)


IN_A_RESTART = pytest.mark.parametrize(
    "point",
    [
        "engine.start.after_task",
        "engine.start.after_old_task",
        "engine.start.after_new_task",
        "tasks.start.before_shim",
    ],
)


@IN_A_RESTART
def test_a_restart_that_was_killed_is_done_at_the_next_start(one: Corrald, point: str) -> None:
    pid = 0

    async def before(engine: EngineClient) -> None:
        nonlocal pid
        await engine.run_script(f"echo ready; {FOR_EVER}", name="again", restart=policy("unless_stopped"))
        pid = (await engine.get("again")).pid

    async def after(engine: EngineClient) -> None:
        found = await _until_it_runs_anew(engine, "again", pid)
        assert found.restart_count <= 2
        await engine.delete("again", force=True)

    play(one, before)
    one.restart_with({"CORRAL_FAILPOINTS": f"{point}=kill"})
    os.kill(pid, signal.SIGKILL)
    one.revive()
    play(one, after)


@IN_A_RESTART
def test_the_last_retry_is_not_lost_when_it_is_killed_in_its_middle(one: Corrald, point: str) -> None:
    pid = 0

    async def before(engine: EngineClient) -> None:
        nonlocal pid
        await engine.run_script(f"echo ready; {FOR_EVER}", name="once", restart=policy("on_failure", 1))
        pid = (await engine.get("once")).pid

    async def after(engine: EngineClient) -> None:
        found = await _until_it_runs_anew(engine, "once", pid)
        os.kill(found.pid, signal.SIGKILL)
        await _until(engine, "once", lambda c: c.status == pb.STATUS_EXITED and c.restart_count == 1)
        await asyncio.sleep(0.5)
        assert (await engine.get("once")).status == pb.STATUS_EXITED, "there was one retry, and no more"
        await engine.delete("once", force=True)

    play(one, before)
    one.restart_with({"CORRAL_FAILPOINTS": f"{point}=kill"})
    os.kill(pid, signal.SIGKILL)
    one.revive()
    play(one, after)


def test_a_restart_during_which_tasks_died_is_done_when_it_is_back(five: Corrald) -> None:
    pid = 0

    async def before(engine: EngineClient) -> None:
        nonlocal pid
        await engine.run_script(f"echo ready; {FOR_EVER}", name="again", restart=policy("always"))
        pid = (await engine.get("again")).pid

    async def after(engine: EngineClient) -> None:
        await _until_it_runs_anew(engine, "again", pid)
        await engine.delete("again", force=True)

    play(five, before)
    five.stop("tasks")
    five.start("tasks", environment={"CORRAL_FAILPOINTS": "tasks.start.before_shim=kill"})
    os.kill(pid, signal.SIGKILL)
    five.revive()
    play(five, after)


@pytest.mark.parametrize(
    ("mode", "retrying"),
    [("always", True), ("no", True), ("always", False)],
    ids=["by-its-policy", "by-one-that-was-taken-away", "by-a-user"],
)
def test_an_intent_to_start_that_the_engine_did_not_live_to_act_on(one: Corrald, mode: str, retrying: bool) -> None:
    """The policy's is acted on by the next one; a user's is taken back, whatever was counted: its call has failed."""
    wanted = retrying and mode != "no"

    async def before(engine: EngineClient) -> None:
        await engine.create("sh", "-c", FOR_EVER, name="again", restart=policy(mode))

    async def after(engine: EngineClient) -> None:
        if wanted:
            await _until_it_runs_anew(engine, "again", 0)
        else:
            await asyncio.sleep(1)
        assert (await engine.get("again")).status == (pb.STATUS_RUNNING if wanted else pb.STATUS_CREATED)
        await engine.delete("again", force=True)

    play(one, before)
    one.kill9()
    with closing(sqlite3.connect(one.root / "engine" / "engine.db")) as database, database:
        row = (int(Status.RUNNING), int(retrying))
        database.execute(
            "UPDATE container SET status = ?, restart_count = 1, retrying = ?, started_ns = created_ns", row
        )
    one.start()
    play(one, after)


@pytest.mark.parametrize("runs_on", [True, False], ids=["runs-on", "has-ended"])
def test_a_restart_that_the_engine_did_not_live_to_write_down_is_found(one: Corrald, runs_on: bool) -> None:
    """Its row tells of the end before."""
    pid = 0

    async def before(engine: EngineClient) -> None:
        nonlocal pid
        await engine.run_script(f"echo ready; {FOR_EVER}", name="again", network="bridge")
        pid = (await engine.get("again")).pid

    async def after(engine: EngineClient) -> None:
        found = await engine.get("again")
        topics = await engine.topics_of(found.id)
        if runs_on:
            assert (found.status, found.pid) == (pb.STATUS_RUNNING, pid)
            assert found.endpoint.ByteSize()
            assert await engine.exec("again", "true") == (0, b"")
        else:
            assert (found.status, found.exit.code) == (pb.STATUS_EXITED, 128 + signal.SIGKILL)
        assert topics[-1] == ("container.started" if runs_on else "container.died")
        await engine.delete("again", force=True)

    play(one, before)
    one.kill9()
    if not runs_on:
        os.kill(pid, signal.SIGKILL)
    exit_before = ExitStatus(code=3, known=True).SerializeToString()
    with closing(sqlite3.connect(one.root / "engine" / "engine.db")) as database, database:
        row = (int(Status.EXITED), exit_before)
        database.execute("UPDATE container SET status = ?, exit = ?, pid = 0, finished_ns = created_ns", row)
    one.start()
    play(one, after)


# What a hostile review found


async def test_a_stop_is_never_overtaken_by_a_restart(engine: EngineClient) -> None:
    for number in range(8):
        name = f"crashes-{number}"
        await engine.run("false", name=name, restart=policy("always"))
        await _until(engine, name, lambda c: c.restart_count >= 1)
        await asyncio.sleep(number * 0.02)
        await engine.stop(name, timeout_s=0)
        count = (await engine.get(name)).restart_count
        await asyncio.sleep(0.5)
        left = await engine.get(name)
        assert (left.status, left.restart_count) == (pb.STATUS_EXITED, count)


async def test_what_never_ran_is_not_restarted(engine: EngineClient) -> None:
    id_ = await engine.create("/no/such/program", restart=policy("always"))
    with pytest.raises(CorralError):
        await engine.start(id_)
    await asyncio.sleep(0.5)
    left = await engine.get(id_)
    assert (left.status, left.restart_count, left.exit.code) == (pb.STATUS_EXITED, 0, 127)


async def test_the_pause_grows_though_the_program_is_gone(engine: EngineClient) -> None:
    await engine.run("sh", "-c", "rm -f /bin/sh; exit 1", name="gone", restart=policy("always"))
    await asyncio.sleep(2.5)
    assert 2 <= (await engine.get("gone")).restart_count <= 6


async def test_a_kill_ends_what_is_restarting(engine: EngineClient) -> None:
    await engine.run("false", name="killed", restart=policy("always"))
    await _until(engine, "killed", lambda c: c.status == pb.STATUS_RESTARTING and c.restart_count >= 2)
    await _until(engine, "killed", lambda c: c.status == pb.STATUS_RESTARTING)
    await engine.kill("killed")
    await asyncio.sleep(1.5)
    assert (await engine.get("killed")).status == pb.STATUS_EXITED


async def test_tries_that_fail_before_the_program_runs_count_too(engine: EngineClient, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    mount = pb.VolumeMount(type=pb.VolumeMount.TYPE_BIND, source=str(source), target="/data")
    await engine.run("sh", "-c", "sleep 0.2; exit 1", name="mounts", restart=policy("on_failure", 2), mounts=[mount])
    source.rmdir()
    await _until(engine, "mounts", lambda c: c.status == pb.STATUS_EXITED and c.restart_count == 2)


async def test_a_log_can_be_read_while_its_container_is_made_again(engine: EngineClient) -> None:
    await engine.run("sh", "-c", "echo run; exit 1", name="often", restart=policy("always"))
    await engine.wait("often")
    while (restarts := (await engine.get("often")).restart_count) < 5:
        assert (await engine.output("often")).count(b"run\n") >= restarts
    await engine.delete("often", force=True)


async def test_the_log_of_what_cannot_be_made_again_is_still_there(engine: EngineClient, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    mount = pb.VolumeMount(type=pb.VolumeMount.TYPE_BIND, source=str(source), target="/x")
    await engine.run("echo", "hello", name="bound", mounts=[mount])
    await engine.wait("bound")
    source.rmdir()
    with pytest.raises(CorralError):
        await engine.start("bound")
    assert await engine.output("bound") == b"hello\n"


async def _has_paused(daemon: Corrald, pause_s: float) -> bool:
    return any(event["pause_s"] == pause_s for event in daemon.events("container.restarts"))


def test_between_the_pause_and_the_next_run_it_is_restarting_too(start_daemon: Start, busybox_archive: Path) -> None:
    """Whoever makes it again is held up: in a cgroup it can't have yet."""
    daemon = start_daemon(split=True)
    asyncio.run(import_image(daemon, busybox_archive))

    async def life(engine: EngineClient) -> None:
        await engine.run("false", name="loops", restart=policy("always"))
        cgroups = daemon.processes["cgroups"].pid
        await eventually(lambda: _has_paused(daemon, 0.8))
        os.kill(cgroups, signal.SIGSTOP)
        try:
            for _ in range(40):
                seen = await engine.get("loops")
                assert (seen.status, seen.pid, seen.exit.code) == (pb.STATUS_RESTARTING, 0, 1)
                assert [c.status for c in await engine.listed(status="restarting")] == [pb.STATUS_RESTARTING]
                await asyncio.sleep(0.05)
            assert (await engine.get("loops")).restart_count == 4
        finally:
            os.kill(cgroups, signal.SIGCONT)
        await _until(engine, "loops", lambda c: c.restart_count >= 4 and c.status == pb.STATUS_RESTARTING)
        await engine.delete("loops", force=True)

    play(daemon, life)
