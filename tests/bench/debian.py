"""Images of Debian's own files, made on the spot and without a network: as OCI layouts, and as archives of these.

The files are those of this host's packages, the essential ones first. Where there is no dpkg, whatever /usr holds.
"""

import hashlib
import json
import os
import shutil
import stat
import subprocess
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_CONFIG = "application/vnd.oci.image.config.v1+json"
_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
_RANKS = {"required": 0, "important": 1, "standard": 2}
_RUNNABLE = ("/usr", "/usr/bin", shutil.which("busybox") or "/usr/bin/busybox")  # static: it needs no other file
_PIECE = 4 << 20
_LARGEST_FILE = 8 << 20  # so that parts of a few MB can be of the same size


@dataclass(frozen=True, slots=True)
class Sample:
    """One image, of these `bytes` of files when unpacked."""

    name: str
    layout: Path
    archive: Path
    layers: int
    files: int
    bytes: int

    @property
    def reference(self) -> str:
        return f"docker.io/library/{self.name}:latest"


def files_of_host(size_bytes: int) -> list[str]:
    """Paths below /usr, parents first, until they hold so much."""
    chosen: list[str] = []
    size = 0
    for path in dict.fromkeys([*_RUNNABLE, *_paths()]):
        try:
            status = os.lstat(path)
        except OSError:
            continue
        # What a moved directory still lists under its old name would come twice.
        above = Path(path).parent
        if not path.startswith("/usr") or above.resolve() != above or status.st_size > _LARGEST_FILE:
            continue
        chosen.append(path)
        size += status.st_size if stat.S_ISREG(status.st_mode) else 0
        if size > size_bytes:
            break
    return chosen


def _paths() -> list[str]:
    if not shutil.which("dpkg-query"):
        return [str(Path(at, name)) for at, below, names in os.walk("/usr") for name in sorted(below) + sorted(names)]
    form = "${Priority} ${binary:Package}\n"
    packages = [line.split() for line in _said("dpkg-query", "-W", "-f", form).splitlines()]
    packages.sort(key=lambda words: (_RANKS.get(words[0], 9), words[-1]))
    return _said("dpkg-query", "-L", *(words[-1] for words in packages)).splitlines()


def _said(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def in_parts(paths: Sequence[str], count: int) -> list[list[str]]:
    """The paths as `count` groups of about the same size, in order."""
    sizes = [os.lstat(path).st_size for path in paths]
    whole, done = sum(sizes), 0
    groups: list[list[str]] = [[] for _ in range(count)]
    for path, size in zip(paths, sizes, strict=True):
        groups[min(done * count // whole, count - 1)].append(path)
        done += size
    return groups


def make_sample(directory: Path, name: str, groups: Sequence[Sequence[str]]) -> Sample:
    """An image with a layer of each group of paths, as gzip makes them by default."""
    layout = directory / name
    (layout / "blobs/sha256").mkdir(parents=True)
    made = [_make_layer(layout, group) for group in groups]
    config = {
        "architecture": {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine),
        "os": "linux",
        "config": {"Cmd": [_RUNNABLE[-1], "true"]},
        "rootfs": {"type": "layers", "diff_ids": [diff_id for diff_id, _ in made]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": _MANIFEST,
        "config": _put(layout, _CONFIG, json.dumps(config).encode()),
        "layers": [layer for _, layer in made],
    }
    target = _put(layout, _MANIFEST, json.dumps(manifest).encode())
    names = {
        "org.opencontainers.image.ref.name": "latest",
        "io.containerd.image.name": f"docker.io/library/{name}:latest",
    }
    (layout / "index.json").write_text(
        json.dumps({"schemaVersion": 2, "manifests": [{**target, "annotations": names}]})
    )
    (layout / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    archive = directory / f"{name}.tar"
    _said("tar", "-C", str(layout), "-cf", str(archive), "oci-layout", "index.json", "blobs")
    paths = [path for group in groups for path in group]
    size = sum(os.lstat(path).st_size for path in paths if not Path(path).is_dir())
    return Sample(name, layout, archive, len(groups), len(paths), size)


def _make_layer(layout: Path, paths: Sequence[str]) -> tuple[str, dict[str, object]]:
    """Its diff id and its descriptor."""
    temporary = layout / f"layer-{hashlib.sha256(paths[0].encode()).hexdigest()}"
    command = ["tar", "--no-recursion", "-C", "/", "-c", "-T", "-"]
    plain, stored, size = hashlib.sha256(), hashlib.sha256(), 0
    encoder = zlib.compressobj(wbits=31)
    names = temporary.with_suffix(".names")
    names.write_text("".join(f"{path[1:]}\n" for path in paths))
    with (
        names.open() as listed,
        subprocess.Popen(command, stdin=listed, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as tar,
        temporary.open("wb") as file,
    ):
        assert tar.stdout is not None
        while piece := tar.stdout.read(_PIECE):
            plain.update(piece)
            data = encoder.compress(piece)
            stored.update(data)
            size += file.write(data)
        data = encoder.flush()
        stored.update(data)
        size += file.write(data)
    names.unlink()
    temporary.rename(layout / "blobs/sha256" / stored.hexdigest())
    descriptor = {"mediaType": _LAYER, "digest": f"sha256:{stored.hexdigest()}", "size": size}
    return f"sha256:{plain.hexdigest()}", descriptor


def _put(layout: Path, media_type: str, data: bytes) -> dict[str, object]:
    digest = hashlib.sha256(data).hexdigest()
    (layout / "blobs/sha256" / digest).write_bytes(data)
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}
