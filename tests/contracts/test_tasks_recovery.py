"""Whatever is killed, whenever: no exit is lost, none is invented, nothing is left."""
# ruff: noqa: ASYNC110 (these tests wait for the kernel, and share their loop with nobody)

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
from support.corrald import PATIENCE, Corrald
from support.requirements import needs
from support.sweep import shims
from support.tasks import TaskClient, task_client

from corral.api.tasks.v1 import tasks_pb2 as pb
from corral.api.types.v1 import types_pb2 as types_pb
from corral.kernel.process import start_time
from corral.rpc.errors import CorralError, NotFound, Unavailable
from corral.tasks.recovery import START_S
from corral.tasks.spawning import ATTEMPTS

pytestmark = needs("root", "busybox")

CREATE_STEPS = (
    *("tasks.create.after_bundle", "tasks.create.after_spawn", "tasks.create.after_row"),
    *("zygote.spawn.before_fork", "zygote.spawn.after_fork"),
    *("shim.spawned", "shim.create.before_clone", "shim.create.after_clone"),
)
START_STEPS = ("tasks.start.before_shim", "tasks.start.after_shim", "tasks.start.after_row")
EXIT_STEPS = ("tasks.exited.before_row", "tasks.exited.after_row", "store.before_commit@3", "store.after_commit@3")
SHIM_EXIT_STEPS = tuple(
    f"shim.exit.{step}" for step in ("seen", "before_rename", "after_rename", "before_event", "after_event")
)
DELETE_STEPS = ("tasks.delete.before_row", "tasks.delete.after_row", "tasks.delete.after_bundle")


@pytest.fixture
def own_daemon() -> Iterator[Corrald]:
    """One for a single test, which kills it."""
    with Corrald(services=("tasks",)) as corrald:
        yield corrald


@asynccontextmanager
async def serving(daemon: Corrald, rootfs: Path, failpoints: str = "") -> AsyncIterator[TaskClient]:
    """Start the daemon and talk to it, until the block ends."""
    daemon.start(environment={"CORRAL_FAILPOINTS": failpoints})
    async with task_client(daemon, rootfs) as client:
        client.created = []  # a later incarnation cleans up
        yield client
        client.created.clear()


