"""Attacks on the whole engine: hostile images and containers, and ordinary users of the host."""

import asyncio
import contextlib
import json
import os
import re
import tarfile
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path

import pytest
from support import images
from support.corrald import Corrald
from support.engine import EngineClient, eventually, import_image
from support.engine_fixtures import engine, loaded
from support.requirements import needs

from corral.api.tasks.v1.tasks_pb2 import Task
from corral.engine.task_making import open_namespace_of
from corral.kernel import process
from corral.kernel.namespaces import Kind
from corral.rpc.errors import CorralError, FailedPrecondition

__all__ = ["engine", "loaded"]
pytestmark = needs("root", "overlayfs", "busybox", "netns")


@pytest.fixture
async def hostile(loaded: Corrald, tmp_path: Path) -> AsyncIterator[Callable]:
    """Import an image made of busybox, some entries and a config; returns its name."""

    async def make(name: str, *entries: images.Entry, **config: object) -> str:
        layers = [images.busybox_layer(), *([images.layer(entries)] if entries else [])]
        path = tmp_path / f"{name}.tar"
        images.write_docker_archive(path, f"{name}:latest", layers, images.image_config(layers, **config))
        await import_image(loaded, path)
        return f"{name}:latest"

    return make


async def test_cve_2026_53488_labels_of_an_image_steer_nothing(engine: EngineClient, hostile, tmp_path: Path) -> None:
    """Some runtimes read from labels, or annotations made of them, what to run or to mount on the host."""
    marker = tmp_path / "pwned"
    labels = {
        "containerd.io/restart.status": "running",
        "containerd.io/restart.loguri": f"binary:///bin/touch?{marker}",
        "containerd.io/restart.policy": "always",
        "cdi.k8s.io/device": "vendor.com/device=all",
        "io.podman.annotations.privileged": "TRUE",
        "run.oci.handler": "krun",
        "run.oci.keep_original_groups": "1",
        "org.criu.config": "/etc/shadow",
        "corral.namespace": "other",
        "corral.owner": "nobody",
        "corral.container": "another",
    }
    image = await hostile("labels", Labels=labels)
    made = await engine.run("sleep", "60", image=image)
    container = await engine.get(made)
    spec = json.loads((Path(container.bundle) / "config.json").read_text())
    text = json.dumps(spec)
    assert not any(key in text or value in text for key, value in labels.items() if value not in ("1", "always"))
    assert "annotations" not in spec
    assert not container.config.privileged
    assert not marker.exists()


@pytest.mark.parametrize(("kind", "device"), [(tarfile.CHRTYPE, (1, 1)), (tarfile.CHRTYPE, (1, 11))])
async def test_a_device_node_in_a_layer_cannot_be_opened(engine: EngineClient, hostile, kind, device) -> None:
    """/dev/mem and /dev/kmsg: whether or not the layer's node is there, it opens nothing."""
    image = await hostile("device", images.Entry("evil", mode=0o666, kind=kind, device=device))
    code, output = await engine.says("sh", "-c", "dd if=/evil bs=1 count=1 2>&1", image=image)
    assert code != 0, output
    assert any(word in output for word in (b"not permitted", b"No such file", b"denied")), output


@pytest.mark.parametrize("user", ["4294967296", "0x0", "-1", "evil", "0:4294967296"])
async def test_cve_2026_46680_an_image_whose_user_is_nobody(engine: EngineClient, hostile, user: str) -> None:
    text = b"4294967296:x:0:0::/:\nevil:x:0x0:0::/:\n-1:x:-1:0::/:\n0x0:x:0x0:0::/:\n"
    passwd = images.Entry("etc/passwd", text)
    image = await hostile("user", passwd, User=user)
    with pytest.raises(CorralError, match=r"user|group"):
        await engine.run("id", "-u", image=image)


async def test_cve_2022_23648_a_volume_of_an_image_climbs_to_nothing_of_the_host(
    engine: EngineClient, hostile, tmp_path: Path
) -> None:
    """Such a path once was where the volume's first content came from: a copy of the host's files."""
    secret = tmp_path / "host"
    secret.mkdir()
    (secret / "secret").write_text("of-the-host")
    paths = [f"{'/..' * 20}{secret}", f"/data{'/..' * 20}{secret}", f"{'../' * 20}{secret}"]
    image = await hostile("climbing", Volumes={path: {} for path in paths})
    try:
        code, output = await engine.says(
            "sh", "-c", f"ls -a {secret}; cat {secret}/secret; touch {secret}/x", image=image
        )
    except CorralError as e:
        assert "volume" in str(e) or "mount" in str(e)  # noqa: PT017 - refused is as good
    else:
        assert b"of-the-host" not in output, (code, output)
    assert [path.name for path in secret.iterdir()] == ["secret"]


async def test_cve_2024_5154_files_for_the_network_are_not_made_where_a_link_leads(
    engine: EngineClient, hostile, tmp_path: Path
) -> None:
    bait = tmp_path / "bait"
    bait.mkdir()
    for number, way in enumerate((str(bait), f"{'../' * 20}{str(bait)[1:]}", f"/proc/1/root{bait}")):
        image = await hostile(f"etc{number}", images.symlink("etc", way))
        with contextlib.suppress(CorralError):
            await engine.says("sh", "-c", "echo x > /etc/made; true", image=image, network="bridge")
        assert list(bait.iterdir()) == []


