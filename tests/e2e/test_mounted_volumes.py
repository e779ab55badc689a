"""Volumes that lie elsewhere (--opt type, device, o): mounted when used, shared, kept over a kill, never emptied."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cli import ok
from support.corrald import Corrald, running
from support.images import write_busybox
from support.requirements import needs

from corral.kernel import mount

pytestmark = needs("root", "overlayfs", "busybox")


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Corrald]:
    archive = write_busybox(tmp_path_factory.mktemp("box") / "b.tar")
    with running() as daemon:
        daemon.corral("load", "-i", str(archive), check=True)
        yield daemon


def create(box: Corrald, name: str, **options: str) -> None:
    words = [word for key, value in options.items() for word in ("--opt", f"{key}={value}")]
    ok(box, "volume", "create", *words, name)


def mounts(box: Corrald) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in lines if str(box.root / "engine/volumes") in line]


def test_a_directory_of_the_host_outlives_the_volume(box: Corrald, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    create(box, "dir", type="none", o="bind", device=str(tmp_path))
    assert mounts(box) == []
    assert ok(box, "run", "--rm", "-v", "dir:/v", "busybox", "cat", "/v/mine") == "mine"
    ok(box, "run", "--rm", "-v", "dir:/v", "busybox", "touch", "/v/theirs")
    assert len(mounts(box)) == 1
    ok(box, "volume", "rm", "dir")
    assert mounts(box) == []
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "theirs"}


def test_a_tmpfs_is_shared_and_kept_over_a_kill(box: Corrald) -> None:
    create(box, "mem", type="tmpfs", device="tmpfs", o="size=2m,mode=1770")
    ok(box, "run", "-d", "--name", "one", "-v", "mem:/v", "busybox", "sleep", "1000")
    ok(box, "exec", "one", "sh", "-c", "echo shared > /v/f")
    box.kill9()
    box.start()
    assert ok(box, "run", "--rm", "-v", "mem:/v", "busybox", "cat", "/v/f") == "shared\n"
    full = box.corral("exec", "one", "dd", "if=/dev/zero", "of=/v/g", "bs=1M", "count=3")
    assert b"No space left" in full.stderr
    ok(box, "rm", "-f", "one")
    ok(box, "volume", "rm", "mem")
    assert mounts(box) == []


def test_what_cannot_be_mounted_is_told_when_it_is_used(box: Corrald, tmp_path: Path) -> None:
    create(box, "gone", type="none", o="bind", device=str(tmp_path / "gone"))
    refused = box.corral("run", "--rm", "-v", "gone:/v", "busybox", "true")
    assert refused.returncode == 125
    assert b"the volume 'gone' cannot be mounted (none from" in refused.stderr
    assert ok(box, "ps", "-aq") == ""
    ok(box, "volume", "rm", "gone")
    for options, words in (
        ({"type": "tmpfs"}, b"'device' is missing"),
        ({"o": "bind", "device": "relative"}, b"absolute path"),
        ({"type": "--bind", "device": "/"}, b"cannot be '--bind'"),
    ):
        flags = [word for key, value in options.items() for word in ("--opt", f"{key}={value}")]
        assert words in box.corral("volume", "create", *flags, "bad").stderr
    assert ok(box, "volume", "ls", "-q") == ""


def test_one_that_is_busy_is_told_and_stays(box: Corrald, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    create(box, "busy", type="none", o="bind", device=str(tmp_path))
    ok(box, "run", "--rm", "-v", "busy:/v", "busybox", "true")
    data = box.root / "engine/volumes/default/busy/data"
    with (data / "mine").open():
        refused = box.corral("volume", "rm", "busy")
        assert refused.returncode == 1
        assert b"is in use" in refused.stderr
        assert ok(box, "volume", "prune", "-a") == ""
        assert ok(box, "volume", "ls", "-q") == "busy\n"
    ok(box, "volume", "rm", "busy")
    assert (mounts(box), (tmp_path / "mine").read_text()) == ([], "mine")


def test_a_daemon_starts_though_what_is_left_of_one_is_busy(box: Corrald, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    left = box.root / "engine/volumes/default/left"
    box.kill9()
    (left / "data").mkdir(parents=True)
    mount.bind(tmp_path, left / "data")
    with (left / "data/mine").open():
        box.start()
        assert ok(box, "volume", "ls", "-q") == ""
    box.kill9()
    box.start()
    assert not left.exists()
    assert (tmp_path / "mine").read_text() == "mine"


def test_what_lies_elsewhere_takes_no_place_on_this_disk(box: Corrald, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(300_000))
    create(box, "far", type="none", o="bind", device=str(tmp_path))
    ok(box, "run", "--rm", "-v", "far:/v", "busybox", "true")
    whole = json.loads(ok(box, "system", "df", "-v", "--format", "json"))
    assert [(volume["name"], int(volume.get("size_bytes", 0))) for volume in whole["volumes"]] == [("far", 0)]
    ok(box, "volume", "rm", "far")


def test_an_rbind_is_refused(box: Corrald) -> None:
    flags = ("--opt", "type=none", "--opt", "o=ro,rbind", "--opt", "device=/")
    assert b"cannot be an rbind" in box.corral("volume", "create", *flags, "bad").stderr
