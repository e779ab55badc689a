"""Who ran out of memory is told right every time: a container, a child of it, an exec, a whole group at once.

CORRAL_OOM_ROUNDS (2): how often each is tried.
"""

import asyncio
import os
import signal
from collections.abc import Iterator, Mapping

import pytest
from support.corrald import Corrald, PlaceOn
from support.engine import EngineClient, eventually
from support.engine_fixtures import engine, loaded
from support.requirements import needs

from corral.api.engine.v1 import engine_pb2 as pb
from corral.api.types.v1.types_pb2 import ExitStatus, MemoryResources, Resources

__all__ = ["engine", "loaded"]
pytestmark = [needs("root", "overlayfs", "busybox", "netns", "cgroup"), pytest.mark.timeout(1200)]

ROUNDS = int(os.environ.get("CORRAL_OOM_ROUNDS", "2"))
HOG = "tail /dev/zero"
"""Keeps all that it has read for want of a newline."""
LIMIT = 16 << 20
COUNTED = {"task.oom": "kills", "cgroup.oom": "oom_kills"}
"""What tells of kills, and how many there were by then."""
rounds = pytest.mark.parametrize("number", range(ROUNDS))


def limits(**more: bool) -> Resources:
    return Resources(memory=MemoryResources(limit_bytes=LIMIT, swap_bytes=LIMIT, **more))


async def told(engine: EngineClient, id_: str) -> Mapping[str, list[Mapping[str, object]]]:
    """The payloads of the events about one container, by topic."""
    found: dict[str, list[Mapping[str, object]]] = {}
    for event in await engine.events():
        if event.subject == id_:
            found.setdefault(event.topic, []).append(dict(event.payload))
    return found


async def exec_status(engine: EngineClient, id_: str, script: str) -> ExitStatus:
    """How a further process ended."""
    made = await engine.containers.Exec(pb.ExecContainerRequest(container=id_, args=["sh", "-c", script]))
    await engine.containers.ExecStart(pb.ExecStartRequest(container=id_, exec_id=made.exec_id))
    wait = pb.ExecWaitRequest(container=id_, exec_id=made.exec_id, remove=True)
    return (await engine.containers.ExecWait(wait)).exit


async def kills_are_told(engine: EngineClient, id_: str, *kills: int) -> None:
    """The journals of task and cgroup come to one of these numbers of kills, the same."""

    last: dict[str, object] = {}

    async def are_told() -> bool:
        events = await told(engine, id_)
        last.update({topic: events.get(topic, [{}])[-1].get(key) for topic, key in COUNTED.items()})
        return len(set(last.values())) == 1 and last["task.oom"] in kills

    try:
        await eventually(are_told)
    except AssertionError as e:
        raise AssertionError(f"{last}, not {kills}") from e


async def says(engine: EngineClient, id_: str, text: bytes) -> None:
    async def is_there() -> bool:
        return text in await engine.output(id_)

    await eventually(is_there)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Corrald]:
    """Its data where a virtual machine has a disk."""
    with Corrald(place=PlaceOn.make_on(tmp_path_factory.mktemp("data"))) as corrald:
        corrald.start()
        yield corrald


@rounds
async def test_a_container_that_runs_out_of_memory_is_reported_so(engine: EngineClient, number: int) -> None:
    id_ = await engine.run("sh", "-c", f"exec {HOG}", resources=limits())
    status = await engine.wait(id_)
    assert (status.code, status.signal, status.oom_killed) == (137, signal.SIGKILL, True)
    await kills_are_told(engine, id_, 1)
    [died] = (await told(engine, id_))["container.died"]
    assert (died["exit_code"], died["oom_killed"]) == (137, True)


@rounds
async def test_a_child_alone_runs_out_of_memory_and_the_container_ends_as_it_likes(
    engine: EngineClient, number: int
) -> None:
    id_ = await engine.run("sh", "-c", f"trap 'exit 7' TERM; {HOG}; echo $?; sleep 100 & wait", resources=limits())
    beside = await engine.run("sleep", "1000", resources=limits())
    await kills_are_told(engine, id_, 1)
    await says(engine, id_, b"137\n")
    assert (await engine.get(id_)).status == pb.STATUS_RUNNING
    await engine.stop(id_)
    status = await engine.wait(id_)
    assert (status.code, status.signal, status.oom_killed) == (7, 0, True)
    assert [len((await told(engine, id_))[topic]) for topic in COUNTED] == [1, 1]
    await engine.kill(beside)
    assert not (await engine.wait(beside)).oom_killed


