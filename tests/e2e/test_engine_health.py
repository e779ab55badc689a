"""Health checks: probed in the container, told to everybody, acted on."""
# ruff: noqa: ASYNC110 (these tests wait for what happens in time)

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path

import pytest
from google.protobuf.duration_pb2 import Duration
from support.corrald import Corrald
from support.engine import EngineClient, engine_of, import_image
from support.engine_fixtures import engine, loaded
from support.requirements import needs

from corral.api.engine.v1 import engine_pb2 as pb
from corral.api.images.v1.images_pb2 import Healthcheck
from corral.api.types.v1.types_pb2 import ExitStatus
from corral.engine.records import Status
from corral.rpc.errors import InvalidArgument

__all__ = ["engine", "loaded"]
pytestmark = needs("root", "overlayfs", "busybox")
SOON = Duration(nanos=50_000_000)


def check(command: str, **more: object) -> Healthcheck:
    return Healthcheck(test=["CMD-SHELL", command], **({"interval": SOON, "retries": 2} | more))  # type: ignore[arg-type]


async def until(engine: EngineClient, name: str, wanted: Callable[[pb.Container], bool]) -> pb.Container:
    async with asyncio.timeout(30):
        while not wanted(found := await engine.get(name)):
            await asyncio.sleep(0.05)
    return found


async def test_it_is_what_its_probe_says_it_is(engine: EngineClient) -> None:
    probe = "echo looked; test -e /tmp/well"
    await engine.run("sleep", "1000", name="probed", healthcheck=check(probe))
    assert (await engine.get("probed")).health.state == pb.Health.STATE_STARTING
    sick = await until(engine, "probed", lambda c: c.health.state == pb.Health.STATE_UNHEALTHY)
    assert (sick.status, sick.health.last_output) == (pb.STATUS_RUNNING, "looked\n")
    assert sick.health.failing_streak >= 2
    assert [c.name for c in await engine.listed(health="unhealthy")] == ["probed"]
    made = pb.ExecContainerRequest(container="probed", args=["touch", "/tmp/well"])
    exec_ = await engine.containers.Exec(made)
    await engine.containers.ExecStart(pb.ExecStartRequest(container="probed", exec_id=exec_.exec_id))
    well = await until(engine, "probed", lambda c: c.health.state == pb.Health.STATE_HEALTHY)
    assert well.health.failing_streak == 0
    topics = await engine.topics_of(well.id, prefix="container.")
    assert topics.count("container.checked") == 2
    await engine.delete("probed", force=True)


async def test_a_probe_that_hangs_is_killed_and_counts_as_a_failure(engine: EngineClient) -> None:
    hanging = check("sleep 1000", timeout=Duration(nanos=200_000_000), retries=1)
    await engine.run("sleep", "1000", name="hangs", healthcheck=hanging)
    sick = await until(engine, "hangs", lambda c: c.health.state == pb.Health.STATE_UNHEALTHY)
    assert "longer than 0.2 s" in sick.health.last_output
    assert {probe.exit_code for probe in sick.health.log} == {-1}
    tops = await engine.containers.Top(pb.TopRequest(container="hangs"))
    assert len([p for p in tops.processes if "1000" in p.command]) <= 2, "probes do not pile up"
    await engine.delete("hangs", force=True)


@pytest.mark.parametrize("action", ["KILL", "STOP", "RESTART"])
async def test_what_is_done_about_an_unhealthy_one(engine: EngineClient, action: str) -> None:
    value = pb.ContainerConfig.HealthAction.Value(f"HEALTH_ACTION_{action}")
    script = "trap 'exit 5' TERM; while :; do sleep 0.05; done"
    id_ = await engine.run(
        "sh", "-c", script, name="acted", healthcheck=check("false", retries=1), health_on_failure=value
    )
    if action == "RESTART":
        began = (await engine.get(id_)).started_at.ToNanoseconds()
        await until(engine, id_, lambda c: c.started_at.ToNanoseconds() > began and c.status == pb.STATUS_RUNNING)
    else:
        ended = await until(engine, id_, lambda c: c.status == pb.STATUS_EXITED)
        assert ended.exit.code == {"KILL": 137, "STOP": 5}[action]
    await engine.delete(id_, force=True)


async def test_a_probe_that_a_daemon_left_when_it_died_is_ended(engine: EngineClient, loaded: Corrald) -> None:
    async def probes(engine: EngineClient) -> int:
        tops = await engine.containers.Top(pb.TopRequest(container="left"))
        return len([p for p in tops.processes if p.command == "sleep 777"])

    async def begin(engine: EngineClient) -> None:
        async with asyncio.timeout(30):
            while not await probes(engine):
                await asyncio.sleep(0.05)

    await engine.run("sleep", "1000", name="left", healthcheck=check("exec sleep 777"))
    await begin(engine)
    loaded.kill9()
    loaded.start()
    async with engine_of(loaded) as again:
        await begin(again)
        async with asyncio.timeout(30):
            while await probes(again) != 1:
                await asyncio.sleep(0.05)
        await asyncio.sleep(0.5)
        assert await probes(again) == 1
        await again.delete("left", force=True)


