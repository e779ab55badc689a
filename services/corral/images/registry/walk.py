"""What a name in a registry leads to: index, manifests, config, layers. Documents are fetched and stored on the way.

Source: OCI image-spec image-index.md, manifest.md.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

from corral.images.digest import Digest
from corral.images.model import (
    INDEXES,
    MANIFESTS,
    MAX_BLOB_BYTES,
    MAX_CONFIG_BYTES,
    Descriptor,
    Index,
    Manifest,
    Platform,
    parse_manifest_or_index,
)
from corral.images.platforms import choices
from corral.rpc.blocking import run_blocking
from corral.rpc.errors import InvalidArgument, NotFound

MAX_DEPTH = 4
MAX_NODES = 10_000

# The bytes of a document, stored here by then.
type Source = Callable[[Descriptor], Awaitable[bytes]]


@dataclass(slots=True)
class Tree:
    """As far as it was asked for."""

    target: Descriptor
    chosen: Descriptor
    manifest: Manifest
    # Configs and layers, each once, in the order of the manifests.
    contents: dict[Digest, Descriptor] = field(default_factory=dict)
    edges: set[tuple[Digest, Digest]] = field(default_factory=set)


class Walk:
    """From one target."""

    def __init__(self, source: Source, what: str, platform: Platform, *, everything: bool) -> None:
        """what: the image in words. everything: all platforms, and whatever else an index holds."""
        self._source = source
        self._what = what
        self._platform = platform
        self._everything = everything
        self._contents: dict[Digest, Descriptor] = {}
        self._edges: set[tuple[Digest, Digest]] = set()
        self._seen: dict[Digest, Manifest | Index] = {}
        self._followed: set[Digest] = set()
        # Indexes below which there is nothing for the platform, at whatever depth: no need to look there again.
        self._barren: set[Digest] = set()

    async def run(self, target: Descriptor) -> Tree:
        """Raises InvalidArgument, NotFound if there is nothing for the platform, and what the source raises."""
        target = replace(target, media_type=(await self._document(target)).media_type)
        chosen = await self._choose(target, depth=0)
        if chosen is None:
            raise self._nothing()
        if self._everything:
            await self._follow(target, depth=0)
        manifest = self._seen[chosen.digest]
        assert isinstance(manifest, Manifest)
        return Tree(target, chosen, manifest, self._contents, self._edges)

    async def _choose(self, descriptor: Descriptor, *, depth: int) -> Descriptor | None:
        """The manifest to run. None: there is nothing for the platform below."""
        if descriptor.digest in self._barren:
            return None
        document = await self._document(descriptor)
        if isinstance(document, Manifest):
            self._add(descriptor, document)
            return descriptor
        if depth >= MAX_DEPTH:
            raise InvalidArgument(f"{self._what} has indexes nested more than {MAX_DEPTH} deep", reason="BAD_DOCUMENT")
        wanted = choices(document.manifests, self._platform)
        if not wanted and self._everything:
            wanted = [m for m in document.manifests if m.media_type in MANIFESTS][:1]
        for child in wanted:
            self._edge(descriptor, child)
            if (chosen := await self._choose(child, depth=depth + 1)) is not None:
                return chosen
        self._barren.add(descriptor.digest)
        return None

    def _nothing(self) -> NotFound:
        listed = (m.platform for index in self._seen.values() if isinstance(index, Index) for m in index.manifests)
        offered = sorted({str(platform) for platform in listed if platform and platform.os != "unknown"})
        return NotFound(
            f"{self._what} has nothing for {self._platform}; it offers {', '.join(offered) or 'nothing'}:"
            " choose with --platform",
            reason="NO_PLATFORM",
        )

    async def _follow(self, descriptor: Descriptor, *, depth: int) -> None:
        if descriptor.digest in self._followed:
            return
        self._followed.add(descriptor.digest)
        document = await self._document(descriptor)
        if isinstance(document, Manifest):
            self._add(descriptor, document)
            return
        for child in document.manifests:
            if child.media_type in MANIFESTS or (child.media_type in INDEXES and depth < MAX_DEPTH):
                await self._follow(child, depth=depth + 1)
                self._edge(descriptor, child)

    def _add(self, descriptor: Descriptor, manifest: Manifest) -> None:
        self._check_size(manifest.config, MAX_CONFIG_BYTES)
        for layer in manifest.layers:
            self._check_size(layer, MAX_BLOB_BYTES)
        for child in (manifest.config, *manifest.layers):
            known = self._contents.setdefault(child.digest, child)
            if known.size_bytes != child.size_bytes:
                raise InvalidArgument(f"{self._what} tells two sizes of blob {child.digest}", reason="SIZE_MISMATCH")
            self._edge(descriptor, child)

    def _check_size(self, descriptor: Descriptor, most: int) -> None:
        if descriptor.size_bytes > most:
            raise InvalidArgument(
                f"{self._what} has a blob {descriptor.digest} of {descriptor.size_bytes} bytes; at most {most} go",
                reason="BAD_DOCUMENT",
            )

    def _edge(self, parent: Descriptor, child: Descriptor) -> None:
        self._edges.add((parent.digest, child.digest))
        if len(self._edges) > MAX_NODES:
            raise InvalidArgument(f"{self._what} refers to more than {MAX_NODES} blobs", reason="BAD_DOCUMENT")

    async def _document(self, descriptor: Descriptor) -> Manifest | Index:
        if descriptor.digest not in self._seen:
            data = await self._source(descriptor)
            what = f"manifest {descriptor.digest}"
            self._seen[descriptor.digest] = await run_blocking(
                lambda: parse_manifest_or_index(data, what, media_type=descriptor.media_type)
            )
        return self._seen[descriptor.digest]
