"""`corral save` and `load`, through files and through pipes."""

import json
import os
import pty
import subprocess
import tarfile
from pathlib import Path

import pytest
from support.corrald import CORRAL, Corrald
from support.requirements import needs

pytestmark = needs("root", "overlayfs", "busybox")


def facts(box: Corrald, name: str) -> dict[str, object]:
    return json.loads(box.corral("image", "inspect", name, check=True).stdout)[0]


def started(box: Corrald, *words: str, **streams: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([CORRAL, "--address", box.address, *words], **streams)  # type: ignore[call-overload]


@pytest.mark.parametrize("form", ["docker", "oci"])
def test_an_image_goes_through_a_file_and_comes_back_as_it_was(box: Corrald, tmp_path: Path, form: str) -> None:
    box.corral("image", "tag", "busybox", "saved:1", check=True)
    before = facts(box, "saved:1")
    archive = tmp_path / "saved.tar"
    box.corral("save", "--format", form, "-o", str(archive), "saved:1", check=True)
    box.corral("image", "rm", "saved:1", check=True)
    assert box.corral("load", "-i", str(archive), check=True).stdout == b"Loaded image: saved:1\n"
    after = facts(box, "saved:1")
    assert (after["id"], after["target"]["digest"]) == (before["id"], before["target"]["digest"])  # type: ignore[index]
    assert box.corral("run", "--rm", "saved:1", "echo", "ok").stdout == b"ok\n"
    box.corral("image", "rm", "saved:1", check=True)
    assert list(tmp_path.iterdir()) == [archive]


def test_save_and_load_make_a_pipe(box: Corrald) -> None:
    for name in ("piped:1", "piped:2"):
        box.corral("image", "tag", "busybox", name, check=True)
    with started(box, "save", "piped:1", "piped:2", stdout=subprocess.PIPE) as saving:
        result = subprocess.run(
            [CORRAL, "--address", box.address, "load", "-q"], stdin=saving.stdout, capture_output=True, check=False
        )
    assert saving.returncode == 0
    assert sorted(result.stdout.decode().split()) == ["piped:1", "piped:2"], result.stderr
    box.corral("image", "rm", "piped:1", "piped:2", check=True)


def test_a_reader_that_goes_away_ends_save_without_a_word(box: Corrald) -> None:
    with started(box, "save", "busybox", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as saving:
        assert saving.stdout
        assert saving.stdout.read(512)
        saving.stdout.close()
        saving.wait(timeout=60)
        assert saving.returncode != 0
        assert saving.stderr
        assert saving.stderr.read() == b""


def test_an_archive_is_not_written_to_a_terminal(box: Corrald) -> None:
    ours, theirs = pty.openpty()
    try:
        with started(box, "save", "busybox", stdout=theirs, stderr=subprocess.PIPE) as saving:
            assert saving.stderr
            assert b"terminal" in saving.stderr.read()
        assert saving.returncode == 2
        os.set_blocking(ours, False)
        with pytest.raises(BlockingIOError):
            os.read(ours, 1)
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_save_that_fails_leaves_no_file(box: Corrald, tmp_path: Path) -> None:
    (tmp_path / "old.tar").write_bytes(b"old")
    result = box.corral("save", "-o", str(tmp_path / "old.tar"), "busybox", "absent:1")
    assert result.returncode == 1
    assert b"no image 'absent:1'" in result.stderr
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_export_is_another_word_for_save(box: Corrald, tmp_path: Path) -> None:
    box.corral("save", "-o", str(tmp_path / "a"), "busybox", check=True)
    (tmp_path / "b").write_bytes(box.corral("image", "export", "busybox", check=True).stdout)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with tarfile.open(tmp_path / "a") as tar:
        assert "manifest.json" in tar.getnames()
