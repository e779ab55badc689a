"""One container's life as its shim sees it: create, start, kill, exit, delete, and what stays on disk."""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from shimclient import RequestError, Shim, Workshop, connect, process, read_to_end, wait_gone, workshop
from support.requirements import needs

from corral.kernel.cgroup import Driver, HugetlbLimit, Resources, detect, hugepages

pytestmark = needs("root", "busybox")


@pytest.fixture(scope="module")
def shop() -> Iterator[Workshop]:
    with workshop() as made:
        yield made


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """An empty cgroup."""
    hierarchy = detect().of("pids")
    assert hierarchy is not None
    path = Path(hierarchy.mount_point) / f"corral-shim-{os.getpid()}"
    path.mkdir()
    yield path
    deadline = time.monotonic() + 5
    while path.exists() and time.monotonic() < deadline:
        try:
            path.rmdir()
        except OSError:
            time.sleep(0.02)


def refused(kind: str) -> AbstractContextManager[object]:
    return pytest.raises(RequestError, match=f"^{kind}: ")


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def status_field(pid: int, name: str) -> str:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return line.partition(":")[2].strip()
    raise LookupError(name)


def test_the_hello_tells_who_and_in_what_state(shop: Workshop) -> None:
    shim = shop.spawn("true")
    assert shim.peer.hello == {
        "v": 1,
        "shim": "0.1.0",
        "namespace": "default",
        "container": shim.name,
        "state": "new",
    }
    shim.create()
    second = connect(shim.bundle)
    assert second.hello["state"] == "created"
    second.close()


def test_a_container_goes_from_new_to_stopped_and_its_shim_ends_by_itself(shop: Workshop) -> None:
    shim = shop.spawn("sh", "-c", "exit 7")
    assert shim.state()["state"] == "new"
    pid = shim.create()
    assert shim.state()["state"] == "created"
    assert status_field(pid, "PPid") == str(shim.pid)
    shim.call("subscribe")
    shim.start()
    started, exited = shim.peer.event(), shim.peer.event()
    assert (started["event"], started["exec"], started["pid"]) == ("started", "", pid)
    assert (exited["event"], exited["code"], exited["signal"], exited["oom"]) == ("exited", 7, None, False)
    assert shim.peer.at_end()
    assert {**shim.wait(), "event": "exited"} == exited
    assert shim.reports() == ""


def test_the_exit_is_on_disk_before_anyone_is_told(shop: Workshop) -> None:
    shim = shop.run("sh", "-c", "read x; exit 3", stdin=True)
    shim.call("subscribe")
    (stdin,) = shim.attach("stdin")
    assert not (shim.bundle / "exit.json").exists()
    os.write(stdin, b"go\n")
    event = shim.peer.event()
    assert shim.exit_file()["code"] == event["code"] == 3
    os.close(stdin)


def test_exit_times_are_in_order_and_name_the_process(shop: Workshop) -> None:
    before = time.time_ns()
    shim = shop.spawn("sleep", "0.05")
    pid = shim.create()
    start_time = shim.state()["start_time"]
    shim.start()
    exited = shim.wait()
    assert exited["pid"] == pid
    assert exited["start_time"] == start_time
    started_at, exited_at = exited["started_at_ns"], exited["exited_at_ns"]
    assert isinstance(started_at, int)
    assert isinstance(exited_at, int)
    assert before < started_at < exited_at < time.time_ns()
    assert exited_at - started_at >= 50_000_000


def test_the_record_names_shim_and_init(shop: Workshop) -> None:
    shim = shop.spawn("sleep", "100")
    pid = shim.create()
    shim.call("state")  # it is written after the reply, before the next request
    record = json.loads((shim.bundle / "record.json").read_text())
    assert (record["v"], record["shim_pid"], record["init_pid"]) == (1, shim.pid, pid)
    assert (record["started_at_ns"], record["terminal"]) == (None, False)
    shim.start()
    shim.call("state")
    started = json.loads((shim.bundle / "record.json").read_text())
    assert started["started_at_ns"] > started["created_at_ns"]
    assert {**started, "started_at_ns": None} == record


