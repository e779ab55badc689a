"""The life of containers over gRPC: made whole or not at all, started, stopped, paused, removed."""

import asyncio
import re
import time

import pytest
from support.corrald import Corrald
from support.engine import EngineClient, engine_of, eventually
from support.engine_fixtures import engine, loaded
from support.requirements import needs

from corral.api.engine.v1 import engine_pb2 as pb
from corral.api.types.v1.types_pb2 import MemoryResources, PidsResources, Resources
from corral.rpc.errors import (
    AlreadyExists,
    CorralError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
)

__all__ = ["engine", "loaded"]
pytestmark = needs("root", "overlayfs", "busybox", "netns")

LOOP = "echo ready; while :; do sleep 0.05; done"
TRAP = f"trap 'exit 7' TERM; {LOOP}"
IGNORE = f"trap '' TERM; {LOOP}"
DEFAULT_GRACE_S = 10
NEXT_EXIT = pb.WaitContainerRequest.CONDITION_NEXT_EXIT
REMOVED = pb.WaitContainerRequest.CONDITION_REMOVED


async def test_a_container_goes_from_created_over_running_to_exited_and_is_gone(engine: EngineClient) -> None:
    id_ = await engine.create("sh", "-c", "sleep 0.2; exit 5", name="life")
    made = await engine.get("life")
    assert (made.status, made.id, made.name) == (pb.STATUS_CREATED, id_, "life")
    assert made.pid > 0
    assert not made.HasField("started_at")
    started = await engine.start("life")
    assert started.status == pb.STATUS_RUNNING
    assert (await engine.get(id_[:12])).pid == made.pid
    status = await engine.wait("life")
    assert (status.code, status.known) == (5, True)
    ended = await engine.get("life")
    assert (ended.status, ended.pid, ended.exit.code) == (pb.STATUS_EXITED, 0, 5)
    assert ended.started_at.ToNanoseconds() < ended.finished_at.ToNanoseconds()
    assert (await engine.delete("life")).exit.code == 5
    with pytest.raises(NotFound, match="no such container: life"):
        await engine.get("life")


async def test_each_step_is_journalled_once_and_in_order(engine: EngineClient) -> None:
    id_ = await engine.run("true")
    await engine.wait(id_)
    await engine.delete(id_)
    await eventually(lambda: _has(engine, id_, "cgroup.removed"))
    assert await engine.topics_of(id_) == [
        "container.created",
        "container.started",
        "container.died",
        "container.removed",
    ]
    everything = await engine.topics_of(id_, prefix="")
    assert len(everything) == len(set(everything)), "nothing is told twice"
    assert {"snapshot.prepared", "endpoint.attached", "cgroup.created", "task.created", "task.exited"} <= set(
        everything
    )


async def _has(engine: EngineClient, id_: str, topic: str) -> bool:
    return topic in await engine.topics_of(id_, prefix="")


async def test_a_name_of_two_words_is_made_when_none_is_given(engine: EngineClient) -> None:
    made = await engine.get(await engine.create("true"))
    assert re.fullmatch(r"[a-z]+_[a-z]+", made.name)
    assert re.fullmatch(r"[0-9a-f]{64}", made.id)
    assert made.config.hostname == made.id[:12]


async def test_the_image_and_its_defaults_are_shown(engine: EngineClient) -> None:
    made = await engine.get(await engine.create("true", env=["A=1"]))
    assert made.image_id.startswith("sha256:")
    assert "A=1" in made.config.env
    assert any(value.startswith("PATH=") for value in made.config.env)
    assert (made.snapshot_key, made.config.working_dir) == (made.id, "/")


async def test_a_taken_name_is_refused_and_free_again_after_removal(engine: EngineClient) -> None:
    first = await engine.create("true", name="one")
    with pytest.raises(AlreadyExists, match=f"'one' is already in use by container {first[:12]}"):
        await engine.create("true", name="one")
    with pytest.raises(AlreadyExists, match="id"):
        await engine.create("true", id_=first)
    await engine.delete("one")
    await engine.create("true", name="one")


