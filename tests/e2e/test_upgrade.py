"""corrald executes itself anew while clients call, wait, follow and are attached: none of them sees anything of it."""

import hashlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from support import registry as registries
from support.amounts import amount
from support.corrald import CORRAL, PATIENCE, Corrald, running
from support.images import Entry, image_config, layer, write_docker_archive
from support.requirements import needs
from support.throttle import throttled

from corral.api.types.v1 import types_pb2
from corral.api.version.v1 import version_pb2, version_pb2_grpc

pytestmark = needs("root", "overlayfs", "netns")

UPGRADES = int(os.environ.get("CORRAL_TEST_UPGRADES") or amount(3, in_ci=2))


def upgrade(daemon: Corrald) -> None:
    done = daemon.corral("system", "upgrade", timeout_s=120 * PATIENCE)
    assert (done.returncode, done.stderr.decode()) == (0, "")
    assert done.stdout.startswith(b"corrald ")


def pids(daemon: Corrald) -> list[int]:
    return [process.pid for process in daemon.processes.values()]


@contextmanager
def meanwhile(*acts: Callable[[], object]) -> Iterator[dict[str, int]]:
    """Each over and over in a thread of its own; yields how often it worked. Raises what one raised."""
    stop, counts = threading.Event(), {}
    failures: list[BaseException] = []

    def go(act: Callable[[], object]) -> None:
        while not stop.is_set() and not failures:
            try:
                act()
            except BaseException as e:  # noqa: BLE001
                failures.append(e)
            counts[act.__name__] = counts.get(act.__name__, 0) + 1
            time.sleep(0.005)

    threads = [threading.Thread(target=go, args=(act,)) for act in acts]
    for thread in threads:
        thread.start()
    try:
        yield counts
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]


def test_no_call_fails_while_it_is_upgraded_again_and_again(box: Corrald) -> None:
    with box.client() as client:

        def over_one_connection() -> None:
            client.system.version()

        def over_a_new_connection() -> None:
            with box.client() as new:
                new.system.info()

        def without_our_client() -> None:
            """Also with who may be connected already. As grpc is by default, but that to connect it gives up after
            20 s, in which a busy machine may not have loaded the new program."""
            with grpc.insecure_channel(box.address, [("grpc.min_reconnect_backoff_ms", 60_000)]) as channel:
                for _ in range(3):
                    version_pb2_grpc.VersionStub(channel).Get(version_pb2.GetRequest())

        before = client.system.version()
        with meanwhile(over_one_connection, over_a_new_connection, without_our_client) as counts:
            for _ in range(UPGRADES):
                upgrade(box)
        after = client.system.version()
    assert min(counts.values()) > 10 * UPGRADES, counts
    assert (after.generation, after.pid) == (before.generation + UPGRADES, before.pid)


def test_no_descriptor_and_no_process_is_left_of_the_programs_before(box: Corrald) -> None:
    def held() -> list[int]:
        return [len([*Path(f"/proc/{pid}/fd").iterdir()]) for pid in pids(box)]

    upgrade(box)
    before = held()
    upgrade(box)
    deadline = time.monotonic() + 20 * PATIENCE
    hidden = [*box.state.glob(".*")]
    while hidden or any(now > was for now, was in zip(held(), before, strict=True)):
        assert time.monotonic() < deadline, (before, held(), hidden)
        hidden = [*box.state.glob(".*")]
        time.sleep(0.1)
    for pid in pids(box):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        states = [Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] for child in children]
        assert "Z" not in states


@contextmanager
def command(box: Corrald, *arguments: str, stdin: int = subprocess.DEVNULL) -> Iterator["subprocess.Popen[bytes]"]:
    environment = os.environ | {"CORRAL_ADDRESS": box.address}
    with subprocess.Popen([str(CORRAL), *arguments], stdin=stdin, stdout=subprocess.PIPE, env=environment) as process:
        yield process


def test_an_attached_client_misses_no_byte_either_way(box: Corrald) -> None:
    """Both ways at once, as fast as it goes: what is on its way when the daemon leaves must arrive, once."""
    with command(box, "run", "--rm", "-i", "busybox", "cat", stdin=subprocess.PIPE) as run:
        assert run.stdin is not None
        assert run.stdout is not None
        sent, got = hashlib.sha256(), hashlib.sha256()
        upgraded = threading.Event()

        def feed() -> None:
            assert run.stdin is not None
            while not upgraded.is_set():
                block = os.urandom(1 << 20)
                sent.update(block)
                run.stdin.write(block)
            run.stdin.close()

        def act() -> None:
            try:
                upgrade(box)
            finally:
                upgraded.set()

        threads = [threading.Thread(target=feed), threading.Thread(target=act)]
        threads[0].start()
        got.update(run.stdout.read(1 << 20))
        threads[1].start()
        while block := run.stdout.read1(1 << 20):
            got.update(block)
        for thread in threads:
            thread.join()
        assert run.wait(30) == 0
    assert got.digest() == sent.digest()