def test_a_signal_ends_it_as_128_plus_its_number(shop: Workshop) -> None:
    shim = shop.run("sleep", "100")
    shim.call("kill", signal=signal.SIGKILL)
    exited = shim.wait()
    assert (exited["code"], exited["signal"]) == (137, 9)


def test_a_signal_reaches_a_program_that_handles_it(shop: Workshop) -> None:
    shim = shop.run("sh", "-c", "trap 'exit 5' TERM; echo ready; while :; do sleep 0.01; done")
    (out,) = shim.attach("stdout", replay=True)
    assert os.read(out, 100) == b"ready\n"
    shim.call("kill", signal=signal.SIGTERM)
    assert shim.wait()["code"] == 5
    os.close(out)


def test_killing_all_reaches_every_process_of_the_cgroup(shop: Workshop, cgroup: Path) -> None:
    shim = shop.run("sh", "-c", "sleep 100 & sleep 101 & wait; wait", cgroup={"paths": [str(cgroup)]})
    while len((cgroup / "cgroup.procs").read_text().split()) < 3:
        time.sleep(0.01)
    shim.call("kill", signal=signal.SIGKILL, all=True)
    shim.wait()
    assert (cgroup / "cgroup.procs").read_text() == ""


def test_a_created_container_that_is_killed_has_an_exit_without_a_start(shop: Workshop) -> None:
    shim = shop.spawn("true")
    shim.create()
    shim.call("kill", signal=signal.SIGKILL)
    exited = shim.wait()
    assert (exited["code"], exited["started_at_ns"]) == (137, None)


def test_init_that_is_killed_from_outside_is_noticed(shop: Workshop) -> None:
    shim = shop.run("sleep", "100")
    pid = shim.state()["pid"]
    assert isinstance(pid, int)
    os.kill(pid, signal.SIGKILL)
    assert shim.wait()["code"] == 137


@pytest.mark.parametrize(
    ("program", "kind", "code"), [("/none", "exec_not_found", 127), ("/etc/passwd", "exec_denied", 126)]
)
def test_a_program_that_cannot_run_is_an_error_and_an_exit(shop: Workshop, program: str, kind: str, code: int) -> None:
    shim = shop.spawn(program)
    shim.create()
    with refused(kind):
        shim.start()
    exited = shim.wait()
    assert (exited["code"], exited["signal"], exited["started_at_ns"]) == (code, None, None)
    assert program in str(exited["reason"])


def test_a_container_that_cannot_be_created_leaves_a_new_shim_that_can_be_deleted(shop: Workshop) -> None:
    shim = shop.spawn("true")
    (shim.bundle / "config.json").write_text(json.dumps({"ociVersion": "1.2.0", "process": process("true")}))
    with refused("invalid_argument"):
        shim.create()
    assert shim.state()["state"] == "new"
    assert children_of(shim.pid) == []
    assert not (shim.bundle / "record.json").exists()
    assert not (shim.bundle / "stdout").exists()
    assert shim.call("delete") == {}
    wait_gone(shim.pid)
    assert not (shim.bundle / "exit.json").exists()


def test_a_failed_create_can_be_tried_again(shop: Workshop) -> None:
    shim = shop.spawn("echo", "second")
    with refused("not_found"):
        shim.create(log={"driver": "json-file", "path": str(shim.bundle / "none" / "log")})
    shim.create()
    (out,) = shim.attach("stdout")
    shim.start()
    assert read_to_end(out) == b"second\n"


def test_a_log_that_cannot_be_opened_ends_the_init_that_was_begun(shop: Workshop) -> None:
    shim = shop.spawn("true")
    with refused("not_found"):
        shim.call("create", log={"driver": "json-file", "path": str(shim.bundle / "missing/log")})
    assert children_of(shim.pid) == []
    assert sorted(path.name for path in shim.bundle.iterdir()) == ["config.json", "socket"]
    shim.create()
    shim.start()
    assert shim.wait()["code"] == 0


def test_deleting_a_running_container_kills_it_and_answers_when_it_is_gone(shop: Workshop) -> None:
    shim = shop.run("sleep", "100")
    pid = shim.state()["pid"]
    assert isinstance(pid, int)
    assert shim.call("delete") == {}
    assert not Path(f"/proc/{pid}").exists()
    assert shim.wait()["code"] == 137


