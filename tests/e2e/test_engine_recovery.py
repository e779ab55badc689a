"""Whatever dies, at whatever step: nothing is lost, nothing is left, and a container is fully there or fully gone."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest
from support.corrald import Corrald, running
from support.engine import EngineClient, engine_of, eventually, import_image
from support.engine_fixtures import five, lasting_five, lasting_one, one
from support.file_systems import fill, small_disk
from support.requirements import needs

from corral.api.engine.v1 import engine_pb2 as pb
from corral.rpc.errors import AlreadyExists, CorralError, NotFound, ResourceExhausted, Unavailable

__all__ = ["five", "lasting_five", "lasting_one", "one"]
pytestmark = needs("root", "overlayfs", "busybox", "netns")

Start = Callable[..., Corrald]
TRAP = "trap 'exit 7' TERM; while :; do sleep 0.05; done"


def failing(point: str, action: str = "kill") -> dict[str, str]:
    return {"CORRAL_FAILPOINTS": f"{point}={action}"}


def start_with_image(start_daemon: Start, archive: Path, **options: object) -> Corrald:
    daemon = start_daemon(**options)
    asyncio.run(import_image(daemon, archive))
    return daemon


def play(daemon: Corrald, scene: Callable[[EngineClient], Awaitable[object]]) -> None:
    """Act as a client, without cleaning up: the daemon may be dead in the end."""

    async def act() -> None:
        async with engine_of(daemon) as engine:
            try:
                await scene(engine)
            finally:
                engine.made.clear()

    asyncio.run(act())


# The daemon dies while containers live


def test_a_container_outlives_the_daemon_and_its_exit_is_not_lost(one: Corrald) -> None:
    async def before(engine: EngineClient) -> None:
        await engine.run("sh", "-c", TRAP, name="stays", network="bridge")
        await engine.run("sh", "-c", TRAP.replace("7", "9"), name="ends")
        await engine.run("sh", "-c", TRAP.replace("7", "3"), name="leaves", auto_remove=True)
        pids.extend([(await engine.get(name)).pid for name in ("stays", "ends", "leaves")])

    async def after(engine: EngineClient) -> None:
        stays = await engine.get("stays")
        assert (stays.status, stays.pid) == (pb.STATUS_RUNNING, pids[0])
        ended = await engine.get("ends")
        assert (ended.status, ended.exit.code, ended.exit.known) == (pb.STATUS_EXITED, 9, True)
        assert await engine.topics_of(ended.id) == ["container.created", "container.started", "container.died"]
        assert (await engine.exec("stays", "echo", "hello")) == (0, b"hello\n")
        assert (await engine.stop("stays")).exit.code == 7

        async def gone() -> bool:
            return "leaves" not in [container.name for container in await engine.listed()]

        await eventually(gone)
        await assert_told_once(engine)

    pids: list[int] = []
    play(one, before)
    one.kill9()
    os.kill(pids[0], 0)
    await_gone(pids[1:], signal.SIGTERM)
    one.start()
    play(one, after)


def await_gone(pids: Sequence[int], number: int = 0) -> None:
    """Signal them until their shims have reaped them, and so have written down how they ended."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            while True:
                os.kill(pid, number)
                time.sleep(0.02)


async def assert_told_once(engine: EngineClient) -> None:
    """No event of any leaf is in the merged journal twice, and none of the engine's own about one container."""
    events = await engine.events()
    merged = Counter((event.origin, event.origin_seq) for event in events if event.origin)
    assert [key for key, count in merged.items() if count > 1] == []
    once = ("container.created", "container.removed")
    own = Counter((event.topic, event.subject) for event in events if event.topic in once)
    assert [key for key, count in own.items() if count > 1] == []
    for origin in ("tasks", "images", "network", "cgroups"):
        sequence = [event.origin_seq for event in events if event.origin == origin]
        assert sequence == list(range(1, len(sequence) + 1)), f"{origin}: in order, without a hole"