async def eventually(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(15):
        while not condition():
            await asyncio.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def zygotes() -> set[int]:
    names = {int(path.parent.name): path for path in Path("/proc").glob("[0-9]*/comm")}
    found = set()
    for pid, path in names.items():
        try:
            if path.read_text().strip() == "corral-zygote":
                found.add(pid)
        except OSError:
            continue
    return found


def zygotes_of(daemon: Corrald) -> list[int]:
    """Children of the daemon that are zygotes. Those of others may end meanwhile."""
    found = []
    for pid in zygotes():
        with contextlib.suppress(OSError):
            if f"PPid:\t{daemon.processes['corrald'].pid}\n" in Path(f"/proc/{pid}/status").read_text():
                found.append(pid)
    return found


def zygote_of(daemon: Corrald) -> int:
    """The child of the daemon that is a zygote."""
    [pid] = zygotes_of(daemon)
    return pid


def living_shims(daemon: Corrald) -> set[int]:
    """Without the zygote, which holds the FIFOs of a shim that was killed until there is another one."""
    found = set()
    for pid in shims(daemon.state):
        with contextlib.suppress(OSError):  # it has ended
            if Path(f"/proc/{pid}/comm").read_text() == "corral-shim\n":
                found.add(pid)
    return found


def nothing_left(daemon: Corrald) -> bool:
    places = (*daemon.root.glob("tasks/logs/*/*"), *daemon.root.glob("tasks/trash/*"), *daemon.state.glob("trash/*"))
    return not daemon.leftovers() and not places


async def test_a_task_outlives_the_daemon_and_is_adopted(own_daemon: Corrald, rootfs: Path):
    async with serving(own_daemon, rootfs) as tasks:
        task_id = await tasks.run("sh", "-c", "i=0; while :; do echo $((i=i+1)); usleep 10000; done")
        before = await tasks.get(task_id)
        await tasks.exec(task_id, "e", "sleep", "1000")
        exec_pid = await tasks.start(task_id, "e")
        told = len(await tasks.logs(task_id))
        own_daemon.kill9()
    log = Path(before.log_path)
    await eventually(lambda: len(log.read_text().splitlines()) > told + 10)
    async with serving(own_daemon, rootfs) as tasks:
        after = await tasks.get(task_id)
        assert (after.pid, after.shim_pid, after.status) == (before.pid, before.shim_pid, pb.STATUS_RUNNING)
        assert after.started_at == before.started_at
        [exec_process] = after.execs
        assert (exec_process.pid, exec_process.status) == (exec_pid, pb.STATUS_RUNNING)
        await tasks.kill(task_id, signal.SIGKILL, "e")
        assert (await tasks.wait(task_id, "e")).code == 137
        async with tasks.attached(task_id, stdout=True) as attached:
            await attached.read_one()
        await tasks.kill(task_id, signal.SIGKILL)
        assert (await tasks.wait(task_id)).code == 137
        numbers = [int(entry.line) for entry in await tasks.logs(task_id)]
        assert numbers == list(range(1, len(numbers) + 1))
        assert len(numbers) > told + 10
        await tasks.delete(task_id)
        assert await tasks.topics(task_id) == [
            *("task.created", "task.started", "task.exec.started", "task.exec.exited", "task.exited", "task.deleted"),
        ]


async def test_exits_while_the_daemon_is_down_are_known_with_their_time(own_daemon: Corrald, rootfs: Path):
    async with serving(own_daemon, rootfs) as tasks:
        quick = await tasks.run("sh", "-c", "usleep 200000; exit 33")
        late = await tasks.run("sleep", "1000")
        quick_pid = (await tasks.get(quick)).pid
        own_daemon.kill9()
    await eventually(lambda: not is_alive(quick_pid))
    gone_ns = time.time_ns()
    async with serving(own_daemon, rootfs) as tasks:
        exited = await tasks.wait(quick)
        assert (exited.code, exited.known) == (33, True)
        stopped = await tasks.get(quick)
        assert stopped.started_at.ToNanoseconds() + 0.15e9 < stopped.exit.exited_at.ToNanoseconds() <= gone_ns
        [event] = [event for event in await tasks.events(quick) if event.topic == "task.exited"]
        assert event.payload["code"] == 33
        assert event.time == stopped.exit.exited_at
        assert (await tasks.get(late)).status == pb.STATUS_RUNNING
        own_daemon.kill9()
    async with serving(own_daemon, rootfs) as tasks:
        assert (await tasks.topics(quick)).count("task.exited") == 1
        await tasks.delete(quick)
        await tasks.delete(late, force=True)
    await eventually(lambda: nothing_left(own_daemon))


async def test_a_clean_stop_harms_no_task(own_daemon: Corrald, rootfs: Path):
    async with serving(own_daemon, rootfs) as tasks:
        task_id = await tasks.run("sleep", "1000")
        pid = (await tasks.get(task_id)).pid
        zygote = zygote_of(own_daemon)
    own_daemon.stop()
    assert is_alive(pid)
    assert is_alive(zygote), "who else would see the container's end, should its shim be killed"
    async with serving(own_daemon, rootfs) as tasks:
        assert (await tasks.get(task_id)).pid == pid
        await tasks.delete(task_id, force=True)
        await eventually(lambda: not is_alive(zygote))


async def test_a_killed_zygote_harms_nobody_and_is_replaced(own_daemon: Corrald, rootfs: Path):
    async with serving(own_daemon, rootfs) as tasks:
        task_id = await tasks.run("sleep", "1000")
        for _ in range(3):
            await eventually(lambda: zygotes_of(own_daemon) != [])  # who has a shim standing by waits for none
            os.kill(zygote_of(own_daemon), signal.SIGKILL)
            other = await tasks.run("sh", "-c", "exit 4")
            assert (await tasks.wait(other)).code == 4
            await tasks.delete(other)
        assert (await tasks.get(task_id)).status == pb.STATUS_RUNNING
        await tasks.delete(task_id, force=True)


async def test_creates_survive_a_zygote_that_dies_meanwhile(own_daemon: Corrald, rootfs: Path):
    async with serving(own_daemon, rootfs) as tasks:
        creating = [asyncio.create_task(tasks.run("sh", "-c", f"exit {number}")) for number in range(30)]
        for _ in range(ATTEMPTS - 1):
            await asyncio.sleep(0.05)
            for pid in zygotes_of(own_daemon):
                os.kill(pid, signal.SIGKILL)
        ids = await asyncio.gather(*creating)
        assert [(await tasks.wait(task_id)).code for task_id in ids] == list(range(30))
        for task_id in ids:
            await tasks.delete(task_id)
    await eventually(lambda: nothing_left(own_daemon))


def impatient(timeout_s: float) -> Corrald:
    return Corrald(services=("tasks",), settings={"tasks": {"shim_timeout_s": timeout_s * PATIENCE}})


async def test_a_zygote_that_gets_stuck_is_replaced(rootfs: Path):
    with impatient(10) as daemon:
        async with serving(daemon, rootfs) as tasks, asyncio.timeout(120 * PATIENCE):
            before = await tasks.run("sleep", "1000")
            stuck = zygote_of(daemon)
            os.kill(stuck, signal.SIGSTOP)
            ids = await asyncio.gather(*(tasks.run("sleep", "1000") for _ in range(4)))
            assert zygote_of(daemon) != stuck
            assert len(daemon.events("zygote.stuck")) == 1
            assert (await tasks.get(before)).status == pb.STATUS_RUNNING
            for task_id in (before, *ids):
                await tasks.delete(task_id, force=True)


# Lets nobody who was killed get further than to the first step of its end, which the kernel also has tasks in D do.
HOLD_DYING = """
import ctypes, sys
if ctypes.CDLL(None, use_errno=True).ptrace(0x4206, int(sys.argv[1]), None, ctypes.c_void_p(1 << 6)):
    raise OSError(ctypes.get_errno(), "PTRACE_SEIZE")
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def dying_held(pid: int) -> Iterator[None]:
    command = [sys.executable, "-c", HOLD_DYING, str(pid)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        try:
            yield
        finally:
            holder.communicate()


async def test_a_zygote_that_cannot_be_killed_is_done_without(rootfs: Path):
    with impatient(6) as daemon:
        async with serving(daemon, rootfs) as tasks, asyncio.timeout(120 * PATIENCE):
            await tasks.delete(await tasks.run("true"), force=True)
            stuck = zygote_of(daemon)
            with dying_held(stuck):
                os.kill(stuck, signal.SIGSTOP)
                assert await one_of_two_is_refused(tasks)
                assert (await tasks.wait(await tasks.run("sh", "-c", "exit 7", task_id="next"))).code == 7
                assert stuck in zygotes()
                await tasks.delete("next")
    assert not is_alive(stuck)


async def one_of_two_is_refused(tasks: TaskClient) -> bool:
    """The first may be made by a shim that stands by already."""
    for _ in range(2):
        try:
            await tasks.delete(await tasks.run("true"), force=True)
        except Unavailable:
            return True
    return False


async def test_a_zygote_that_takes_long_to_start_is_waited_for(rootfs: Path):
    with impatient(6) as daemon:
        async with serving(daemon, rootfs) as tasks, asyncio.timeout(120 * PATIENCE):
            await tasks.delete(await tasks.run("true"), force=True)
            before = zygote_of(daemon)
            os.kill(before, signal.SIGKILL)
            slow = started_by(daemon, after=before)
            os.kill(slow, signal.SIGSTOP)
            with pytest.raises(Unavailable, match="was not ready"):
                await tasks.create("true")
            creating = asyncio.ensure_future(tasks.run("sh", "-c", "exit 7"))
            await asyncio.sleep(0.1)
            os.kill(slow, signal.SIGCONT)
            task_id = await creating
            assert (await tasks.wait(task_id)).code == 7
            await tasks.delete(task_id)
            assert zygote_of(daemon) == slow


def started_by(daemon: Corrald, *, after: int) -> int:
    """A zygote of the daemon that has just executed its program."""
    daemon_pid = daemon.processes["corrald"].pid
    while True:
        for pid in Path(f"/proc/{daemon_pid}/task/{daemon_pid}/children").read_text().split():
            with contextlib.suppress(OSError):
                if int(pid) != after and b"corral.shim.zygote" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return int(pid)


async def test_containers_whose_zygote_is_gone_have_heirs_all_the_same(own_daemon: Corrald, rootfs: Path):
    async with serving(own_daemon, rootfs) as tasks, asyncio.timeout(60 * PATIENCE):
        script = "i=0; until [ -e /tmp/go ]; do echo $((i=i+1)); usleep 3000; done; echo end; exit 9"
        plain = await tasks.run("sh", "-c", script)
        terminal = await tasks.run("sh", terminal=True, stdin=True)
        async with tasks.attached(terminal, stdin=True, stdout=True, replay=True) as attached:
            await attached.read_until(b"#")
            before = zygote_of(own_daemon)
            os.kill(before, signal.SIGKILL)
            await eventually(lambda: set(zygotes_of(own_daemon)) - {before})
            for task_id in (plain, terminal):
                shim_pid = (await tasks.get(task_id)).shim_pid
                os.kill(shim_pid, signal.SIGKILL)
                await eventually(lambda shim_pid=shim_pid: not is_alive(shim_pid))
            await attached.send(b"echo $((40 + 2)); exit 6\n")
            exited = await attached.drain()
        assert b"42" in attached.stdout
        assert (exited.known, exited.code) == (True, 6)
        (rootfs / "tmp/go").touch()
        exited = await tasks.wait(plain)
        (rootfs / "tmp/go").unlink()
        assert (exited.known, exited.code) == (True, 9)
        *numbers, last = [entry.line for entry in await tasks.logs(plain)]
        assert last == b"end\n"
        assert [int(number) for number in numbers] == list(range(1, len(numbers) + 1))
        for task_id in (plain, terminal):
            await tasks.delete(task_id)


async def test_shims_that_do_not_answer_keep_nobody_else_waiting_at_a_start(rootfs: Path):
    with Corrald(services=("tasks",), settings={"tasks": {"shim_timeout_s": 600}}) as daemon:
        async with serving(daemon, rootfs) as tasks:
            stuck = [await tasks.run("sleep", "1000", task_id=f"a{n:02}") for n in range(40)]
            other = await tasks.run("sleep", "1000", task_id="z")
            shim_pids = [(await tasks.get(task_id)).shim_pid for task_id in stuck]
            daemon.kill9()
        for pid in shim_pids:
            os.kill(pid, signal.SIGSTOP)
        async with serving(daemon, rootfs) as tasks, asyncio.timeout(60 * PATIENCE):
            await tasks.delete(other, force=True)
            one = stuck[0]
            assert (await tasks.get(one)).status == pb.STATUS_RUNNING
            with pytest.raises(Unavailable):
                await tasks.stub.Probe(pb.ProbeRequest(id=one, exec_id="p", process=b'{"args": ["true"]}'))
            assert not (await tasks.stub.Check(types_pb.CheckRequest())).findings
            ending = asyncio.ensure_future(tasks.kill(one, signal.SIGKILL))
            await asyncio.sleep(0.2)
            assert not ending.done()
            for pid in shim_pids:
                os.kill(pid, signal.SIGCONT)
            await ending
            assert (await tasks.wait(one)).code == 137
            for task_id in stuck:
                await tasks.delete(task_id, force=True)


async def test_nobody_is_told_that_a_task_is_not_started_until_that_is_known(own_daemon: Corrald, rootfs: Path):
    async with serving(own_daemon, rootfs, "tasks.start.after_shim=kill") as tasks:
        task_id = await tasks.create("sleep", "1000")
        shim_pid = (await tasks.get(task_id)).shim_pid
        with pytest.raises(CorralError):
            await tasks.start(task_id)
    own_daemon.processes.pop("corrald").wait(10)
    os.kill(shim_pid, signal.SIGSTOP)
    late = threading.Timer(2 * START_S, os.kill, (shim_pid, signal.SIGCONT))
    late.start()
    async with serving(own_daemon, rootfs) as tasks:
        assert (await tasks.get(task_id)).status == pb.STATUS_RUNNING
        late.join()
        await tasks.delete(task_id, force=True)


async def test_a_killed_shim_has_an_heir(own_daemon: Corrald, rootfs: Path):
    """Clients stay attached, no byte and no exit is lost, execs go on, and the next one works."""
    async with serving(own_daemon, rootfs) as tasks:
        script = "i=0; while [ $i -lt 300 ]; do echo $((i=i+1)); usleep 2000; done; read x; echo $x; exit 29"
        task_id = await tasks.run("sh", "-c", script, stdin=True)
        await tasks.exec(task_id, "e", "sh", "-c", "read x; exit $x", stdin=True)
        await tasks.start(task_id, "e")
        before = await tasks.get(task_id)
        async with tasks.attached(task_id, stdin=True, stdout=True) as attached:
            for _ in range(3):
                await attached.read_one()
                shim_pid = (await tasks.get(task_id)).shim_pid
                os.kill(shim_pid, signal.SIGKILL)
                await eventually(lambda pid=shim_pid: not is_alive(pid))  # type: ignore[misc]
                await tasks.kill(task_id, signal.SIGCHLD)
                after = await tasks.get(task_id)
                assert (after.pid, after.status) == (before.pid, pb.STATUS_RUNNING)
                assert is_alive(after.shim_pid)
            assert after.shim_pid != before.shim_pid
            await tasks.exec(task_id, "f", "sh", "-c", "exit 4")
            await tasks.start(task_id, "f")
            assert (await tasks.wait(task_id, "f")).code == 4
            async with tasks.attached(task_id, "e", stdin=True) as other:
                await other.send(b"31\n")
                assert (await tasks.wait(task_id, "e")).code == 31
            await attached.read_until(b"\n300\n")
            await attached.send(b"last\n")
            exited = await attached.drain()
        assert attached.stdout.endswith(b"\n300\nlast\n")
        assert (exited.known, exited.code, exited.reason) == (True, 29, "")
        lines = [entry.line for entry in await tasks.logs(task_id)]
        assert lines == [*(b"%d\n" % number for number in range(1, 301)), b"last\n"]
        assert (await tasks.topics(task_id)).count("task.adopted") == 3
        await tasks.delete(task_id)
    await eventually(lambda: nothing_left(own_daemon) and not shims(own_daemon.state))


async def test_last_words_are_logged_though_one_shim_after_the_other_dies_over_them(own_daemon: Corrald, rootfs: Path):
    """Each takes a part, and dies; so they do before the container's end, more often than is tried at once."""
    async with serving(own_daemon, rootfs, "shim.log.taken=kill@1") as tasks, asyncio.timeout(60):
        script = "for i in 1 2 3 4 5; do echo $i; sleep 0.2; done; echo 6; echo last >&2; exit 29"
        task_id = await tasks.run("sh", "-c", script)
        exited = await tasks.wait(task_id)
        assert (exited.known, exited.code) == (True, 29)
        lines = [entry.line for entry in await tasks.logs(task_id)]
        assert sorted(lines) == [*(b"%d\n" % number for number in range(1, 7)), b"last\n"]
        await tasks.delete(task_id)
    await eventually(lambda: nothing_left(own_daemon) and not shims(own_daemon.state))


async def test_an_end_whose_last_words_no_shim_lives_to_read_says_so(own_daemon: Corrald, rootfs: Path):
    async with serving(own_daemon, rootfs) as tasks, asyncio.timeout(60):
        task_id = await tasks.run("sh", "-c", "sleep 1; echo last; exit 29")
        shim_pid = (await tasks.get(task_id)).shim_pid
        own_daemon.kill9()
        os.kill(shim_pid, signal.SIGKILL)
        await asyncio.sleep(1.5)
    async with serving(own_daemon, rootfs, "shim.record.before_rename=kill@1") as tasks, asyncio.timeout(60):
        exited = await tasks.wait(task_id)
        assert (exited.known, exited.code) == (True, 29)
        assert exited.reason.endswith("what it wrote last may be missing")
        await tasks.delete(task_id)
    await eventually(lambda: nothing_left(own_daemon) and not shims(own_daemon.state))


async def test_an_heir_that_gets_stuck_is_ended_and_the_next_one_takes_over(rootfs: Path):
    """It may have taken over by then, so nothing that it is told is to end the container."""
    with impatient(5) as daemon:
        async with (
            serving(daemon, rootfs, "shim.record.before_rename=sleep:1@1") as tasks,
            asyncio.timeout(60 * PATIENCE),
        ):
            task_id = await tasks.run("sleep", "1000")
            before = await tasks.get(task_id)
            os.kill(before.shim_pid, signal.SIGKILL)
            await eventually(lambda: living_shims(daemon) - {before.shim_pid})
            [stuck] = living_shims(daemon) - {before.shim_pid}
            await asyncio.sleep(0.5)
            os.kill(stuck, signal.SIGSTOP)
            await tasks.kill(task_id, signal.SIGCHLD)
            after = await tasks.get(task_id)
            assert (after.pid, after.status) == (before.pid, pb.STATUS_RUNNING)
            assert living_shims(daemon) == {after.shim_pid}
            assert after.shim_pid != stuck
            await tasks.delete(task_id, force=True)


async def test_an_heir_stays_the_only_one_although_that_cannot_be_written(own_daemon: Corrald, rootfs: Path):
    async with serving(own_daemon, rootfs) as tasks:
        task_id = await tasks.run("sleep", "1000")
        before = await tasks.get(task_id)
        own_daemon.kill9()
    os.kill(before.shim_pid, signal.SIGKILL)
    async with serving(own_daemon, rootfs, "store.before_commit=error@1") as tasks:
        after = await tasks.get(task_id)
        assert (after.pid, after.status) == (before.pid, pb.STATUS_RUNNING)
        assert living_shims(own_daemon) == {after.shim_pid}
        await tasks.kill(task_id, signal.SIGKILL)
        assert (await tasks.wait(task_id)).code == 137
        await tasks.delete(task_id, force=True)


@pytest.mark.parametrize("hit", [1, 2])
async def test_execs_go_on_when_the_daemon_is_killed_over_the_taking_over(own_daemon: Corrald, rootfs: Path, hit: int):
    async with serving(own_daemon, rootfs) as tasks:
        task_id = await tasks.run("sleep", "1000")
        await tasks.exec(task_id, "e", "sh", "-c", "until [ -e /tmp/go ]; do sleep 0.05; done; exit 6")
        await tasks.start(task_id, "e")
        shim_pid = (await tasks.get(task_id)).shim_pid
        own_daemon.kill9()
    os.kill(shim_pid, signal.SIGKILL)
    with contextlib.suppress(RuntimeError):
        own_daemon.start(environment={"CORRAL_FAILPOINTS": f"store.before_commit=kill@{hit}"})
    own_daemon.kill9()
    async with serving(own_daemon, rootfs) as tasks:
        (rootfs / "tmp/go").touch()
        exited = await tasks.wait(task_id, "e")
        (rootfs / "tmp/go").unlink()
        assert (exited.known, exited.code) == (True, 6)
        await tasks.delete(task_id, force=True)


async def test_a_client_misses_nothing_that_an_heir_reads_before_it_is_back(own_daemon: Corrald, rootfs: Path):
    async with serving(own_daemon, rootfs) as tasks, asyncio.timeout(30):
        script = "echo 0; until [ -e /tmp/go ]; do sleep 0.05; done; seq 1 2000; read x; echo $x"
        task_id = await tasks.run("sh", "-c", script, stdin=True)
        async with tasks.attached(task_id, stdin=True, stdout=True, replay=True) as attached:
            await attached.read_until(b"0\n")
            shim_pid = (await tasks.get(task_id)).shim_pid
            os.kill(shim_pid, signal.SIGSTOP)
            (rootfs / "tmp/go").touch()
            await asyncio.sleep(0.5)  # until all of it is in the FIFO
            os.kill(shim_pid, signal.SIGKILL)
            await attached.read_until(b"\n2000\n")
            await attached.send(b"last\n")
            await attached.drain()
        (rootfs / "tmp/go").unlink()
        assert attached.stdout.split() == [*(b"%d" % number for number in range(2001)), b"last"]
        await tasks.delete(task_id)


async def test_a_terminal_outlives_its_shim(own_daemon: Corrald, rootfs: Path):
    async with serving(own_daemon, rootfs) as tasks, asyncio.timeout(20):
        task_id = await tasks.run("sh", terminal=True, stdin=True)
        async with tasks.attached(task_id, stdin=True, stdout=True, replay=True) as attached:
            await attached.read_until(b"#")
            shim_pid = (await tasks.get(task_id)).shim_pid
            os.kill(shim_pid, signal.SIGKILL)
            await eventually(lambda: not is_alive(shim_pid))
            await attached.resize(81, 33)
            await attached.send(b"stty size; exit 6\n")
            exited = await attached.drain()
        assert b"33 81" in attached.stdout
        assert exited.code == 6
        await tasks.delete(task_id)


async def test_shims_killed_while_the_daemon_is_down(own_daemon: Corrald, rootfs: Path):
    """One container goes on until there is a daemon again, another one ends with nobody but the zygote to see it."""
    async with serving(own_daemon, rootfs) as tasks:
        script = "i=0; until [ $i = 300 ]; do echo $((i=i+1)); usleep 3000; done; until %s; do sleep 0.05; done; exit 9"
        ids = [await tasks.run("sh", "-c", script % condition) for condition in ("[ -e /tmp/go ]", "true")]
        before = [await tasks.get(task_id) for task_id in ids]
        own_daemon.kill9()
    for task in before:
        os.kill(task.shim_pid, signal.SIGKILL)
    await eventually(lambda: not is_alive(before[1].pid))
    async with serving(own_daemon, rootfs) as tasks:
        after = await tasks.get(ids[0])
        assert (after.pid, after.status) == (before[0].pid, pb.STATUS_RUNNING)
        assert after.shim_pid != before[0].shim_pid
        (rootfs / "tmp/go").touch()
        for task_id in ids:
            exited = await tasks.wait(task_id)
            assert (exited.known, exited.code) == (True, 9)
            assert [int(entry.line) for entry in await tasks.logs(task_id)] == list(range(1, 301))
            await tasks.delete(task_id)
    (rootfs / "tmp/go").unlink()
    await eventually(lambda: nothing_left(own_daemon))


async def test_another_process_with_the_pid_of_init_is_left_alone(own_daemon: Corrald, rootfs: Path):
    """After a reboot pids are other processes': only the start time tells."""
    bystander = await asyncio.create_subprocess_exec("sleep", "1000")
    try:
        async with serving(own_daemon, rootfs) as tasks:
            task_id = await tasks.run("sleep", "1000")
            task = await tasks.get(task_id)
            own_daemon.kill9()
        os.kill(task.shim_pid, signal.SIGKILL)
        os.kill(task.pid, signal.SIGKILL)
        record = own_daemon.state / f"shim/default/{task_id}/record.json"
        database = own_daemon.root / "tasks/tasks.db"
        _rename_pid(record, database, task.pid, bystander.pid)
        async with serving(own_daemon, rootfs) as tasks:
            assert not (await tasks.wait(task_id)).known
            await tasks.delete(task_id)
        assert bystander.returncode is None
        assert is_alive(bystander.pid)
    finally:
        bystander.kill()
        await bystander.wait()


def _rename_pid(record: Path, database: Path, old: int, new: int) -> None:
    import sqlite3

    record.write_text(record.read_text().replace(f'"init_pid":{old}', f'"init_pid":{new}'))
    with sqlite3.connect(database) as connection:
        changed = connection.execute("UPDATE processes SET pid = ? WHERE pid = ?", (new, old)).rowcount
    connection.close()
    assert changed == 1
    assert start_time(new) > 0


async def test_run_state_that_vanished_means_lost_tasks(own_daemon: Corrald, rootfs: Path):
    """As after a reboot: the rows are there, the bundles and processes are not."""
    import shutil

    async with serving(own_daemon, rootfs) as tasks:
        task_id = await tasks.run("sleep", "1000")
        task = await tasks.get(task_id)
        own_daemon.kill9()
    os.kill(task.pid, signal.SIGKILL)
    await eventually(lambda: not is_alive(task.shim_pid))
    shutil.rmtree(own_daemon.state / "shim")
    async with serving(own_daemon, rootfs) as tasks:
        exited = await tasks.wait(task_id)
        assert not exited.known
        assert "bundle is gone" in exited.reason
        await tasks.delete(task_id)


@pytest.mark.parametrize("step", CREATE_STEPS)
async def test_a_create_that_is_cut_short_is_undone_or_whole(own_daemon: Corrald, rootfs: Path, step: str):
    async with serving(own_daemon, rootfs, f"{step}=kill") as tasks:
        try:
            await tasks.create("sleep", "1000", task_id="cut")
        except CorralError:
            pass
        else:
            assert step.startswith("zygote"), step  # the daemon tried again with another one
    if own_daemon.processes["corrald"].poll() is not None:
        own_daemon.processes.pop("corrald")
    else:
        own_daemon.kill9()
    async with serving(own_daemon, rootfs) as tasks:
        listed = (await tasks.stub.List(pb.ListTasksRequest())).tasks
        for task in listed:
            assert task.status == pb.STATUS_CREATED
            await tasks.start("cut")
            await tasks.delete("cut", force=True)
        topics = await tasks.topics("cut")
        assert topics == (["task.created", "task.started", "task.exited", "task.deleted"] if listed else [])
        await eventually(lambda: nothing_left(own_daemon))
        assert (await tasks.wait(await tasks.run("sh", "-c", "exit 3", task_id="cut"))).code == 3
        await tasks.delete("cut")
    await eventually(lambda: nothing_left(own_daemon) and not shims(own_daemon.state))


async def test_a_shim_whose_zygote_died_is_known_by_its_record_however_late_that_is_written(
    own_daemon: Corrald, rootfs: Path
):
    failpoints = "zygote.spawn.after_fork=kill,shim.record.before_rename=sleep:0.3"
    async with serving(own_daemon, rootfs, failpoints) as tasks:
        task_id = await tasks.create("sh", "-c", "exit 4")
        await tasks.start(task_id)
        assert (await tasks.wait(task_id)).code == 4
        await tasks.delete(task_id)


@pytest.mark.parametrize("step", [*START_STEPS, *EXIT_STEPS])
async def test_a_kill_around_start_and_exit_loses_no_exit(own_daemon: Corrald, rootfs: Path, step: str):
    name, _, hit = step.partition("@")
    async with serving(own_daemon, rootfs, f"{name}=kill{'@' + hit if hit else ''}") as tasks:
        task_id = await tasks.create("sh", "-c", "usleep 20000; exit 21", task_id="cut")

        async def until_killed() -> None:
            await tasks.start(task_id)
            await tasks.wait(task_id)
            for _ in range(200):
                await asyncio.sleep(0.05)
                await tasks.get(task_id)

        with pytest.raises(CorralError):
            await until_killed()
    own_daemon.processes.pop("corrald").wait(10)
    async with serving(own_daemon, rootfs) as tasks:
        if (await tasks.get(task_id)).status == pb.STATUS_CREATED:
            await tasks.start(task_id)
        assert (await tasks.wait(task_id)).code == 21
        await tasks.delete(task_id)
        assert await tasks.topics(task_id) == ["task.created", "task.started", "task.exited", "task.deleted"]
    await eventually(lambda: nothing_left(own_daemon))


async def test_nobody_waits_for_the_kernel_to_take_a_shim_apart(own_daemon: Corrald, rootfs: Path):
    async with serving(own_daemon, rootfs, "shim.end.after_hang_up=sleep:60") as tasks:
        task_id = await tasks.create("sh", "-c", "exit 21")
        shim_pid = (await tasks.get(task_id)).shim_pid
        await tasks.start(task_id)
        assert (await tasks.wait(task_id)).code == 21
        async with asyncio.timeout(30):
            while (await tasks.get(task_id)).shim_pid:
                await asyncio.sleep(0.02)
        assert is_alive(shim_pid)
        await tasks.delete(task_id)
        os.kill(shim_pid, signal.SIGKILL)
        await eventually(lambda: nothing_left(own_daemon) and not is_alive(shim_pid))


@pytest.mark.parametrize("step", SHIM_EXIT_STEPS)
async def test_an_exit_is_known_although_its_shim_was_killed_over_it(own_daemon: Corrald, rootfs: Path, step: str):
    async with serving(own_daemon, rootfs, f"{step}=kill") as tasks:
        task_id = await tasks.run("sh", "-c", "exit 21")
        async with asyncio.timeout(10):
            exited = await tasks.wait(task_id)
        assert (exited.known, exited.code) == (True, 21)
        await tasks.delete(task_id)
        assert (await tasks.topics(task_id)).count("task.exited") == 1
    await eventually(lambda: nothing_left(own_daemon))


@pytest.mark.parametrize("step", DELETE_STEPS)
async def test_a_delete_that_is_cut_short_can_be_repeated(own_daemon: Corrald, rootfs: Path, step: str):
    async with serving(own_daemon, rootfs, f"{step}=kill") as tasks:
        task_id = await tasks.run("sh", "-c", "exit 8", task_id="cut")
        await tasks.wait(task_id)
        with pytest.raises(CorralError):
            await tasks.delete(task_id)
    own_daemon.processes.pop("corrald").wait(10)
    async with serving(own_daemon, rootfs) as tasks:
        await tasks.delete(task_id)
        with pytest.raises(NotFound):
            await tasks.get(task_id)
        await eventually(lambda: nothing_left(own_daemon))
        assert (await tasks.topics(task_id)).count("task.deleted") == 1


@pytest.mark.parametrize("step", ["tasks.exec.after_shim", "tasks.exec.after_row"])
async def test_an_exec_that_is_cut_short_is_gone_or_whole(own_daemon: Corrald, rootfs: Path, step: str):
    async with serving(own_daemon, rootfs, f"{step}=kill") as tasks:
        task_id = await tasks.run("sleep", "1000", task_id="cut")
        with pytest.raises(CorralError):
            await tasks.exec(task_id, "e", "sh", "-c", "exit 6")
    own_daemon.processes.pop("corrald").wait(10)
    async with serving(own_daemon, rootfs) as tasks:
        if not (await tasks.get(task_id)).execs:
            await tasks.exec(task_id, "e", "sh", "-c", "exit 6")
        await tasks.start(task_id, "e")
        assert (await tasks.wait(task_id, "e")).code == 6
        await tasks.delete(task_id, force=True)
    await eventually(lambda: nothing_left(own_daemon))