@pytest.mark.parametrize("interactive", [False, True], ids=["without-stdin", "after-the-end-of-stdin"])
def test_whoever_only_reads_goes_on_too(box: Corrald, interactive: bool) -> None:
    options = ["-i"] if interactive else []
    script = "cat; i=0; while [ $i -lt 300 ]; do echo $i; echo $i >&2; i=$((i+1)); usleep 20000; done; exit 3"
    with command(box, "run", "--rm", *options, "busybox", "sh", "-c", script) as run:
        assert run.stdout is not None
        first = run.stdout.readline()
        upgrade(box)
        rest = run.stdout.read()
        assert run.wait(30) == 3
    assert (first + rest).split() == [b"%d" % n for n in range(300)]


def test_input_that_is_not_read_waits_until_it_is(box: Corrald) -> None:
    """More of it than anything between holds."""
    script = "while ! test -e /go; do usleep 20000; done; md5sum"
    sent = os.urandom(1 << 20) * 24
    with command(box, "run", "--rm", "-i", "busybox", "sh", "-c", script, stdin=subprocess.PIPE) as run:
        assert run.stdin is not None
        assert run.stdout is not None
        with box.client() as client:
            while not (found := [c for c in client.containers.list() if c.pid]):
                time.sleep(0.05)
        feeding = threading.Thread(target=lambda: (run.stdin.write(sent), run.stdin.close()))  # type: ignore[union-attr]
        feeding.start()
        time.sleep(1)
        upgrade(box)
        assert feeding.is_alive()
        assert run.poll() is None
        Path(f"/proc/{found[0].pid}/root/go").touch()
        assert run.stdout.read().split()[0].decode() == hashlib.md5(sent, usedforsecurity=False).hexdigest()
        assert run.wait(30) == 0
        feeding.join()


def test_who_is_cut_off_is_told_that_the_container_goes_on_and_how_to_come_back(box: Corrald, name: str) -> None:
    script = "echo ready; exec sleep 1000"
    # From another network namespace, where it can't take the pipes over.
    run = ["unshare", "--net", str(CORRAL), "run", "--name", name, "busybox", "sh", "-c", script]
    environment = os.environ | {"CORRAL_ADDRESS": box.address}
    with subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        box.kill9()
        _, errors = process.communicate(timeout=60)
    box.start()
    assert process.returncode == 125
    assert b"the container goes on, and corral attach " in errors
    assert name in box.corral("ps", check=True).stdout.decode()