def test_deleting_a_created_container_ends_it(shop: Workshop) -> None:
    shim = shop.spawn("true")
    pid = shim.create()
    shim.call("delete")
    wait_gone(shim.pid)
    assert not Path(f"/proc/{pid}").exists()


def test_moves_that_make_no_sense_are_refused_by_kind(shop: Workshop) -> None:
    shim = shop.spawn("sleep", "100")
    with refused("failed_precondition"):
        shim.start()
    with refused("failed_precondition"):
        shim.call("kill", signal=15)
    with refused("failed_precondition"):
        shim.exec("e", "true")
    shim.create()
    with refused("already_exists"):
        shim.create()
    with refused("failed_precondition"):
        shim.exec("e", "true")
    shim.start()
    with refused("failed_precondition"):
        shim.start()
    with refused("not_found"):
        shim.call("kill", exec="none", signal=15)
    with refused("not_found"):
        shim.start("none")
    with refused("invalid_argument"):
        shim.call("kill", signal=1000)
    with refused("invalid_argument"):
        shim.call("kill", exec="../../etc", signal=15)
    with refused("unimplemented"):
        shim.call("dance")
    with refused("failed_precondition"):
        shim.call("resize", width=80, height=24)
    assert shim.state()["state"] == "running"


@pytest.mark.parametrize(
    "fields",
    [
        {"rootfs": "x"},
        {"rootfs": [1]},
        {"user": 5},
        {"stdin": "yes"},
        {"console_size": [1]},
        {"console_size": [1, 70000]},
        {"log": {"driver": "tape", "path": "/x"}},
        {"log": {"driver": "cri", "path": "relative"}},
        {"log": {"driver": "cri", "path": "/x", "max_size": -1}},
        {"cgroup": {"paths": "/sys"}},
        {"cgroup": []},
    ],
    ids=str,
)
def test_malformed_requests_are_refused_and_change_nothing(shop: Workshop, fields: dict[str, object]) -> None:
    shim = shop.spawn("true")
    with refused("invalid_argument"):
        shim.call("create", **fields)
    assert shim.state()["state"] == "new"


def test_fields_of_a_newer_daemon_are_ignored(shop: Workshop) -> None:
    shim = shop.spawn("true")
    shim.create(colour="blue", cgroup={"paths": [], "hue": 3})
    shim.call("start", exec="", mood="good")
    assert shim.wait()["code"] == 0


def test_orphans_inside_are_reaped_and_nothing_stays_a_zombie(shop: Workshop) -> None:
    # Without a pid namespace of its own, orphans of the container go to the nearest subreaper: the shim.
    shim = shop.spawn(
        "sh", "-c", "for i in 1 2 3 4 5; do (sleep 0.05 &) ; done; sleep 100", namespaces=("mount", "ipc", "uts")
    )
    pid = shim.create()
    shim.start()
    deadline = time.monotonic() + 5
    seen = 0
    while time.monotonic() < deadline:
        children = children_of(shim.pid)
        seen = max(seen, len(children))
        if seen > 1 and children == [pid]:
            return
        time.sleep(0.005)
    raise AssertionError(f"children of the shim: {children_of(shim.pid)}, at most {seen}")


def test_processes_outside_the_pid_namespace_end_with_the_container(shop: Workshop, cgroup: Path) -> None:
    shim = shop.spawn("sh", "-c", "sleep 100 & sleep 101 & sleep 0.1", namespaces=("mount", "ipc", "uts"))
    shim.create(cgroup={"paths": [str(cgroup)]})
    shim.start()
    shim.wait()
    deadline = time.monotonic() + 5
    while (cgroup / "cgroup.procs").read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (cgroup / "cgroup.procs").read_text() == ""


def test_a_container_starts_with_default_signals_and_only_its_descriptors(shop: Workshop) -> None:
    shim = shop.spawn("sh", "-c", "cat /proc/self/status; ls /proc/self/fd")
    shim.create()
    (out,) = shim.attach("stdout")
    shim.start()
    text = read_to_end(out).decode()
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    assert [int(fields[name], 16) for name in ("SigBlk", "SigIgn")] == [0, 0]
    assert text.split()[-4:] == ["0", "1", "2", "3"]  # 3 is ls reading the directory


