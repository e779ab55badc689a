"""What a container is asked to be, seen from inside: security, mounts, volumes, namespaces, limits."""

import json
from pathlib import Path

import pytest
from support.engine import EngineClient
from support.engine_fixtures import engine, loaded
from support.requirements import needs

from corral.api.engine.v1 import engine_pb2 as pb
from corral.api.types.v1.types_pb2 import CpuResources, MemoryResources, PidsResources, Resources
from corral.rpc.errors import AlreadyExists, CorralError, FailedPrecondition, InvalidArgument, NotFound

__all__ = ["engine", "loaded"]
pytestmark = needs("root", "overlayfs", "busybox", "netns")

BIND, VOLUME, TMPFS = pb.VolumeMount.TYPE_BIND, pb.VolumeMount.TYPE_VOLUME, pb.VolumeMount.TYPE_TMPFS


async def say(engine: EngineClient, script: str, **options: object) -> str:
    """Output of a shell script that succeeds."""
    code, output = await engine.says("sh", "-c", script, **options)
    assert code == 0, output
    return output.decode()


def host_namespace(name: str) -> str:
    return str(Path("/proc/self/ns", name).readlink())


def content(volume: pb.Volume) -> dict[str, str] | None:
    """The files of a volume; None if it has no directory."""
    directory = Path(volume.mountpoint)
    return {path.name: path.read_text() for path in directory.iterdir()} if directory.exists() else None


async def test_environment_hostname_directory_and_user(engine: EngineClient) -> None:
    output = await say(
        engine,
        "echo $HOSTNAME; hostname; pwd; id -u; id -g; echo $X; cat /etc/hostname",
        hostname="box",
        working_dir="/tmp",
        user="12:34",
        env=["X=y"],
    )
    assert output.split() == ["box", "box", "/tmp", "12", "34", "y", "box"]


async def test_the_default_confinement(engine: EngineClient) -> None:
    status = await say(engine, "cat /proc/self/status; cat /proc/self/attr/current 2>/dev/null || true")
    facts = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert facts["NoNewPrivs"] == "1"
    assert facts["Seccomp"] == "2"
    assert facts["CapInh"] == facts["CapAmb"] == "0" * 16
    assert int(facts["CapBnd"], 16) & 1 << 21 == 0, "no CAP_SYS_ADMIN"
    assert await say(engine, "cat /proc/kcore /proc/keys /proc/timer_list 2>/dev/null | wc -c") == "0\n"
    assert await say(engine, "echo x 2>/dev/null > /proc/sys/kernel/hostname || echo ro") == "ro\n"


async def test_privileged_may_what_others_may_not(engine: EngineClient) -> None:
    script = "mkdir /m && mount -t tmpfs t /m && echo mounted"
    assert (await engine.says("sh", "-c", script))[0] != 0
    assert await say(engine, script, privileged=True) == "mounted\n"


async def test_capabilities_can_be_added_and_dropped(engine: EngineClient) -> None:
    script = "mkdir /m && mount -t tmpfs t /m && echo mounted"
    assert await say(engine, script, cap_add=["SYS_ADMIN"], seccomp_profile="unconfined") == "mounted\n"
    assert (await engine.says("chown", "1", "/etc/passwd", cap_drop=["CHOWN"]))[0] != 0
    held = await say(engine, "grep CapEff /proc/self/status", cap_drop=["ALL"])
    assert int(held.split()[1], 16) == 0


async def test_a_seccomp_profile_of_the_callers_own(engine: EngineClient) -> None:
    profile = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}],
    }
    code, output = await engine.says("mkdir", "/x", seccomp_profile=json.dumps(profile))
    assert code != 0
    assert b"not supported" in output


