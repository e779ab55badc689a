"""Archives of images, made from nothing but Debian's static busybox: no network is needed to test or to demonstrate."""

import gzip
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PASSWD = (
    "root:x:0:0:root:/root:/bin/sh\n"
    "daemon:x:1:1:daemon:/usr/sbin:/bin/false\n"
    "app:x:1000:1000:app:/home/app:/bin/sh\n"
    "nobody:x:65534:65534:nobody:/:/bin/false\n"
)
GROUP = "root:x:0:\ndaemon:x:1:\ntty:x:5:\nstaff:x:50:app\napp:x:1000:\nnogroup:x:65534:\n"
DEFAULT_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One member of a layer."""

    name: str
    data: bytes = b""
    mode: int = 0o644
    kind: bytes = tarfile.REGTYPE
    link: str = ""
    uid: int = 0
    gid: int = 0
    device: tuple[int, int] = (0, 0)
    pax: Mapping[str, str] = field(default_factory=dict)


def directory(name: str, mode: int = 0o755, *, uid: int = 0) -> Entry:
    return Entry(name, mode=mode, kind=tarfile.DIRTYPE, uid=uid, gid=uid)


def symlink(name: str, target: str) -> Entry:
    return Entry(name, mode=0o777, kind=tarfile.SYMTYPE, link=target)


def layer(entries: Sequence[Entry]) -> bytes:
    """An uncompressed layer; the same entries give the same bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for entry in entries:
            info = tarfile.TarInfo(entry.name)
            info.size, info.mode, info.type, info.linkname = len(entry.data), entry.mode, entry.kind, entry.link
            info.uid, info.gid = entry.uid, entry.gid
            info.devmajor, info.devminor = entry.device
            info.pax_headers = dict(entry.pax)
            archive.addfile(info, io.BytesIO(entry.data))
    return buffer.getvalue()


def busybox_layer() -> bytes:
    """busybox with a link for every applet, and the files that programs expect."""
    path = shutil.which("busybox")
    if path is None:
        raise FileNotFoundError("busybox is not installed: apt install busybox-static")
    applets = subprocess.run([path, "--list"], capture_output=True, check=True, text=True).stdout.split()
    directories = ["bin", "dev", "etc", "home", "proc", "run", "sys", "usr", "usr/bin", "var", "var/tmp"]
    entries = [directory(name) for name in directories]
    entries += [directory("root", 0o700), directory("tmp", 0o1777), directory("home/app", uid=1000)]
    entries.append(Entry("bin/busybox", Path(path).read_bytes(), 0o755))
    entries += [symlink(f"bin/{applet}", "busybox") for applet in sorted(applets) if applet != "busybox"]
    entries += [Entry("etc/passwd", PASSWD.encode()), Entry("etc/group", GROUP.encode())]
    entries += [Entry("etc/hosts"), Entry("etc/resolv.conf"), Entry("etc/hostname")]
    return layer(entries)


def image_config(layers: Sequence[bytes], **config: object) -> bytes:
    """An OCI image configuration; `config` is its inner `config` object, with Cmd and Env if not given."""
    import platform

    machine = platform.machine()
    document = {
        "created": "2025-01-01T00:00:00Z",
        "architecture": ARCHITECTURES.get(machine, machine),
        "os": "linux",
        "config": {"Env": [DEFAULT_PATH], "Cmd": ["sh"], **config},
        "rootfs": {"type": "layers", "diff_ids": [digest(data) for data in layers]},
        "history": [{"created": "2025-01-01T00:00:00Z", "created_by": "corral tests"} for _ in layers],
    }
    return json.dumps(document, separators=(",", ":")).encode()


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def write_docker_archive(path: Path, name: str, layers: Sequence[bytes], config: bytes) -> Path:
    """As `docker save` wrote it before version 25."""
    names = [f"{digest(data)[7:]}/layer.tar" for data in layers]
    config_name = f"{digest(config)[7:]}.json"
    manifest = [{"Config": config_name, "RepoTags": [name], "Layers": names}]
    members = {config_name: config, **dict(zip(names, layers, strict=True))}
    members["manifest.json"] = json.dumps(manifest).encode()
    return _write_tar(path, members)


def write_oci_archive(path: Path, name: str, layers: Sequence[bytes], config: bytes, *, compress: bool = True) -> Path:
    """An OCI image layout in a tar file, as `skopeo copy … oci-archive:` writes it."""
    stored = [gzip.compress(data, 6, mtime=0) if compress else data for data in layers]
    kind = "application/vnd.oci.image.layer.v1.tar+gzip" if compress else "application/vnd.oci.image.layer.v1.tar"
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": _descriptor("application/vnd.oci.image.config.v1+json", config),
            "layers": [_descriptor(kind, data) for data in stored],
        }
    ).encode()
    entry = _descriptor("application/vnd.oci.image.manifest.v1+json", manifest)
    entry["annotations"] = {"org.opencontainers.image.ref.name": name}
    members = {
        "oci-layout": b'{"imageLayoutVersion":"1.0.0"}',
        "index.json": json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode(),
    }
    members |= {f"blobs/sha256/{digest(data)[7:]}": data for data in (manifest, config, *stored)}
    return _write_tar(path, members)


def _descriptor(media_type: str, data: bytes) -> dict[str, object]:
    return {"mediaType": media_type, "digest": digest(data), "size": len(data)}


def _write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_busybox(path: Path, name: str = "busybox:latest", *, form: str = "docker", **config: object) -> Path:
    """The image that tests and the demo use. `form` is docker or oci; `config` as in image_config."""
    layers = [busybox_layer()]
    write = write_docker_archive if form == "docker" else write_oci_archive
    return write(path, name, layers, image_config(layers, **config))
