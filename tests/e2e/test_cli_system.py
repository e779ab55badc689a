"""`corral system df` and `corral image prune`."""

import json
import subprocess
from pathlib import Path

from support.corrald import Corrald
from support.images import Entry, image_config, layer, write_oci_archive


def df(box: Corrald) -> dict[str, dict[str, int]]:
    """The rows by type, in exact bytes."""
    lines = box.corral("system", "df", "--format", "json", check=True).stdout.splitlines()
    return {row.pop("type"): row for row in map(json.loads, lines)}


def disk_bytes(path: Path) -> int:
    """What du(1) says of all below."""
    out = subprocess.run(["du", "-s", "-B1", str(path)], capture_output=True, check=True).stdout
    return int(out.split()[0]) - path.stat().st_blocks * 512


def test_df_tells_what_each_kind_takes(box: Corrald, name: str) -> None:
    box.corral("volume", "create", "df-vol", check=True)
    script = "head -c 300000 /dev/zero > /v/a; head -c 200000 /dev/zero > /mine"
    try:
        box.corral("run", "--name", name, "-v", "df-vol:/v", "busybox", "sh", "-c", script, check=True)
        found = df(box)
        assert (found["Images"]["total"], found["Images"]["active"]) == (1, 1)
        assert found["Images"]["size_bytes"] <= found["Blobs"]["size_bytes"] + found["Snapshots"]["size_bytes"]
        assert found["Images"]["reclaimable_bytes"] == 0
        assert (found["Containers"]["total"], found["Containers"]["active"]) == (1, 0)
        [upper] = (box.root / "images/overlay/s").glob("*/u/mine")
        assert found["Containers"]["size_bytes"] == disk_bytes(upper.parent) >= 200_000
        assert found["Containers"]["reclaimable_bytes"] == found["Containers"]["size_bytes"]
        volume = box.root / "engine/volumes/default/df-vol/data"
        assert found["Local Volumes"]["size_bytes"] == disk_bytes(volume) >= 300_000
        assert found["Local Volumes"]["reclaimable_bytes"] == 0
        blobs = sum(path.stat().st_size for path in (box.root / "images/blobs/sha256").iterdir())
        assert found["Blobs"]["size_bytes"] == blobs
        assert found["Partial downloads"] == {"total": 0, "active": 0, "size_bytes": 0, "reclaimable_bytes": 0}
        box.corral("rm", name, check=True)
        found = df(box)
        assert found["Images"]["reclaimable_bytes"] == found["Images"]["size_bytes"] > 0
        assert found["Local Volumes"]["reclaimable_bytes"] == found["Local Volumes"]["size_bytes"]
    finally:
        box.corral("rm", "-f", name)
        box.corral("volume", "rm", "df-vol", check=True)


def test_df_shows_tables(box: Corrald, name: str) -> None:
    box.corral("create", "--name", name, "busybox", "true", check=True)
    short = box.corral("system", "df", check=True).stdout.decode().splitlines()
    assert short[0].split() == ["TYPE", "TOTAL", "ACTIVE", "SIZE", "RECLAIMABLE"]
    assert [line.split("   ")[0] for line in short[1:]] == [
        "Images",
        "Containers",
        "Local Volumes",
        "Blobs",
        "Snapshots",
        "Partial downloads",
    ]
    long = box.corral("system", "df", "-v", check=True).stdout.decode()
    assert "SHARED SIZE" in long
    assert name in long
    whole = json.loads(box.corral("system", "df", "-v", "--format", "json", check=True).stdout)
    assert [container["name"] for container in whole["containers"]] == [name]
    assert whole["images"]["images"][0]["snapshots"] == [whole["containers"][0]["id"]]


def test_prune_takes_a_time(box: Corrald, tmp_path: Path) -> None:
    layers = [layer([Entry("x", b"prune")])]
    box.corral("image", "import", str(write_oci_archive(tmp_path / "x.tar", "old:1", layers, image_config(layers))))
    assert b"old" not in box.corral("image", "prune", "-a", "--filter", "until=2020-01-01", check=True).stdout
    bad = box.corral("image", "prune", "--filter", "before=1h")
    assert bad.returncode != 0
    assert b"until=TIME" in bad.stderr
    box.corral("image", "tag", "busybox", "kept:1", check=True)
    box.corral("create", "--name", "prune-user", "busybox", "true", check=True)
    try:
        pruned = box.corral("image", "prune", "-a", "-f", "--filter", "until=24h", check=True).stdout.decode()
    finally:
        box.corral("rm", "prune-user", check=True)
    assert "docker.io/library/old:1" in pruned
    assert "kept" not in pruned
    box.corral("image", "rm", "kept:1", check=True)


def test_an_image_whose_blobs_are_not_kept_is_saved_with_the_same_digests(box: Corrald, tmp_path: Path) -> None:
    layers = [layer([Entry("text", b"".join(b"line %d\n" % i for i in range(50_000)))])]
    archive = write_oci_archive(tmp_path / "x.tar", "thin:1", layers, image_config(layers))
    box.corral("image", "import", str(archive), "--keep-blobs=true", check=True)
    box.corral("save", "thin:1", "-o", str(tmp_path / "before.tar"), check=True)
    before = df(box)["Blobs"]["size_bytes"]
    box.corral("image", "import", str(archive), "--keep-blobs=false", check=True)
    assert df(box)["Blobs"]["size_bytes"] < before - 50_000
    box.corral("save", "thin:1", "-o", str(tmp_path / "after.tar"), check=True)
    assert (tmp_path / "after.tar").read_bytes() == (tmp_path / "before.tar").read_bytes()
    assert box.corral("system", "check", check=True).stdout == b""
    box.corral("image", "rm", "thin:1", check=True)