async def test_a_read_only_root_with_a_writable_tmpfs(engine: EngineClient) -> None:
    mounts = [pb.VolumeMount(type=TMPFS, target="/scratch", tmpfs_size_bytes=1 << 20, tmpfs_mode=0o700)]
    output = await say(
        engine,
        "touch /x 2>/dev/null || echo ro; touch /scratch/x && echo rw; stat -c %a /scratch; df -k /scratch | tail -1",
        read_only_rootfs=True,
        mounts=mounts,
    )
    lines = output.splitlines()
    assert lines[:3] == ["ro", "rw", "700"]
    assert lines[3].split()[1] == "1024"


async def test_bind_mounts_of_directories_and_files(engine: EngineClient, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "file").write_text("from the host\n")
    missing = tmp_path / "made"
    mounts = [
        pb.VolumeMount(type=BIND, source=str(tmp_path / "sub"), target="/deep/er"),
        pb.VolumeMount(type=BIND, source=str(tmp_path / "file"), target="/etc/motd", read_only=True),
        pb.VolumeMount(type=BIND, source=str(missing), target="/made", create_source=True),
    ]
    output = await say(
        engine,
        "cat /etc/motd; echo inside > /deep/er/x; echo x 2>/dev/null > /etc/motd || echo ro; touch /made/y",
        mounts=mounts,
    )
    assert output == "from the host\nro\n"
    assert (tmp_path / "sub/x").read_text() == "inside\n"
    assert (missing / "y").exists()


async def test_the_files_of_the_network_are_the_containers_own(engine: EngineClient) -> None:
    output = await say(
        engine, "echo 10.9.9.9 added >> /etc/hosts; cat /etc/hosts; cat /etc/resolv.conf > /dev/null", network="bridge"
    )
    assert "10.9.9.9 added" in output
    assert "localhost" in output


async def test_limits_are_seen_inside(engine: EngineClient) -> None:
    resources = Resources(
        memory=MemoryResources(limit_bytes=50 << 20),
        pids=PidsResources(limit=20),
        cpu=CpuResources(quota_us=50_000, period_us=100_000),
    )
    id_ = await engine.run("sleep", "100", resources=resources)
    async for response in engine.containers.Stats(pb.ContainerStatsRequest(containers=[id_])):
        stats = response.stats[0].cgroup
        assert (stats.memory.limit_bytes, stats.pids.limit) == (50 << 20, 20)
    code, output = await engine.exec(id_, "sh", "-c", "for i in $(seq 40); do sleep 9 & done")
    assert code != 0
    assert b"fork" in output


async def test_ulimits_sysctls_and_the_oom_score(engine: EngineClient) -> None:
    output = await say(
        engine,
        "ulimit -n; ulimit -Hn; cat /proc/sys/net/core/somaxconn /proc/self/oom_score_adj; df -k /dev/shm | tail -1",
        ulimits=[pb.Ulimit(name="nofile", soft=111, hard=222)],
        sysctls={"net.core.somaxconn": "77"},
        oom_score_adj=300,
        shm_size_bytes=2 << 20,
    )
    lines = output.splitlines()
    assert lines[:4] == ["111", "222", "77", "300"]
    assert lines[4].split()[1] == "2048"


async def test_devices_are_made_and_allowed_only_if_granted(engine: EngineClient) -> None:
    script = "mknod /dev/mine c 1 11 2>/dev/null; head -c1 /dev/mine >/dev/null 2>&1 && echo open || echo closed"
    assert await say(engine, script) == "closed\n"
    output = await say(engine, "ls -l /dev/fast; head -c1 /dev/fast | wc -c", devices=["/dev/urandom:/dev/fast:r"])
    assert output.startswith("c")
    assert output.splitlines()[1] == "1"


async def test_host_namespaces(engine: EngineClient) -> None:
    here = {name: host_namespace(name) for name in ("pid", "ipc", "uts", "net")}
    script = "for n in pid ipc uts net; do readlink /proc/self/ns/$n; done"
    own = (await say(engine, script)).split()
    assert not set(own) & set(here.values())
    shared = await say(engine, script, pid_mode="host", ipc_mode="host", uts_mode="host", network="host")
    assert shared.split() == list(here.values())


