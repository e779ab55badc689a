"""What a shim does for others, or is done to it, while much that is no text passes through it."""

import base64
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from shimclient import Workshop, read_to_end, workshop
from support.requirements import needs
from test_shim_adoption import Keeper, heir_of, kill, rotated

pytestmark = needs("root", "busybox")
SIZE = 24 << 20


@pytest.fixture(scope="module")
def shop() -> Iterator[Workshop]:
    with workshop() as made:
        yield made


@pytest.fixture(scope="module")
def data(shop: Workshop) -> bytes:
    """What is in /data of each container."""
    made = os.urandom(SIZE)
    (shop.root / "data").write_bytes(made)
    return made


@pytest.fixture
def disk(shop: Workshop) -> Iterator[Path]:
    """A file system of 4 MiB."""
    path = shop.directory / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", path], check=True)
    yield path
    subprocess.run(["umount", path], check=True)


def content(*files: Path) -> bytes:
    """What the log's files, the oldest first, have of the container's output."""
    entries = [json.loads(line) for file in files for line in file.read_bytes().splitlines()]
    return b"".join(base64.b64decode(entry["data"]) if "data" in entry else entry["log"].encode() for entry in entries)


def written(log: Path) -> int:
    """How much all files of a log have by now."""
    sizes = []
    for file in rotated(log):
        try:
            sizes.append(file.stat().st_size)
        except FileNotFoundError:  # rotated meanwhile
            sizes.append(0)
    return sum(sizes)


def test_a_shim_that_is_killed_again_and_again_leaves_each_byte_in_the_log_once(shop: Workshop, data: bytes) -> None:
    rounds, stopped_half_way = 5, 0
    shim = shop.spawn("sh", "-c", "while read x; do cat /data; done; exit 9")
    log = {"driver": "json-file", "path": str(shim.log), "max_size": 4 << 20, "max_files": 200}
    shim.create(log=log, stdin=True)
    keeper = Keeper(shim)
    shim.start()
    for number in range(rounds):
        os.write(keeper.fds["stdin"], b"go\n")
        before = written(shim.log)
        deadline = time.monotonic() + 20
        while written(shim.log) < before + (number + 1 << 20):
            assert time.monotonic() < deadline
        kill(shim)
        stopped_half_way += written(shim.log) < (number + 1) * SIZE * 4 // 3
        keeper.hand_over(heir_of(shop, shim), log=log, stdin=True)
    assert stopped_half_way
    shim.call("close_stdin")
    keeper.let_go()
    assert shim.wait()["code"] == 9
    assert content(*rotated(shim.log)) == data * rounds


def test_execs_run_and_logs_are_reopened_meanwhile_and_the_exit_is_told_behind_the_last_byte(
    shop: Workshop, data: bytes
) -> None:
    shim = shop.spawn("sh", "-c", "cat /data; exit 7")
    shim.create()
    (out,) = shim.attach("stdout", lossless=True)
    shim.call("subscribe")
    shim.start()
    got, files = bytearray(), []
    for number in range(8):
        while len(got) < (number + 1) * SIZE // 12:
            got += os.read(out, 1 << 20)
        assert shim.run_exec("echo", "hello") == b"hello\n"
        files.append(shim.log.rename(f"{shim.log}-{number}"))
        shim.call("reopen_log")
    assert len(got) < SIZE
    assert bytes(got) + read_to_end(out) == data
    while (event := shim.peer.event()) and (event["event"], event["exec"]) != ("exited", ""):
        pass
    assert content(*files, shim.log) == data
    exited = shim.wait()
    assert (exited["code"], exited["dropped_bytes"], shim.reports()) == (7, 0, "")


def test_a_disk_that_fills_costs_counted_bytes_and_never_the_container(shop: Workshop, data: bytes, disk: Path) -> None:
    shim = shop.spawn("sh", "-c", "cat /data; cat /data; exit 3")
    shim.create(log={"driver": "json-file", "path": str(disk / "log"), "max_size": 0})
    shim.start()
    exited = shim.wait()
    kept = content(disk / "log")
    assert exited["code"] == 3
    assert kept
    assert (data * 2).startswith(kept[: 2 << 20])
    assert exited["dropped_bytes"] == 2 * SIZE - len(kept)