def test_subscribers_on_several_connections_all_hear_of_the_exit(shop: Workshop) -> None:
    shim = shop.run("sleep", "100")
    peers = [connect(shim.bundle) for _ in range(5)]
    for peer in peers:
        peer.call("subscribe")
    shim.call("kill", signal=9)
    assert [peer.event()["code"] for peer in peers] == [137] * 5
    for peer in peers:
        peer.close()


def test_a_subscriber_that_never_reads_does_not_keep_the_shim_alive(shop: Workshop) -> None:
    shim = shop.run("sleep", "100")
    peer = connect(shim.bundle)
    peer.call("subscribe")
    shim.call("kill", signal=9)
    wait_gone(shim.pid, 8)
    peer.close()


def test_signals_sent_to_the_shim_do_not_end_it(shop: Workshop) -> None:
    shim = shop.run("sleep", "100")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGPIPE):
        os.kill(shim.pid, number)
    time.sleep(0.05)
    assert shim.state()["state"] == "running"


def test_garbage_on_one_connection_does_not_disturb_another(shop: Workshop) -> None:
    shim = shop.run("sleep", "100")
    for garbage in (b"\xff" * 100, b"\0\0\0\x02[]", b"\0\0\0\x05hello", b"GET / HTTP/1.1\r\n\r\n"):
        peer = connect(shim.bundle)
        peer.sock.sendall(garbage)
        reply = peer.receive()
        assert reply["id"] is None
        assert peer.at_end()
        peer.close()
    assert shim.state()["state"] == "running"


def test_a_client_without_hello_is_turned_away(shop: Workshop) -> None:
    shim = shop.spawn("true")
    peer = connect(shim.bundle, hello={"id": 1, "op": "state"})
    assert peer.hello["error"] == {
        "kind": "invalid_argument",
        "message": "the first frame must be a hello with a version",
    }
    assert peer.at_end()
    peer.close()


def shim_fds(shim: Shim) -> list[str]:
    return sorted(str(link.readlink()) for link in Path(f"/proc/{shim.pid}/fd").iterdir())


def test_no_descriptor_stays_behind_in_the_shim(shop: Workshop) -> None:
    shim = shop.run("sleep", "100", stdin=True)
    before = len(shim_fds(shim))
    for n in range(20):
        assert shim.run_exec("echo", str(n)) == b"%d\n" % n
    for exec_id in list(shim.state()["execs"]):  # type: ignore[call-overload]
        shim.wait_state("stopped", exec_id)
        shim.call("delete_exec", exec=exec_id)
    for _ in range(20):
        peer = connect(shim.bundle)
        with refused("invalid_argument"):
            peer.call("attach", [0], stdout=True)
        peer.close()
    shim.state()
    programs = [each for each in shim_fds(shim) if each.startswith("/memfd:")]
    assert len(programs) <= 1, "that of the last exec"
    assert len(shim_fds(shim)) - len(programs) == before


def test_an_exec_joins_init_below_a_cgroup_that_the_container_has_divided(shop: Workshop) -> None:
    driver, sizes = Driver(detect()), hugepages.sizes()
    unified = driver.layout.unified
    if unified is None or "hugetlb" not in unified.controllers or not sizes:
        pytest.skip("needs the hugetlb controller on cgroup v2")
    path = f"/corral-shim-{os.getpid()}/divided"
    group = driver.create(path, Resources(hugetlb=(HugetlbLimit(sizes[0], 2**30),)))
    own = Path(f"{unified.mount_point}{path}")
    try:
        shim = shop.run("sleep", "100", cgroup={"paths": list(group.directories)})
        (own / "inner").mkdir()
        (own / "inner/cgroup.procs").write_text(str(shim.state()["pid"]))
        (own / "cgroup.subtree_control").write_text("+hugetlb")
        assert shim.run_exec("cat", "/proc/self/cgroup").decode().endswith(f"0::{path}/inner\n")
    finally:
        group.remove()
        driver.prune(path)
