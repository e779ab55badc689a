"""Containers without a mount namespace: they are in the runtime's, with a root that is nowhere in it."""

import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.ocicommand import runtime_in
from support.requirements import needs

from corral.kernel import process
from corral.kernel.capabilities import NAMES
from corral.kernel.namespaces import Kind
from corral.oci.container import Container
from corral.oci.spec import Capabilities, IdMapping, Namespace

pytestmark = needs("root", "overlayfs", "busybox")

CLONE_NEWUSER, CLONE_NEWNS = 0x10000000, 0x00020000


def mounts_below(directory: Path) -> list[str]:
    """Of the host; other tests have theirs elsewhere."""
    return [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f" {directory}" in line]


def mount_namespace(pid: object) -> str:
    return str(Path(f"/proc/{pid}/ns/mnt").readlink())


def without_mounts(lab, *args: str, **changes):
    spec = lab.spec(*args, **changes)
    kept = tuple(each for each in spec.linux.namespaces if each.type is not Kind.MOUNT)
    return replace(spec, linux=replace(spec.linux, namespaces=kept))


@pytest.fixture
def running(lab) -> Container:
    (lab.plant / "planted").write_text("in the image")
    container = lab.create(without_mounts(lab, "sleep", "60"))
    container.start()
    return container


def within(container: Container, body: Callable[[], bytes]) -> bytes:
    """What a process says that is where the container's are: in the host's mount namespace, and with their root."""
    reader, writer = os.pipe()
    root = os.open(f"/proc/{container.init.pid}/root", os.O_PATH | os.O_DIRECTORY)
    pid, pidfd = process.clone(0)
    if pid == 0:
        try:
            os.fchdir(root)
            os.chroot(".")
            os.write(writer, body())
        except OSError as e:
            os.write(writer, str(e.strerror).encode())
        finally:
            os._exit(0)
    os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    said = os.read(reader, 4096)
    for fd in (reader, writer, root, pidfd):
        os.close(fd)
    return said


def test_the_namespace_is_the_hosts_and_the_root_the_containers(lab, running: Container) -> None:
    assert mount_namespace(running.init.pid) == mount_namespace("self")
    script = "cat /planted; echo; readlink /proc/self/ns/mnt; ls /dev/shm /dev/pts/ptmx; ls /.. | grep -c planted"
    seen = lab.exec(running, script).output.splitlines()
    assert seen == ["in the image", mount_namespace("self"), "/dev/pts/ptmx", "", "/dev/shm:", "1"]


def test_the_host_sees_none_of_its_mounts_neither_while_it_lives_nor_after(lab) -> None:
    container = lab.create(without_mounts(lab, "sleep", "60"))
    assert mounts_below(lab.directory) == []
    container.start()
    lab.exec(container, "true")
    assert mounts_below(lab.directory) == []
    process.send_signal(container.init.pidfd, signal.SIGKILL)
    lab.wait(container.init)
    assert mounts_below(lab.directory) == []


def test_what_is_masked_or_read_only_is_so_here_too(lab, running: Container) -> None:
    script = "cat /proc/timer_list | wc -c; echo 1 > /proc/sys/kernel/panic; touch /sys/x"
    output = lab.exec(running, script).output
    assert output.splitlines()[0] == "0"
    assert output.count("Read-only file system") == 2


def test_nobody_climbs_out_of_the_root_as_from_a_chroot(lab, running: Container) -> None:
    def climb() -> bytes:
        top = os.open("/", os.O_RDONLY)
        Path("/pit").mkdir()
        os.chroot("/pit")
        os.fchdir(top)
        for _ in range(64):
            os.chdir("..")
        os.chroot(".")
        return " ".join(
            sorted(each.name for each in Path("/").iterdir() if each.name in ("planted", "pit", "lib64"))
        ).encode()

    assert within(running, climb) == b"pit planted"


def test_a_user_namespace_can_t_be_made_in_there_by_which_to_reach_the_hosts_root(running: Container) -> None:
    def unshare() -> bytes:
        os.unshare(CLONE_NEWUSER | CLONE_NEWNS)
        return b"made"

    assert within(running, unshare) == b"Operation not permitted"


def test_without_the_right_to_administer_the_host_its_mount_namespace_cant_be_entered(lab) -> None:
    every = tuple(f"CAP_{name}" for name in NAMES if name != "SYS_ADMIN")
    held = Capabilities(bounding=every, effective=every, permitted=every)
    spec = without_mounts(lab, "nsenter -m/proc/self/ns/mnt ls /", capabilities=held, linux={"seccomp": None})
    result = lab.run_spec(spec)
    assert result.code != 0
    assert "Operation not permitted" in result.output


@pytest.mark.parametrize("kind", [Kind.USER, Kind.TIME])
def test_what_leads_away_from_the_hosts_mounts_is_refused_by_name(lab, kind: Kind) -> None:
    spec = without_mounts(lab, "true")
    ids = (IdMapping(0, 100000, 65536),) if kind is Kind.USER else ()
    linux = replace(
        spec.linux, namespaces=(*spec.linux.namespaces, Namespace(kind)), uid_mappings=ids, gid_mappings=ids
    )
    with pytest.raises(ValueError, match=rf"linux\.namespaces: with a {kind.value} namespace .* mount namespace"):
        lab.create(replace(spec, linux=linux))


def test_the_command_runs_execs_and_deletes_one_that_shares_all_namespaces(tmp_path: Path) -> None:
    with runtime_in(tmp_path) as oci:
        (oci.bundle / "rootfs/planted").write_text("x")
        spec = oci.spec("sleep", "1000") | {"hostname": ""}
        linux = spec["linux"]
        assert isinstance(linux, dict)
        spec["linux"] = linux | {"namespaces": []}
        oci.write_spec(spec)
        name = oci.new_id()
        oci.detached("run", "--detach", name)
        assert mounts_below(tmp_path) == []
        assert oci.ok("exec", name, "ls", "/planted") == "/planted\n"
        elsewhere = ["unshare", "--mount", *oci.words("exec", name, "ls", "-l", "/proc/self/ns/mnt")]
        seen = subprocess.run(elsewhere, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
        assert seen.endswith(f" -> {mount_namespace('self')}")
        pid = oci.state(name)["pid"]
        assert mount_namespace(pid) == mount_namespace("self")
        oci.ok("delete", "--force", name)
        assert oci.call("state", name).returncode == 1
        assert mounts_below(tmp_path) == []
