"""Debian's stock kernel, fetched once and unpacked, never installed; and an initramfs that starts tests on it."""

import lzma
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "linux-image-amd64"  # the one for clouds has no 9p
# Without these the machine finds neither its root nor its disk.
FIRST = ("9p", "9pnet_virtio", "overlay", "virtio_blk", "ext4")
INIT = Path(__file__).with_name("init.sh")
SHARED = "trans=virtio,version=9p2000.L,msize=524288"


class Missing(Exception):
    """Why there can be no machine here."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """Files of one kernel. modules: the directory that has lib/modules/<version>; None: all is built in."""

    image: Path
    modules: Path | None = None
    version: str = ""


def cache() -> Path:
    """Where what is fetched stays: below XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "corral-vm"


def kernel() -> Kernel:
    """Fetched by apt-get at the first time; remove the cache to get a newer one. Raises Missing."""
    tree = cache() / "kernel"
    if not tree.exists():
        _fetch(tree)
    [version] = [path.name for path in (tree / "usr/lib/modules").iterdir()]
    return Kernel(tree / f"boot/vmlinuz-{version}", tree / "usr", version)


def _fetch(tree: Path) -> None:
    cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache(), prefix="new-") as work:
        try:
            described = subprocess.run(["apt-cache", "depends", PACKAGE], capture_output=True, text=True, check=True)
            found = re.search(r"Depends: (linux-image-\S+)", described.stdout)
            if found is None:
                raise Missing(f"apt knows no {PACKAGE}: try `apt-get update`")
            as_root = ("-o", "APT::Sandbox::User=root")  # the cache is root's
            subprocess.run(["apt-get", "-qq", *as_root, "download", found[1]], cwd=work, check=True)
            [package] = Path(work).glob("*.deb")
            new = Path(work, "tree")
            subprocess.run(["dpkg-deb", "-x", package, new], check=True)
        except (OSError, subprocess.CalledProcessError) as e:
            raise Missing(f"{PACKAGE} cannot be fetched: {e}; try `apt-get update`") from e
        (new / "lib").symlink_to("usr/lib")
        [modules] = (new / "usr/lib/modules").iterdir()
        subprocess.run(["depmod", "-b", new, modules.name], check=True)
        new.rename(tree)


def initramfs(of: Kernel, target: Path) -> None:
    """Write one with busybox, the modules that come first, and init.sh. Raises Missing."""
    busybox = shutil.which("busybox")
    if busybox is None or b"/ld-linux" in Path(busybox).read_bytes():
        raise Missing("needs the static busybox (package busybox-static)")
    directories = ((name, 0o40755, b"") for name in ("bin", "dev", "host", "memory", "modules", "proc", "root", "run"))
    modules = ((f"modules/{i:02}.ko", 0o100644, data) for i, data in enumerate(_modules(of)))
    init = INIT.read_text("ascii").replace("$SHARED", SHARED)
    files = (("bin/busybox", 0o100755, Path(busybox).read_bytes()), ("init", 0o100755, init.encode()))
    target.write_bytes(b"".join(_cpio((*directories, *files, *modules))))


def _modules(of: Kernel) -> Iterator[bytes]:
    if of.modules is None:
        return
    command = ["modprobe", "-d", of.modules.parent, "-S", of.version, "-a", "--show-depends", *FIRST]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for path in dict.fromkeys(re.findall(r"insmod (\S+)", listed)):
        yield lzma.decompress(Path(path).read_bytes())


def _cpio(entries: Iterable[tuple[str, int, bytes]]) -> Iterator[bytes]:
    """Source: Documentation/driver-api/early-userspace/buffer-format.rst, the format newc."""
    for number, (name, mode, data) in enumerate((*entries, ("TRAILER!!!", 0, b"")), 1):
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        yield header + bytes(-len(header) % 4) + data + bytes(-len(data) % 4)
