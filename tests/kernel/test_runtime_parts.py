"""Roots that are put together from file systems in files, which nobody but the container sees."""

import signal
import subprocess
import time
from pathlib import Path

import pytest
from support.requirements import needs

from corral.kernel import loop, process
from corral.kernel.namespaces import Kind
from corral.oci.spec import IdMapping, Mount, Namespace

pytestmark = needs("root", "overlayfs", "busybox", "mkfs.ext4")


def image_of(directory: Path, image: Path, size_mb: int = 16) -> str:
    """An ext4 file system with what is in the directory."""
    with image.open("wb") as file:
        file.truncate(size_mb << 20)
    subprocess.run(["mkfs.ext4", "-q", "-d", directory, image], check=True)
    return str(image)


def devices_of(directory: Path) -> list[str]:
    """The files below it that are loop devices now."""
    found = [path.read_text().strip() for path in Path("/sys/block").glob("loop*/loop/backing_file")]
    return [name for name in found if name.startswith(str(directory))]


def eventually_none(directory: Path) -> list[str]:
    deadline = time.monotonic() + 5
    while (found := devices_of(directory)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


@pytest.fixture
def layer(lab, tmp_path: Path) -> Mount:
    """busybox, in a file."""
    return Mount("", "ext4", image_of(lab.busybox, tmp_path / "layer"), ("ro", "loop"))


@pytest.fixture
def writable(tmp_path: Path) -> Mount:
    """An upper and a work directory, in a file."""
    for name in ("u", "w"):
        (tmp_path / "empty" / name).mkdir(parents=True)
    return Mount("", "ext4", image_of(tmp_path / "empty", tmp_path / "writable"), ("loop",))


def test_an_overlay_of_layers_and_a_writable_layer_in_files(lab, layer, writable, tmp_path):
    options = (f"lowerdir={lab.plant}:@0", "upperdir=@1/u", "workdir=@1/w")
    rootfs = [Mount("", "overlay", "overlay", options)]
    (lab.plant / "planted").write_text("p")
    script = "cat /planted; echo mine > /mine; cut -d' ' -f1,2,3 /proc/mounts | grep -c -e ext4 -e loop"
    for expected in ("p0\n", "p0\n"):
        result = lab.run(script, options={"rootfs": rootfs, "parts": [layer, writable]})
        assert (result.output, eventually_none(tmp_path)) == (expected, [])
    again = lab.run("cat", "/mine", options={"rootfs": rootfs, "parts": [layer, writable]})
    assert again.output == "mine\n"


def test_a_directory_of_a_file_system_in_a_file(lab, tmp_path):
    (tmp_path / "tree").mkdir()
    subprocess.run(["cp", "-a", lab.busybox, tmp_path / "tree/u"], check=True)
    part = Mount("", "ext4", image_of(tmp_path / "tree", tmp_path / "image"), ("loop",))
    rootfs = [Mount("", "bind", "@0/u", ("bind",))]
    result = lab.run("touch /new; ls -d /new /lost+found", options={"rootfs": rootfs, "parts": [part]})
    assert "/new" in result.output.splitlines()
    assert "lost+found: No such file" in result.output
    assert eventually_none(tmp_path) == []


@needs("userns")
def test_with_a_user_namespace(lab, layer, writable, tmp_path):
    ids = (IdMapping(0, 0, 65536),)
    kinds = (Kind.USER, Kind.MOUNT, Kind.PID, Kind.IPC, Kind.UTS, Kind.NETWORK)
    linux = {"namespaces": tuple(map(Namespace, kinds)), "uid_mappings": ids, "gid_mappings": ids}
    rootfs = [Mount("", "overlay", "overlay", ("lowerdir=@0", "upperdir=@1/u", "workdir=@1/w"))]
    options = {"rootfs": rootfs, "parts": [layer, writable]}
    assert lab.run("echo x > /f; cat /f", linux=linux, options=options).output == "x\n"
    assert eventually_none(tmp_path) == []


def test_what_fails_leaves_no_device(lab, layer, tmp_path):
    rootfs = [Mount("", "overlay", "overlay", ("lowerdir=@0:/nowhere",))]
    with pytest.raises(Exception, match="nowhere"):
        lab.run("true", options={"rootfs": rootfs, "parts": [layer]})
    (tmp_path / "garbage").write_bytes(bytes(1 << 20))
    garbage = Mount("", "ext4", str(tmp_path / "garbage"), ("loop",))
    with pytest.raises(OSError, match="ext4"):
        lab.run("true", options={"rootfs": rootfs, "parts": [layer, garbage]})
    assert eventually_none(tmp_path) == []


def test_a_file_is_written_by_one_container_at_a_time(lab, layer, writable, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "BUSY_S", 0.1)
    rootfs = [Mount("", "overlay", "overlay", ("lowerdir=@0", "upperdir=@1/u", "workdir=@1/w"))]
    options = {"rootfs": rootfs, "parts": [layer, writable]}
    first = lab.create(lab.spec("sleep 100"), **options)
    with pytest.raises(OSError, match="in use"):
        lab.run("true", options=options)
    process.send_signal(first.init.pidfd, signal.SIGKILL)
    lab.wait(first.init)
    assert lab.run("echo now", options=options).output == "now\n"
