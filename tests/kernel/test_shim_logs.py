"""What a shim keeps of its container's output, on real files and real full disks."""

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from shimclient import Workshop, read_until, workshop
from support.requirements import needs

from corral.kernel.cgroup import detect

pytestmark = needs("root", "busybox")
CRI_LINE = re.compile(rb"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z (stdout|stderr) (P|F) (.*)$")


@pytest.fixture(scope="module")
def shop() -> Iterator[Workshop]:
    with workshop() as made:
        yield made


@pytest.fixture
def small_disk(shop: Workshop) -> Iterator[Path]:
    """A file system of 64 KiB."""
    path = shop.directory / "disk"
    path.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", path], check=True)
    yield path
    subprocess.run(["umount", path], check=True)


def test_cri_lines_are_what_kubelet_reads(shop: Workshop) -> None:
    shim = shop.run("sh", "-c", "echo one; echo two >&2; printf %20000s x; printf end", driver="cri")
    shim.wait()
    lines = [CRI_LINE.match(line) for line in shim.log.read_bytes().splitlines()]
    assert all(lines)
    found = [(match[1].decode(), match[2].decode(), len(match[3])) for match in lines if match]
    assert [entry for entry in found if entry[0] == "stderr"] == [("stderr", "F", 3)]
    out = [entry[1:] for entry in found if entry[0] == "stdout"]
    assert out == [("F", 3), ("P", 16384), ("F", 20003 - 16384)]


def test_every_line_has_the_time_of_its_arrival(shop: Workshop) -> None:
    shim = shop.run("sh", "-c", "echo one; sleep 0.3; echo two")
    shim.wait()
    times = [json.loads(line)["time"] for line in shim.log.read_bytes().splitlines()]
    seconds = [float(time_[17:-1]) for time_ in times]
    assert 0.25 < (seconds[1] - seconds[0]) % 60 < 5


def test_rotation_bounds_what_a_container_may_fill(shop: Workshop) -> None:
    shim = shop.spawn("sh", "-c", "for i in $(seq 20000); do echo this is line number $i; done")
    log = {"driver": "json-file", "path": str(shim.log), "max_size": 100_000, "max_files": 3}
    shim.create(log=log)
    shim.start()
    assert shim.wait()["dropped_bytes"] == 0
    files = sorted(shim.log.parent.glob(f"{shim.log.name}*"))
    assert [path.name for path in files] == [shim.log.name, f"{shim.log.name}.1", f"{shim.log.name}.2"]
    assert all(path.stat().st_size <= 100_000 for path in files)
    newest = [json.loads(line)["log"] for path in reversed(files) for line in path.read_bytes().splitlines()]
    assert newest == [f"this is line number {n}\n" for n in range(20001 - len(newest), 20001)]


def test_the_log_is_reopened_on_request(shop: Workshop) -> None:
    shim = shop.run("sh", "-c", "while read x; do echo $x; done", stdin=True)
    stdin, out = shim.attach("stdin", "stdout")
    os.write(stdin, b"before\n")
    read_until(out, b"before\n")
    old = shim.log.with_suffix(".old")
    shim.log.rename(old)
    shim.call("reopen_log")
    os.write(stdin, b"after\n")
    read_until(out, b"after\n")
    assert b"before" in old.read_bytes()
    assert shim.log_entries() == [("stdout", "after\n")]
    os.close(stdin)
    os.close(out)


def test_a_full_disk_costs_counted_bytes_and_never_the_container(shop: Workshop, small_disk: Path) -> None:
    lines = 5000
    shim = shop.spawn("sh", "-c", f"for i in $(seq {lines}); do echo line number $i; done; echo done >&2; read x")
    shim.create(stdin=True, log={"driver": "cri", "path": str(small_disk / "log")})
    (err,) = shim.attach("stderr")
    shim.start()
    read_until(err, b"done\n")
    time.sleep(0.2)
    dropped = shim.state()["dropped_bytes"]
    assert isinstance(dropped, int)
    assert dropped > 0
    matches = [CRI_LINE.match(line) for line in (small_disk / "log").read_bytes().splitlines()]
    assert all(matches), "a line was torn"
    kept = sum(len(match[3]) + 1 for match in matches if match and match[1] == b"stdout")
    assert kept + dropped in (total := sum(len(f"line number {n}\n") for n in range(1, lines + 1)), total + 5)
    shim.call("close_stdin")
    assert shim.wait()["code"] == 1
    os.close(err)


def test_an_exit_on_a_full_disk_is_still_reported(shop: Workshop, small_disk: Path) -> None:
    shim = shop.spawn("sh", "-c", "exit 5")
    shim.create(log={"driver": "cri", "path": str(small_disk / "log")})
    (small_disk / "fill").write_bytes(bytes(40_000))
    shim.start()
    assert shim.wait()["code"] == 5


def test_none_keeps_nothing(shop: Workshop) -> None:
    shim = shop.run("echo", "hello", driver="none")
    assert shim.wait()["dropped_bytes"] == 0
    assert not shim.log.exists()


@pytest.fixture
def small_memory() -> Iterator[list[str]]:
    """The directories of a cgroup that allows 16 MiB."""
    hierarchy = detect().of("memory")
    assert hierarchy is not None
    path = Path(hierarchy.mount_point) / f"corral-shim-oom-{os.getpid()}"
    path.mkdir()
    limit = "memory.max" if hierarchy.version == 2 else "memory.limit_in_bytes"
    (path / limit).write_text(str(16 << 20))
    yield [str(path)]
    deadline = time.monotonic() + 5
    while path.exists() and time.monotonic() < deadline:
        try:
            path.rmdir()
        except OSError:
            time.sleep(0.02)


def test_an_oom_kill_is_the_reason_of_the_exit(shop: Workshop, small_memory: list[str]) -> None:
    shim = shop.spawn("sh", "-c", "dd if=/dev/zero of=/dev/x bs=1M count=64")
    shim.create(cgroup={"paths": small_memory})
    shim.call("subscribe")
    shim.start()
    exited = shim.wait()
    assert (exited["oom"], exited["code"]) == (True, 137)
    events = []
    while not events or events[-1] != "exited":
        events.append(shim.peer.event()["event"])
    assert events == ["started", "oom", "exited"]


def test_an_exit_without_an_oom_kill_has_no_such_reason(shop: Workshop, small_memory: list[str]) -> None:
    shim = shop.spawn("sh", "-c", "exit 137")
    shim.create(cgroup={"paths": small_memory})
    shim.start()
    exited = shim.wait()
    assert (exited["oom"], exited["code"]) == (False, 137)