@pytest.mark.parametrize(
    ("options", "kind", "sentence"),
    [
        ({"image": "nosuchimage"}, NotFound, "nosuchimage"),
        ({"image": ""}, InvalidArgument, "image"),
        ({"network": "nosuchnet"}, NotFound, "nosuchnet"),
        ({"network": "container:nosuch"}, NotFound, "nosuch"),
        ({"user": "nosuchuser"}, CorralError, "nosuchuser"),
        ({"user": "0x0"}, CorralError, "0x0"),
        (
            {"mounts": [pb.VolumeMount(type=pb.VolumeMount.TYPE_BIND, source="/no/such", target="/x")]},
            InvalidArgument,
            "/no/such",
        ),
        ({"init": True, "pid_mode": "host"}, InvalidArgument, "--init"),
        ({"restart": {"mode": pb.RestartPolicy.MODE_ALWAYS}, "auto_remove": True}, InvalidArgument, "--rm"),
        ({"devices": ["/dev/nosuch"]}, NotFound, "/dev/nosuch"),
        ({"seccomp_profile": "{"}, InvalidArgument, "seccomp"),
        ({"id_": "../x"}, InvalidArgument, "container id"),
        ({"name": "a b"}, InvalidArgument, "container name"),
    ],
)
async def test_bad_input_gives_one_sentence_and_leaves_nothing_half_made(
    engine: EngineClient, options: dict[str, object], kind: type[CorralError], sentence: str
) -> None:
    before = engine.daemon.leftovers()
    with pytest.raises(kind, match=re.escape(sentence)) as raised:
        await engine.create("true", **options)
    assert "\n" not in str(raised.value)
    assert await engine.listed() == []
    assert engine.daemon.leftovers() == before


@pytest.mark.parametrize(
    ("program", "kind", "reason", "code"),
    [
        (["nosuchprogram"], NotFound, "EXEC_NOT_FOUND", 127),
        (["/no/such/program"], NotFound, "EXEC_NOT_FOUND", 127),
        (["/etc"], CorralError, "EXEC_DENIED", 126),
    ],
)
async def test_a_program_that_cannot_be_executed_ends_the_container_as_a_shell_would(
    engine: EngineClient, program: list[str], kind: type[CorralError], reason: str, code: int
) -> None:
    id_ = await engine.create(*program)
    with pytest.raises(kind) as raised:
        await engine.start(id_)
    assert raised.value.reason == reason
    ended = await engine.get(id_)
    assert (ended.status, ended.exit.code) == (pb.STATUS_EXITED, code)
    await eventually(lambda: _has(engine, id_, "container.died"))
    assert await engine.topics_of(id_) == ["container.created", "container.died"]


async def test_an_ended_container_starts_again_on_the_tree_it_left(engine: EngineClient) -> None:
    script = "echo run >> /ran; wc -l < /ran; exit $(wc -l < /ran)"
    id_ = await engine.run("sh", "-c", script, network="bridge")
    assert (await engine.wait(id_)).code == 1
    address = (await engine.get(id_)).endpoint.interfaces[0].ipv4_address
    for run in (2, 3):
        await engine.start(id_)
        assert (await engine.wait(id_)).code == run
    assert await engine.output(id_) == b"1\n2\n3\n", "the log is kept over restarts"
    assert (await engine.get(id_)).endpoint.interfaces[0].ipv4_address == address


async def test_start_of_a_running_container_changes_nothing(engine: EngineClient) -> None:
    id_ = await engine.run("sleep", "100")
    before = await engine.get(id_)
    assert (await engine.start(id_)).started_at == before.started_at
    assert (await engine.get(id_)).pid == before.pid


async def test_stop_sends_the_stop_signal_and_tells_how_it_ended(engine: EngineClient) -> None:
    id_ = await engine.run_script(TRAP)
    stopped = await engine.stop(id_)
    assert (stopped.status, stopped.exit.code) == (pb.STATUS_EXITED, 7)
    assert (await engine.stop(id_)).exit.code == 7, "stopping it again is no error"
    assert (await engine.topics_of(id_))[-2:] == ["container.died", "container.stopped"]


