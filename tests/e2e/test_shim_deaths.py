"""Shims that are killed at other moments than while their containers run, and together with their daemon."""

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from crash.victims import shims
from support.corrald import Corrald, running
from support.requirements import needs

from corral.api.engine.v1 import engine_pb2
from corral.api.tasks.v1 import tasks_pb2
from corral.api.types.v1 import types_pb2
from corral.client.execution import Attachment, Collected, Execution, exec_request
from corral.client.sync import Client
from corral.rpc.errors import FailedPrecondition, Unavailable

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


def kill_shim(client: Client, container: str) -> None:
    shim = client.containers.get(container).shim_pid
    pidfd = os.pidfd_open(shim)
    os.kill(shim, signal.SIGKILL)
    select.select([pidfd], [], [], 5)
    os.close(pidfd)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def topics_of(client: Client, container: str) -> list[str]:
    request = types_pb2.EventsRequest(no_follow=True)
    events = [event for answer in client.system.events(request) for event in answer.events]
    return [event.topic for event in events if event.subject == container and event.topic.startswith("container.")]


def test_a_created_container_whose_shim_was_killed_starts_all_the_same(client: Client) -> None:
    client.containers.create("busybox", ["sh", "-c", "exit 9"], name="made", id="made", network="none")
    kill_shim(client, "made")
    client.containers.start("made")
    status = client.containers.wait("made")
    assert (status.code, status.known) == (9, True)
    assert topics_of(client, "made") == ["container.created", "container.started", "container.died"]


@pytest.mark.parametrize("init", [False, True])
@pytest.mark.parametrize("failpoint", ["shim.start.before_exec", "shim.start.after_exec"])
def test_one_whose_shim_is_killed_while_it_starts_it_runs_once(
    client: Client, daemon: Corrald, failpoint: str, init: bool
) -> None:
    """Exit code 1 is that of an init, too, that nobody has told to start."""
    daemon.restart_with({"CORRAL_FAILPOINTS": f"{failpoint}=kill"})
    script, name = "echo here; sleep 0.5; exit 1", f"{failpoint}.{init}"
    eventually(lambda: client.containers.create("busybox", ["sh", "-c", script], name=name, id=name, init=init))
    daemon.restart()
    eventually(lambda: client.containers.start(name))
    status = client.containers.wait(name)
    assert (status.code, status.known) == (1, True)
    assert [entry.line for entry in client.containers.logs(name)] == [b"here\n"]
    assert topics_of(client, name) == ["container.created", "container.started", "container.died"]


def test_who_ends_while_a_daemon_starts_without_its_shim_has_its_exit_code(client: Client, daemon: Corrald) -> None:
    """The zygote has seen the end, and writes it down only after the daemon has looked for it."""
    daemon.restart_with({"CORRAL_FAILPOINTS": "zygote.orphan.before_rename=sleep:4"})
    made = eventually(lambda: client.containers.run("busybox", ["sh", "-c", "sleep 1; exit 9"], name="made"))
    shim = client.containers.get("made").shim_pid
    daemon.kill9()
    os.kill(shim, signal.SIGKILL)
    while Path(f"/proc/{made.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    daemon.start()
    status = eventually(lambda: client.containers.wait("made"))
    assert (status.code, status.known) == (9, True)


def test_it_can_be_attached_to_before_it_is_started(client: Client) -> None:
    client.containers.create("busybox", ["sh", "-c", "echo hello; exit 9"], name="made", network="none")
    kill_shim(client, "made")
    time.sleep(0.3)
    assert list(client.containers.logs("made")) == []
    collected = Collected()
    for part in client.containers.attach(Attachment("made", stdout=True, lossless=True)):
        if part.HasField("attached"):
            client.containers.start("made")
        collected.add(part)
    assert (collected.result().stdout, collected.result().exit.code) == (b"hello\n", 9)


def test_what_its_client_sends_at_once_is_not_lost_if_it_has_to_be_made_again_first(client: Client) -> None:
    client.containers.create("busybox", ["cat"], name="made", network="none", stdin=True, stdin_once=True)
    kill_shim(client, "made")
    time.sleep(0.3)
    lines = [b"line %d\n" % number for number in range(20)]
    attachment = Attachment("made", stdin=True, stdout=True, lossless=True)
    collected = Collected()
    for part in client.containers.attach(attachment, (tasks_pb2.AttachRequest(stdin=line) for line in lines)):
        if part.HasField("attached"):
            client.containers.start("made")
        collected.add(part)
    assert collected.result().stdout == b"".join(lines)


def test_one_that_loses_its_shim_again_while_it_is_made_again_starts_all_the_same(busybox_archive: Path) -> None:
    with running(environment={"CORRAL_FAILPOINTS": "engine.start.after_new_task=sleep:1@1"}) as own, own.client() as it:
        it.images.load(busybox_archive, name="busybox")
        it.containers.create("busybox", ["sh", "-c", "exit 9"], name="made", id="made", network="none")
        first = it.containers.get("made").shim_pid
        kill_shim(it, "made")
        time.sleep(0.3)
        with ThreadPoolExecutor(1) as pool:
            starting = pool.submit(it.containers.start, "made")
            while (found := [shim.process.pid for shim in shims(own)]) in ([], [first]):
                time.sleep(0.02)
            os.kill(found[0], signal.SIGKILL)
            starting.result(20)
        assert it.containers.wait("made").code == 9
        it.containers.remove("made")


def test_who_waits_for_a_container_to_be_started_waits_on_when_its_shim_is_killed(
    client: Client, daemon: Corrald
) -> None:
    client.containers.create("busybox", ["sh", "-c", "exit 4"], name="made", network="none")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.containers.wait, "made", "next-exit")
        time.sleep(0.2)
        kill_shim(client, "made")
        time.sleep(0.3)
        assert not waiting.done()
        client.containers.start("made")
        assert waiting.result(10).code == 4


