"""The engine's own directories and mounts compared with its rows."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from corral.engine import bounded_volumes, mounted_volumes, store, volume_rows
from corral.engine.core import Core, Key
from corral.engine.secrets import file_of as secret_file
from corral.engine.secrets import known_files as known_secrets
from corral.engine.volume_rows import VolumeRecord
from corral.engine.volumes import remove_unknown
from corral.kernel import mount
from corral.rpc.blocking import run_blocking
from corral.rpc.checking import Found
from corral.store import Snapshot
from corral.store.mountinfo import mounts_below


class FileChecker:
    """See the module."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def look(self) -> Sequence[Found]:
        return await run_blocking(self._look)

    def _look(self) -> list[Found]:
        """Directories are read before rows: what is being made has its row first."""
        root = self._core.config.root
        volumes, containers = _keys(root / "volumes"), _keys(root / "containers")
        mounts = mounts_below(root / "volumes")
        known, records = self._core.database.read_sync(_known)
        found = [
            Found(
                f"volume {namespace}/{name}",
                "is a directory that no row describes",
                "repair removes it",
                partial(remove_unknown, self._core, (namespace, name)),
            )
            for namespace, name in sorted(volumes - known.keys())
        ]
        found += [
            Found(
                f"directory {root}/containers/{namespace}/{id_}",
                "belongs to no container",
                "repair removes it",
                partial(self._remove_directory, (namespace, id_)),
            )
            for namespace, id_ in sorted(containers - records)
        ]
        for key, volume in sorted(known.items()):
            found += self._volume(volume, is_there=key in volumes)
        found += [
            Found(
                f"secret {secret.namespace}/{secret.name}",
                "has lost its content",
                "remove it, with the containers that use it, and make them again",
            )
            for secret in known_secrets(self._core).values()
            if not secret_file(self._core, secret).is_file()
        ]
        mounted = [volume for volume in known.values() if volume.quota_bytes or volume.lies_elsewhere]
        expected = {self._directory(volume) / "data" for volume in mounted}
        found += [
            Found(
                f"mount {path}", "belongs to no volume", "repair unmounts it", partial(run_blocking, mount.umount, path)
            )
            for path in mounts
            if path not in expected and (path.parent.parent.name, path.parent.name) in known
        ]
        return found

    def _volume(self, volume: VolumeRecord, *, is_there: bool) -> Iterator[Found]:
        subject = f"volume {volume.namespace}/{volume.name}"
        directory = self._directory(volume)
        repair = partial(run_blocking, bounded_volumes.prepare, directory, volume.options)
        if volume.lies_elsewhere and mounted_volumes.is_mounted(directory / "data"):
            return
        if not is_there or not (directory / "data").is_dir():
            yield Found(subject, "has lost its directory", "repair makes an empty one", repair)
        elif volume.quota_bytes and (directory / "image").exists() and not (directory / "data").is_mount():
            yield Found(subject, "is not mounted", "repair mounts it", repair)

    def _directory(self, volume: VolumeRecord) -> Path:
        return self._core.volume_root(volume.namespace) / volume.name

    async def _remove_directory(self, key: Key) -> None:
        if key not in self._core.database.read_sync(_known)[1]:
            self._core.trash.throw(self._core.config.root / "containers" / key[0] / key[1])


def _known(view: Snapshot) -> tuple[dict[Key, VolumeRecord], set[Key]]:
    """Volumes, and the keys of containers, of all namespaces."""
    volumes = {(volume.namespace, volume.name): volume for volume in volume_rows.volumes(view, None)}
    return volumes, set(store.keys(view))


def _keys(root: Path) -> set[Key]:
    return {(path.parent.name, path.name) for path in root.glob("*/*")}