@rounds
async def test_an_exec_that_runs_out_of_memory_is_told_from_one_that_was_killed(
    engine: EngineClient, number: int
) -> None:
    id_ = await engine.run("sleep", "1000", resources=limits())
    for script, code, is_out_of_memory, kills in (
        ("kill -9 $$; sleep 9", 137, False, 0),
        (f"exec {HOG}", 137, True, 1),
        ("kill -9 $$; sleep 9", 137, False, 1),  # whose is that kill was told already
        (f"{HOG}; exit 3", 3, False, 2),  # a child of the exec's
        ("true", 0, False, 2),
    ):
        status = await exec_status(engine, id_, script)
        assert (status.code, status.oom_killed) == (code, is_out_of_memory), script
        if kills:
            await kills_are_told(engine, id_, kills)
    assert (await engine.get(id_)).status == pb.STATUS_RUNNING
    await engine.kill(id_)
    assert (await engine.wait(id_)).oom_killed


@rounds
async def test_an_exec_that_was_killed_beside_a_child_that_ran_out_of_memory_is_not_told_so(
    engine: EngineClient, number: int
) -> None:
    id_ = await engine.run("sh", "-c", f"{HOG}; exec sleep 1000", resources=limits())
    await kills_are_told(engine, id_, 1)
    status = await exec_status(engine, id_, "sleep 0.2; kill -9 $$; sleep 9")
    assert (status.code, status.oom_killed) == (137, False)


async def test_an_exec_is_not_told_so_while_there_are_others_who_run_out_of_memory(engine: EngineClient) -> None:
    script = f"trap '{HOG}; touch /over' USR1; while :; do sleep 0.1; done"
    id_ = await engine.run("sh", "-c", script, resources=limits())
    others = "rm -f /over; kill -USR1 1; until [ -e /over ]; do sleep 0.1; done"
    for kills in range(1, 4):
        status = await exec_status(engine, id_, f"{others}; sleep 0.5; kill -9 $$; sleep 9")
        assert (status.code, status.oom_killed) == (137, False)
        await kills_are_told(engine, id_, kills)
    await engine.kill(id_)


@rounds
@pytest.mark.parametrize("script", [f"exec {HOG}", f"{HOG}; exit 5"])
async def test_an_exec_ends_with_a_container_that_ran_out_of_memory_and_is_not_told_so(
    engine: EngineClient, script: str, number: int
) -> None:
    id_ = await engine.run("sh", "-c", f"until [ -e /begun ]; do sleep 0.1; done; {script}", resources=limits())
    ended = asyncio.ensure_future(exec_status(engine, id_, "touch /begun; exec sleep 1000"))
    assert (await engine.wait(id_)).oom_killed
    assert ((await ended).code, (await ended).oom_killed) == (137, False)


async def test_a_shim_that_takes_over_tells_nobody_of_kills_before_it(engine: EngineClient) -> None:
    id_ = await engine.run("sleep", "1000", resources=limits())
    assert (await exec_status(engine, id_, f"{HOG}; exit 3")).code == 3
    await kills_are_told(engine, id_, 1)
    shim = (await engine.get(id_)).shim_pid
    os.kill(shim, signal.SIGKILL)

    async def has_another() -> bool:
        return (await engine.get(id_)).shim_pid not in (0, shim)

    await eventually(has_another)
    for script, is_out_of_memory in (("kill -9 $$; sleep 9", False), (f"exec {HOG}", True)):
        status = await exec_status(engine, id_, script)
        assert (status.code, status.oom_killed) == (137, is_out_of_memory), script
    await kills_are_told(engine, id_, 2)
    await engine.kill(id_)


# The kernel may count the process that it chose once more as one of the group (mm/oom_kill.c).
@needs("cgroup2")
@rounds
async def test_a_group_goes_at_once_with_all_its_processes(engine: EngineClient, number: int) -> None:
    script = f"sleep 1000 & {HOG} & wait; wait; echo survived"
    id_ = await engine.run("sh", "-c", script, resources=limits(oom_group=True))
    status = await engine.wait(id_)
    assert (status.code, status.signal, status.oom_killed) == (137, signal.SIGKILL, True)
    await kills_are_told(engine, id_, 3, 4)
    assert b"survived" not in await engine.output(id_)


@needs("cgroup2")
@rounds
async def test_an_exec_takes_its_group_with_it(engine: EngineClient, number: int) -> None:
    id_ = await engine.run("sleep", "1000", resources=limits(oom_group=True))
    ended = asyncio.ensure_future(exec_status(engine, id_, f"exec {HOG}"))
    status = await engine.wait(id_)
    assert (status.code, status.oom_killed) == (137, True)
    assert ((await ended).code, (await ended).oom_killed) == (137, True)
    await kills_are_told(engine, id_, 2, 3)
