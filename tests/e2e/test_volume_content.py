"""A new volume begins with what the image has in its place, with modes and owners, once."""

import json
import os
import struct
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cli import ok
from support.corrald import Corrald
from support.images import Entry, busybox_layer, directory, image_config, layer, symlink, write_oci_archive

MAKE = (
    "mkdir -p /data/sub && echo one > /data/one && echo two > /data/sub/two && ln -s one /data/link"
    " && chown -R 1000:1001 /data && chmod 750 /data && chmod 4711 /data/one && ln -s /etc /linked"
)
SHOW = "cd /data && stat -c '%n %u:%g %a' . one sub sub/two && readlink link && cat sub/two"
SHOWN = ". 1000:1001 750\none 1000:1001 4711\nsub 1000:1001 755\nsub/two 1000:1001 644\none\ntwo\n"


@pytest.fixture
def image(box: Corrald, name: str) -> Iterator[str]:
    ok(box, "run", "--name", name, "busybox", "sh", "-c", MAKE)
    ok(box, "commit", "--change", "VOLUME /data", name, f"filled-{name}")
    ok(box, "rm", "-v", name)
    yield f"filled-{name}"
    box.corral("rm", "-fv", name)
    box.corral("volume", "rm", name)
    ok(box, "image", "rm", f"filled-{name}")


def run(box: Corrald, *args: str) -> str:
    return ok(box, "run", "--rm", *args)


@pytest.mark.parametrize("access", ["", ":ro"])
def test_a_new_volume_has_what_the_image_has_there(box: Corrald, name: str, image: str, access: str) -> None:
    assert run(box, "-v", f"{name}:/data{access}", image, "sh", "-c", SHOW) == SHOWN


def test_an_anonymous_volume_has_it_too(box: Corrald, image: str) -> None:
    assert run(box, image, "sh", "-c", f"grep -q ' /data ' /proc/self/mountinfo && {SHOW}") == SHOWN


def test_what_is_in_a_volume_already_stays_as_it_is(box: Corrald, name: str, image: str) -> None:
    run(box, "-v", f"{name}:/v", "busybox", "sh", "-c", "echo mine > /v/one")
    assert run(box, "-v", f"{name}:/data", image, "sh", "-c", "ls /data; cat /data/one") == "one\nmine\n"


def test_nocopy_and_bind_mounts_begin_empty(box: Corrald, name: str, image: str, tmp_path: object) -> None:
    assert run(box, "-v", f"{name}:/data:nocopy", image, "ls", "-A", "/data") == ""
    assert run(box, "-v", f"{tmp_path}:/data", image, "ls", "-A", "/data") == ""


def test_a_volume_that_was_emptied_stays_empty_when_its_container_starts_again(
    box: Corrald, name: str, image: str
) -> None:
    script = "ls -A /data | wc -l; rm -rf /data/* /data/.[a-z]*"
    ok(box, "run", "--name", name, "-v", f"{name}:/data", image, "sh", "-c", script)
    ok(box, "start", name)
    ok(box, "wait", name)
    assert ok(box, "logs", name) == "3\n0\n"
    ok(box, "rm", name)


def test_a_link_in_the_image_leads_no_further_than_its_root(box: Corrald, name: str, image: str) -> None:
    """What is copied is the image's own /etc, not the host's."""
    shown = run(box, "-v", f"{name}:/linked", image, "sh", "-c", "ls -A /linked/")
    assert "shadow-" not in shown
    assert "corral" not in shown


def test_a_directory_that_the_image_lacks_gives_an_empty_volume(box: Corrald, name: str, image: str) -> None:
    assert run(box, "-v", f"{name}:/nowhere", image, "ls", "-A", "/nowhere") == ""


def test_a_copy_that_fails_leaves_the_volume_empty(box: Corrald, name: str, image: str) -> None:
    deep = "/".join("d" * 150)
    ok(box, "run", "--name", name, "busybox", "sh", "-c", f"mkdir -p /data/a /data/z/{deep}")
    ok(box, "commit", name, f"deep-{name}")
    ok(box, "rm", name)
    try:
        for _ in range(2):
            refused = box.corral("run", "--rm", "-v", f"{name}:/data", f"deep-{name}", "true")
            assert refused.returncode == 125
            assert b"copying up" in refused.stderr
        assert run(box, "-v", f"{name}:/v", "busybox", "ls", "-A", "/v") == ""
    finally:
        ok(box, "image", "rm", f"deep-{name}")


def test_attributes_capabilities_and_hard_links_come_along(box: Corrald, name: str, tmp_path: Path) -> None:
    capability = struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)  # CAP_NET_BIND_SERVICE, effective
    pax = {"SCHILY.xattr.user.kind": "here", "SCHILY.xattr.security.capability": capability.decode("utf-8")}
    entries = [
        directory("data"), directory("data/a"), directory("data/b"),
        Entry("data/a/one", b"content", 0o755, uid=1000, gid=1000, pax=pax),
        Entry("data/b/two", kind=tarfile.LNKTYPE, link="data/a/one"),
        symlink("data/link", "nowhere"),
        Entry("data/b/three", kind=tarfile.LNKTYPE, link="data/link"),
    ]  # fmt: skip
    layers = [busybox_layer(), layer(entries)]
    archive = write_oci_archive(tmp_path / "i.tar", f"{name}:1", layers, image_config(layers))
    ok(box, "load", "-i", str(archive))
    try:
        run(box, "-v", f"{name}:/data", f"{name}:1", "true")
        [volume] = json.loads(ok(box, "volume", "inspect", name))
        there = Path(volume["mountpoint"])
        one = there / "a/one"
        assert os.getxattr(one, "user.kind") == b"here"
        assert os.getxattr(one, "security.capability") == capability
        assert (one.stat().st_uid, one.stat().st_mtime) == (1000, 0)
        assert one.samefile(there / "b/two")
        assert (there / "b/three").lstat().st_ino == (there / "link").lstat().st_ino
        assert (there / "link").lstat().st_mtime == 0
    finally:
        box.corral("volume", "rm", name)
        ok(box, "image", "rm", f"{name}:1")