@pytest.mark.parametrize("split", [False, True])
def test_who_dies_in_the_middle_of_a_commit_leaves_no_container_paused(
    start_daemon: Start, busybox_archive: Path, *, split: bool
) -> None:
    daemon = start_with_image(start_daemon, busybox_archive, split=split)

    async def before(engine: EngineClient) -> None:
        await engine.run("sh", "-c", TRAP, name="committed")
        await engine.run("sh", "-c", TRAP, name="paused")
        await engine.containers.Pause(pb.PauseContainerRequest(container="paused"))

    async def commit(engine: EngineClient) -> None:
        with pytest.raises(Unavailable):
            await engine.containers.Commit(pb.CommitContainerRequest(container="committed", name="made:1"))

    async def after(engine: EngineClient) -> None:
        await eventually(running)
        assert (await engine.get("paused")).status == pb.STATUS_PAUSED
        assert (await engine.exec("committed", "echo", "hello")) == (0, b"hello\n")
        assert (await engine.stop("committed")).exit.code == 7
        await engine.containers.Commit(pb.CommitContainerRequest(container="paused", name="made:1"))
        assert (await engine.get("paused")).status == pb.STATUS_PAUSED

    async def running() -> bool:
        async with engine_of(daemon) as engine:
            return (await engine.get("committed")).status == pb.STATUS_RUNNING

    play(daemon, before)
    daemon.kill9("engine") if split else daemon.kill9()
    daemon.start(environment=failing("engine.commit.while_paused"))
    play(daemon, commit)
    daemon.revive()
    play(daemon, after)


CREATE_POINTS = (
    "engine.create.after_intent",
    "engine.create.after_parts",
    "engine.create.after_parts_row",
    "engine.task.before_create",
    "engine.create.after_task",
    "engine.create.after_row",
)


@pytest.mark.parametrize("point", CREATE_POINTS)
def test_a_create_that_was_killed_left_all_or_nothing(one: Corrald, point: str) -> None:
    async def before(engine: EngineClient) -> None:
        with pytest.raises(Unavailable):
            await engine.create("sh", "-c", "exit 4", name="half", network="bridge")

    async def after(engine: EngineClient) -> None:
        try:
            await engine.get("half")
        except NotFound:
            assert one.leftovers() == []
            await engine.create("sh", "-c", "exit 4", name="half", network="bridge")
        await engine.start("half")
        assert (await engine.wait("half")).code == 4
        await engine.delete("half")
        assert one.leftovers() == []
        await assert_told_once(engine)

    one.restart_with(failing(point))
    play(one, before)
    one.revive()
    play(one, after)


@pytest.mark.parametrize("point", CREATE_POINTS[:4])
def test_a_create_that_fails_on_the_way_leaves_nothing(one: Corrald, point: str) -> None:
    async def scene(engine: EngineClient) -> None:
        with pytest.raises(CorralError, match=f"failpoint {point}"):
            await engine.create("true", name="half", network="bridge")
        assert await engine.listed() == []
        assert one.leftovers() == []
        with pytest.raises(CorralError, match=f"failpoint {point}"):
            await engine.create("true", name="half", network="bridge")

    one.restart_with(failing(point, "error"))
    play(one, scene)


@pytest.mark.parametrize(
    "point", ["engine.start.after_task", "engine.start.after_old_task", "engine.start.after_new_task"]
)
def test_a_start_that_was_killed_can_be_done_again(one: Corrald, point: str) -> None:
    async def first_run(engine: EngineClient) -> None:
        await engine.run("sh", "-c", "echo run >> /ran; sleep 0.3; exit $(wc -l < /ran)", name="again")
        assert (await engine.wait("again")).code == 1

    async def before(engine: EngineClient) -> None:
        with pytest.raises(Unavailable):
            await engine.start("again")

    async def after(engine: EngineClient) -> None:
        code = 2
        if (await engine.get("again")).status == pb.STATUS_EXITED and point != "engine.start.after_task":
            await engine.start("again")
        assert (await engine.wait("again")).code == code
        ended = await engine.get("again")
        assert (ended.status, ended.exit.code) == (pb.STATUS_EXITED, code)
        await assert_told_once(engine)

    play(one, first_run)
    one.restart_with(failing(point))
    play(one, before)
    one.revive()
    play(one, after)


