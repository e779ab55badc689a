"""Where the files are that containers see as /etc/hosts, /etc/resolv.conf and /etc/hostname."""

import contextlib
import os
import shutil
from pathlib import Path

from corral.network.etc import EtcFiles
from corral.network.model import EndpointKey

HOSTS, RESOLV_CONF, HOSTNAME = "hosts", "resolv.conf", "hostname"


class FileStore:
    """The files of all endpoints: <state>/endpoints/<namespace>/<endpoint>/{hosts,resolv.conf,hostname}.

    Run state, not fsynced: they are of use only while the machine runs, and the first Attach after a boot writes them
    anew. On a tmpfs that costs 0.1 ms; on an ext4 without journal, after many deletions, 4 ms (it searches past every
    inode freed in the last minute).
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def directory(self, key: EndpointKey) -> Path:
        """Where the files of an endpoint are."""
        return self._root / key.namespace / key.id

    def write(self, key: EndpointKey, files: EtcFiles) -> None:
        """Write all three, or none: a directory appears with all of them in it. Raises OSError."""
        directory = self.directory(key)
        temporary = directory.with_name(f".{key.id}.{os.urandom(4).hex()}")
        try:
            temporary.mkdir(0o755)
        except FileNotFoundError:
            temporary.mkdir(0o755, parents=True)
        try:
            for name, text in ((HOSTS, files.hosts), (RESOLV_CONF, files.resolv_conf), (HOSTNAME, files.hostname)):
                _write(temporary / name, text)
            _replace(temporary, directory)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def remove(self, key: EndpointKey) -> None:
        """Remove the files; no error if they are gone."""
        directory = self.directory(key)
        for name in (HOSTS, RESOLV_CONF, HOSTNAME):
            with contextlib.suppress(FileNotFoundError):
                (directory / name).unlink()
        with contextlib.suppress(FileNotFoundError):
            directory.rmdir()

    def sweep(self, keep: set[EndpointKey]) -> list[EndpointKey]:
        """Remove the files of endpoints that are not to be kept, and what was half written; returns whose they were."""
        stale = []
        for namespace in sorted(self._root.iterdir()) if self._root.is_dir() else ():
            for directory in sorted(namespace.iterdir()):
                key = EndpointKey(namespace.name, directory.name)
                if key not in keep:
                    shutil.rmtree(directory)
                    stale.append(key)
        return stale


def _write(path: Path, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        os.fchmod(fd, 0o644)  # whatever the umask: any user in the container reads them
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _replace(temporary: Path, directory: Path) -> None:
    try:
        temporary.rename(directory)
    except OSError:
        if not directory.is_dir():
            raise
        shutil.rmtree(directory)  # of an earlier life of this endpoint
        temporary.rename(directory)