async def test_namespaces_of_another_container(engine: EngineClient) -> None:
    first = await engine.run("sleep", "77", name="first", network="bridge", hostname="theirs")
    script = "ps; hostname; ip addr show eth0 | grep inet; ls -l /proc/1/ns/ipc /proc/self/ns/ipc"
    options = {"pid_mode": "container:first", "ipc_mode": f"container:{first[:12]}", "uts_mode": "container:first"}
    output = await say(engine, script, network="container:first", **options)
    assert "sleep 77" in output
    assert "theirs" in output
    address = (await engine.get("first")).endpoint.interfaces[0].ipv4_address
    assert address in output
    with pytest.raises(FailedPrecondition, match="not running"):
        await engine.create("true", pid_mode=f"container:{await engine.create('true')}")


# Volumes


async def test_a_named_volume_outlives_its_containers(engine: EngineClient) -> None:
    mounts = [pb.VolumeMount(type=VOLUME, source="data", target="/data")]
    await say(engine, "echo kept > /data/file", mounts=mounts)
    await engine.delete_all()
    assert await say(engine, "cat /data/file", mounts=mounts) == "kept\n"
    volume = await engine.volumes.Get(pb.GetVolumeRequest(name="data"))
    assert (volume.driver, volume.anonymous) == ("local", False)
    assert content(volume) == {"file": "kept\n"}
    with pytest.raises(FailedPrecondition, match="'data' is used by"):
        await engine.volumes.Remove(pb.RemoveVolumeRequest(name="data"))
    await engine.delete_all()
    await engine.volumes.Remove(pb.RemoveVolumeRequest(name="data"))
    assert content(volume) is None


async def test_anonymous_volumes_go_with_their_container_if_asked(engine: EngineClient) -> None:
    mounts = [pb.VolumeMount(type=VOLUME, target="/data"), pb.VolumeMount(type=VOLUME, source="named", target="/n")]
    kept = await engine.create("true", mounts=mounts)
    gone = await engine.create("true", mounts=mounts)
    await engine.delete(gone, volumes=True)
    await engine.delete(kept)
    left = (await engine.volumes.List(pb.ListVolumesRequest())).volumes
    assert sorted(volume.anonymous for volume in left) == [False, True]
    pruned = await engine.volumes.Prune(pb.PruneVolumesRequest())
    assert list(pruned.removed) == [volume.name for volume in left if volume.anonymous]
    assert list((await engine.volumes.Prune(pb.PruneVolumesRequest(all=True))).removed) == ["named"]


async def test_volumes_by_hand(engine: EngineClient) -> None:
    made = await engine.volumes.Create(pb.CreateVolumeRequest(name="v", labels={"a": "b"}))
    assert dict(made.labels) == {"a": "b"}
    assert content(made) == {}
    with pytest.raises(AlreadyExists, match="'v' exists"):
        await engine.volumes.Create(pb.CreateVolumeRequest(name="v"))
    with pytest.raises(InvalidArgument, match="driver"):
        await engine.volumes.Create(pb.CreateVolumeRequest(name="w", driver="nfs"))
    with pytest.raises(InvalidArgument, match="'device' is missing"):
        await engine.volumes.Create(pb.CreateVolumeRequest(name="w", options={"type": "nfs"}))
    await engine.volumes.Remove(pb.RemoveVolumeRequest(name="v"))
    with pytest.raises(NotFound, match="no such volume: v"):
        await engine.volumes.Remove(pb.RemoveVolumeRequest(name="v"))


async def test_a_create_that_fails_takes_its_anonymous_volumes_back(engine: EngineClient) -> None:
    mounts = [pb.VolumeMount(type=VOLUME, target="/data")]
    with pytest.raises(CorralError):
        await engine.create("true", mounts=mounts, user="nosuchuser")
    assert not (await engine.volumes.List(pb.ListVolumesRequest())).volumes
