"""Push: an image goes to a registry, with the digests that it has.

content      configs and layers, several at a time: those that the registry has not, mounted where it has them
             under another name, else sent
documents    manifests by digest, an index after all that it holds
name         last of all, so that whoever pulls it finds it whole
"""

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

from corral.images import catalog, origins
from corral.images.blobs import is_stored
from corral.images.catalog import ImageRecord
from corral.images.collector import Collector
from corral.images.content import ContentStore
from corral.images.digest import Digest
from corral.images.model import (
    INDEXES,
    MANIFESTS,
    MAX_MANIFEST_BYTES,
    Descriptor,
    Index,
    Manifest,
    Platform,
    parse_manifest_or_index,
)
from corral.images.platforms import choose
from corral.images.progress import Report, Step
from corral.images.reference import Reference, parse_reference
from corral.images.registry.credentials import ANONYMOUS, Credentials
from corral.images.registry.crew import crew
from corral.images.registry.http import Http
from corral.images.registry.referrers import announce
from corral.images.registry.repository import Document, Repository, open_repository
from corral.images.registry.upload import Upload
from corral.images.store import write_much
from corral.rpc.blocking import run_blocking
from corral.rpc.errors import FailedPrecondition, InvalidArgument, NotFound
from corral.store import Database, failpoint

BLOBS_AT_ONCE = 4
# Layers that a registry may not hold: who wants them has them from where their descriptor says.
_NOT_OURS = ("nondistributable", "foreign")


@dataclass(frozen=True, slots=True)
class PushOptions:
    """What the user asked for. platform None: what is here of it."""

    namespace: str
    name: str
    destination: Reference | None = None
    platform: Platform | None = None
    all_platforms: bool = False
    credentials: Credentials = field(default=ANONYMOUS, repr=False)
    insecure: bool = False


@dataclass(slots=True)
class _Load:
    """What goes: documents with children before parents, and the content that they refer to."""

    documents: dict[Digest, Document] = field(default_factory=dict)
    contents: dict[Digest, Descriptor] = field(default_factory=dict)
    missing: list[Digest] = field(default_factory=list)