def test_a_terminal_outlives_a_shim_and_a_daemon_that_are_killed_together(client: Client, daemon: Corrald) -> None:
    script = "i=0; while [ $i -lt 20 ]; do i=$((i+1)); echo line $i; sleep 0.1; done; exit 8"
    client.containers.run("busybox", ["sh", "-c", script], name="screen", network="none", terminal=True, stdin=True)
    shim = client.containers.get("screen").shim_pid
    time.sleep(0.5)
    os.kill(shim, signal.SIGKILL)
    daemon.kill9()
    daemon.start()
    status = eventually(lambda: client.containers.wait("screen"))
    assert (status.code, status.known) == (8, True)
    lines = [entry.line for entry in client.containers.logs("screen")]
    assert b"".join(lines) == b"".join(b"line %d\r\n" % i for i in range(1, 21))


def test_an_exec_that_ends_while_its_shim_and_the_daemon_are_dead_has_its_exit_code(
    client: Client, daemon: Corrald
) -> None:
    client.containers.run("busybox", ["sleep", "1000"], name="long", network="none")
    made = client.containers.exec_create("long", ["sh", "-c", "sleep 0.5; exit 31"])
    client.containers.exec_start("long", made.exec_id)
    shim = client.containers.get("long").shim_pid
    daemon.kill9()
    os.kill(shim, signal.SIGKILL)
    time.sleep(1)
    daemon.start()
    status = eventually(lambda: client.containers.exec_wait("long", made.exec_id))
    assert (status.code, status.known) == (31, True)


def test_an_exec_that_was_created_starts_though_its_shim_was_killed(client: Client) -> None:
    client.containers.run("busybox", ["sleep", "1000"], name="long", network="none")
    made = client.containers.exec_create("long", ["sh", "-c", "exit $CODE"], env=["CODE=33"])
    kill_shim(client, "long")
    assert client.containers.exec_start("long", made.exec_id) > 0
    status = client.containers.exec_wait("long", made.exec_id)
    assert (status.code, status.known) == (33, True)


@pytest.mark.parametrize("failpoint", ["shim.exec.after_clone", "shim.exec.before_reply"])
def test_an_exec_whose_shim_is_killed_before_it_can_say_that_it_runs_keeps_its_client_and_its_input(
    client: Client, daemon: Corrald, failpoint: str
) -> None:
    daemon.restart_with({"CORRAL_FAILPOINTS": f"{failpoint}=kill@1"})
    eventually(lambda: client.containers.run("busybox", ["sleep", "1000"], name="long", network="none"))
    process = exec_request("long", ["sh", "-c", "echo begun; cat; exit 7"], stdin=True)
    is_to_end = threading.Event()

    def requests() -> Iterator[engine_pb2.ExecRunRequest]:
        yield engine_pb2.ExecRunRequest(stdin=b"at once\n")
        is_to_end.wait(10)
        yield engine_pb2.ExecRunRequest(stdin=b"later\n")

    collected = Collected()
    for part in client.containers.exec_run(Execution(process), requests()):
        collected.add(part)
        if b"at once" in part.stdout:
            is_to_end.set()
    assert is_to_end.is_set()
    result = collected.result()
    assert (result.stdout, result.code, result.exit.known) == (b"begun\nat once\nlater\n", 7, True)
    daemon.restart()


