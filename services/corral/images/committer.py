"""Commit: what a container has written becomes a layer, and with the layers below it an image.

    pack      a worker makes the layer of the upper directory, which others may still be looking at
    describe  the config and the manifest of the image below, with the layer added; what they hold besides is kept
    unpack    as any layer is, which proves that what was packed can be read again
    admit     all of it or nothing

Where a driver keeps whole trees and not their changes, the worker compares (corral.images.layers.differing).
"""

import asyncio
import json
import shutil
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from corral.images import catalog
from corral.images.admission import Admission, Admitted
from corral.images.archives.found import FoundImage
from corral.images.archives.intake import StoredFile
from corral.images.archives.rootfs import config_object, dumped, manifest_document
from corral.images.blobs import is_stored
from corral.images.catalog import ImageRecord
from corral.images.collector import Collector
from corral.images.content import ContentStore, Ingest
from corral.images.details import make_details
from corral.images.digest import Digest
from corral.images.drivers import Drivers
from corral.images.errors import explained
from corral.images.layers.errors import BadLayer
from corral.images.model import (
    DOCKER_LAYER,
    MAX_CONFIG_BYTES,
    MAX_MANIFEST_BYTES,
    OCI_CONFIG,
    OCI_LAYER,
    OCI_MANIFEST,
    Descriptor,
    ImageConfig,
    Manifest,
    parse_config,
    parse_manifest_or_index,
)
from corral.images.platforms import host_platform
from corral.images.reference import Reference
from corral.images.snapshots import Snapshots
from corral.images.trees import Kind, TreeRecord
from corral.images.unpacker import Unpacker
from corral.images.workers import Workers
from corral.rpc.blocking import run_blocking
from corral.rpc.errors import FailedPrecondition
from corral.store import Database, failpoint

GZIP_LAYER = f"{OCI_LAYER}+gzip"
CHANGES_AT_ONCE = 1000


@dataclass(frozen=True, slots=True)
class CommitOptions:
    """What the user asked for. config: all of the image's, not only what differs."""

    namespace: str
    key: str
    name: Reference | None
    config: ImageConfig
    author: str = ""
    comment: str = ""
    created_by: str = ""
    lease: str = ""


@dataclass(frozen=True, slots=True)
class _Base:
    """The image below: its documents as they are, and its layers."""

    config: Mapping[str, Any]
    layers: tuple[Descriptor, ...] = ()
    pinned: tuple[str, ...] = ()