@pytest.fixture
def parts(box: Corrald, name: str) -> Iterator[str]:
    """A volume with a directory, a file, and links that lead out of it."""
    script = "mkdir -p /v/a/b && echo deep > /v/a/b/file && ln -s /a/b /v/round && ln -s ../../../../etc /v/out"
    run(box, "-v", f"{name}:/v", "busybox", "sh", "-c", script)
    yield name
    box.corral("rm", "-f", name)
    ok(box, "volume", "rm", name)


def part(volume: str, path: str, target: str = "/x", more: str = "") -> tuple[str, str]:
    return "--mount", f"type=volume,src={volume},dst={target},volume-subpath={path}{more}"


def test_a_part_of_a_volume_is_mounted_and_written_to(box: Corrald, name: str, parts: str) -> None:
    ok(box, "create", "--name", name, *part(parts, "a/b"), "busybox", "sh", "-c", "ls /x; cat /x/file; echo n > /x/new")
    assert ok(box, "start", "-a", name) == "file\ndeep\n"
    box.kill9()
    box.start()
    assert ok(box, "start", "-a", name) == "file\nnew\ndeep\n"
    assert run(box, "-v", f"{parts}:/v", "busybox", "cat", "/v/a/b/new") == "n\n"
    assert run(box, *part(parts, "a/b/file", "/f"), "busybox", "cat", "/f") == "deep\n"
    shown = run(box, *part(parts, "a/b"), "busybox", "grep", " /x ", "/proc/self/mountinfo").split()
    assert "nosuid" not in shown[5]
    assert "ro" not in shown[5].split(",")


def test_a_part_of_a_volume_may_be_read_only(box: Corrald, parts: str) -> None:
    refused = box.corral("run", "--rm", *part(parts, "a/b", more=",readonly"), "busybox", "touch", "/x/new")
    assert (refused.returncode, b"Read-only file system" in refused.stderr) == (1, True)


def test_a_part_of_a_volume_is_looked_up_inside_it(box: Corrald, parts: str) -> None:
    assert run(box, *part(parts, "round"), "busybox", "cat", "/x/file") == "deep\n"
    for path in ("out", "nothing", "a/nothing"):
        result = box.corral("run", "--rm", *part(parts, path), "busybox", "ls", "/x")
        assert (result.returncode, f"the volume has no {path}" in result.stderr.decode()) == (125, True), result
    refused = box.corral("run", "--rm", *part(parts, "a/../../b"), "busybox", "true")
    assert (refused.returncode, b"is no path without '..'" in refused.stderr) == (125, True)


def test_a_creation_that_is_refused_makes_no_source_of_a_mount(box: Corrald, tmp_path: Path) -> None:
    result = box.corral("create", "-v", f"{tmp_path}/new:/x", "--cpuset-cpus", "999", "busybox", "true")
    assert (result.returncode, b"cpuset" in result.stderr) == (125, True), result.stderr
    assert not any(tmp_path.iterdir())


def test_files_go_to_and_come_from_a_part_of_a_volume_whose_container_does_not_run(
    box: Corrald, name: str, parts: str, tmp_path: Path
) -> None:
    mounts = [*part(parts, "a/b"), *part(parts, "round", "/ro", ",readonly"), *part(parts, "a", "/x/below")]
    ok(box, "create", "--name", name, *mounts, "busybox", "true")
    ok(box, "start", "-a", name)
    (tmp_path / "new").write_text("new")
    ok(box, "cp", str(tmp_path / "new"), f"{name}:/x/new")
    ok(box, "cp", str(tmp_path / "new"), f"{name}:/x/below/other")
    assert run(box, "-v", f"{parts}:/v", "busybox", "cat", "/v/a/b/new", "/v/a/other") == "newnew"
    for source in ("/x/file", "/ro/file", "/x/below/b/file"):
        ok(box, "cp", f"{name}:{source}", str(tmp_path / "out"))
        assert (tmp_path / "out").read_text() == "deep\n"
    assert b"read-only file system" in box.corral("cp", str(tmp_path / "new"), f"{name}:/ro/new").stderr
    run(box, "-v", f"{parts}:/v", "busybox", "rm", "/v/round")
    run(box, "-v", f"{parts}:/v", "busybox", "ln", "-s", f"../../../..{tmp_path}", "/v/round")
    told = box.corral("cp", f"{name}:/x/file", str(tmp_path / "out"))
    assert (told.returncode, b"the volume has no round" in told.stderr) == (1, True), told.stderr


def test_a_part_of_a_volume_that_is_made_for_the_container_is_refused(box: Corrald, name: str) -> None:
    mount = "type=volume,dst=/x,volume-subpath=a"
    refused = box.corral("create", "--name", name, "--mount", mount, "busybox", "true")
    assert (refused.returncode, b"is a new one and has no parts" in refused.stderr) == (125, True), refused.stderr
    assert box.corral("inspect", name).returncode == 1