def test_an_intent_to_start_that_came_to_nothing_is_taken_back(one: Corrald) -> None:
    async def before(engine: EngineClient) -> None:
        await engine.create("sh", "-c", "exit 5", name="intended")
        with pytest.raises(Unavailable):
            await engine.start("intended")

    async def after(engine: EngineClient) -> None:
        assert (await engine.get("intended")).status == pb.STATUS_CREATED
        await engine.start("intended")
        assert (await engine.wait("intended")).code == 5

    one.restart_with(failing("tasks.start.before_shim"))
    play(one, before)
    one.revive()
    play(one, after)


BOOT_AGAIN = """
import os, sqlite3, sys
database = sqlite3.connect(sys.argv[1], autocommit=True)
done = database.execute("UPDATE container SET made_in_boot = 'an earlier one' WHERE made_in_boot <> ''")
os._exit(done.rowcount != 1)  # as when the power goes: to close the last connection would empty the log
"""


def boot_again(daemon: Corrald) -> None:
    """As if the machine had died after the daemon had made the parts of a container."""
    subprocess.run([sys.executable, "-c", BOOT_AGAIN, daemon.root / "engine" / "engine.db"], check=True)


async def find_told(engine: EngineClient) -> None:
    """The container is there, and whole."""

    async def is_kept() -> bool:
        return [c.status in (pb.STATUS_CREATED, pb.STATUS_EXITED) for c in await engine.listed()] == [True]

    await eventually(is_kept, timeout_s=20)
    [told] = await engine.listed()
    assert (told.name, told.config.image) == ("told", "busybox")
    assert (await engine.topics_of(told.id))[0] == "container.created"
    await engine.start("told")
    assert (await engine.wait("told")).code == 4
    await engine.delete("told")


@pytest.mark.parametrize("is_another_boot", [True, False])
def test_who_may_have_been_told_of_a_container_before_the_machine_died_finds_it(
    one: Corrald, *, is_another_boot: bool
) -> None:
    async def before(engine: EngineClient) -> None:
        with pytest.raises(Unavailable):
            await engine.create("sh", "-c", "exit 4", name="told")

    async def after(engine: EngineClient) -> None:
        if is_another_boot:
            await find_told(engine)
        else:
            assert await engine.listed() == []

    one.restart_with(failing("engine.create.after_task"))
    play(one, before)
    if is_another_boot:
        boot_again(one)
    one.revive()
    play(one, after)
    assert one.leftovers() == []


DELETE_POINTS = (
    "engine.delete.after_task",
    "engine.delete.before_flush",
    "engine.delete.after_intent",
    "engine.delete.after_parts",
    "engine.delete.after_row",
)


@pytest.mark.parametrize("point", DELETE_POINTS)
def test_a_removal_that_was_killed_is_finished_and_the_exit_is_not_lost(one: Corrald, point: str) -> None:
    async def before(engine: EngineClient) -> None:
        mount = pb.VolumeMount(type=pb.VolumeMount.TYPE_VOLUME, target="/data")
        ids.append(await engine.run("sleep", "100", name="goes", network="bridge", mounts=[mount]))
        with pytest.raises(Unavailable):
            await engine.delete("goes", force=True, volumes=True)

    async def after(engine: EngineClient) -> None:
        listed = await engine.listed()
        if point == "engine.delete.after_task":
            assert [(c.name, c.status, c.exit.code) for c in listed] == [("goes", pb.STATUS_EXITED, 137)]
            await engine.delete("goes", volumes=True)
        else:
            assert listed == []
        assert one.leftovers() == []
        assert (await engine.volumes.List(pb.ListVolumesRequest())).volumes == []
        assert await engine.topics_of(ids[0]) == [
            "container.created",
            "container.started",
            "container.died",
            "container.removed",
        ]
        await assert_told_once(engine)

    ids: list[str] = []
    one.restart_with(failing(point))
    play(one, before)
    one.revive()
    play(one, after)