class Committer:
    """See the module."""

    def __init__(
        self,
        database: Database,
        content: ContentStore,
        drivers: Drivers,
        snapshots: Snapshots,
        workers: Workers,
        unpacker: Unpacker,
        collector: Collector,
        admission: Admission,
    ) -> None:
        self._database = database
        self._content = content
        self._drivers = drivers
        self._snapshots = snapshots
        self._workers = workers
        self._unpacker = unpacker
        self._collector = collector
        self._admission = admission

    async def commit(self, options: CommitOptions) -> ImageRecord:
        """The image. Raises NotFound, FailedPrecondition, InvalidArgument, ResourceExhausted."""
        tree = self._snapshots.get(options.namespace, options.key)
        apart = await run_blocking(self._apart, tree)
        image = self._image_below(options.namespace, tree)
        directory = await run_blocking(self._content.make_ingest_directory)
        try:
            async with AsyncExitStack() as pins:
                if image is not None:
                    await pins.enter_async_context(self._collector.pinned([image.manifest.digest]))
                base = await run_blocking(self._base, image)
                await pins.enter_async_context(self._collector.pinned(base.pinned))
                return await self._commit(options, base, apart, directory)
        except (BadLayer, OSError) as e:
            raise explained(e, f"cannot commit snapshot {options.key!r}") from e
        finally:
            await asyncio.shield(run_blocking(shutil.rmtree, directory, True))

    async def changes(self, namespace: str, key: str) -> AsyncGenerator[Sequence[tuple[str, str]]]:
        """The letter of each change, and its path, some at a time. Raises NotFound, FailedPrecondition.

        They go through a file: there may be millions, and nobody waits for a client.
        """
        apart = await run_blocking(self._apart, self._snapshots.get(namespace, key))
        try:
            directory = await run_blocking(self._content.make_ingest_directory)
            try:
                job = {"op": "compare", **apart, "target": str(directory / "changes")}
                await self._workers.run(job, lambda _done: None)
                file = Path(directory, "changes").open(encoding="ascii")  # noqa: ASYNC230, SIM115 - quick, closed below
            finally:
                await asyncio.shield(run_blocking(shutil.rmtree, directory, True))
        except (BadLayer, OSError) as e:
            raise explained(e, f"cannot compare snapshot {key!r}") from e
        with file:
            while some := await run_blocking(lambda: [_change(line) for line in islice(file, CHANGES_AT_ONCE)]):
                yield some

    def _apart(self, tree: TreeRecord) -> Mapping[str, object]:
        """Where the changes are, as a part of a worker's job. Blocking."""
        if tree.kind is not Kind.ACTIVE:
            raise FailedPrecondition(f"snapshot {tree.key!r} is not an active one: it has no changes of its own")
        return asdict(self._drivers.of(tree.driver).apart(tree.id, tree.chain))

    def _image_below(self, namespace: str, tree: TreeRecord) -> ImageRecord | None:
        if not tree.chain:
            return None
        found = self._database.read_sync(lambda s: catalog.by_id(s, namespace, tree.image_id))
        if not found:
            raise FailedPrecondition(
                f"the image that {tree.key!r} was made from is not here any more: import or pull it again",
                reason="NO_IMAGE",
            )
        return found[0]

    def _base(self, image: ImageRecord | None) -> _Base:
        """Blocking."""
        if image is None:
            platform = host_platform()
            return _Base({"architecture": platform.architecture, "os": platform.os})
        data = self._content.read(image.manifest.digest, max_bytes=MAX_MANIFEST_BYTES)
        manifest = parse_manifest_or_index(data, "the manifest", media_type=image.manifest.media_type)
        assert isinstance(manifest, Manifest), "an image's manifest is not an index"
        config = self._content.read(manifest.config.digest, max_bytes=MAX_CONFIG_BYTES)
        details = make_details(manifest, parse_config(config, "the config"), "the image")
        pinned = (*(layer.digest for layer in manifest.layers), *details.chain)
        return _Base(json.loads(config), tuple(map(_as_oci, manifest.layers)), pinned)

    async def _commit(
        self, options: CommitOptions, base: _Base, apart: Mapping[str, object], directory: Path
    ) -> ImageRecord:
        path = directory / "layer"
        answer = await self._workers.run({"op": "pack", **apart, "target": str(path)}, lambda _done: None)
        failpoint("images.commit.after_pack")
        layer = StoredFile(path, Digest(answer["digest"]), answer["size_bytes"])
        image = await run_blocking(self._described, options, base, layer, answer["diff_id"])
        async with self._collector.pinned([*image.blobs, *image.details.chain]):

            async def path_of(digest: Digest) -> Path:
                return image.blobs[digest].path if digest in image.blobs else self._content.path(digest)

            async with self._unpacker.unpacked(image.details, path_of, lambda *_: None) as staged:
                how = Admitted(options.namespace, "image.committed", options.lease)
                [record] = await self._admission.admit(how, [image], [staged])
        return record

    def _described(self, options: CommitOptions, base: _Base, layer: StoredFile, diff_id: str) -> FoundImage:
        """Blocking."""
        config_file = _stored(layer.path.with_name("config"), dumped(_config(options, base.config, diff_id)))
        layers = (*base.layers, Descriptor(GZIP_LAYER, layer.digest, layer.size_bytes))
        config = Descriptor(OCI_CONFIG, config_file.digest, config_file.size_bytes)
        manifest = Manifest(OCI_MANIFEST, config, layers)
        manifest_file = _stored(layer.path.with_name("manifest"), dumped(manifest_document(manifest)))
        target = Descriptor(OCI_MANIFEST, manifest_file.digest, manifest_file.size_bytes)
        details = make_details(manifest, parse_config(config_file.path.read_bytes(), "the config"), "the image")
        blobs = {file.digest: file for file in (config_file, layer, manifest_file)}
        here = [each.digest for each in base.layers if self._is_here(each.digest)]
        edges = {(target.digest, digest) for digest in (config.digest, layer.digest, *here)}
        names = () if options.name is None else (options.name,)
        return FoundImage(names, target, target, details, blobs, edges)

    def _is_here(self, digest: Digest) -> bool:
        return self._database.read_sync(lambda s: is_stored(s, self._content, digest))


def _change(line: str) -> tuple[str, str]:
    kind, path = json.loads(line)
    return kind, path


def _as_oci(layer: Descriptor) -> Descriptor:
    """An OCI manifest names its layers in OCI's words."""
    if not layer.media_type.startswith(DOCKER_LAYER):
        return layer
    compression = layer.media_type.removeprefix(DOCKER_LAYER).replace(".", "+")
    return Descriptor(OCI_LAYER + compression, layer.digest, layer.size_bytes)


def _config(options: CommitOptions, base: Mapping[str, Any], diff_id: str) -> Mapping[str, object]:
    """Source: OCI image-spec config.md."""
    now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    entry = {
        "created": now,
        "created_by": options.created_by,
        "author": options.author,
        "comment": options.comment,
    }
    inner = {key: value for key, value in (base.get("config") or {}).items() if key not in _KNOWN}
    diff_ids = [*((base.get("rootfs") or {}).get("diff_ids") or []), diff_id]
    return {
        **base,
        "created": now,
        **({"author": options.author} if options.author else {}),
        "config": inner | config_object(options.config),
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
        "history": [*(base.get("history") or []), {key: value for key, value in entry.items() if value}],
    }


_KNOWN = frozenset(
    {
        "User", "ExposedPorts", "Env", "Entrypoint", "Cmd", "Volumes", "WorkingDir", "Labels", "StopSignal",
        "Healthcheck",
    }
)  # fmt: skip


def _stored(path: Path, data: bytes) -> StoredFile:
    ingest = Ingest(path)
    try:
        ingest.write(data)
    finally:
        ingest.close()
    return StoredFile(path, ingest.digest, ingest.size_bytes)
