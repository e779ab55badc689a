"""Processes that a shim runs to their end for one client: their exit and output in one answer, and nothing kept."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from shimclient import Message, RequestError, Shim, Workshop, connect, process, wait_gone, workshop
from support.requirements import needs

pytestmark = needs("root", "busybox")


@pytest.fixture(scope="module")
def shop() -> Iterator[Workshop]:
    with workshop() as made:
        yield made


def run(shim: Shim, *args: str, name: str = "", output_bytes: int = 4096, **more: object) -> Message:
    name = name or f"run{shim.peer.last_id}"
    return shim.call("run", exec=name, process=process(*args), output_bytes=output_bytes, **more)


def begin(shim: Shim, *args: str, **more: object) -> int:
    """Ask for a run and do not wait: the pid of its process, which alone has this name."""
    shim.peer.last_id += 1
    asked = {"id": shim.peer.last_id, "op": "run", "exec": f"r{shim.peer.last_id}", "process": process(*args), **more}
    shim.peer.send(asked)
    deadline = time.monotonic() + 10
    while not (found := running(shim, args[-1].split()[-1])):  # a shell becomes what it runs last
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return found[0]


def running(shim: Shim, last_word: str) -> list[int]:
    """Children of a shim by the last word of their command lines."""
    found = []
    for pid in Path(f"/proc/{shim.pid}/task/{shim.pid}/children").read_text().split():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").split()[-1:] == [last_word]:
                found.append(int(pid))
    return found


def fds_of(shim: Shim) -> list[str]:
    return sorted(entry.name for entry in Path(f"/proc/{shim.pid}/fd").iterdir())


def test_its_exit_and_the_beginning_of_its_output_are_one_answer(shop: Workshop) -> None:
    shim = shop.run("sleep", "100")
    for _ in range(3):  # by Python at first, which finds out who it is, then as a list of calls
        told = run(shim, "sh", "-c", "echo one; echo two >&2; echo three; exit 7")
        assert (told["code"], told["signal"], told["output"]) == (7, None, "one\ntwo\nthree\n")
        assert told["started_at_ns"] <= told["exited_at_ns"]  # type: ignore[operator]
    assert run(shim, "sh", "-c", "kill -9 $$")["code"] == 137
    assert run(shim, "sh", "-c", "echo 0123456789", output_bytes=4)["output"] == "0123"
    assert run(shim, "sh", "-c", "yes | head -c 3000000")["output"] == "y\n" * 2048
    assert run(shim, "sh", "-c", "printf '\\377'")["output"] == "\N{REPLACEMENT CHARACTER}"
    for _ in range(2):  # what was asked for last is remembered
        assert run(shim, "id", "-un", user="user")["output"] == "user\n"
        assert run(shim, "id", "-un")["output"] == "root\n"


def test_nobody_else_hears_of_it_and_nothing_is_left(shop: Workshop) -> None:
    shim = shop.run("sleep", "100")
    other = connect(shim.bundle)
    other.call("subscribe")
    run(shim, "true")
    fds = fds_of(shim)
    for _ in range(20):
        run(shim, "true", name="again")
    assert other.call("state")["execs"] == {}
    assert not other.events
    assert fds_of(shim) == fds
    assert not (shim.bundle / "execs").exists()
    other.close()


def test_one_whose_time_is_over_is_killed_and_what_it_made_keeps_nobody_waiting(shop: Workshop) -> None:
    shim = shop.run("sleep", "100")
    began = time.monotonic()
    told = run(shim, "sh", "-c", "echo begun; sleep 50 & sleep 50", timeout_ns=300_000_000)
    assert (told["code"], told["timed_out"], told["output"]) == (137, True, "begun\n")
    assert time.monotonic() - began < 2
    told = run(shim, "true", timeout_ns=10_000_000_000)
    assert (told["code"], told["timed_out"]) == (0, False)


FAMILY = "sleep 4721 & sh -c 'sleep 4722 & sleep 4723' & (sleep 4724 &); setsid sleep 4725 & echo begun; sleep {}"


def family() -> list[str]:
    """Those of FAMILY that live."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found.append(path.read_text().replace("\0", " ").strip())
    return sorted(line for line in found if line.startswith("sleep 472"))


def wait_for_family(size: int) -> None:
    deadline = time.monotonic() + 10
    while len(family()) != size:
        assert time.monotonic() < deadline, family()
        time.sleep(0.01)


