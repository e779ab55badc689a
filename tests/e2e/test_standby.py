"""The shim that stands by for the next container: used by it, ended with its makers, and missed by nobody."""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support import sweep
from support.corrald import Corrald, running
from support.requirements import needs

from corral.client.sync import Client
from corral.kernel import rebirth
from corral.rpc.errors import CorralError

pytestmark = needs("root", "overlayfs", "busybox")


@pytest.fixture(scope="module")
def daemon(busybox_archive: Path) -> Iterator[Corrald]:
    with running() as made:
        with made.client() as client:
            client.images.load(busybox_archive, name="busybox")
        yield made


@pytest.fixture
def client(daemon: Corrald) -> Iterator[Client]:
    with daemon.client() as made:
        yield made
        for container in made.containers.list(all=True):
            made.containers.remove(container.id, force=True)


def zygote_of(daemon: Corrald) -> int:
    (pid,) = sweep.zygotes(daemon.place.root)
    return pid


def standing_by(daemon: Corrald, *, but: int = 0) -> int:
    """Its pid, once there is one, other than `but`: the zygote's only child that has no bundle, while all is quiet."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        time.sleep(0.3)
        zygote = zygote_of(daemon)
        free = [pid for pid in children_of(zygote) if is_connected(pid) and pid != but]
        if len(free) == 1:
            return free[0]
    raise TimeoutError("none stands by")


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_connected(pid: int) -> bool:
    """Whether it has, beside what leads to its zygote and to its midwife, another socket; a spare has none."""
    links = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()]
    return sum(link.startswith("socket:") for link in links) == 2 + rebirth.POSSIBLE


def ended(pid: int) -> bool:
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not Path(f"/proc/{pid}").exists()


def run(client: Client) -> int:
    """Run a container to its right end; the pid of its shim."""
    made = client.containers.create("busybox", ["sh", "-c", "exit 5"], network="none")
    shim = client.containers.get(made.id).shim_pid
    client.containers.start(made.id)
    assert client.containers.wait(made.id).code == 5
    client.containers.remove(made.id)
    return shim


def test_it_becomes_the_next_containers_and_then_another_one_stands_by(client: Client, daemon: Corrald) -> None:
    first = standing_by(daemon)
    assert run(client) == first
    second = standing_by(daemon, but=first)
    assert run(client) == second


def test_nobody_waits_for_one_that_was_killed(client: Client, daemon: Corrald) -> None:
    pid = standing_by(daemon)
    os.kill(pid, signal.SIGKILL)
    assert ended(pid)
    assert run(client) != pid
    assert standing_by(daemon)


def test_one_whose_zygote_was_killed_is_of_no_use_and_ends(client: Client, daemon: Corrald) -> None:
    pid = standing_by(daemon)
    os.kill(zygote_of(daemon), signal.SIGKILL)
    assert ended(pid)
    assert run(client) != pid
    assert standing_by(daemon)


def test_where_every_shim_dies_as_it_is_told_to_begin_the_error_says_so(client: Client, daemon: Corrald) -> None:
    daemon.restart_with({"CORRAL_FAILPOINTS": "shim.spawned=kill"})
    try:
        standing_by(daemon)
        with pytest.raises(CorralError, match="shim"):
            run(client)
        assert client.containers.list(all=True) == []
    finally:
        daemon.restart()
    run(client)


def test_it_ends_with_its_daemon(client: Client, daemon: Corrald) -> None:
    pid = standing_by(daemon)
    daemon.kill9()
    assert ended(pid)
    daemon.start()
    run(client)


@pytest.fixture(scope="module")
def impatient(busybox_archive: Path) -> Iterator[Corrald]:
    with running(settings={"tasks": {"shim_timeout_s": 2.0}}) as made:
        with made.client() as client:
            client.images.load(busybox_archive, name="busybox")
        yield made


def test_one_that_is_stuck_is_killed_before_it_can_take_the_bundle_later(impatient: Corrald) -> None:
    pid = standing_by(impatient)
    os.kill(pid, signal.SIGSTOP)
    with impatient.client() as client:
        with pytest.raises(CorralError, match="shim"):
            run(client)
        assert ended(pid)
        assert client.containers.list(all=True) == []
        assert run(client)


def test_a_daemon_that_stood_still_for_too_long_has_no_container_made_twice(impatient: Corrald) -> None:
    """Its patience is over before it reads the answer that is there."""
    pid, daemon = standing_by(impatient), impatient.processes["corrald"].pid
    os.kill(pid, signal.SIGSTOP)
    with impatient.client() as client, ThreadPoolExecutor() as others:
        made = others.submit(client.containers.create, "busybox", ["sleep", "50"], network="none")
        time.sleep(0.7)
        os.kill(daemon, signal.SIGSTOP)
        os.kill(pid, signal.SIGCONT)
        time.sleep(2.5)
        os.kill(daemon, signal.SIGCONT)
        try:
            container = made.result(30).id
        except CorralError:
            assert client.containers.list(all=True) == []
            assert ended(pid)
            assert sweep.pids(impatient.place.cgroup_parent) == set()
        else:
            assert len(sweep.pids(impatient.place.cgroup_parent)) == 1
            client.containers.remove(container, force=True)