@pytest.mark.parametrize("sick_first", [False, True])
async def test_a_user_who_stops_it_has_the_last_word(engine: EngineClient, sick_first: bool) -> None:
    sick = "" if sick_first else "touch /tmp/sick; "
    script = f"trap '{sick}sleep 1; exit 5' TERM; while :; do sleep 0.05; done"
    probe = check("test ! -e /tmp/sick", retries=1)
    action = pb.ContainerConfig.HEALTH_ACTION_RESTART
    id_ = await engine.run("sh", "-c", script, name="stopped", healthcheck=probe, health_on_failure=action)
    began = (await until(engine, id_, lambda c: c.health.state == pb.Health.STATE_HEALTHY)).started_at
    if sick_first:
        made = await engine.containers.Exec(pb.ExecContainerRequest(container=id_, args=["touch", "/tmp/sick"]))
        await engine.containers.ExecStart(pb.ExecStartRequest(container=id_, exec_id=made.exec_id))
        await until(engine, id_, lambda c: c.health.state == pb.Health.STATE_UNHEALTHY)
        await asyncio.sleep(0.3)
    await engine.containers.Stop(pb.StopContainerRequest(container=id_))
    await asyncio.sleep(1.5)
    ended = await engine.get(id_)
    assert (ended.status, ended.exit.code, ended.started_at) == (pb.STATUS_EXITED, 5, began)
    await engine.delete(id_, force=True)


@pytest.mark.parametrize("goes_on", [False, True])
async def test_a_pause_in_the_middle_of_a_probe_is_no_failure(engine: EngineClient, goes_on: bool) -> None:
    hangs_once = "test -e /tmp/probed || { touch /tmp/probed; sleep 1000; }"
    probe = check(hangs_once, timeout=Duration(seconds=2), retries=1)
    action = pb.ContainerConfig.HEALTH_ACTION_KILL
    id_ = await engine.run("sleep", "1000", name="frozen", healthcheck=probe, health_on_failure=action)
    while (await engine.exec(id_, "test", "-e", "/tmp/probed"))[0] != 0:
        await asyncio.sleep(0.05)
    await engine.containers.Pause(pb.PauseContainerRequest(container=id_))
    if not goes_on:
        await asyncio.sleep(3)  # the probe's time is over, and that of waiting for it
        found = await engine.get(id_)
        assert (found.status, found.health.state) == (pb.STATUS_PAUSED, pb.Health.STATE_STARTING)
        assert list(found.health.log) == []
    await engine.containers.Resume(pb.ResumeContainerRequest(container=id_))
    well = await until(engine, id_, lambda c: c.health.state == pb.Health.STATE_HEALTHY)
    assert {probe.exit_code for probe in well.health.log} == {0}
    assert (await engine.topics_of(id_, prefix="container.checked")) == ["container.checked"]
    await engine.delete(id_, force=True)


@pytest.mark.parametrize("by_itself", [False, True])
async def test_the_end_of_a_container_is_no_failure_of_the_probe_that_it_ends(
    engine: EngineClient, by_itself: bool
) -> None:
    program = "sh", "-c", "while ! test -e /tmp/enough; do sleep 0.05; done"
    probe = check("touch /tmp/probed; sleep 5", retries=1, timeout=Duration(seconds=10))
    id_ = await engine.run(*program, name="ending", healthcheck=probe)
    while (await engine.exec(id_, "test", "-e", "/tmp/probed"))[0] != 0:
        await asyncio.sleep(0.05)
    if by_itself:
        await engine.exec(id_, "touch", "/tmp/enough")
        await engine.wait(id_)
    else:
        await engine.stop(id_, timeout_s=0)
    await asyncio.sleep(0.5)
    assert await engine.topics_of(id_, prefix="container.checked") == []
    assert list((await engine.get(id_)).health.log) == []
    await engine.delete(id_, force=True)


async def test_nonsense_is_refused(engine: EngineClient) -> None:
    with pytest.raises(InvalidArgument, match="health check"):
        await engine.create("true", healthcheck=Healthcheck(test=["whatever"]))
    with pytest.raises(InvalidArgument, match="unhealthy"):
        await engine.create("true", health_on_failure=77)


def test_the_command_line_has_dockers_options(loaded: Corrald) -> None:
    flags = ("--health-cmd", "true", "--health-interval", "100ms", "--health-retries", "1", "--health-timeout", "9s")
    loaded.corral("run", "-d", "--name", "well", "--network", "none", *flags, "busybox", "sleep", "1000", check=True)
    for _ in range(200):
        shown = loaded.corral("ps", "--filter", "health=healthy").stdout
        if b"(healthy)" in shown:
            break
    assert b"(healthy)" in shown
    refused = loaded.corral("run", "--no-healthcheck", "--health-cmd", "x", "busybox", "true")
    assert refused.returncode == 125
    assert b"exclude one another" in refused.stderr
    loaded.corral("rm", "-f", "well", check=True)


def test_one_that_is_found_to_run_once_tasks_is_back_is_probed(
    start_daemon: Callable[..., Corrald], busybox_archive: Path
) -> None:
    """Its row tells of the end before, and the engine is there first."""
    daemon = start_daemon(split=True)
    asyncio.run(import_image(daemon, busybox_archive))

    async def before(engine: EngineClient) -> None:
        await engine.run("sleep", "1000", name="found", healthcheck=check("true"))
        engine.made.clear()

    async def after(engine: EngineClient) -> None:
        well = await until(engine, "found", lambda c: c.health.state == pb.Health.STATE_HEALTHY)
        assert well.status == pb.STATUS_RUNNING
        await engine.delete("found", force=True)

    asyncio.run(with_engine(daemon, before))
    daemon.kill9()
    exit_before = ExitStatus(code=3, known=True).SerializeToString()
    with closing(sqlite3.connect(daemon.root / "engine" / "engine.db")) as database, database:
        row = (int(Status.EXITED), exit_before)
        database.execute("UPDATE container SET status = ?, exit = ?, pid = 0, finished_ns = started_ns - 1", row)
    daemon.start("images", "cgroups", "network", "engine")
    daemon.start("tasks")
    asyncio.run(with_engine(daemon, after))


async def with_engine(daemon: Corrald, scene: Callable[[EngineClient], Awaitable[None]]) -> None:
    async with engine_of(daemon) as engine:
        await scene(engine)
