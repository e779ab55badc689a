"""A disk that is full for a while: containers can be ended and removed, and once there is room all goes on."""

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.corrald import Corrald, PlaceOn
from support.engine import EngineClient, engine_of, eventually, import_image
from support.file_systems import file_system, fill, lacking_file_system, small_disk
from support.requirements import needs

from corral.api.engine.v1 import engine_pb2 as pb
from corral.api.images.v1.images_pb2 import Healthcheck
from corral.client.execution import Execution, exec_request
from corral.client.sync import Client
from corral.rpc.errors import ResourceExhausted

pytestmark = needs("root", "overlayfs", "busybox", "netns")

SLEEPS = ("sleep", "1000")
ALWAYS = pb.RestartPolicy(mode=pb.RestartPolicy.MODE_ALWAYS)


@contextmanager
def lending_nothing(directory: Path) -> Iterator[Path]:
    """A disk on which no room can be had ahead of need."""
    if reason := lacking_file_system("ext4"):
        pytest.skip(reason)
    with file_system("ext4", directory, size_mb=64, features=("-O", "^extents,^has_journal,^64bit")) as disk:
        yield disk


def play(daemon: Corrald, scene: Callable[[EngineClient], object]) -> None:
    async def act() -> None:
        async with engine_of(daemon) as engine:
            await scene(engine)  # type: ignore[misc]

    asyncio.run(act())


async def topics(engine: EngineClient, id_: str) -> Counter[str]:
    return Counter(await engine.topics_of(id_))


@pytest.mark.parametrize("split", [False, True], ids=["one", "five"])
def test_containers_are_ended_and_removed_on_a_full_disk(busybox_archive: Path, split: bool) -> None:
    daemon = Corrald(split=split)

    async def nothing_is_left() -> bool:
        return daemon.leftovers() == []

    async def scene(engine: EngineClient) -> None:
        ids = [await engine.run(*SLEEPS, name=f"c{n}", network="bridge") for n in range(10)]
        await engine.create("true", name="created")
        await asyncio.to_thread(fill, junk)
        for n in range(5):
            await engine.stop(f"c{n}", timeout_s=0)
            await engine.delete(f"c{n}")
        for n in range(5, 10):
            await engine.delete(f"c{n}", force=True)
        await engine.delete("created")
        assert await engine.listed() == []
        await eventually(nothing_is_left)
        for id_ in ids:
            assert (await topics(engine, id_))["container.removed"] == 1

    with small_disk(daemon, "64m") as junk, daemon:
        daemon.start()
        asyncio.run(import_image(daemon, busybox_archive))
        play(daemon, scene)


def test_what_ended_while_nothing_could_be_written_is_told_and_acted_on_once_it_can(
    busybox_archive: Path, tmp_path: Path
) -> None:
    with lending_nothing(tmp_path) as disk, Corrald(place=PlaceOn.make_on(disk / "root")) as daemon:

        async def scene(engine: EngineClient) -> None:
            again = await engine.run(*SLEEPS, restart=ALWAYS)
            gone = await engine.run(*SLEEPS, auto_remove=True)
            ends = await engine.run(*SLEEPS)
            pids = [(await engine.get(id_)).pid for id_ in (again, gone, ends)]
            await asyncio.to_thread(fill, disk / "junk")
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            await eventually(lambda: _is_told(daemon, "task.end_not_written", 3))
            await asyncio.to_thread((disk / "junk").unlink)

            async def all_is_true() -> bool:
                """By the engine's own records: nothing is asked of tasks."""
                listed = {container.id: container for container in await engine.listed()}
                runs = listed[again].status == pb.STATUS_RUNNING and listed[again].pid != pids[0]
                return runs and gone not in listed and listed[ends].exit.code == 137

            await eventually(all_is_true)
            for id_ in (again, gone, ends):
                assert (await topics(engine, id_))["container.died"] == 1

        daemon.start()
        asyncio.run(import_image(daemon, busybox_archive))
        play(daemon, scene)


def test_what_a_user_stops_while_nothing_can_be_written_ends_and_stays_so(
    busybox_archive: Path, tmp_path: Path
) -> None:
    with lending_nothing(tmp_path) as disk, Corrald(place=PlaceOn.make_on(disk / "root")) as daemon:

        async def scene(engine: EngineClient) -> None:
            plain = [await engine.run(*SLEEPS) for _ in range(6)]  # the first of which may still be written down
            kept = await engine.run(*SLEEPS, restart=ALWAYS)
            pids = [(await engine.get(id_)).pid for id_ in (*plain, kept)]
            await asyncio.to_thread(fill, disk / "junk")
            for id_ in plain:
                stopped = await engine.stop(id_, timeout_s=0)
                assert (stopped.status, stopped.exit.code) == (pb.STATUS_EXITED, 137)
            with pytest.raises(ResourceExhausted, match="has been stopped, which can't be written down"):
                await engine.stop(kept, timeout_s=0)
            assert not any(map(_lives, pids))
            await asyncio.to_thread((disk / "junk").unlink)

            async def is_written() -> bool:
                return all([(await topics(engine, id_))["container.stopped"] for id_ in (*plain, kept)])

            await eventually(is_written)
            await asyncio.sleep(0.5)  # its policy would have acted by then
            assert (await engine.get(kept)).status == pb.STATUS_EXITED
            for id_ in (*plain, kept):
                told = await topics(engine, id_)
                assert (told["container.died"], told["container.stopped"]) == (1, 1)
            await engine.start(kept)
            await asyncio.sleep(3)
            os.kill((await engine.get(kept)).pid, signal.SIGKILL)

            async def runs_again() -> bool:
                return (await topics(engine, kept))["container.started"] == 3

            await eventually(runs_again)

        daemon.start()
        asyncio.run(import_image(daemon, busybox_archive))
        play(daemon, scene)