async def test_stop_kills_after_the_grace(engine: EngineClient) -> None:
    id_ = await engine.run_script(IGNORE)
    began = time.monotonic()
    stopped = await engine.stop(id_, timeout_s=0.3)
    assert 0.3 <= time.monotonic() - began < DEFAULT_GRACE_S
    assert (stopped.exit.code, stopped.exit.signal) == (137, 9)


async def test_the_container_says_its_own_stop_signal_and_grace(engine: EngineClient) -> None:
    id_ = await engine.run_script(f"trap 'exit 9' USR1; trap '' TERM; {LOOP}", stop_signal="SIGUSR1")
    assert (await engine.stop(id_)).exit.code == 9
    hurried = await engine.run_script(IGNORE, stop_timeout={"seconds": 0, "nanos": 200_000_000})
    began = time.monotonic()
    assert (await engine.stop(hurried)).exit.code == 137
    assert time.monotonic() - began < DEFAULT_GRACE_S


async def test_kill_sends_any_signal(engine: EngineClient) -> None:
    id_ = await engine.run_script(f"trap 'exit 4' HUP; {LOOP}")
    await engine.kill(id_, "HUP")
    assert (await engine.wait(id_)).code == 4
    with pytest.raises(FailedPrecondition, match="not running"):
        await engine.kill(id_)
    with pytest.raises(InvalidArgument, match="no signal"):
        await engine.kill(id_, "NOPE")


async def test_restart_makes_a_new_run(engine: EngineClient) -> None:
    id_ = await engine.run_script(TRAP)
    before = await engine.get(id_)
    again = await engine.containers.Restart(pb.StopContainerRequest(container=id_))
    assert again.status == pb.STATUS_RUNNING
    now = await engine.get(id_)
    assert now.pid != before.pid
    assert now.started_at.ToNanoseconds() > before.started_at.ToNanoseconds()


async def test_pause_stops_every_process_and_resume_lets_them_go_on(engine: EngineClient) -> None:
    id_ = await engine.run("sh", "-c", "while :; do echo x; sleep 0.01; done")
    paused = await engine.containers.Pause(pb.PauseContainerRequest(container=id_))
    assert paused.status == pb.STATUS_PAUSED
    assert (await engine.get(id_)).status == pb.STATUS_PAUSED
    await eventually(lambda: _has_settled(engine, id_))  # what it wrote before is on its way to the log
    first = await engine.output(id_)
    await asyncio.sleep(0.2)
    assert await engine.output(id_) == first
    with pytest.raises(FailedPrecondition, match="is paused: resume it"):
        await engine.exec(id_, "true")
    with pytest.raises(FailedPrecondition, match="paused already"):
        await engine.containers.Pause(pb.PauseContainerRequest(container=id_))
    resumed = await engine.containers.Resume(pb.ResumeContainerRequest(container=id_))
    assert resumed.status == pb.STATUS_RUNNING
    await eventually(lambda: _has_written(engine, id_, len(first) + 1))
    with pytest.raises(FailedPrecondition, match="not paused"):
        await engine.containers.Resume(pb.ResumeContainerRequest(container=id_))
    assert [t for t in await engine.topics_of(id_) if "pause" in t] == ["container.paused", "container.unpaused"]


async def _has_settled(engine: EngineClient, id_: str) -> bool:
    before = await engine.output(id_)
    await asyncio.sleep(0.1)
    return await engine.output(id_) == before


async def _has_written(engine: EngineClient, id_: str, size: int) -> bool:
    return len(await engine.output(id_)) >= size


@pytest.mark.parametrize("how", ["stop", "kill", "delete"])
async def test_a_paused_container_can_be_ended(engine: EngineClient, how: str) -> None:
    id_ = await engine.run_script(TRAP)
    await engine.containers.Pause(pb.PauseContainerRequest(container=id_))
    if how == "stop":
        assert (await engine.stop(id_)).exit.code == 7
    elif how == "kill":
        await engine.kill(id_)
        assert (await engine.wait(id_)).code == 137
    else:
        assert (await engine.delete(id_, force=True)).exit.code == 137


async def test_a_running_container_is_removed_only_by_force(engine: EngineClient) -> None:
    id_ = await engine.run("sleep", "100")
    with pytest.raises(FailedPrecondition, match="stop it first, or remove it by force"):
        await engine.delete(id_)
    assert (await engine.get(id_)).status == pb.STATUS_RUNNING
    assert (await engine.delete(id_, force=True)).exit.code == 137
    assert (await engine.topics_of(id_))[-2:] == ["container.died", "container.removed"]


