"""What an image consists of, read from its blobs and kept in memory: blobs never change."""

import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property

from corral.images.content import ContentStore
from corral.images.digest import Digest, chain_ids
from corral.images.model import (
    MAX_CONFIG_BYTES,
    MAX_MANIFEST_BYTES,
    Config,
    Descriptor,
    Manifest,
    check_runnable,
    parse_config,
    parse_manifest_or_index,
)
from corral.rpc.errors import InvalidArgument

MAX_KEPT = 256


@dataclass(frozen=True)
class Details:
    """A manifest and its config, which fit each other."""

    manifest: Manifest
    config: Config

    @cached_property
    def chain(self) -> tuple[Digest, ...]:
        return chain_ids(self.config.diff_ids)

    @property
    def layers(self) -> list[tuple[Digest, Digest, Descriptor]]:
        """Chain id, diff id and blob of each layer, bottom first."""
        return list(zip(self.chain, self.config.diff_ids, self.manifest.layers, strict=True))

    @property
    def chain_id(self) -> str:
        return self.chain[-1] if self.chain else ""


def make_details(manifest: Manifest, config: Config, what: str) -> Details:
    """Raises InvalidArgument if they do not belong together."""
    check_runnable(manifest, what)
    if len(manifest.layers) != len(config.diff_ids):
        raise InvalidArgument(
            f"{what} has {len(manifest.layers)} layers, but its config tells of {len(config.diff_ids)}: it is damaged",
            reason="BAD_DOCUMENT",
        )
    return Details(manifest, config)


class DetailsCache:
    """By manifest digest."""

    def __init__(self, content: ContentStore) -> None:
        self._content = content
        self._kept: OrderedDict[Digest, Details] = OrderedDict()
        self._lock = threading.Lock()  # lists are read on other threads

    def get(self, manifest: Descriptor) -> Details:
        """Reads two small files at the first time. Raises NotFound, InvalidArgument."""
        with self._lock:
            if (details := self._kept.get(manifest.digest)) is not None:
                self._kept.move_to_end(manifest.digest)
                return details
        details = self._read(manifest)
        with self._lock:
            self._kept[manifest.digest] = details
            if len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        return details

    def _read(self, descriptor: Descriptor) -> Details:
        what = f"manifest {descriptor.digest}"
        data = self._content.read(descriptor.digest, max_bytes=MAX_MANIFEST_BYTES)
        manifest = parse_manifest_or_index(data, what, media_type=descriptor.media_type)
        if not isinstance(manifest, Manifest):
            raise InvalidArgument(f"{what} is an index", reason="BAD_DOCUMENT")
        config = self._content.read(manifest.config.digest, max_bytes=MAX_CONFIG_BYTES)
        return make_details(manifest, parse_config(config, f"config {manifest.config.digest}"), what)