def await_file(path: Path) -> None:
    deadline = time.monotonic() + 30 * PATIENCE
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_container_that_removes_itself_and_ends_during_an_upgrade_is_read_first(box: Corrald, name: str) -> None:
    """The upgrade waits for a call that has come late, and takes its time; who reads the container was sent away
    before that."""
    script = "while ! test -e /end; do usleep 20000; done; echo bye; exit 7"
    with box.client() as client, box.client() as other:
        client.containers.run("busybox", ["sleep", "1000"], name=name)
        root = Path(f"/proc/{client.containers.get(name).pid}/root")
        scripts = "touch /held; while test -e /held; do usleep 20000; done", "touch /late; exec sleep 4"
        held, late = (
            threading.Thread(target=other.containers.exec, args=(name, ["sh", "-c", script])) for script in scripts
        )
        held.start()
        await_file(root / "held")
        with command(box, "run", "--rm", "--name", f"{name}-read", "busybox", "sh", "-c", script) as run:
            while not (pid := next((c.pid for c in client.containers.list() if c.name == f"{name}-read"), 0)):
                time.sleep(0.05)
            ready, begun = len(box.events("daemon.ready")), len(box.events("daemon.upgrading"))
            box.processes[list(box.processes)[-1]].send_signal(signal.SIGUSR2)
            deadline = time.monotonic() + 30 * PATIENCE
            while len(box.events("daemon.upgrading")) == begun:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            late.start()
            await_file(root / "late")
            (root / "held").unlink()
            time.sleep(1)
            assert len(box.events("daemon.ready")) == ready
            Path(f"/proc/{pid}/root/end").touch()
            assert run.stdout is not None
            assert run.stdout.read() == b"bye\n"
            assert run.wait(30) == 7
        held.join()
        late.join()
        deadline = time.monotonic() + 20 * PATIENCE
        while any(c.name == f"{name}-read" for c in client.containers.list(all=True)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        client.containers.remove(name, force=True)


def test_who_waits_and_who_follows_the_log_or_the_journal_goes_on(box: Corrald, name: str) -> None:
    lines = "i=0; while [ $i -lt 400 ]; do echo line $i; i=$((i+1)); usleep 20000; done; exit 5"
    with box.client() as client:
        client.containers.run("busybox", ["sh", "-c", lines], name=name)
        last = client.containers.get(name)
        waited: list[int] = []
        followed: list[bytes] = []
        events: list[types_pb2.Event] = []

        def wait() -> None:
            waited.append(client.containers.wait(name).code)

        def follow() -> None:
            followed.extend(entry.line for entry in client.containers.logs(name, follow=True))

        def watch() -> None:
            request = types_pb2.EventsRequest(subjects=[last.id])
            for answer in client.system.events(request):
                events.extend(answer.events)
                if any(event.topic == "container.died" for event in answer.events):
                    return

        threads = [threading.Thread(target=act) for act in (wait, follow, watch)]
        for thread in threads:
            thread.start()
        for _ in range(2):
            upgrade(box)
        for thread in threads:
            thread.join(60 * PATIENCE)
        client.containers.remove(name, force=True)
    assert waited == [5]
    assert followed == [b"line %d\n" % n for n in range(400)]
    numbers = [event.seq for event in events]
    assert numbers == sorted(set(numbers))
    assert [e.topic for e in events].count("container.died") == 1


def test_who_follows_a_log_and_takes_nothing_while_corrald_is_upgraded_misses_no_line(box: Corrald, name: str) -> None:
    """What it is sent waits for it, more than anything between holds."""
    count, filling = 20_000, "x" * 100
    script = f"i=0; while [ $i -lt {count} ]; do echo $i {filling}; i=$((i+1)); done; exec sleep 1000"
    with box.client() as client:
        client.containers.run("busybox", ["sh", "-c", script], name=name)
        lines = iter(client.containers.logs(name, follow=True))
        numbers = [int(next(lines).line.split()[0])]
        time.sleep(2)
        upgrade(box)
        numbers += [int(next(lines).line.split()[0]) for _ in range(count - 1)]
        assert numbers == list(range(count))
        client.containers.remove(name, force=True)


def test_who_follows_what_a_container_uses_goes_on(box: Corrald, name: str) -> None:
    with box.client() as client:
        client.containers.run("busybox", ["sleep", "1000"], name=name)
        answers: list[object] = []
        failures: list[Exception] = []
        enough = threading.Event()

        def follow() -> None:
            try:
                for answer in client.containers.stats([name], interval_ms=100):
                    answers.append(answer)
                    if enough.is_set():
                        return
            except Exception as e:  # noqa: BLE001
                failures.append(e)

        def come(count: int) -> None:
            deadline, mark = time.monotonic() + 30 * PATIENCE, len(answers)
            while len(answers) < mark + count:
                assert time.monotonic() < deadline, failures
                time.sleep(0.05)

        following = threading.Thread(target=follow)
        following.start()
        try:
            come(2)
            upgrade(box)
            come(3)
        finally:
            enough.set()
            following.join(30 * PATIENCE)
            client.containers.remove(name, force=True)
        assert not following.is_alive()


@needs("docker-registry", "skopeo")
def test_a_pull_that_an_upgrade_does_not_wait_for_goes_on_where_it_was(tmp_path: Path) -> None:
    noise = [layer([Entry("noise", random.Random(7).randbytes(size := 24 << 20))])]
    archive = write_docker_archive(tmp_path / "noise.tar", "noise:1", noise, image_config(noise))
    with (
        registries.running(tmp_path / "registry") as registry,
        throttled(registry.port, size // 4) as throttle,
        running(settings={"daemon": {"upgrade_grace_s": 0.2}}) as daemon,
        daemon.client() as client,
    ):
        name = f"{registry.host}/noise:1"
        registries.skopeo("copy", "--dest-tls-verify=false", f"docker-archive:{archive}", f"docker://{name}")
        name = f"{throttle.host}/noise:1"
        pulled: list[str] = []
        pulling = threading.Thread(target=lambda: pulled.append(client.images.pull(name, insecure=True).name))
        pulling.start()
        deadline = time.monotonic() + 30 * PATIENCE
        while throttle.sent < size // 4:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        throttle.bytes_per_s = 20_000
        upgrade(daemon)
        assert pulling.is_alive()
        before, throttle.bytes_per_s = throttle.sent, 0
        pulling.join(60 * PATIENCE)
        assert pulled == [name]
        assert throttle.sent < size * 1.1, (before, throttle.sent, size)


def test_containers_are_not_touched(box: Corrald, name: str) -> None:
    with box.client() as client:
        client.containers.run("busybox", ["sleep", "1000"], name=name)
        before = client.containers.get(name)
        shim = Path(f"/proc/{before.pid}/stat").read_text()
        upgrade(box)
        after = client.containers.get(name)
        assert (after.pid, after.shim_pid, after.started_at) == (before.pid, before.shim_pid, before.started_at)
        assert Path(f"/proc/{after.pid}/stat").read_text().split()[21] == shim.split()[21]
        assert client.containers.exec(name, ["echo", "there"]).stdout == b"there\n"
        client.containers.remove(name, force=True)


def test_what_would_not_start_is_refused_and_the_old_one_goes_on(box: Corrald) -> None:
    config = box.place.directory / "config.toml"
    good = config.read_text()
    config.write_text(good + "\n[engine]\nlimit_of_patience = 3\n")
    try:
        done = box.corral("system", "upgrade", timeout_s=120)
        assert done.returncode == 1
        assert b"would not start, so this one goes on" in done.stderr
        assert b"has no setting 'limit_of_patience'" in done.stderr
        process = list(box.processes.values())[-1]
        process.send_signal(signal.SIGUSR2)
        deadline = time.monotonic() + 30 * PATIENCE
        while not box.events("daemon.upgrade_refused"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with box.client() as client:
            assert client.system.info()
    finally:
        config.write_text(good)
    upgrade(box)


def test_what_cannot_be_executed_after_all_is_told_and_the_old_one_goes_on(
    busybox_archive: Path, tmp_path: Path
) -> None:
    """It was there when it was checked."""
    python = tmp_path / "python"
    python.symlink_to(Path(sys.executable).resolve())
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with running(command=(str(python), "-m", "corral.daemon"), environment=environment) as daemon:
        daemon.corral("image", "import", str(busybox_archive), "--as", "busybox", check=True)
        with daemon.client() as client, command(daemon, "run", "-i", "busybox", "cat", stdin=subprocess.PIPE) as cat:
            assert cat.stdin is not None
            assert cat.stdout is not None
            while not (found := [c for c in client.containers.list() if c.pid]):
                time.sleep(0.05)
            held = Path(f"/proc/{found[0].pid}/root")
            script = "touch /held; while test -e /held; do usleep 20000; done"
            slow = threading.Thread(target=lambda: daemon.corral("exec", found[0].id, "sh", "-c", script, check=True))
            slow.start()
            await_file(held / "held")
            asked: list[subprocess.CompletedProcess[bytes]] = []
            asking = threading.Thread(target=lambda: asked.append(daemon.corral("system", "upgrade", timeout_s=120)))
            asking.start()
            deadline = time.monotonic() + 30 * PATIENCE
            while not daemon.events("daemon.upgrading"):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            python.rename(tmp_path / "gone")
            (held / "held").unlink()
            asking.join()
            assert asked[0].returncode == 1
            assert (
                f"{python} cannot be executed: No such file or directory; this corrald goes on"
                in asked[0].stderr.decode()
            )
            cat.stdin.write(b"still there\n")
            cat.stdin.flush()
            assert cat.stdout.readline() == b"still there\n"
            after = client.containers.get(found[0].id)
            assert (after.pid, after.shim_pid) == (found[0].pid, found[0].shim_pid)
            slow.join()
            (tmp_path / "gone").rename(python)
            upgrade(daemon)
            assert client.system.version().generation == 1
            cat.stdin.close()
            assert cat.wait(30) == 0


def test_a_second_daemon_never_gets_in_between(box: Corrald) -> None:
    """The locks are held while the program is exchanged."""
    command = [*box.command, "--root", str(box.root), "--state", str(box.state)]
    command += ["--service", "tasks", "--config", str(box.place.directory / "config.toml")]
    stop = threading.Event()
    codes: list[tuple[int, bytes]] = []

    def intrude() -> None:
        while not stop.is_set():
            done = subprocess.run(command, capture_output=True, timeout=60, check=False)
            codes.append((done.returncode, done.stderr))

    intruders = [threading.Thread(target=intrude) for _ in range(2)]
    for thread in intruders:
        thread.start()
    try:
        for _ in range(2):
            upgrade(box)
    finally:
        stop.set()
        for thread in intruders:
            thread.join()
    assert len(codes) > 2
    assert all(code == 1 and b"another corrald (process" in said for code, said in codes), codes


def test_the_service_manager_sees_a_reload_of_the_same_process() -> None:
    with Corrald() as daemon:
        path = daemon.place.directory / "notify"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(str(path))
            manager.settimeout(60)
            daemon.start(environment={"NOTIFY_SOCKET": str(path)})
            assert manager.recv(200) == b"READY=1"
            before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
            daemon.processes["corrald"].send_signal(signal.SIGUSR2)
            reloading, _, when = manager.recv(200).partition(b"\n")
            assert reloading == b"RELOADING=1"
            assert before < int(when.removeprefix(b"MONOTONIC_USEC="))
            assert manager.recv(200) == b"READY=1"
        ready = daemon.events("daemon.ready")
        assert [event["generation"] for event in ready] == [0, 1]
        assert ready[0]["pid"] == ready[1]["pid"]