@pytest.mark.parametrize("point", ["engine.pause.after_freeze", "engine.resume.after_thaw"])
def test_a_container_is_frozen_if_and_only_if_it_is_shown_as_paused(one: Corrald, point: str) -> None:
    async def before(engine: EngineClient) -> None:
        await engine.run("sh", "-c", "while :; do echo x; sleep 0.01; done", name="cold")
        try:
            await engine.containers.Pause(pb.PauseContainerRequest(container="cold"))
            await engine.containers.Resume(pb.ResumeContainerRequest(container="cold"))
        except Unavailable:
            return
        pytest.fail("it was not killed")

    async def after(engine: EngineClient) -> None:
        assert (await engine.get("cold")).status == pb.STATUS_RUNNING
        assert (await engine.exec("cold", "true"))[0] == 0

    one.restart_with(failing(point))
    play(one, before)
    one.revive()
    play(one, after)


@pytest.mark.parametrize("point", ["engine.merge.before_write", "engine.merge.after_write"])
def test_events_are_merged_exactly_once_over_a_kill_at_each_side_of_the_write(one: Corrald, point: str) -> None:
    async def before(engine: EngineClient) -> None:
        try:
            for _ in range(20):
                id_ = await engine.run("true")
                await engine.wait(id_)
                await engine.delete(id_)
        except Unavailable:
            return
        pytest.fail("it was not killed")

    async def after(engine: EngineClient) -> None:
        for container in await engine.listed():
            await engine.delete(container.id, force=True)
        assert one.leftovers() == []
        await asyncio.sleep(0.1)
        await assert_told_once(engine)

    for _ in range(3):
        one.restart_with(failing(point, "kill@7"))
        play(one, before)
        one.revive()
        play(one, after)


def test_a_batch_of_events_that_could_not_be_written_is_written_later(
    start_daemon: Start, busybox_archive: Path
) -> None:
    one = start_with_image(start_daemon, busybox_archive, split=False)

    async def scene(engine: EngineClient) -> None:
        for _ in range(6):
            id_ = await engine.run("true")
            await engine.wait(id_)
            await engine.delete(id_)

        async def merged() -> bool:
            return Counter(event.topic for event in await engine.events())["cgroup.removed"] == 6

        await eventually(merged)
        await assert_told_once(engine)

    one.restart_with(failing("engine.merge.before_write", "error@3"))
    play(one, scene)


# Five processes: any may be away


@pytest.mark.parametrize("leaf", ["tasks", "images", "network", "cgroups"])
def test_a_leaf_that_dies_and_comes_back_costs_nothing(start_daemon: Start, busybox_archive: Path, leaf: str) -> None:
    five = start_with_image(start_daemon, busybox_archive, split=True)

    async def scene(engine: EngineClient) -> None:
        id_ = await engine.run("sh", "-c", TRAP, name="stays")
        waiting = asyncio.ensure_future(engine.wait(id_))
        pid = (await engine.get(id_)).pid
        five.kill9(leaf)
        assert (await engine.get("stays")).status == pb.STATUS_RUNNING
        made = asyncio.ensure_future(engine.create("sh", "-c", "exit 6", name="meanwhile"))
        await asyncio.sleep(0.2)
        await asyncio.to_thread(five.start, leaf)
        await made
        await engine.start("meanwhile")
        assert (await engine.wait("meanwhile")).code == 6
        assert (await engine.get("stays")).pid == pid
        assert (await engine.exec("stays", "echo", "hi")) == (0, b"hi\n")
        await engine.stop("stays")
        assert (await waiting).code == 7
        for name in ("stays", "meanwhile"):
            await engine.delete(name)
        await eventually(lambda: _merged_everything(engine))
        await assert_told_once(engine)
        assert five.leftovers() == []

    play(five, scene)


async def _merged_everything(engine: EngineClient) -> bool:
    topics = Counter(event.topic for event in await engine.events())
    return topics["cgroup.removed"] == topics["endpoint.detached"] == topics["snapshot.removed"] == 2