@pytest.mark.parametrize("failpoint", ["shim.attach.before_connect", "shim.attach.before_reply"])
def test_a_client_stays_attached_though_an_heir_is_killed_while_it_comes_back(
    client: Client, daemon: Corrald, failpoint: str
) -> None:
    daemon.restart_with({"CORRAL_FAILPOINTS": f"{failpoint}=sleep:1@1"})
    made = eventually(lambda: client.containers.run("busybox", ["sleep", "1000"], name="long", network="none"))
    process = exec_request("long", ["sh", "-c", "echo begun; read x; echo got $x; exit 7"], stdin=True)
    is_heir_gone = threading.Event()

    def requests() -> Iterator[engine_pb2.ExecRunRequest]:
        is_heir_gone.wait(20)
        yield engine_pb2.ExecRunRequest(stdin=b"that\n")

    def kill_two() -> None:
        shim = made.shim_pid
        kill_shim(client, "long")
        while client.containers.get("long").shim_pid == shim:
            time.sleep(0.01)
        time.sleep(0.5)  # by now that is told to attach
        kill_shim(client, "long")
        is_heir_gone.set()

    collected, killing = Collected(), threading.Thread(target=kill_two)
    for part in client.containers.exec_run(Execution(process), requests()):
        collected.add(part)
        if b"begun" in part.stdout:
            killing.start()
    killing.join()
    result = collected.result()
    assert (result.stdout, result.code, result.exit.known) == (b"begun\ngot that\n", 7, True)
    daemon.restart()


def test_one_whose_shim_is_killed_before_it_has_told_it_to_run_never_does_and_is_told_to_be_lost(
    client: Client, daemon: Corrald
) -> None:
    daemon.restart_with({"CORRAL_FAILPOINTS": "shim.exec.before_start=kill@1"})
    eventually(lambda: client.containers.run("busybox", ["sleep", "1000"], name="long", network="none"))
    made = client.containers.exec_create("long", ["touch", "/ran"])
    with pytest.raises((FailedPrecondition, Unavailable)):
        client.containers.exec_start("long", made.exec_id)
    status = client.containers.exec_wait("long", made.exec_id)
    assert (status.known, status.code) == (False, 255)
    daemon.restart()
    kill_shim(client, "long")  # which has that armed
    collected = Collected()
    for part in client.containers.exec_run(Execution(exec_request("long", ["test", "-e", "/ran"])), iter(())):
        collected.add(part)
    assert collected.result().code == 1


def test_a_container_outlives_any_number_of_heirs_that_are_killed_as_they_take_it_over(
    client: Client, daemon: Corrald
) -> None:
    script = "while ! test -e /go; do usleep 9999; done; echo bye; exit 9"
    made = client.containers.run("busybox", ["sh", "-c", script], name="made", id="made", network="none")
    client.containers.run("busybox", ["sleep", "999"], name="removed", id="removed", network="none")
    daemon.restart_with({"CORRAL_FAILPOINTS": "shim.adopt.before_reply=kill"})
    eventually(lambda: kill_shim(client, "made"))
    time.sleep(4)
    assert client.containers.get("made").status == engine_pb2.STATUS_RUNNING
    eventually(lambda: kill_shim(client, "removed"))
    client.containers.remove("removed", force=True)
    assert [each.name for each in client.containers.list(all=True)] == ["made"]
    daemon.restart()
    Path(f"/proc/{made.pid}/root/go").touch()
    status = eventually(lambda: client.containers.wait("made"))
    assert (status.code, status.known) == (9, True)
    assert [entry.line for entry in client.containers.logs("made")] == [b"bye\n"]


def test_an_exec_outlives_any_number_of_heirs_that_are_killed_as_they_take_it_over(
    client: Client, daemon: Corrald
) -> None:
    """Each takes over the container first."""
    daemon.restart_with({"CORRAL_FAILPOINTS": "shim.adopt.before_reply=kill@2"})
    eventually(lambda: client.containers.run("busybox", ["sleep", "1000"], name="long", network="none"))
    made = client.containers.exec_create("long", ["sh", "-c", "sleep 1; exit 37"])
    client.containers.exec_start("long", made.exec_id)
    kill_shim(client, "long")
    status = client.containers.exec_wait("long", made.exec_id)
    assert (status.code, status.known) == (37, True)
    daemon.restart()


def test_one_that_is_started_by_itself_is_started_then_and_one_that_has_ended_by_then_has_its_exit_code(
    client: Client, daemon: Corrald
) -> None:
    daemon.restart_with({"CORRAL_FAILPOINTS": "shim.exec.before_reply=kill"})
    eventually(lambda: client.containers.run("busybox", ["sleep", "1000"], name="long", network="none"))
    for script, code in ("sleep 0.5; exit 32", 32), ("exit 33", 33):
        made = client.containers.exec_create("long", ["sh", "-c", script])
        client.containers.exec_start("long", made.exec_id)
        status = client.containers.exec_wait("long", made.exec_id)
        assert (status.code, status.known) == (code, True)
    daemon.restart()


