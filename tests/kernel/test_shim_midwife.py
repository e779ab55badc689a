"""The process that a shim has forked ahead, to become its container's init."""

import base64
import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from shimclient import RequestError, Shim, Workshop, read_to_end, wait_gone, workshop
from support.cgroups import eventually
from support.requirements import needs
from support.sweep import parent_of

from corral.kernel import rebirth, seccomp
from corral.kernel.cgroup import detect

pytestmark = [
    needs("root", "busybox"),
    pytest.mark.skipif(not rebirth.POSSIBLE, reason="needs x86-64"),
]


@pytest.fixture(scope="module")
def shop() -> Iterator[Workshop]:
    with workshop() as made:
        yield made


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def midwife_of(shim: Shim) -> int:
    """Once it waits for its order."""
    (found,) = children_of(shim.pid)
    assert eventually(lambda: Path(f"/proc/{found}/comm").read_text() == "corral-midwife\n")
    assert eventually(lambda: Path(f"/proc/{found}/syscall").read_text().startswith("47 "))  # recvmsg
    return found


def status_of(pid: int, name: str) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith(f"{name}:"))


def changed(shim: Shim, change: Callable[[dict[str, Any]], object]) -> None:
    """Its config.json."""
    content = json.loads((shim.bundle / "config.json").read_text())
    change(content)
    (shim.bundle / "config.json").write_text(json.dumps(content))


def test_it_has_the_mounts_made_ahead_and_nothing_else(shop: Workshop) -> None:
    shim = shop.spawn("true", standing_by=True)
    midwife = midwife_of(shim)
    links = [str(link.readlink()) for link in Path(f"/proc/{midwife}/fd").iterdir()]
    assert sorted(link.partition(":")[0] for link in links if link != "/") == ["/dev/null"] * 3 + ["socket"]
    assert 0 < links.count("/") <= 5
    roots = [link.stat().st_dev for link in Path(f"/proc/{midwife}/fd").iterdir() if str(link.readlink()) == "/"]
    assert Path("/").stat().st_dev not in roots


def test_init_is_the_shims_child_and_while_it_waits_the_midwife_can_do_nothing(shop: Workshop) -> None:
    shim = shop.spawn("sh", "-c", "echo out; exit 3", standing_by=True)
    midwife = midwife_of(shim)
    init = shim.create()
    assert parent_of(init) == shim.pid
    assert sorted(children_of(shim.pid)) == sorted([midwife, init])
    assert status_of(midwife, "State") == "S (sleeping)"
    assert status_of(midwife, "Seccomp") == "1"
    (link,) = Path(f"/proc/{midwife}/fd").iterdir()
    assert str(link.readlink()).startswith("pipe:")
    assert os.sched_getscheduler(midwife) == os.SCHED_IDLE
    assert os.sched_getscheduler(init) == os.SCHED_OTHER
    (out,) = shim.attach("stdout")
    shim.start()
    wait_gone(midwife)
    assert read_to_end(out) == b"out\n"
    assert shim.wait()["code"] == 3


def test_the_program_has_nothing_of_it(shop: Workshop) -> None:
    shim = shop.spawn("sh", "-c", "ls -l /proc/self/fd | wc -l; umount /dev/shm 2>&1", standing_by=True)
    midwife_of(shim)
    shim.create()
    (out,) = shim.attach("stdout")
    shim.start()
    lines = read_to_end(out).decode().splitlines()
    assert lines[0] == "5"  # the total, 0, 1, 2, and the directory
    assert "busy" not in "".join(lines[1:]).lower()


def test_without_it_the_shim_makes_init_itself(shop: Workshop) -> None:
    shim = shop.spawn("echo", "hello", standing_by=True)
    midwife = midwife_of(shim)
    os.kill(midwife, signal.SIGKILL)
    wait_gone(midwife)
    init = shim.create()
    assert children_of(shim.pid) == [init]
    (out,) = shim.attach("stdout")
    shim.start()
    assert read_to_end(out) == b"hello\n"
    assert shim.wait()["code"] == 0


def test_one_that_is_killed_with_its_order_leaves_the_shim_to_do_it(shop: Workshop) -> None:
    shim = shop.spawn("true", standing_by=True)
    midwife = midwife_of(shim)
    os.kill(midwife, signal.SIGSTOP)
    shim.peer.send({"id": 77, "op": "create", "log": {"driver": "none"}})
    assert eventually(lambda: Path(f"/proc/{shim.pid}/syscall").read_text().startswith(("47 ", "7 ")))
    os.kill(midwife, signal.SIGKILL)
    assert shim.peer.receive()["id"] == 77
    assert shim.state()["state"] == "created"
    shim.start()
    assert shim.wait()["code"] == 0


@pytest.mark.parametrize("size", [0, 1 << 20], ids=["that has its order", "whose order is too much for the socket"])
def test_one_that_is_stuck_is_not_waited_for_long(shop: Workshop, size: int) -> None:
    shim = shop.spawn("true", standing_by=True)
    midwife = midwife_of(shim)
    os.kill(midwife, signal.SIGSTOP)
    try:
        shim.create(secret_env=[f"A{number}={'x' * 1024}" for number in range(size >> 10)])
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(midwife, signal.SIGCONT)
    wait_gone(midwife)
    shim.start()
    assert shim.wait()["code"] == 0


