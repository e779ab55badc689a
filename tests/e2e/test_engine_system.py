"""The installation as a whole: facts, addresses, checks of the host, the merged journal."""

import asyncio
import platform
from pathlib import Path

import pytest
from support.engine import EngineClient, eventually
from support.engine_fixtures import engine, loaded
from support.requirements import needs

from corral.api.engine.v1 import engine_pb2 as pb
from corral.api.types.v1.types_pb2 import EventsRequest
from corral.engine import host

__all__ = ["engine", "loaded"]


@needs("root", "overlayfs", "busybox", "netns")
async def test_info_counts_and_describes(engine: EngineClient) -> None:
    running = await engine.run("sleep", "100")
    paused = await engine.run("sleep", "100")
    await engine.containers.Pause(pb.PauseContainerRequest(container=paused))
    await engine.create("true")
    info = await engine.system.Info(pb.InfoRequest())
    assert (info.containers, info.containers_running, info.containers_paused, info.containers_stopped) == (3, 1, 1, 1)
    assert (info.images, info.kernel_release) == (1, platform.release())
    assert info.cgroup_layout in ("v1", "v2", "hybrid")
    assert info.snapshot_driver == "overlayfs"
    assert (info.root, info.state) == (str(engine.daemon.root), str(engine.daemon.state))
    await engine.delete(running, force=True)


@needs("root")
async def test_addresses_name_every_service(engine: EngineClient) -> None:
    addresses = (await engine.system.Addresses(pb.AddressesRequest())).addresses
    assert {"images", "tasks", "network", "cgroups"} <= set(addresses)
    assert all(address.startswith("unix://") for address in addresses.values())


@needs("root")
async def test_what_the_host_lacks_comes_with_a_remedy(engine: EngineClient) -> None:
    checks = (await engine.system.CheckHost(pb.CheckHostRequest())).checks
    assert {"kernel", "privileges", "namespaces", "overlayfs", "cgroups", "seccomp", "nftables"} <= {
        check.name for check in checks
    }
    for check in checks:
        assert check.result != pb.Check.RESULT_UNSPECIFIED
        assert check.detail
        assert bool(check.remedy) == (check.result != pb.Check.RESULT_OK), check.name


@needs("root", "overlayfs", "busybox", "netns")
async def test_events_are_replayed_from_any_number_and_then_followed(engine: EngineClient) -> None:
    after = await engine.last_seq()
    request = EventsRequest(after=after, topics=["container.*"])
    stream = engine.system.Events(request)
    id_ = await engine.run("true")
    await engine.wait(id_)
    await engine.delete(id_)
    followed = []
    async with asyncio.timeout(5):
        async for response in stream:
            followed += response.events
            if followed[-1].topic == "container.removed":
                break
    assert [event.topic for event in followed] == [
        "container.created",
        "container.started",
        "container.died",
        "container.removed",
    ]
    assert followed[2].payload["exit_code"] == 0
    again = await engine.events(followed[0].seq, topics=["container.*"])
    assert [event.seq for event in again] == [event.seq for event in followed[1:]]


@needs("root", "overlayfs", "busybox", "netns")
async def test_merged_events_say_where_they_come_from_and_keep_their_own_time(engine: EngineClient) -> None:
    id_ = await engine.run("true")
    await engine.wait(id_)

    async def are_merged() -> bool:
        return {"task.exited", "snapshot.prepared"} <= set(await engine.topics_of(id_, prefix=""))

    await eventually(are_merged)
    events = [event for event in await engine.events() if event.subject == id_]
    origins = {event.topic: event.origin for event in events}
    assert origins["task.exited"] == "tasks"
    assert origins["snapshot.prepared"] == "images"
    assert origins["container.created"] == ""
    exited = next(event for event in events if event.topic == "task.exited")
    created = next(event for event in events if event.topic == "snapshot.prepared")
    assert created.time.ToNanoseconds() < exited.time.ToNanoseconds()
    assert "@origin" not in exited.payload


# Checks of the host, as functions


@pytest.mark.parametrize(
    ("release", "result"),
    [
        ("5.4.0-generic", pb.Check.RESULT_MISSING),
        ("6.1.0-18-amd64", pb.Check.RESULT_WARNING),
        ("6.18.5", pb.Check.RESULT_OK),
    ],
)
def test_the_kernel_is_judged_by_its_version(release: str, result: int) -> None:
    [check] = host.check_kernel(release)
    assert check.result == result


def test_missing_namespaces_and_file_systems_are_named(tmp_path: Path) -> None:
    (tmp_path / "self/ns").mkdir(parents=True)
    for name in ("mnt", "pid", "net", "ipc", "uts"):
        (tmp_path / "self/ns" / name).touch()
    [check] = host.check_namespaces(tmp_path)
    assert check.result == pb.Check.RESULT_MISSING
    assert "cgroup" in check.remedy
    (tmp_path / "filesystems").write_text("nodev\tproc\n\text4\n")
    [check] = host.check_filesystems(tmp_path)
    assert check.result != pb.Check.RESULT_OK
    [check] = host.check_seccomp(tmp_path)
    assert check.result == pb.Check.RESULT_MISSING