def test_what_only_a_zygote_has_is_waited_for_if_that_is_told_last_of_the_death_of_a_shim(
    client: Client, daemon: Corrald
) -> None:
    daemon.restart_with({"CORRAL_FAILPOINTS": "shim.exec.before_reply=kill"})
    eventually(lambda: client.containers.run("busybox", ["sleep", "1000"], name="long", network="none"))
    made = client.containers.exec_create("long", ["sh", "-c", "sleep 2; exit 35"])
    zygote = parent_of(client.containers.get("long").shim_pid)
    os.kill(zygote, signal.SIGSTOP)
    threading.Timer(0.5, os.kill, (zygote, signal.SIGCONT)).start()
    assert client.containers.exec_start("long", made.exec_id) > 0
    status = client.containers.exec_wait("long", made.exec_id)
    assert (status.code, status.known) == (35, True)
    daemon.restart()


def test_who_waits_for_an_exec_is_told_its_end_also_if_it_cannot_be_removed(client: Client, daemon: Corrald) -> None:
    daemon.restart_with({"CORRAL_FAILPOINTS": "tasks.delete_exec.after_shim=error"})
    eventually(lambda: client.containers.run("busybox", ["sleep", "1000"], name="long", network="none"))
    made = client.containers.exec_create("long", ["sh", "-c", "exit 36"])
    client.containers.exec_start("long", made.exec_id)
    assert client.containers.exec_wait("long", made.exec_id, remove=True).code == 36
    daemon.restart()


def test_an_exec_that_was_created_is_told_to_be_lost_with_both_its_shim_and_the_daemon(
    client: Client, daemon: Corrald
) -> None:
    client.containers.run("busybox", ["sleep", "1000"], name="long", network="none")
    made = client.containers.exec_create("long", ["true"])
    shim = client.containers.get("long").shim_pid
    daemon.kill9()
    os.kill(shim, signal.SIGKILL)
    daemon.start()
    with pytest.raises(FailedPrecondition, match=r"cannot be started any more: its shim was killed.*; create it anew"):
        eventually(lambda: client.containers.exec_start("long", made.exec_id))
    again = client.containers.exec_create("long", ["sh", "-c", "exit 34"])
    client.containers.exec_start("long", again.exec_id)
    assert client.containers.exec_wait("long", again.exec_id).code == 34


def test_input_that_a_client_has_sent_reaches_the_process_over_the_death_of_its_shim(
    client: Client, daemon: Corrald
) -> None:
    """The process reads late, so that the pipes on the way are full when the shim is killed."""
    text = "".join(f"line {number}\n" for number in range(60_000)).encode()
    script = ["sh", "-c", "sleep 1; cat; exit 6"]
    client.containers.create("busybox", script, name="fed", network="none", stdin=True, stdin_once=True)

    def requests() -> Iterator[tasks_pb2.AttachRequest]:
        for start in range(0, len(text), 20_000):
            yield tasks_pb2.AttachRequest(stdin=text[start : start + 20_000])

    attachment = Attachment("fed", stdin=True, stderr=True, lossless=True)
    for part in client.containers.attach(attachment, requests()):
        if part.HasField("attached"):
            client.containers.start("fed")
            time.sleep(0.4)
            kill_shim(client, "fed")
    assert client.containers.wait("fed").code == 6
    assert b"".join(entry.line for entry in client.containers.logs("fed")) == text


@needs("cgroup")
def test_a_kill_for_memory_while_there_is_no_shim_is_told(client: Client, daemon: Corrald) -> None:
    script = "sleep 0.8; dd if=/dev/zero of=/dev/shm/x bs=1M count=64; sleep 0.3; exit 7"
    options = {"memory": "32m", "network": "none"}
    client.containers.run("busybox", ["sh", "-c", script], name="hungry", id="hungry", **options)  # type: ignore[arg-type]
    shim = client.containers.get("hungry").shim_pid
    daemon.kill9()
    os.kill(shim, signal.SIGKILL)
    time.sleep(2)
    daemon.start()
    status = eventually(lambda: client.containers.wait("hungry"))
    assert (status.code, status.known, status.oom_killed) == (7, True, True)


def test_a_create_by_the_id_of_one_that_cannot_be_undone_yet_is_not_told_that_it_was_done(
    busybox_archive: Path,
) -> None:
    with running(split=True) as five, five.client() as client:
        client.images.load(busybox_archive, name="busybox")
        five.kill9("network")
        for _ in range(2):
            with pytest.raises(Unavailable):
                client.containers.create("busybox", ["true"], name="half", id="half")
        five.start("network")
        made = client.containers.create("busybox", ["true"], name="half", id="half", network="none")
        assert made.status == engine_pb2.STATUS_CREATED
        client.containers.remove("half", force=True)


def eventually[T](call: Callable[[], T]) -> T:
    """Its answer, once the daemon is reached again."""
    while True:
        try:
            return call()
        except Unavailable:
            time.sleep(0.05)
