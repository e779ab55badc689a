"""A shim that stands by: it is its client who tells it which bundle is its own."""

import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from shimclient import RequestError, Workshop, connect, greeted, listen, read_to_end, wait_gone, workshop
from support.requirements import needs
from support.sweep import parent_of

pytestmark = needs("root", "busybox")


@pytest.fixture(scope="module")
def shop() -> Iterator[Workshop]:
    with workshop() as made:
        yield made


def has_hung_up(sock: socket.socket) -> bool:
    sock.settimeout(10)
    return sock.recv(1) == b""


def test_it_is_the_shim_of_what_it_is_given(shop: Workshop) -> None:
    shim = shop.spawn("sh", "-c", "echo out; exit 3", standing_by=True)
    assert shim.peer.hello["state"] == "new"
    shim.create()
    (out,) = shim.attach("stdout")
    shim.start()
    assert read_to_end(out) == b"out\n"
    assert shim.wait()["code"] == 3
    assert shim.log_entries() == [("stdout", "out\n")]
    assert shim.reports() == ""


def test_others_find_it_by_its_bundle(shop: Workshop) -> None:
    shim = shop.spawn("sleep", "100", standing_by=True)
    shim.create()
    shim.peer.close()
    shim.peer = connect(shim.bundle)
    assert shim.peer.call("state")["shim_pid"] == shim.pid
    shim.peer.call("start", exec="")
    shim.peer.call("delete")
    assert shim.wait()["code"] == 137


def test_it_ends_with_its_client(shop: Workshop) -> None:
    pid, sock = shop.zygote.stand_by()
    assert parent_of(pid) == shop.zygote.pid
    sock.close()
    wait_gone(pid)


def test_it_ends_with_its_zygote() -> None:
    with workshop() as own:
        pid, sock = own.zygote.stand_by()
        with sock:
            os.kill(own.zygote.pid, signal.SIGKILL)
            wait_gone(pid)
            assert has_hung_up(sock)


def test_until_it_has_its_bundle_it_does_nothing_else(shop: Workshop) -> None:
    pid, sock = shop.zygote.stand_by()
    with contextlib.closing(greeted(sock)) as peer:
        for op in ("state", "create", "start", "delete", "reopen_log", "dance"):
            with pytest.raises(RequestError, match="failed_precondition: this shim has no container yet"):
                peer.call(op)
        with pytest.raises(RequestError, match="needs 1 file descriptors"):
            peer.call("take", bundle="/tmp", namespace="n", container="c")
        with pytest.raises(RequestError, match="not_found"), listen(shop.directory) as other:
            peer.call("take", [other.fileno()], bundle=str(shop.directory / "none"), namespace="n", container="c")
    wait_gone(pid)


def test_it_takes_one_only(shop: Workshop) -> None:
    shim = shop.spawn("sleep", "100", standing_by=True)
    shop.directory.joinpath("socket").unlink(missing_ok=True)
    with pytest.raises(RequestError, match="has its container"), listen(shop.directory) as other:
        shim.call("take", [other.fileno()], bundle="/tmp", namespace="n", container="c")
    shim.create()
    assert shim.state()["state"] == "created"


def test_who_speaks_nonsense_to_it_is_hung_up_on_and_nobody_else(shop: Workshop) -> None:
    pid, sock = shop.zygote.stand_by()
    with sock:
        sock.send(b"\xff" * 8)
        wait_gone(pid)
    assert shop.run("true").wait()["code"] == 0


def test_the_end_of_what_it_made_is_written_down_by_the_zygote_if_it_was_killed(shop: Workshop) -> None:
    shim = shop.spawn("sh", "-c", "sleep 1; exit 7", standing_by=True)
    shim.create()
    shim.start()
    os.kill(shim.pid, signal.SIGKILL)
    wait_gone(shim.pid)
    wait_gone(int(str(json.loads((shim.bundle / "record.json").read_text())["init_pid"])))
    deadline = time.monotonic() + 5
    while not (shim.bundle / "exit.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert shim.exit_file()["code"] == 7


def test_while_it_stands_by_there_is_no_other_spare() -> None:
    with workshop() as own:
        own.zygote.peer.call("ready")  # before, it has others, to try its hand on
        (spare,) = eventually(lambda: children_of(own.zygote.pid))
        pid, sock = own.zygote.stand_by()
        with sock:
            assert pid == spare
            own.zygote.peer.call("ready")
            assert children_of(own.zygote.pid) == {pid}
            shim = own.spawn("true")
            own.zygote.peer.call("ready")
            assert children_of(own.zygote.pid) == {pid, shim.pid}
        wait_gone(pid)
        shim = own.spawn("true")
        assert len(eventually(lambda: children_of(own.zygote.pid) - {pid, shim.pid})) >= 1


def eventually(look: Callable[[], set[int]]) -> set[int]:
    deadline = time.monotonic() + 10
    while not (seen := look()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return seen


def children_of(pid: int) -> set[int]:
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