def test_the_engine_dies_and_the_exits_of_meanwhile_are_taken_over(five: Corrald) -> None:
    async def before(engine: EngineClient) -> None:
        id_ = await engine.run("sh", "-c", "sleep 0.5; exit 8", name="ends")
        pids.append((await engine.get(id_)).pid)

    async def after(engine: EngineClient) -> None:
        assert (await engine.get("ends")).exit.code == 8
        await assert_told_once(engine)

    pids: list[int] = []
    play(five, before)
    five.kill9("engine")
    await_gone(pids)
    five.start("engine")
    play(five, after)


def test_the_engine_may_start_before_its_leaves(five: Corrald) -> None:
    async def before(engine: EngineClient) -> None:
        await engine.run("sh", "-c", TRAP, name="stays")

    async def without_leaves(engine: EngineClient) -> None:
        assert (await engine.get("stays")).status == pb.STATUS_RUNNING
        assert [c.name for c in await engine.listed()] == ["stays"]
        with pytest.raises(Unavailable, match="cannot reach corral at unix://"):
            await engine.containers.Top(pb.TopRequest(container="stays"))

    async def after(engine: EngineClient) -> None:
        async def stops() -> bool:
            try:
                return (await engine.stop("stays")).exit.code == 7
            except Unavailable:
                return False

        await eventually(stops)

    play(five, before)
    five.kill9()
    five.start("engine")
    play(five, without_leaves)
    five.start("cgroups", "network", "tasks", "images")
    play(five, after)


def test_a_create_without_a_leaf_says_so_and_is_undone_when_it_is_back(five: Corrald) -> None:
    async def without(engine: EngineClient) -> None:
        with pytest.raises(Unavailable):
            await engine.create("true", name="half")

    async def after(engine: EngineClient) -> None:
        async def possible() -> bool:
            try:
                return bool(await engine.create("true", name="half"))
            except AlreadyExists:
                return False

        await eventually(possible, timeout_s=20)
        await engine.delete("half")
        assert five.leftovers() == []

    five.kill9("images")
    play(five, without)
    five.start("images")
    play(five, after)


