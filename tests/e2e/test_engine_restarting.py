"""What a user asks of a container in the moment that its restart policy starts it again."""

import asyncio
import fcntl
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.engine import EngineClient, eventually
from support.engine_fixtures import engine, loaded
from support.requirements import needs

from corral.api.engine.v1 import engine_pb2 as pb
from corral.api.network.v1.network_pb2 import PortMapping
from corral.rpc.errors import FailedPrecondition

__all__ = ["engine", "loaded"]
pytestmark = needs("root", "overlayfs", "busybox", "netns")

ALWAYS = pb.RestartPolicy(mode=pb.RestartPolicy.MODE_ALWAYS)


@contextmanager
def _unopened(program: Path) -> Iterator[asyncio.Event]:
    """A lease on a file: whoever executes it waits until the block is left. Set once somebody does.

    Source: fcntl(2), "Leases".
    """
    loop, asked = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGIO, asked.set)
    fd = os.open(program, os.O_RDONLY)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        yield asked
    finally:
        os.close(fd)
        loop.remove_signal_handler(signal.SIGIO)


async def test_a_signal_to_what_is_just_started_again_goes_to_its_program(engine: EngineClient, tmp_path: Path) -> None:
    """It waits until that is executed, and is taken for no wish that it should end."""
    held = tmp_path / "sh"
    shutil.copy(shutil.which("busybox") or "", held)
    mount = pb.VolumeMount(type=pb.VolumeMount.TYPE_BIND, source=str(held), target="/held/sh")
    first = "trap 'exit 1' HUP; echo ready; while :; do sleep 0.05; done"
    script = f'[ -e /again ] && exec /bin/sleep 1000; touch /again; exec /bin/sh -c "{first}"'
    id_ = await engine.create("/held/sh", "-c", script, name="held", restart=ALWAYS, mounts=[mount])
    await engine.start(id_)

    async def is_ready() -> bool:
        return b"ready\n" in await engine.output(id_)

    await eventually(is_ready)
    with _unopened(held) as asked:
        await engine.kill(id_, "HUP")
        await asyncio.wait_for(asked.wait(), 20)
        now = await engine.get(id_)
        assert (now.status, now.restart_count) == (pb.STATUS_RUNNING, 1)
        sent = asyncio.ensure_future(engine.kill(id_, "HUP"))
        assert await asyncio.wait((sent,), timeout=0.5) == (set(), {sent})
    await sent
    now = await engine.get(id_)
    assert (now.status, now.restart_count) == (pb.STATUS_RUNNING, 1)
    os.kill(now.pid, signal.SIGKILL)  # not by a user of corral: no policy was told to leave it alone

    async def runs_again() -> bool:
        found = await engine.get(id_)
        return found.restart_count == 2 and found.status == pb.STATUS_RUNNING

    await eventually(runs_again)


async def test_what_is_about_to_be_started_again_is_not_removed_and_keeps_its_ports(engine: EngineClient) -> None:
    """Whoever removes it comes before the one who starts it: both wait for a copy to end."""
    script = "dd if=/dev/zero of=/big bs=1M count=64 2>/dev/null; exit 1"
    network = pb.NetworkConfig(mode="bridge", ports=[PortMapping(container_port=80)])
    config = pb.ContainerConfig(image="busybox", args=["sh", "-c", script], restart=ALWAYS, network=network)
    id_ = (await engine.containers.Create(pb.CreateContainerRequest(config=config))).id
    engine.made.append(id_)
    await engine.start(id_)

    async def pauses() -> bool:
        told = engine.daemon.events("container.restarts")
        return any(event["pause_s"] == 1.6 for event in told if event["container"] == id_)

    await eventually(pauses)
    before = await engine.get(id_)
    copy = engine.containers.CopyFrom(pb.CopyFromRequest(container=id_, path="/big"))
    try:
        await anext(aiter(copy))
        removal = asyncio.ensure_future(engine.delete(id_))
        await asyncio.sleep(2.0)  # its pause is over
        now = await engine.get(id_)
    finally:
        copy.cancel()
    with pytest.raises(FailedPrecondition, match="is restarting"):
        await removal
    assert (now.status, now.finished_at) == (pb.STATUS_RESTARTING, before.finished_at)
    assert [port.container_port for port in now.endpoint.ports] == [80]
    await engine.delete(id_, force=True)