def test_with_one_whose_time_is_over_all_that_it_has_made_is_killed(shop: Workshop) -> None:
    shim = shop.run("sleep", "100")
    shim.peer.last_id += 1
    asked = {"op": "run", "exec": "r", "process": process("sh", "-c", FAMILY.format(50)), "timeout_ns": 1_000_000_000}
    shim.peer.send({"id": shim.peer.last_id, **asked})
    wait_for_family(5)
    told = shim.peer.receive()["ok"]
    assert isinstance(told, dict)
    assert told["timed_out"]
    wait_for_family(0)
    assert shim.state()["state"] == "running"


def test_what_it_has_left_when_it_ends_by_itself_goes_on(shop: Workshop) -> None:
    shim = shop.run("sleep", "100")
    run(shim, "sh", "-c", FAMILY.format(0) + " >/dev/null 2>&1", timeout_ns=10_000_000_000)
    wait_for_family(5)
    shim.call("kill", exec="", signal=int(signal.SIGKILL))
    wait_for_family(0)


def test_it_ends_with_the_connection_of_who_asked(shop: Workshop) -> None:
    shim = shop.run("sleep", "100")
    pid = begin(shim, "sh", "-c", FAMILY.format(4711))
    wait_for_family(5)
    shim.peer.close()
    wait_gone(pid)
    wait_for_family(0)
    shim.peer = connect(shim.bundle)
    assert shim.peer.call("state")["state"] == "running"


@pytest.mark.parametrize("before", [0, 1])
def test_it_ends_with_its_shim(shop: Workshop, before: int) -> None:
    """That it is killed is the kernel's promise: also if it was born by a list of calls."""
    shim = shop.run("sleep", "100")
    for _ in range(before):
        run(shim, "true")
    pid, init = begin(shim, "sleep", "4712"), running(shim, "100")[0]
    os.kill(shim.pid, signal.SIGKILL)
    wait_gone(pid)
    assert Path(f"/proc/{init}").exists(), "only that"
    os.kill(init, signal.SIGKILL)


def test_an_exec_does_not_end_with_its_shim(shop: Workshop) -> None:
    shim = shop.run("sleep", "100")
    run(shim, "true")
    shim.exec("stays", "sleep", "4713")
    pid, init = shim.start("stays")["pid"], running(shim, "100")[0]
    os.kill(shim.pid, signal.SIGKILL)
    wait_gone(shim.pid)
    assert Path(f"/proc/{pid}/cmdline").read_text().endswith("\x004713\0")
    os.kill(init, signal.SIGKILL)


def test_what_cannot_be_run_is_refused_and_its_name_is_free(shop: Workshop) -> None:
    shim = shop.run("sleep", "100")
    for program, kind in (("/none", "exec_not_found"), ("/etc/passwd", "exec_denied")):
        for _ in range(2):
            with pytest.raises(RequestError, match=f"^{kind}: "):
                run(shim, program, name="same")
    with pytest.raises(RequestError, match=r"^invalid_argument: process\.terminal"):
        shim.call("run", exec="t", process=process("sh", terminal=True))
    with pytest.raises(RequestError, match=r"^invalid_argument: output_bytes"):
        run(shim, "true", output_bytes=1 << 20)
    with pytest.raises(RequestError, match=r"^invalid_argument: timeout_ns"):
        run(shim, "true", timeout_ns=-1)
    assert run(shim, "true", name="same")["code"] == 0
    shim.exec("same", "true")
    with pytest.raises(RequestError, match=r"^already_exists: "):
        run(shim, "true", name="same")
    created = shop.spawn("true")
    created.create()
    with pytest.raises(RequestError, match=r"^failed_precondition: "):
        run(created, "true")


def test_it_ends_with_its_container(shop: Workshop) -> None:
    shim = shop.run("sleep", "100")
    pid = begin(shim, "sleep", "4714")
    shim.peer.last_id += 1
    shim.peer.send({"id": shim.peer.last_id, "op": "kill", "exec": "", "signal": int(signal.SIGKILL)})
    answers = {message["id"]: message for message in (shim.peer.receive() for _ in range(2))}
    ran = answers[shim.peer.last_id - 1]["ok"]
    assert isinstance(ran, dict)
    assert ran["code"] == 137
    wait_gone(pid)
