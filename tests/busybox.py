"""An image made without any network: Debian's static busybox as a docker archive."""

import gzip
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path


def busybox_binary() -> Path | None:
    """The static busybox of Debian's busybox-static, or None."""
    for name in ("/usr/bin/busybox", "/bin/busybox"):
        path = Path(name)
        if path.exists():
            return path.resolve()
    found = shutil.which("busybox")
    return Path(found) if found else None


def applets() -> list[str]:
    """Every command that this busybox offers."""
    binary = busybox_binary()
    assert binary is not None, "busybox is missing: apt-get install busybox-static"
    listed = subprocess.run([binary, "--list"], capture_output=True, text=True, check=True).stdout.split()
    return [name for name in listed if name != "busybox"]


def layer(extra: Sequence[tuple[str, bytes]] = ()) -> bytes:
    """A layer as plain tar: the binary once, a hard link for each applet, and what a root file system needs."""
    binary = busybox_binary()
    assert binary is not None, "busybox is missing: apt-get install busybox-static"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, mode in (
            ("bin", 0o755), ("dev", 0o755), ("etc", 0o755), ("home", 0o755), ("lib", 0o755), ("proc", 0o555), ("root", 0o700),
            ("sys", 0o555), ("tmp", 0o1777), ("usr", 0o755), ("var", 0o755), ("var/spool", 0o755),
        ):  # fmt: skip
            _add(tar, name, mode=mode, kind=tarfile.DIRTYPE)
        _add(tar, "bin/busybox", binary.read_bytes(), mode=0o755)
        for applet in applets():
            _add(tar, f"bin/{applet}", kind=tarfile.LNKTYPE, link="bin/busybox", mode=0o755)
        _add(tar, "etc/passwd", b"root:x:0:0:root:/root:/bin/sh\nwww:x:33:33:www:/var:/bin/false\n")
        _add(tar, "etc/group", b"root:x:0:\nwww:x:33:\naudio:x:29:www\n")
        for name, data in extra:
            _add(tar, name, data)
    return buffer.getvalue()


def docker_archive(
    path: Path, name: str = "busybox:latest", *, extra: Sequence[tuple[str, bytes]] = (), compress: bool = False
) -> Path:
    """Writes the image to `path` as `docker save` would; returns `path`."""
    data = layer(extra)
    diff_id = hashlib.sha256(data).hexdigest()
    config = json.dumps({
        "architecture": "amd64",
        "os": "linux",
        "created": "2026-01-01T00:00:00Z",
        "config": {"Cmd": ["sh"], "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{diff_id}"]},
        "history": [{"created": "2026-01-01T00:00:00Z", "created_by": "busybox-static"}],
    }).encode()  # fmt: skip
    config_name = f"{hashlib.sha256(config).hexdigest()}.json"
    blob = gzip.compress(data, 1, mtime=0) if compress else data
    manifest = [{"Config": config_name, "RepoTags": [name], "Layers": [f"{diff_id}/layer.tar"]}]
    with tarfile.open(path, "w") as tar:
        _add(tar, f"{diff_id}/layer.tar", blob)
        _add(tar, config_name, config)
        _add(tar, "manifest.json", json.dumps(manifest).encode())
    return path


def _add(
    tar: tarfile.TarFile,
    name: str,
    data: bytes = b"",
    *,
    mode: int = 0o644,
    kind: bytes = tarfile.REGTYPE,
    link: str = "",
) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.linkname, info.size, info.mtime = kind, mode, link, len(data), 1_767_225_600
    tar.addfile(info, io.BytesIO(data) if data else None)