def test_a_host_that_refuses_another_scheduler_has_containers() -> None:
    rule = seccomp.Rule(("sched_setscheduler",), 0x50001)
    profile = seccomp.Profile(0x7FFF0000, 0x7FFF0000, (seccomp.Architecture.X86_64,), (rule,))

    def live() -> int:
        seccomp.load(seccomp.Filter(seccomp.compile_profile(profile)))  # of this thread, and what it starts
        with workshop() as filtered:
            shim = filtered.spawn("true", standing_by=True)
            midwife_of(shim)
            shim.create()
            shim.start()
            code = shim.wait()["code"]
            assert isinstance(code, int)
            return code

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(live).result() == 0


def test_what_it_cannot_plan_the_shim_tells(shop: Workshop) -> None:
    shim = shop.spawn("true", standing_by=True)
    midwife = midwife_of(shim)
    changed(shim, lambda content: content["linux"].update(sysctl={"kernel.panic": "1"}))
    with pytest.raises(RequestError, match=r"invalid_argument: .*kernel\.panic"):
        shim.create()
    wait_gone(midwife)


@needs("timens", "unshare")
def test_a_time_namespace_can_be_joined(shop: Workshop) -> None:
    with subprocess.Popen(["unshare", "--time", "--boottime", "1000000", "sleep", "60"]) as holder:
        try:
            own, path = Path("/proc/self/ns/time").readlink(), Path(f"/proc/{holder.pid}/ns/time")
            assert eventually(lambda: path.readlink() != own)
            shim = shop.spawn("cat", "/proc/uptime", standing_by=True)
            midwife_of(shim)
            changed(shim, lambda content: content["linux"]["namespaces"].append({"type": "time", "path": str(path)}))
            shim.create()
            (out,) = shim.attach("stdout")
            shim.start()
            assert float(read_to_end(out).split()[0]) > 1000000
        finally:
            holder.kill()


def _is_removed(directory: Path) -> bool:
    with contextlib.suppress(OSError):
        directory.rmdir()
    return not directory.exists()


@pytest.fixture
def memory() -> Iterator[tuple[str, Callable[[], int]]]:
    """A cgroup, and how much is charged to it of files in memory."""
    hierarchy = detect().of("memory")
    if hierarchy is None:
        pytest.skip("needs the memory controller")
    directory = Path(hierarchy.mount_point) / f"corral-midwife-{os.getpid()}"
    directory.mkdir()
    name = "shmem " if hierarchy.version == 2 else "cache "

    def charged() -> int:
        stat = (directory / "memory.stat").read_text().splitlines()
        return next(int(line.removeprefix(name)) for line in stat if line.startswith(name))

    try:
        yield str(directory), charged
    finally:
        assert eventually(lambda: _is_removed(directory))


def test_a_tmpfs_that_is_filled_is_charged_to_the_container(
    shop: Workshop, memory: tuple[str, Callable[[], int]]
) -> None:
    cgroup, charged = memory
    shim = shop.spawn("true", standing_by=True)
    filled = shop.root / "filled"
    filled.mkdir()
    (filled / "file").write_bytes(bytes(8 << 20))
    mount = {"destination": "/filled", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup"]}
    changed(shim, lambda content: content["mounts"].append(mount))
    midwife_of(shim)
    shim.create(cgroup={"paths": [cgroup]})
    assert charged() >= 8 << 20
    shim.start()
    shim.wait()


def test_secrets_are_charged_to_the_container(shop: Workshop, memory: tuple[str, Callable[[], int]]) -> None:
    cgroup, charged = memory
    shim = shop.spawn("true", standing_by=True)
    midwife_of(shim)
    data = base64.b64encode(bytes(1 << 20)).decode()
    secret = {"target": "/run/secrets/one", "uid": 0, "gid": 0, "mode": 0o400, "data": data}
    shim.create(cgroup={"paths": [cgroup]}, secrets=[secret])
    assert charged() >= 1 << 20
    shim.start()
    shim.wait()


def test_a_container_in_another_pid_namespace_has_none(shop: Workshop) -> None:
    shim = shop.spawn("true", namespaces=("mount", "ipc", "uts"), standing_by=True)
    midwife = midwife_of(shim)
    shim.create()
    wait_gone(midwife)
    shim.start()
    assert shim.wait()["code"] == 0


def test_it_ends_with_its_shim(shop: Workshop) -> None:
    shim = shop.spawn("true", standing_by=True)
    midwife = midwife_of(shim)
    os.kill(shim.pid, signal.SIGKILL)
    wait_gone(midwife)


def test_it_ends_with_an_init_that_is_never_started(shop: Workshop) -> None:
    shim = shop.spawn("true", standing_by=True)
    midwife = midwife_of(shim)
    init = shim.create()
    os.kill(shim.pid, signal.SIGKILL)
    wait_gone(init)
    wait_gone(midwife)


def test_an_init_that_is_killed_before_start_is_told_of(shop: Workshop) -> None:
    shim = shop.spawn("true", standing_by=True)
    midwife = midwife_of(shim)
    os.kill(shim.create(), signal.SIGKILL)
    assert shim.wait()["code"] == 137
    wait_gone(midwife)


def test_a_shim_that_is_deleted_without_a_container_takes_it_along(shop: Workshop) -> None:
    shim = shop.spawn("true", standing_by=True)
    midwife = midwife_of(shim)
    shim.call("delete")
    wait_gone(shim.pid)
    wait_gone(midwife)