async def test_cve_2021_21334_containers_of_one_image_see_their_own_environment(engine: EngineClient, hostile) -> None:
    """Also those that are made at the same time, and what is executed in them."""
    image = await hostile("shared", Env=["OF_IMAGE=1"])
    made = await asyncio.gather(
        *(engine.run("sleep", "60", image=image, env=[f"SECRET{number}=x"]) for number in range(4))
    )
    for number, container in enumerate(made):
        _, output = await engine.exec(container, "sh", "-c", "env; tr '\\0' '\\n' < /proc/1/environ", env=["MORE=1"])
        seen = [line for line in output.decode().splitlines() if line.startswith(("SECRET", "OF_IMAGE", "MORE"))]
        assert sorted(seen) == sorted(["OF_IMAGE=1", f"SECRET{number}=x"] * 2 + ["MORE=1"])


async def test_what_a_container_may_grow_does_not_lie_on_the_hosts_run(engine: EngineClient) -> None:
    """/etc/hosts is writable inside. Grown without end it must not fill the file system of everybody's records."""
    made = await engine.run("sleep", "60", network="bridge")
    names = ("hosts", "resolv.conf", "hostname")
    script = "for i in hosts resolv.conf hostname; do head -c 2000000 /dev/zero >> /etc/$i; done"
    code, output = await engine.exec(made, "sh", "-c", script)
    state, root = engine.daemon.place.state, engine.daemon.place.root
    assert max((path.stat().st_size for path in state.rglob("*") if path.is_file()), default=0) < 1 << 20
    grown = [path for path in (root / "network").rglob("*") if path.name in names and path.stat().st_size > 1 << 20]
    assert len(grown) == 3, (code, output)


async def test_a_read_only_container_grows_nothing(engine: EngineClient) -> None:
    script = "for i in hosts resolv.conf hostname; do echo x >> /etc/$i && echo $i; done; true"
    code, output = await engine.says("sh", "-c", script, network="bridge", read_only_rootfs=True)
    assert code == 0
    assert output.count(b"Read-only file system") == 3


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_a_namespace_is_not_joined_by_a_pid_that_is_another_process(engine: EngineClient) -> None:
    """A pid is used again. Here it is this test's process, in the host's namespaces."""
    made = await engine.run("sleep", "60")
    own = os.getpid()
    for start_time in (process.start_time(own) - 1, 0):
        task = Task(id=made, pid=own, start_time=start_time)
        with pytest.raises(FailedPrecondition, match="has ended"):
            open_namespace_of(task, Kind.PID)
    with pytest.raises(FailedPrecondition, match="has ended"):
        open_namespace_of(Task(id=made, pid=2**22, start_time=1), Kind.PID)
    before = open_fds()
    fd = open_namespace_of(Task(id=made, pid=own, start_time=process.start_time(own)), Kind.PID)
    os.close(fd)
    assert open_fds() == before


def reachable_by_an_ordinary_user(top: Path) -> list[str]:
    """What below a directory a user without any privilege can list, read or execute, if he knows what it is called.

    Sockets have a test of their own.
    """
    tree = [(directory, files) for directory, _, files in os.walk(top)]
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            with os.fdopen(writer, "w") as said:
                for directory, files in tree:
                    paths = [f"{directory}/{name}" for name in files]
                    open_ones = [path for path in paths if os.access(path, os.R_OK) or os.access(path, os.X_OK)]
                    said.writelines(f"{path}\n" for path in [directory] * os.access(directory, os.R_OK) + open_ones)
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as said:
        lines = said.read().split()
    os.waitpid(pid, 0)
    return lines


async def test_cve_2021_41091_cve_2021_41103_cve_2024_25621_nothing_is_open_to_the_hosts_users(
    engine: EngineClient, hostile
) -> None:
    """Else a setuid program of an image, or a secret of a container, is every user's."""
    image = await hostile("suid", images.Entry("suid", b"#!/bin/sh\n", mode=0o4755))
    await engine.run("sleep", "60", image=image, network="bridge")
    place = engine.daemon.place
    place.directory.chmod(0o755)
    try:
        assert await asyncio.to_thread(reachable_by_an_ordinary_user, place.root) == []
        seen = await asyncio.to_thread(reachable_by_an_ordinary_user, place.state)
        assert seen == []
    finally:
        place.directory.chmod(0o700)


async def test_cve_2020_15257_no_service_and_no_shim_has_an_abstract_socket(engine: EngineClient) -> None:
    """A container in the host's network namespace reaches them all."""
    made = await engine.get(await engine.run("sleep", "60", network="host"))
    names = socket_names([made.shim_pid, *(running.pid for running in engine.daemon.processes.values())])
    assert any(name.endswith("/socket") for name in names)
    assert not [name for name in names if name.startswith("@")]


def socket_names(pids: Iterable[int]) -> list[str]:
    """What the unix sockets of some processes are called."""
    inodes = set()
    for pid in pids:
        targets = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()]
        inodes |= {target[8:-1] for target in targets if target.startswith("socket:[")}
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    return [line[7] for line in lines if len(line) > 7 and line[6] in inodes]


async def test_two_containers_that_share_pids_are_ended_one_by_one(engine: EngineClient) -> None:
    """The second one's end takes its own processes along, and none of the first one's."""
    first = await engine.run("sleep", "60", name="first")
    second = await engine.run("sh", "-c", "sleep 61 & sleep 62 & exec sleep 63", pid_mode=f"container:{first}")

    async def asleep(*seconds: bytes) -> None:
        async def shown() -> bool:
            _, processes = await engine.exec(first, "ps")
            return sorted(re.findall(rb"sleep (\d+)$", processes, re.MULTILINE)) == list(seconds)

        await eventually(shown)

    await asleep(b"60", b"61", b"62", b"63")
    await engine.kill(second, "KILL")
    await engine.wait(second)
    await asleep(b"60")