def parent_of(pid: int) -> int:
    """Of a shim: the zygote, which would see the container's end in its place."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_task_that_was_lost_is_reported_and_never_invented(one: Corrald) -> None:
    async def before(engine: EngineClient) -> None:
        await engine.run("sleep", "100", name="lost")
        container = await engine.get("lost")
        pids.extend((parent_of(container.shim_pid), container.shim_pid, container.pid))

    async def after(engine: EngineClient) -> None:
        lost = await engine.get("lost")
        assert (lost.status, lost.exit.known) == (pb.STATUS_EXITED, False)
        assert lost.exit.reason
        await engine.start("lost")
        assert (await engine.get("lost")).status == pb.STATUS_RUNNING
        await engine.delete("lost", force=True)
        assert one.leftovers() == []

    pids: list[int] = []
    play(one, before)
    one.kill9()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    while any(Path(f"/proc/{pid}").exists() for pid in pids):  # as long as it is a zombie, its exit is known
        time.sleep(0.05)
    one.start()
    play(one, after)


def test_many_containers_survive_many_kills(start_daemon: Start, busybox_archive: Path) -> None:
    """A short form of `make crash-test`: lives of containers while the daemon dies again and again."""
    with running(split=False) as daemon:
        asyncio.run(import_image(daemon, busybox_archive))
        codes: list[int] = []

        async def lives(engine: EngineClient) -> None:
            async def life(number: int) -> None:
                id_ = f"life{number}"
                await patiently(lambda: engine.create("sh", "-c", f"exit {number}", id_=id_), exists=True)
                await patiently(lambda: engine.start(id_))
                codes.append((await patiently(lambda: engine.wait(id_))).code)  # type: ignore[attr-defined]
                await patiently(lambda: engine.delete(id_), gone=True)

            killing = asyncio.ensure_future(asyncio.to_thread(kill_repeatedly, daemon, 4))
            await asyncio.gather(*(life(number) for number in range(100, 116)))
            await killing

        async def after(engine: EngineClient) -> None:
            assert await engine.listed() == []
            assert daemon.leftovers() == []
            await assert_told_once(engine)

        play(daemon, lives)
        assert sorted(codes) == list(range(100, 116))
        play(daemon, after)


def kill_repeatedly(daemon: Corrald, times: int) -> None:
    for number in range(times):
        time.sleep(0.05 + 0.07 * number)
        daemon.kill9()
        daemon.start()


async def patiently(call: Callable[[], Awaitable[object]], *, exists: bool = False, gone: bool = False) -> object:
    """As a careful client: again when the daemon died. What was done before its answer was lost counts as done."""
    broken = False
    while True:
        try:
            return await call()
        except Unavailable:
            broken = True
            await asyncio.sleep(0.1)
        except CorralError as e:
            if broken and ((exists and e.reason == "ID_TAKEN") or (gone and e.reason == "NO_CONTAINER")):
                return None
            raise


def test_a_full_disk_refuses_with_a_sentence_and_leaves_nothing_half_made(busybox_archive: Path) -> None:
    daemon = Corrald(split=False)

    async def scene(engine: EngineClient) -> None:
        await engine.run("sleep", "100", name="before", network="bridge")
        await asyncio.to_thread(fill, junk)
        for _ in range(2):
            with pytest.raises(ResourceExhausted, match=r"full|No space left"):
                await engine.create("true", name="half", network="bridge")
        assert (await engine.get("before")).status == pb.STATUS_RUNNING
        await asyncio.to_thread(junk.unlink)

        async def possible() -> bool:
            try:
                return bool(await engine.create("true", name="half"))
            except AlreadyExists:  # it is still being undone
                return False

        await eventually(possible, timeout_s=20)
        assert [container.name for container in await engine.listed()] == ["half", "before"]
        for name in ("half", "before"):
            await engine.delete(name, force=True)
        assert daemon.leftovers() == []

    with small_disk(daemon, "48m") as junk, daemon:
        daemon.start()
        asyncio.run(import_image(daemon, busybox_archive))
        play(daemon, scene)


def test_the_daemon_starts_on_a_full_disk_also_where_a_container_is_to_be_kept(busybox_archive: Path) -> None:
    daemon = Corrald(split=False)

    async def before(engine: EngineClient) -> None:
        with pytest.raises(Unavailable):
            await engine.create("sh", "-c", "exit 4", name="told")

    async def after(engine: EngineClient) -> None:
        await asyncio.to_thread(junk.unlink)
        await find_told(engine)
        assert daemon.leftovers() == []

    with small_disk(daemon, "48m") as junk, daemon:
        daemon.start(environment=failing("engine.create.after_task"))
        asyncio.run(import_image(daemon, busybox_archive))
        play(daemon, before)
        daemon.kill9()
        boot_again(daemon)
        fill(junk)
        daemon.start()
        play(daemon, after)


def test_what_cannot_be_forgotten_is_whole_if_the_machine_dies(one: Corrald) -> None:
    """Of a create that failed, so that it is undone: not of its tree, while the machine might keep it as created."""

    async def before(engine: EngineClient) -> None:
        with pytest.raises(CorralError):
            await engine.create("sh", "-c", "exit 4", name="told")

    one.restart_with({"CORRAL_FAILPOINTS": "engine.create.after_task=error,engine.delete.before_flush=error"})
    play(one, before)
    one.kill9()
    boot_again(one)
    one.start()
    play(one, find_told)
    assert one.leftovers() == []


def test_a_create_that_could_not_be_undone_yet_is_not_told_to_be_done(five: Corrald) -> None:
    """Its row still has the name; whoever repeats the call would start what is not there."""

    async def broken(engine: EngineClient) -> None:
        for _ in range(2):
            with pytest.raises(Unavailable):
                await engine.create("true", name="half", network="bridge")

    async def after(engine: EngineClient) -> None:
        await engine.create("sh", "-c", "exit 5", name="half", network="bridge")
        await engine.start("half")
        assert (await engine.wait("half")).code == 5
        await engine.delete("half")

    five.kill9("network")
    play(five, broken)
    five.start("network")
    play(five, after)
