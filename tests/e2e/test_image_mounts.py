"""`--mount type=image`: another image's files in a container, to be read, or written to in a tree of its own."""

import json
import os
import signal
from pathlib import Path

import pytest
from support.cli import ok
from support.corrald import Corrald
from support.images import Entry, image_config, layer, symlink, write_docker_archive
from support.requirements import needs

pytestmark = needs("root", "overlayfs", "busybox", "netns")


@pytest.fixture(scope="module")
def data(box: Corrald, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An image of two layers, with links that lead out of it."""
    layers = [
        layer([Entry("a", b"below"), Entry("deep/file", b"deep")]),
        layer([Entry("a", b"above"), symlink("out", "../../../../proc"), symlink("round", "/deep")]),
    ]
    archive = tmp_path_factory.mktemp("data") / "data.tar"
    write_docker_archive(archive, "data:1", layers, image_config(layers))
    ok(box, "image", "import", str(archive), "--as", "data")
    return "data"


def trees(box: Corrald) -> list[str]:
    return [key for key in ok(box, "snapshot", "ls", "-q").split() if ".image-" in key]


def asked(data: str, target: str, more: str = "") -> tuple[str, str]:
    return "--mount", f"type=image,source={data},target={target}{more}"


def test_an_image_is_mounted_to_be_read(box: Corrald, name: str, data: str) -> None:
    ok(box, "run", "-d", "--name", name, *asked(data, "/x/y"), "busybox", "sleep", "1000")
    assert ok(box, "exec", name, "cat", "/x/y/a", "/x/y/deep/file") == "abovedeep"
    assert b"Read-only" in box.corral("exec", name, "touch", "/x/y/new").stderr
    assert len(trees(box)) == 1
    ok(box, "rm", "-f", name)
    assert trees(box) == []
    ok(box, "run", "--rm", *asked(data, "/x"), "busybox", "cat", "/x/a")
    assert trees(box) == []


def test_what_is_written_into_an_image_is_the_containers_own_and_kept(box: Corrald, name: str, data: str) -> None:
    script = "cat /x/new; echo more >> /x/new; rm -f /x/a; ls /x"
    ok(box, "create", "--name", name, *asked(data, "/x", ",rw"), "busybox", "sh", "-c", script)
    assert ok(box, "start", "-a", name) == "deep\nnew\nout\nround\n"
    box.kill9()
    box.start()
    assert ok(box, "start", "-a", name) == "more\ndeep\nnew\nout\nround\n"
    assert ok(box, "run", "--rm", *asked(data, "/x"), "busybox", "cat", "/x/a") == "above"
    assert "/x/new" not in ok(box, "diff", name)


def test_a_part_of_an_image_is_looked_up_inside_it(box: Corrald, data: str) -> None:
    assert ok(box, "run", "--rm", *asked(data, "/x", ",subpath=deep"), "busybox", "ls", "/x") == "file\n"
    assert ok(box, "run", "--rm", *asked(data, "/f", ",subpath=deep/file"), "busybox", "cat", "/f") == "deep"
    assert ok(box, "run", "--rm", *asked(data, "/x", ",subpath=round"), "busybox", "ls", "/x") == "file\n"
    for path in ("out", "nothing"):
        result = box.corral("run", "--rm", *asked(data, "/x", f",subpath={path}"), "busybox", "ls", "/x")
        assert (result.returncode, f"the image has no {path}" in result.stderr.decode()) == (125, True), result
    assert trees(box) == []


def test_files_go_to_and_come_from_an_image_whose_container_does_not_run(
    box: Corrald, name: str, data: str, tmp_path: Path
) -> None:
    mounts = [*asked(data, "/x", ",rw"), *asked(data, "/y", ",subpath=deep")]
    ok(box, "create", "--name", name, *mounts, "busybox", "cat", "/x/new")
    box.corral("start", "-a", name)
    (tmp_path / "new").write_text("new")
    ok(box, "cp", str(tmp_path / "new"), f"{name}:/x/new")
    assert ok(box, "start", "-a", name) == "new"
    ok(box, "cp", f"{name}:/x/a", str(tmp_path / "a"))
    ok(box, "cp", f"{name}:/y/file", str(tmp_path / "file"))
    assert ((tmp_path / "a").read_text(), (tmp_path / "file").read_text()) == ("above", "deep")
    assert b"read-only file system" in box.corral("cp", str(tmp_path / "new"), f"{name}:/y/new").stderr


def test_mounts_of_images_go_below_and_above_others(box: Corrald, name: str, data: str, tmp_path: Path) -> None:
    (tmp_path / "host").write_text("host")
    flags = ["-v", f"{tmp_path}:/x/deep:ro", *asked(data, "/x"), "--tmpfs", "/t", *asked(data, "/t/in")]
    assert (
        ok(box, "run", "--name", name, *flags, "busybox", "cat", "/x/deep/host", "/x/a", "/t/in/a") == "hostaboveabove"
    )


def test_an_image_stays_mounted_while_its_name_and_its_shim_go(box: Corrald, name: str, data: str) -> None:
    ok(box, "tag", data, "passing")
    ok(box, "run", "-d", "--name", name, *asked("passing", "/x"), "busybox", "sleep", "1000")
    ok(box, "rmi", "-f", "passing")
    shim = json.loads(ok(box, "inspect", name))[0]["shim_pid"]
    os.kill(shim, signal.SIGKILL)
    assert ok(box, "exec", name, "cat", "/x/a") == "above"
    ok(box, "restart", "-t", "0", name)
    assert ok(box, "exec", name, "cat", "/x/a") == "above"
    ok(box, "kill", name)
    ok(box, "wait", name)
    ok(box, "snapshot", "rm", *trees(box))
    told = " ".join(box.corral("system", "check").stdout.decode().split())
    assert f"{name} has lost the tree of the image that is mounted at /x" in told


def test_bad_mounts_of_images_are_refused_and_nothing_is_left(box: Corrald, name: str, data: str) -> None:
    for text, told in {
        "type=image,source=nobody,target=/x": "nobody",
        "type=image,target=/x": "names no image",
        f"type=image,source={data},target=/x,subpath=../..": "without '..'",
        f"type=image,source={data},target=/x,ro,rw": "either read-only or rw",
        "type=bind,source=/,target=/x,subpath=a": "only those of images and volumes have a subpath",
    }.items():
        result = box.corral("run", "--name", name, "--mount", text, "busybox", "true")
        assert (result.returncode, told in result.stderr.decode()) == (125, True), (text, result.stderr)
    assert box.corral("inspect", name).returncode == 1
    assert trees(box) == []