class Pusher:
    """See the module."""

    def __init__(
        self, database: Database, content: ContentStore, collector: Collector, http: Http, *, certs: Path
    ) -> None:
        self._database = database
        self._content = content
        self._collector = collector
        self._http = http
        self._certs = certs

    async def run(self, options: PushOptions, report: Report) -> Descriptor:
        """What the destination points at afterwards.

        Raises NotFound, PermissionDenied, Unavailable, InvalidArgument, FailedPrecondition.
        """
        record = self._database.read_sync(lambda s: catalog.find(s, options.namespace, options.name))
        destination = options.destination or _own_name(options.name, record)
        async with AsyncExitStack() as pins:
            await pins.enter_async_context(self._collector.pinned([record.target.digest]))
            load = await run_blocking(self._load, options, record)
            await pins.enter_async_context(self._collector.pinned((*load.documents, *load.contents)))
            found = await open_repository(
                self._http, self._certs, destination, options.credentials, insecure=options.insecure
            )
            repository = await found.settled()
            await self._send_contents(repository, load, report)
            *children, top = load.documents.values()
            for child in children:
                await self._put(repository, child, child.descriptor.digest)
            failpoint("images.push.before_name")
            await self._put(repository, top, destination.tag or top.descriptor.digest)
            failpoint("images.push.after_name")
        digests = [*load.documents, *load.contents]
        await write_much(self._database, lambda t: origins.record(t, digests, destination))
        return top.descriptor

    # What goes

    def _load(self, options: PushOptions, record: ImageRecord) -> _Load:
        """Blocking. The whole index if all of it is here, else the manifest that is."""
        if options.platform is not None:
            return self._complete(self._chosen(record.target, options.platform), options)
        load = self._gathered(record.target)
        if not load.missing:
            return load
        if options.all_platforms or record.manifest.digest == record.target.digest:
            raise _incomplete(options.name, load)
        return self._complete(record.manifest, options)

    def _complete(self, target: Descriptor, options: PushOptions) -> _Load:
        load = self._gathered(target)
        if load.missing:
            raise _incomplete(options.name, load)
        return load

    def _chosen(self, target: Descriptor, platform: Platform) -> Descriptor:
        if target.media_type not in INDEXES or not self._is_here(target.digest):
            return target
        document = self._parsed(self._document(target))
        if isinstance(document, Manifest):
            return target
        chosen = choose(document.manifests, platform)
        if chosen is None:
            raise NotFound(f"the image has nothing for {platform}: choose with --platform", reason="NO_PLATFORM")
        return self._chosen(chosen, platform)

    def _gathered(self, target: Descriptor) -> _Load:
        load = _Load()
        self._gather(target, load)
        return load

    def _gather(self, target: Descriptor, load: _Load) -> None:
        if target.digest in load.documents or target.digest in load.missing:
            return
        if not self._is_here(target.digest):
            load.missing.append(target.digest)
            return
        document = self._document(target)
        parsed = self._parsed(document)
        if isinstance(parsed, Index):
            for child in parsed.manifests:
                if child.media_type in MANIFESTS | INDEXES:
                    self._gather(child, load)
                else:
                    self._add(child, load)
        else:
            for child in (parsed.config, *parsed.layers):
                self._add(child, load)
        load.documents[target.digest] = document

    def _add(self, child: Descriptor, load: _Load) -> None:
        if any(word in child.media_type for word in _NOT_OURS):
            return
        load.contents[child.digest] = child
        if not self._is_here(child.digest):
            load.missing.append(child.digest)

    def _document(self, descriptor: Descriptor) -> Document:
        return Document(descriptor, self._content.read(descriptor.digest, max_bytes=MAX_MANIFEST_BYTES))

    def _parsed(self, document: Document) -> Manifest | Index:
        descriptor = document.descriptor
        return parse_manifest_or_index(document.data, f"manifest {descriptor.digest}", media_type=descriptor.media_type)

    def _is_here(self, digest: Digest) -> bool:
        return self._database.read_sync(lambda s: is_stored(s, self._content, digest))

    # How it goes

    async def _put(self, repository: Repository, document: Document, name: str) -> None:
        if not await repository.put_manifest(document, name):
            await announce(repository, document)

    async def _send_contents(self, repository: Repository, load: _Load, report: Report) -> None:
        limit = asyncio.Semaphore(BLOBS_AT_ONCE)

        async def send(descriptor: Descriptor) -> None:
            async with limit:
                await self._send(repository, descriptor, report)

        async with crew() as tasks:
            for descriptor in load.contents.values():
                report(descriptor.digest, Step.WAITING, 0, descriptor.size_bytes)
                tasks.create_task(send(descriptor))

    async def _send(self, repository: Repository, descriptor: Descriptor, report: Report) -> None:
        digest, size = descriptor.digest, descriptor.size_bytes
        path = self._content.path(digest)
        upload = Upload(repository, descriptor, path, lambda done: report(digest, Step.TRANSFER, done, size))
        if await upload.is_there():
            report(digest, Step.EXISTS, size, size)
            return
        origin = self._database.read_sync(lambda s: origins.elsewhere(s, digest, repository.reference))
        session = await upload.mounted(origin) if origin else None
        if origin and session is None:
            report(digest, Step.EXISTS, size, size)
            return
        await upload.send(session)
        failpoint("images.push.after_blob")
        report(digest, Step.DONE, size, size)


def _own_name(name: str, record: ImageRecord) -> Reference:
    """Where an image goes that is pushed by its name. Raises InvalidArgument if it was called by its id."""
    try:
        reference = parse_reference(name)
    except InvalidArgument:
        reference = None
    if reference is None or (reference.digest is None and record.name != str(reference)):
        raise InvalidArgument(
            f"{name!r} is not a name but an id: say where the image shall go, `corral push {name} NAME`",
            reason="NAME_NEEDED",
        )
    return reference


def _incomplete(name: str, load: _Load) -> FailedPrecondition:
    return FailedPrecondition(
        f"of image {name!r} {len(load.missing)} blobs are not here ({load.missing[0]}, …):"
        f" fetch them with `corral pull --all-platforms {name}`, or choose with --platform",
        reason="INCOMPLETE",
    )