async def test_nothing_is_left_on_the_machine_after_removal(engine: EngineClient) -> None:
    before = engine.daemon.leftovers()
    ids = [await engine.run("sleep", "100", network="bridge") for _ in range(3)]
    assert engine.daemon.leftovers() != before
    await asyncio.gather(*(engine.delete(id_, force=True) for id_ in ids))
    assert engine.daemon.leftovers() == before


async def test_a_container_may_remove_itself(engine: EngineClient) -> None:
    id_ = await engine.create("sh", "-c", "exit 3", auto_remove=True)
    removed = asyncio.ensure_future(engine.wait(id_, REMOVED))
    await engine.start(id_)
    assert (await removed).code == 3
    with pytest.raises(NotFound):
        await engine.get(id_)


async def test_wait_answers_under_each_condition(engine: EngineClient) -> None:
    id_ = await engine.create("sh", "-c", "exit 6")
    never_ran = await engine.wait(id_)
    assert not never_ran.known
    next_exit = asyncio.ensure_future(engine.wait(id_, NEXT_EXIT))
    removed = asyncio.ensure_future(engine.wait(id_, REMOVED))
    await asyncio.sleep(0.05)
    assert not next_exit.done()
    await engine.start(id_)
    assert (await next_exit).code == 6
    assert (await engine.wait(id_)).code == 6, "and at once when it has ended"
    again = asyncio.ensure_future(engine.wait(id_, NEXT_EXIT))
    await asyncio.sleep(0.05)
    assert not again.done(), "an end that was is not the next one"
    await engine.start(id_)
    assert (await again).code == 6
    await engine.delete(id_)
    assert (await removed).code == 6


async def test_references_may_be_abbreviated_and_ambiguity_is_told(engine: EngineClient) -> None:
    await engine.create("true", id_="dead" * 16, name="d1")
    await engine.create("true", id_="deaf" * 16, name="d2")
    assert (await engine.get("deaf")).name == "d2"
    with pytest.raises(FailedPrecondition, match=r"several container ids: .*\(d1\)"):
        await engine.get("dea")


async def test_rename(engine: EngineClient) -> None:
    id_ = await engine.create("true", name="old")
    await engine.create("true", name="other")
    with pytest.raises(AlreadyExists, match="'other'"):
        await engine.containers.Rename(pb.RenameContainerRequest(container=id_, name="other"))
    renamed = await engine.containers.Rename(pb.RenameContainerRequest(container="old", name="new"))
    assert renamed.name == "new"
    with pytest.raises(NotFound):
        await engine.get("old")


async def test_list_shows_what_runs_or_all_and_filters(engine: EngineClient) -> None:
    running = await engine.run("sleep", "100", name="runs", labels={"tier": "a"})
    created = await engine.create("true", name="waits", labels={"tier": "b"})
    assert [c.id for c in await engine.listed(everything=False)] == [running]
    assert [c.id for c in await engine.listed()] == [created, running], "newest first"
    for key, value, expected in (
        ("name", "run", ["runs"]),
        ("status", "created", ["waits"]),
        ("label", "tier", ["waits", "runs"]),
        ("label", "tier=a", ["runs"]),
        ("id", created[:6], ["waits"]),
        ("image", "busybox", ["waits", "runs"]),
        ("network", "none", ["waits", "runs"]),
    ):
        assert [c.name for c in await engine.listed(**{key: value})] == expected, (key, value)
    with pytest.raises(InvalidArgument, match="no filter"):
        await engine.listed(colour="red")
    with pytest.raises(InvalidArgument, match="no status"):
        await engine.listed(status="odd")


async def test_namespaces_do_not_see_each_other(engine: EngineClient, loaded: Corrald) -> None:
    await engine.create("true", name="mine")
    async with engine_of(loaded, namespace="other") as other:
        assert await other.listed() == []
        with pytest.raises(NotFound):
            await other.get("mine")