def _lives(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def create_execs(client: Client) -> None:
    for _ in range(2000):
        client.containers.exec_create("long", ["true"])


def test_an_exec_on_a_full_disk_is_refused_with_a_sentence_and_leaves_no_traceback(
    busybox_archive: Path, tmp_path: Path
) -> None:
    with lending_nothing(tmp_path) as disk, Corrald(place=PlaceOn.make_on(disk / "root")) as daemon:
        daemon.start()
        asyncio.run(import_image(daemon, busybox_archive))
        with daemon.client() as client:
            client.containers.run("busybox", list(SLEEPS), name="long", network="none")
            fill(disk / "junk")
            with pytest.raises(ResourceExhausted, match="full"):
                create_execs(client)  # some find room in what the database has already
            for _ in range(3):
                with pytest.raises(ResourceExhausted, match="full"):
                    list(client.containers.exec_run(Execution(exec_request("long", ["true"] * 2000)), iter(())))
                with pytest.raises(ResourceExhausted, match="full"):
                    client.containers.exec_create("long", ["true"])
            (disk / "junk").unlink()
            client.containers.remove("long", force=True)
        assert "Traceback" not in daemon.log()


async def _is_told(daemon: Corrald, event: str, times: int) -> bool:
    return len(daemon.events(event)) >= times


@pytest.mark.parametrize("split", [False, True], ids=["one", "five"])
def test_tasks_comes_back_on_a_full_disk_though_containers_have_ended(
    busybox_archive: Path, tmp_path: Path, split: bool
) -> None:
    with lending_nothing(tmp_path) as disk, Corrald(split=split, place=PlaceOn.make_on(disk / "root")) as daemon:
        names = ("tasks",) if split else ()

        async def before(engine: EngineClient) -> None:
            ids.append(await engine.run(*SLEEPS, name="again", restart=ALWAYS))
            ids.append(await engine.run(*SLEEPS, name="ends"))
            pids.extend([(await engine.get(id_)).pid for id_ in ids])
            engine.made.clear()

        async def after(engine: EngineClient) -> None:
            await asyncio.to_thread((disk / "junk").unlink)

            async def all_is_true() -> bool:
                again, ends = await engine.get("again"), await engine.get("ends")
                return again.status == pb.STATUS_RUNNING and again.pid != pids[0] and ends.exit.code == 137

            await eventually(all_is_true)
            for id_ in ids:
                assert (await topics(engine, id_))["container.died"] == 1
                await engine.delete(id_, force=True)

        ids: list[str] = []
        pids: list[int] = []
        daemon.start()
        asyncio.run(import_image(daemon, busybox_archive))
        play(daemon, before)
        daemon.kill9(*names)
        fill(disk / "junk")
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        daemon.start(*names)
        play(daemon, after)


def test_a_full_disk_makes_no_container_unhealthy_and_its_checks_go_on(busybox_archive: Path, tmp_path: Path) -> None:
    check = Healthcheck(test=["CMD", "test", "!", "-e", "/sick"], retries=1)
    check.interval.FromMilliseconds(100)
    with lending_nothing(tmp_path) as disk, Corrald(place=PlaceOn.make_on(disk / "root")) as daemon:

        async def scene(engine: EngineClient) -> None:
            id_ = await engine.run(*SLEEPS, healthcheck=check)
            root = Path(f"/proc/{(await engine.get(id_)).pid}/root")

            async def health(state: "pb.Health.State.ValueType") -> None:
                async def is_so() -> bool:
                    return (await engine.get(id_)).health.state == state

                await eventually(is_so)

            await health(pb.Health.STATE_HEALTHY)
            await asyncio.to_thread(fill, disk / "junk")

            async def was_probed() -> bool:
                """As far as that goes."""
                return len(daemon.events("probe.not_written") + daemon.events("tasks.work_failed")) > 3

            await eventually(was_probed)
            assert (await engine.get(id_)).health.state == pb.Health.STATE_HEALTHY
            await asyncio.to_thread((disk / "junk").unlink)
            (root / "sick").touch()
            await health(pb.Health.STATE_UNHEALTHY)
            (root / "sick").unlink()
            await health(pb.Health.STATE_HEALTHY)

        daemon.start()
        asyncio.run(import_image(daemon, busybox_archive))
        play(daemon, scene)
