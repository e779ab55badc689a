"""An image on a directory of the host: seen, written to, known after a crash, and unmounted."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import images
from support.corrald import Corrald, running
from support.requirements import needs

pytestmark = needs("root", "overlayfs", "busybox")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Corrald]:
    with running() as daemon:
        layers = [
            images.busybox_layer(),
            images.layer([images.Entry("f", b"image")]),
        ]
        path = images.write_docker_archive(tmp_path / "i.tar", "img:1", layers, images.image_config(layers))
        daemon.corral("image", "import", str(path), check=True)
        yield daemon


@pytest.fixture
def where(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "a mount"
    path.mkdir()
    yield path
    while mounts(path):
        subprocess.run(["umount", path], check=True)


def mounts(path: Path) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line.split()[5] for line in lines if line.split()[4] == str(path).replace(" ", "\\040")]


def snapshots(daemon: Corrald) -> list[str]:
    listed = daemon.corral("snapshot", "ls", "-q", check=True).stdout.decode().split()
    return [key for key in listed if key.startswith("mount-")]


def test_an_image_is_mounted_listed_and_unmounted(daemon: Corrald, where: Path) -> None:
    daemon.corral("image", "mount", "img:1", str(where), check=True)
    assert (where / "f").read_bytes() == b"image"
    with pytest.raises(OSError, match="Read-only"):
        (where / "f").write_bytes(b"x")
    [options] = mounts(where)
    assert {"ro", "nosuid", "nodev"} <= set(options.split(","))
    assert str(where).encode() in daemon.corral("image", "mount", check=True).stdout
    again = daemon.corral("image", "mount", "img:1", str(where))
    assert again.returncode == 1
    assert b"mounted on" in again.stderr
    assert daemon.corral("image", "rm", "img:1").returncode == 1, "it is in use"
    daemon.corral("image", "unmount", str(where), check=True)
    assert (mounts(where), snapshots(daemon)) == ([], [])
    missing = daemon.corral("image", "unmount", str(where))
    assert missing.returncode == 1
    assert b"no image is mounted on" in missing.stderr


def test_what_is_written_to_a_writable_one_is_its_own(daemon: Corrald, where: Path) -> None:
    daemon.corral("image", "mount", "--rw", "img:1", str(where), check=True)
    (where / "f").write_bytes(b"mine")
    assert daemon.corral("run", "--rm", "img:1", "cat", "/f", check=True).stdout == b"image"
    with (where / "f").open():
        busy = daemon.corral("image", "unmount", str(where))
        assert busy.returncode == 1
        assert b"in use" in busy.stderr
    daemon.corral("image", "unmount", str(where), check=True)
    daemon.corral("image", "mount", "--rw", "img:1", str(where), check=True)
    assert (where / "f").read_bytes() == b"image"
    daemon.corral("image", "unmount", str(where), check=True)


def test_a_mount_that_was_there_before_stays(daemon: Corrald, where: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "corral-test", where], check=True)
    daemon.corral("image", "mount", "img:1", str(where), check=True)
    assert len(mounts(where)) == 2
    daemon.corral("image", "unmount", str(where), check=True)
    assert len(mounts(where)) == 1


@pytest.mark.parametrize("point", ["", "images.mount.after_snapshot", "images.mount.after_mount"])
def test_a_mount_is_known_after_a_crash(daemon: Corrald, where: Path, point: str) -> None:
    if point:
        daemon.kill9()
        daemon.start(environment={"CORRAL_FAILPOINTS": f"{point}=kill"})
    daemon.corral("image", "mount", "--rw", "img:1", str(where), check=not point)
    if not point:
        (where / "f").write_bytes(b"mine")
        daemon.kill9()
    daemon.start()
    assert len(mounts(where)) == (point != "images.mount.after_snapshot")
    if not point:
        assert (where / "f").read_bytes() == b"mine"
    assert str(where).encode() in daemon.corral("image", "mount", check=True).stdout
    daemon.corral("image", "unmount", str(where), check=True)
    assert (mounts(where), snapshots(daemon)) == ([], [])


@pytest.mark.parametrize("bad", ["/", "/absent/directory"])
def test_what_is_no_directory_to_mount_on_is_told(daemon: Corrald, bad: str) -> None:
    refused = daemon.corral("image", "mount", "img:1", bad)
    assert refused.returncode == 1
    assert b"no directory to mount an image on" in refused.stderr
    assert snapshots(daemon) == []


def test_inspect_tells_what_an_index_offers(daemon: Corrald, tmp_path: Path) -> None:
    layers = [images.layer([images.Entry("f", b"x")])]
    path = images.write_oci_archive(tmp_path / "one.tar", "one:1", layers, images.image_config(layers))
    subprocess.run(["tar", "-xf", path, "-C", tmp_path], check=True)
    [entry] = json.loads((tmp_path / "index.json").read_bytes())["manifests"]
    del entry["annotations"]
    other = {**entry, "digest": "sha256:" + "1" * 64, "platform": {"os": "linux", "architecture": "riscv64"}}
    inner = {"schemaVersion": 2, "manifests": [entry | {"platform": {"os": "linux", "architecture": "amd64"}}, other]}
    data = json.dumps(inner).encode()
    (tmp_path / "blobs/sha256" / images.digest(data)[7:]).write_bytes(data)
    media_type = "application/vnd.oci.image.index.v1+json"
    named = {"io.containerd.image.name": "docker.io/library/many:1"}
    top = {"mediaType": media_type, "digest": images.digest(data), "size": len(data), "annotations": named}
    (tmp_path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [top]}))
    packed = tmp_path / "many.tar"
    subprocess.run(["tar", "-cf", packed, "-C", tmp_path, "oci-layout", "index.json", "blobs"], check=True)
    daemon.corral("image", "import", str(packed), check=True)
    [image] = json.loads(daemon.corral("image", "inspect", "many:1", check=True).stdout)
    assert [each["platform"]["architecture"] for each in image["offered"]] == ["amd64", "riscv64"]
    [plain] = json.loads(daemon.corral("image", "inspect", "img:1", check=True).stdout)
    assert not plain.get("offered")
