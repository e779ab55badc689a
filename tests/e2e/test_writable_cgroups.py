"""`--security-opt writable-cgroups=true`: a container divides its cgroup, and cannot lift its limits by that."""

from collections.abc import Iterator

import pytest
from support.corrald import Corrald, PlaceOn
from support.engine import EngineClient
from support.engine_fixtures import engine, loaded
from support.requirements import needs

from corral.api.engine.v1 import engine_pb2 as pb
from corral.api.types.v1.types_pb2 import MemoryResources, Resources
from corral.kernel.cgroup import Kind, detect
from corral.rpc.errors import FailedPrecondition, InvalidArgument

__all__ = ["engine", "loaded"]
pytestmark = needs("root", "overlayfs", "busybox", "netns", "cgroup")

ROOT = "/sys/fs/cgroup"
LIMIT = 64 << 20
LIMITS = ("job/memory.max", "memory.max")
DIVIDE = f"""
set -e
mkdir {ROOT}/main {ROOT}/job
echo 1 > {ROOT}/main/cgroup.procs
echo +memory +pids > {ROOT}/cgroup.subtree_control
echo 8388608 > {ROOT}/job/memory.max
for file in memory.max pids.max; do ! echo max 2>/dev/null > {ROOT}/$file || echo lifted $file; done
! unshare -U true 2>/dev/null || echo lifted from a user namespace
echo divided
exec sleep 1000
"""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Corrald]:
    """Its data where a virtual machine has a disk."""
    with Corrald(place=PlaceOn.make_on(tmp_path_factory.mktemp("data"))) as corrald:
        corrald.start()
        yield corrald


async def output_of(engine: EngineClient, script: str, **config: object) -> bytes:
    id_ = await engine.run("sh", "-c", script, **config)
    await engine.wait(id_)
    return await engine.output(id_)


@needs("cgroup2")
async def test_a_container_divides_its_cgroup_again_in_each_life_and_keeps_to_its_limits(engine: EngineClient) -> None:
    limits = Resources(memory=MemoryResources(limit_bytes=LIMIT))
    id_ = await engine.run_script(DIVIDE.replace("echo divided", "echo ready"), writable_cgroups=True, resources=limits)
    for life in range(1, 3):
        assert b"lifted" not in await engine.output(id_)
        # A further process is below, too, and may use what the container has given it.
        code, found = await engine.exec(id_, "cat", "/proc/self/cgroup", *(f"{ROOT}/{file}" for file in LIMITS))
        assert (code, found.splitlines()) == (0, [b"0::/main", b"8388608", str(LIMIT).encode()])
        await engine.stop(id_, timeout_s=0)
        if life == 1:
            await engine.start(id_)


async def test_the_cgroup_is_there_to_look_at_only_unless_it_is_asked_for(engine: EngineClient) -> None:
    script = f"mkdir {ROOT}/x 2>&1 || mkdir {ROOT}/*/x 2>&1"
    assert b"Read-only file system" in await output_of(engine, script)
    assert b"Read-only file system" in await output_of(engine, script, privileged=True, writable_cgroups=False)
    assert b"Read-only file system" not in await output_of(engine, script, privileged=True)


async def test_it_is_refused_where_the_container_could_lift_its_limits_by_it(engine: EngineClient) -> None:
    with pytest.raises(InvalidArgument, match="needs a cgroup namespace of its own"):
        await engine.create("true", writable_cgroups=True, cgroupns_mode="host")
    for added in ("SYS_ADMIN", "ALL"):
        with pytest.raises(InvalidArgument, match="leave SYS_ADMIN out of its capabilities"):
            await engine.create("true", writable_cgroups=True, cap_add=[added])
    with pytest.raises(InvalidArgument, match="needs the default seccomp profile"):
        await engine.create("true", writable_cgroups=True, seccomp_profile="unconfined")
    layout = detect()
    if layout.kind is not Kind.V2:
        with pytest.raises(FailedPrecondition, match="on cgroup v1 it could lift all of its limits"):
            await engine.create("true", writable_cgroups=True)
    listed = await engine.containers.List(pb.ListContainersRequest())
    assert not listed.containers
