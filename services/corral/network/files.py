"""Where the files are that containers see as /etc/hosts, /etc/resolv.conf and /etc/hostname.

    endpoints/<namespace>/<endpoint>/{hosts,resolv.conf,hostname}
    endpoints-ready/<name>/…            the three, empty, made before anybody needs them
    endpoints-trash/…                   on their way out

They are run state, and not fsynced: the first Attach after a boot writes them anew. But a container may write to them,
and no limit of its own holds there. So they lie on the disk on which its root file system lies, which it can fill
anyway, and not on the small tmpfs that /run is: that belongs to the host, and to the records of all containers.
What costs time is not the writing but the making and removing of files, on a disk above all (an ext4 without journal
searches past every inode freed in the last minute, 4 ms): so a request only fills what is there, and renames it.
"""

import os
import shutil
from pathlib import Path

from corral.network.etc import EtcFiles
from corral.network.model import EndpointKey
from corral.store import Trash, remove_tree

HOSTS, RESOLV_CONF, HOSTNAME = "hosts", "resolv.conf", "hostname"
_NAMES = (HOSTS, RESOLV_CONF, HOSTNAME)
MOST_READ = 1 << 20
"""Characters of a file that a container has written to."""


class FileStore:
    """The files of all endpoints."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._ready_root = root.with_name(f"{root.name}-ready")
        self._ready: set[str] = set()
        self.trash = Trash(root.with_name(f"{root.name}-trash"))

    def path(self, namespace: str, endpoint_id: str) -> str:
        """The directory with the files of an endpoint."""
        return f"{self._root}/{namespace}/{endpoint_id}"

    # Ahead

    def make_ready(self, name: str) -> None:
        """Make ahead what a write() with that name will need. Raises OSError."""
        _make(f"{self._ready_root}/{name}")
        self._ready.add(name)

    def is_ready(self, name: str) -> bool:
        """Whether write() with that name waits for no disk."""
        return name in self._ready

    def drop_ready(self, name: str) -> None:
        """What was made ready will not be used."""
        if name in self._ready:
            self._ready.discard(name)
            remove_tree(self._ready_root / name)

    # Of an endpoint

    def write(self, key: EndpointKey, files: EtcFiles, *, ready: str = "") -> None:
        """Write all three, or none: a directory appears with all of them in it. Raises OSError.

        ready: a name of make_ready(), which is used up.
        """
        if ready in self._ready:
            self._ready.discard(ready)
            temporary = f"{self._ready_root}/{ready}"
        else:
            temporary = f"{self._ready_root}/{os.urandom(8).hex()}"
            _make(temporary)
        try:
            for name, text in zip(_NAMES, (files.hosts, files.resolv_conf, files.hostname), strict=True):
                _fill(f"{temporary}/{name}", text, is_empty=True)
            self._place(temporary, key)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _place(self, temporary: str, key: EndpointKey) -> None:
        directory = self.path(key.namespace, key.id)
        try:
            os.rename(temporary, directory)  # noqa: PTH104 - a string
        except OSError:
            self.remove(key)  # of an earlier life of this endpoint
            Path(directory).parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            os.rename(temporary, directory)  # noqa: PTH104

    def change(self, key: EndpointKey, before: EtcFiles, after: EtcFiles) -> None:
        """Write what is different, into the same files: containers have them mounted.

        Whoever is in there may have written to them too: then lines of hosts come and go around what he wrote, and
        resolv.conf is his. Raises OSError.
        """
        directory = self.path(key.namespace, key.id)
        pairs = ((HOSTS, before.hosts, after.hosts), (RESOLV_CONF, before.resolv_conf, after.resolv_conf))
        for name, old, new in pairs:
            if old == new:
                continue
            current = _read(f"{directory}/{name}")
            if current != old:
                new = current if name == RESOLV_CONF else exchanged(current, old, new)
            if new != current:
                _fill(f"{directory}/{name}", new)

    def throw(self, key: EndpointKey) -> None:
        """Remove the files, in the background; no error if they are gone. On the event loop; waits for no disk."""
        self.trash.throw(self.path(key.namespace, key.id))

    def remove(self, key: EndpointKey) -> None:
        """The same for threads: what is left of them goes with what is thrown away next."""
        self.trash.discard(self.path(key.namespace, key.id))

    def found(self) -> set[EndpointKey]:
        """Whose files there are."""
        namespaces = self._root.iterdir() if self._root.is_dir() else ()
        return {EndpointKey(above.name, path.name) for above in namespaces for path in above.iterdir()}

    def sweep(self, keep: set[EndpointKey]) -> list[EndpointKey]:
        """Remove the files of endpoints that are not to be kept, and what was half written or not used; returns whose
        they were. Before anything else."""
        stale = []
        for namespace in sorted(self._root.iterdir()) if self._root.is_dir() else ():
            for directory in sorted(namespace.iterdir()):
                key = EndpointKey(namespace.name, directory.name)
                if key not in keep:
                    shutil.rmtree(directory)
                    stale.append(key)
        remove_tree(self._ready_root)
        self.trash.empty_or_report()
        return stale


def _make(directory: str) -> None:
    """A directory with the three files in it."""
    try:
        os.mkdir(directory, 0o755)  # noqa: PTH102 - a string
    except FileNotFoundError:
        Path(directory).mkdir(0o755, parents=True)
    for name in _NAMES:
        fd = os.open(f"{directory}/{name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            os.fchmod(fd, 0o644)  # whatever the umask: any user in the container reads them
        finally:
            os.close(fd)


def exchanged(text: str, old: str, new: str) -> str:
    """A text without the lines of old that are not in new, and with those of new. Pure."""
    going = set(old.splitlines()) - set(new.splitlines())
    kept = [line for line in text.splitlines() if line not in going]
    coming = [line for line in new.splitlines() if line not in kept]
    return "".join(f"{line}\n" for line in (*kept, *coming))


def _read(path: str) -> str:
    """A file in which a container may have written anything: no more than is looked at."""
    with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        return file.read(MOST_READ)


def _fill(path: str, text: str, *, is_empty: bool = False) -> None:
    data = text.encode(errors="surrogateescape")
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        written = 0
        while written < len(data):  # where there is room for a part of it, the next call tells why
            written += os.write(fd, data[written:])
        if not is_empty:
            os.ftruncate(fd, len(data))
    finally:
        os.close(fd)
