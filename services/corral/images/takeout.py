"""A container's whole root file system, image and changes together, as a plain tar.

A worker packs it into a file first, so that no client holds up a worker, and a tree that cannot be packed is an error
before the first byte. Layers and changes are mounted once more for that, read-only and seen by the worker alone.
"""

import asyncio
import shutil
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path

from corral.images.content import READ_BYTES, ContentStore
from corral.images.errors import explained
from corral.images.layers.errors import BadLayer
from corral.images.snapshots import Snapshots
from corral.images.workers import Workers
from corral.kernel.aufs import split_branches
from corral.rpc.blocking import run_blocking


class Takeout:
    """See the module."""

    def __init__(self, content: ContentStore, snapshots: Snapshots, workers: Workers) -> None:
        self._content = content
        self._snapshots = snapshots
        self._workers = workers

    async def run(self, namespace: str, key: str) -> AsyncGenerator[bytes]:
        """The tar's bytes. Raises NotFound, FailedPrecondition, ResourceExhausted."""
        job = self._job(namespace, key)
        try:
            directory = await run_blocking(self._content.make_ingest_directory)
            try:
                await self._workers.run({**job, "target": str(directory / "tar")}, lambda _done: None)
                file = Path(directory, "tar").open("rb", 0)  # noqa: ASYNC230, SIM115 - quick, and closed below
            finally:
                await asyncio.shield(run_blocking(shutil.rmtree, directory, True))
        except (BadLayer, OSError) as e:
            raise explained(e, f"cannot export snapshot {key!r}") from e
        with file:
            while data := await run_blocking(file.read, READ_BYTES):
                yield data

    def _job(self, namespace: str, key: str) -> Mapping[str, object]:
        [mount] = self._snapshots.mounts(namespace, key)
        options = dict(option.partition("=")[::2] for option in mount.options)
        more: list[str] = []
        if mount.type == "bind":
            layers = [mount.source]
        elif mount.type == "aufs":
            layers = [directory for directory, _ in split_branches(options["br"])]
        else:
            upper = options.pop("upperdir", "")
            layers = [upper, *options.pop("lowerdir").split(":")] if upper else options.pop("lowerdir").split(":")
            more = [f"{name}={value}" for name, value in options.items() if name not in ("workdir", "rw", "ro")]
        inside, _, upper = layers[0].partition("/")
        if inside.startswith("@") and upper:  # the changes are in a file system of their own
            own = {"file": mount.parts[int(inside[1:])].source, "source": upper}
            layers = layers[1:]
        else:
            own = {}
        files = [mount.parts[int(path[1:])].source if path.startswith("@") else path for path in layers]
        return {"op": "pack_whole", "type": mount.type, "layers": files, "options": more, **own}
