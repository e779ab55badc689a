"""Volumes that lie elsewhere, on the file system: mounted once, found through links, never emptied."""

import errno
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.requirements import needs

from corral.engine import bounded_volumes, mounted_volumes
from corral.engine.mounted_volumes import Source
from corral.rpc.errors import FailedPrecondition
from corral.store.mountinfo import mounts_below

pytestmark = needs("root", "mount")
TMPFS = Source("tmpfs", "tmpfs", "size=1m")


@pytest.fixture
def data(tmp_path: Path) -> Iterator[Path]:
    data = tmp_path / "root/volume/data"
    data.parent.mkdir(parents=True)
    yield data
    mounted_volumes.release(data)


def programs(monkeypatch: pytest.MonkeyPatch, directory: Path, script: str) -> None:
    """Have `script` found as mount(8)."""
    directory.mkdir()
    (directory / "mount").write_text(f"#!/bin/sh\n{script}\n")
    (directory / "mount").chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/usr/sbin:/usr/bin:/sbin:/bin")


def test_a_bound_directory_is_kept_where_a_link_leads_to_the_volume(data: Path, tmp_path: Path) -> None:
    outside, link = tmp_path / "outside", tmp_path / "link"
    outside.mkdir()
    (outside / "mine").write_text("mine")
    link.symlink_to(tmp_path / "root")
    mounted_volumes.ready(link / "volume/data", Source("none", str(outside), "bind"))
    assert mounted_volumes.is_mounted(link / "volume/data")
    assert mounted_volumes.is_mounted(data)
    bounded_volumes.remove(link / "volume")
    assert (outside / "mine").read_text() == "mine"
    assert mounts_below(tmp_path) == []


def test_what_lies_in_the_place_of_one_that_lies_elsewhere_is_not_removed(data: Path) -> None:
    data.mkdir()
    (data / "whose").touch()
    with pytest.raises(OSError, match="not empty") as told:
        bounded_volumes.remove(data.parent, lies_elsewhere=True)
    assert told.value.errno == errno.ENOTEMPTY
    assert (data / "whose").exists()


def test_those_that_start_together_have_it_mounted_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs(monkeypatch, tmp_path / "bin", 'sleep 0.3; PATH=/usr/sbin:/usr/bin:/sbin:/bin exec mount "$@"')
    threads = [threading.Thread(target=mounted_volumes.ready, args=(data, TMPFS)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert mounts_below(tmp_path) == [data]


def test_a_helper_of_mount_that_hangs_is_killed_too(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs(monkeypatch, tmp_path / "bin", f"sleep 1000 & echo $! > {tmp_path}/pid; wait")
    monkeypatch.setattr(mounted_volumes, "PATIENCE_S", 0.5)
    with pytest.raises(FailedPrecondition, match="no answer"):
        mounted_volumes.ready(data, TMPFS)
    status = Path("/proc", (tmp_path / "pid").read_text().strip(), "stat")
    for _ in range(100):
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.02)
    raise AssertionError("it goes on")
