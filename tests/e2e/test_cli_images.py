"""`corral image`, with archives good and bad."""

import contextlib
import gzip
import io
import json
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cli import eventually
from support.corrald import Corrald
from support.images import busybox_layer, image_config, write_busybox, write_docker_archive, write_oci_archive
from support.requirements import needs


def refused(box: Corrald, *args: str) -> str:
    """The one sentence with which an import fails; nothing may be left of it."""
    before = box.corral("image", "ls", "--format", "json").stdout
    result = box.corral("image", "import", *args)
    sentence = result.stderr.decode()
    assert result.returncode == 1, sentence
    assert result.stdout == b""
    assert sentence.startswith("corral: ")
    assert sentence.count("\n") == 1, sentence
    assert "Traceback" not in sentence
    assert box.corral("image", "ls", "--format", "json").stdout == before
    assert unfinished(box) == []
    return sentence


def unfinished(box: Corrald) -> list[Path]:
    """Half-made blobs and layers."""
    words = ("tmp", "ingest", "partial", "unpack")
    found = [p for p in (box.root / "images").rglob("*") if p.is_file() and any(w in p.parent.name for w in words)]
    return [p for p in found if "fs" not in p.parts]


def tar_of(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def test_docker_and_oci_archives_give_the_same_image(box: Corrald, tmp_path: Path) -> None:
    write_busybox(tmp_path / "d.tar", "one:1", form="docker")
    write_busybox(tmp_path / "o.tar", "two:2", form="oci")
    box.corral("image", "import", str(tmp_path / "d.tar"), check=True)
    box.corral("image", "import", str(tmp_path / "o.tar"), "--as", "two:2", check=True)
    ids = [json.loads(box.corral("image", "inspect", n, check=True).stdout)[0]["id"] for n in ("one:1", "two:2")]
    assert ids[0] == ids[1]
    box.corral("image", "rm", "one:1", "two:2", check=True)


def test_a_plain_root_file_system_needs_a_name_and_takes_a_config(box: Corrald, tmp_path: Path) -> None:
    (tmp_path / "rootfs.tar").write_bytes(busybox_layer())
    assert "--as" in refused(box, str(tmp_path / "rootfs.tar"))
    box.corral(
        "image",
        "import",
        str(tmp_path / "rootfs.tar"),
        "--as",
        "plain:1",
        "--cmd",
        "echo",
        "--cmd",
        "from config",
        check=True,
    )
    assert box.corral("run", "--rm", "plain:1").stdout == b"from config\n"
    box.corral("image", "rm", "plain:1", check=True)


def test_an_archive_may_come_from_a_pipe(box: Corrald, busybox_archive: Path) -> None:
    result = box.corral("image", "import", "-", "--as", "piped:1", stdin=busybox_archive.read_bytes())
    assert result.returncode == 0, result.stderr
    box.corral("image", "rm", "piped:1", check=True)


def test_a_layout_directory_is_an_archive_too(box: Corrald, tmp_path: Path) -> None:
    write_busybox(tmp_path / "o.tar", "x:1", form="oci")
    with tarfile.open(tmp_path / "o.tar") as tar:
        tar.extractall(tmp_path / "layout", filter="data")
    box.corral("image", "import", str(tmp_path / "layout"), "--as", "layout:1", check=True)
    box.corral("image", "rm", "layout:1", check=True)
    # Several layouts may share their blobs.
    (tmp_path / "layout/blobs").rename(tmp_path / "shared")
    (tmp_path / "layout/blobs").symlink_to(tmp_path / "shared")
    box.corral("image", "import", str(tmp_path / "layout"), "--as", "layout:2", check=True)
    box.corral("image", "rm", "layout:2", check=True)


@needs("skopeo")
def test_what_skopeo_writes_is_imported(box: Corrald, busybox_archive: Path, tmp_path: Path) -> None:
    copy = [
        "skopeo",
        "copy",
        "--insecure-policy",
        "-q",
        f"docker-archive:{busybox_archive}",
        f"oci-archive:{tmp_path}/s.tar:s:1",
    ]
    subprocess.run(copy, check=True)
    box.corral("image", "import", str(tmp_path / "s.tar"), "--as", "skopeo:1", check=True)
    assert box.corral("run", "--rm", "skopeo:1", "echo", "ok").stdout == b"ok\n"
    box.corral("image", "rm", "skopeo:1", check=True)


def test_tag_and_rm(box: Corrald) -> None:
    box.corral("image", "tag", "busybox", "registry.example/a/b:c", check=True)
    assert b"registry.example/a/b" in box.corral("image", "ls").stdout
    assert box.corral("run", "--rm", "registry.example/a/b:c", "echo", "x").stdout == b"x\n"
    assert b"Untagged" in box.corral("image", "rm", "registry.example/a/b:c", check=True).stdout
    assert box.corral("image", "inspect", "busybox").returncode == 0


def test_an_image_in_use_is_only_removed_by_force(box: Corrald, name: str) -> None:
    box.corral("image", "tag", "busybox", "held:1", check=True)
    box.corral("create", "--name", name, "held:1", "true", check=True)
    failed = box.corral("image", "rm", "held:1")
    assert failed.returncode == 1
    assert b"-f" in failed.stderr or b"force" in failed.stderr
    box.corral("image", "rm", "-f", "held:1", check=True)
    box.corral("start", name, check=True)


def test_what_is_no_archive(box: Corrald, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"this is not an archive" * 1000)
    refused(box, str(tmp_path / "x.tar"), "--as", "bad:1")
    (tmp_path / "x.tar").write_bytes(b"")
    refused(box, str(tmp_path / "x.tar"), "--as", "bad:1")


@pytest.mark.parametrize("form", ["docker", "oci"])
def test_a_truncated_archive(box: Corrald, tmp_path: Path, form: str) -> None:
    archive = write_busybox(tmp_path / "x.tar", "bad:1", form=form)
    whole = archive.read_bytes()
    for part in (0.2, 0.9):
        archive.write_bytes(whole[: int(len(whole) * part)])
        assert "truncated" in refused(box, str(archive), "--as", "bad:1") or "ends" in refused(
            box, str(archive), "--as", "bad:1"
        )


def test_a_corrupt_layer_is_named_by_its_digest(box: Corrald, tmp_path: Path) -> None:
    layers = [busybox_layer()]
    archive = write_oci_archive(tmp_path / "x.tar", "bad:1", layers, image_config(layers))
    data = bytearray(archive.read_bytes())
    data[len(data) // 2] ^= 0xFF
    archive.write_bytes(data)
    assert "sha256:" in refused(box, str(archive), "--as", "bad:1")


def test_a_layer_that_is_not_what_the_config_promises(box: Corrald, tmp_path: Path) -> None:
    promised = [busybox_layer()]
    other = [tar_of((tarfile.TarInfo("file"), b"something else"))]
    write_docker_archive(tmp_path / "x.tar", "bad:1", other, image_config(promised))
    assert "sha256:" in refused(box, str(tmp_path / "x.tar"), "--as", "bad:1")


def hostile_layers() -> dict[str, bytes]:
    def link(name: str, target: str, kind: bytes) -> tuple[tarfile.TarInfo, bytes]:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        return info, b""

    inside = tarfile.TarInfo("d/escaped")
    return {
        "parent": tar_of((tarfile.TarInfo("../escaped"), b"x")),
        "deep-parent": tar_of((tarfile.TarInfo("a/../../escaped"), b"x")),
        "symlink-parent": tar_of(link("d", "../../../../../../tmp", tarfile.SYMTYPE), (inside, b"x")),
        "absolute-symlink-parent": tar_of(link("d", "/tmp", tarfile.SYMTYPE), (inside, b"x")),
        "hardlink-out": tar_of(link("d", "../../../../etc/passwd", tarfile.LNKTYPE)),
        "hardlink-through-link": tar_of(link("d", "/etc", tarfile.SYMTYPE), link("e", "d/passwd", tarfile.LNKTYPE)),
    }


@pytest.mark.parametrize("trick", sorted(hostile_layers()))
def test_no_layer_reaches_out_of_its_root(box: Corrald, tmp_path: Path, trick: str) -> None:
    """Refused, or contained: in either case the host has no such file."""
    layers = [hostile_layers()[trick]]
    write_docker_archive(tmp_path / "x.tar", "hostile:1", layers, image_config(layers))
    result = box.corral("image", "import", str(tmp_path / "x.tar"), "--as", "hostile:1")
    if result.returncode:
        assert result.stderr.decode().count("\n") == 1
        eventually(lambda: unfinished(box) == [])  # what was removed by the one before goes in the background
    else:
        box.corral("image", "rm", "hostile:1", check=True)
    assert not Path("/tmp/escaped").exists()
    assert [p for p in box.root.rglob("escaped") if "images" not in p.parts] == []


def test_a_full_disk_is_one_sentence_and_leaves_nothing(busybox_archive: Path) -> None:
    with running_on_small_disk() as small:
        before = used(small.root)
        result = small.corral("image", "import", str(busybox_archive), "--as", "busybox")
        assert result.returncode == 1
        assert b"space" in result.stderr
        assert result.stderr.count(b"\n") == 1
        assert small.corral("image", "ls", "-q").stdout == b""
        assert used(small.root) < before + 300_000


def used(root: Path) -> int:
    return sum(
        p.lstat().st_blocks * 512
        for p in (root / "images").rglob("*")
        if p.is_file() and p.suffix not in (".db", ".db-wal", ".db-shm")
    )


@contextlib.contextmanager
def running_on_small_disk() -> Iterator[Corrald]:
    """A daemon whose data root is a tmpfs of one mebibyte and a half."""
    with Corrald() as daemon:
        daemon.root.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1536k", "corral-test", daemon.root], check=True)
        daemon.start()
        yield daemon
        daemon.stop()
        subprocess.run(["umount", daemon.root], check=True)


def test_gzip_and_zstd_layers(box: Corrald, tmp_path: Path) -> None:
    import zstandard

    layer = busybox_layer()
    for number, packed in enumerate((gzip.compress(layer), zstandard.compress(layer))):
        (tmp_path / "rootfs.tar").write_bytes(packed)
        box.corral("image", "import", str(tmp_path / "rootfs.tar"), "--as", f"packed:{number}", check=True)
        assert box.corral("run", "--rm", f"packed:{number}", "echo", "ok").stdout == b"ok\n"
        box.corral("image", "rm", f"packed:{number}", check=True)