async def test_update_changes_limits_and_labels_and_shows_them(engine: EngineClient) -> None:
    id_ = await engine.run("sleep", "100", labels={"a": "1"}, resources=Resources(pids=PidsResources(limit=50)))
    request = pb.UpdateContainerRequest(
        container=id_,
        resources=Resources(memory=MemoryResources(limit_bytes=64 << 20)),
        labels={"b": "2"},
    )
    updated = await engine.containers.Update(request)
    assert updated.config.resources.memory.limit_bytes == 64 << 20
    assert updated.config.resources.pids.limit == 50
    assert dict(updated.config.labels) == {"a": "1", "b": "2"}
    async for response in engine.containers.Stats(pb.ContainerStatsRequest(containers=[id_])):
        [stats] = response.stats
        assert stats.cgroup.memory.limit_bytes == 64 << 20
        assert stats.cgroup.pids.limit == 50
    always = pb.UpdateContainerRequest(container=id_, restart={"mode": pb.RestartPolicy.MODE_ALWAYS})
    assert (await engine.containers.Update(always)).config.restart.mode == pb.RestartPolicy.MODE_ALWAYS


async def test_a_memory_limit_kills_and_is_reported(engine: EngineClient) -> None:
    limits = Resources(memory=MemoryResources(limit_bytes=16 << 20))
    id_ = await engine.run("sh", "-c", "dd if=/dev/zero of=/dev/shm/x bs=1M count=60", resources=limits, network="none")
    status = await engine.wait(id_)
    assert (status.code, status.oom_killed) == (137, True)
    assert (await engine.get(id_)).exit.oom_killed


async def test_top_and_stats_show_what_runs_inside(engine: EngineClient) -> None:
    id_ = await engine.run_script("sleep 100 & echo ready; wait", name="busy")
    await eventually(lambda: _executes(engine, id_, "sleep 100"))  # a fork is a second shell first
    response = await engine.containers.Top(pb.TopRequest(container=id_))
    commands = [process.command for process in response.processes]
    assert len(commands) == 2
    assert commands[1] == "sleep 100"
    assert response.processes[1].parent_pid == response.processes[0].pid
    readings = [
        [stats.name for stats in reading.stats] async for reading in engine.containers.Stats(pb.ContainerStatsRequest())
    ]
    assert readings == [["busy"]]


async def test_a_stream_of_statistics_has_who_starts_meanwhile_and_loses_who_ends(engine: EngineClient) -> None:
    first = await engine.run("sleep", "1000")
    stream = engine.containers.Stats(pb.ContainerStatsRequest(interval_ms=100))

    async def comes_to(*wanted: str) -> None:
        async with asyncio.timeout(20):
            while {stats.id for stats in (await stream.read()).stats} != set(wanted):  # type: ignore[union-attr]
                pass

    await comes_to(first)
    second = await engine.run("sleep", "1000")
    await comes_to(first, second)
    await engine.stop(first, timeout_s=0)
    await comes_to(second)
    await engine.delete(second, force=True)
    await comes_to()
    stream.cancel()


async def _executes(engine: EngineClient, id_: str, command: str) -> bool:
    return command in [
        process.command for process in (await engine.containers.Top(pb.TopRequest(container=id_))).processes
    ]


async def test_two_hundred_changes_at_once_keep_their_order(engine: EngineClient) -> None:
    async def whole_life(number: int) -> int:
        id_ = await engine.run("sh", "-c", f"exit {number}")
        code = (await engine.wait(id_)).code
        await engine.delete(id_)
        return code

    assert await asyncio.gather(*map(whole_life, range(30))) == list(range(30))


async def test_concurrent_starts_stops_and_removals_of_one_container_end_well(engine: EngineClient) -> None:
    id_ = await engine.create("sh", "-c", TRAP)
    calls = [engine.start(id_), engine.start(id_), engine.stop(id_, timeout_s=1), engine.start(id_)]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert not [a for a in answers if isinstance(a, BaseException) and not isinstance(a, CorralError)]
    await asyncio.gather(
        *(engine.delete(id_, force=True) for _ in range(3)), engine.stop(id_, timeout_s=1), return_exceptions=True
    )
    with pytest.raises(NotFound):
        await engine.get(id_)
