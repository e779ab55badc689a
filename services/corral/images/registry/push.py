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
from corral.images.catalog import ImageRecord
from corral.images.collector import Collector
from corral.images.content import ContentStore
from corral.images.holdings import Document, Holding, Holdings, incomplete
from corral.images.model import Descriptor, Platform
from corral.images.progress import Report, Step
from corral.images.reference import Reference, parse_reference
from corral.images.registry.credentials import ANONYMOUS, Credentials
from corral.images.registry.crew import crew
from corral.images.registry.http import Http
from corral.images.registry.referrers import announce
from corral.images.registry.repository import Repository, open_repository
from corral.images.registry.upload import Upload
from corral.images.store import write_much
from corral.rpc.blocking import run_blocking
from corral.rpc.errors import InvalidArgument
from corral.store import Database, failpoint

BLOBS_AT_ONCE = 4


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


class Pusher:
    """See the module."""

    def __init__(
        self, database: Database, content: ContentStore, collector: Collector, http: Http, *, certs: Path
    ) -> None:
        self._database = database
        self._content = content
        self._holdings = Holdings(database, content)
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
            await self._send_contents(options.namespace, repository, load, report)
            *children, top = load.documents.values()
            for child in children:
                await self._put(repository, child, child.descriptor.digest)
            failpoint("images.push.before_name")
            await self._put(repository, top, destination.tag or top.descriptor.digest)
            failpoint("images.push.after_name")
        digests = [*load.documents, *load.contents]
        await write_much(self._database, lambda t: origins.record(t, options.namespace, digests, destination))
        return top.descriptor

    # What goes

    def _load(self, options: PushOptions, record: ImageRecord) -> Holding:
        """Blocking. The whole index if all of it is here, else the manifest that is."""
        if options.platform is not None:
            return self._holdings.whole(self._holdings.chosen(record.target, options.platform), options.name)
        load = self._holdings.gathered(record.target)
        if not load.missing:
            return load
        if options.all_platforms or record.manifest.digest == record.target.digest:
            raise incomplete(options.name, load)
        return self._holdings.whole(record.manifest, options.name)

    # How it goes

    async def _put(self, repository: Repository, document: Document, name: str) -> None:
        if not await repository.put_manifest(document, name):
            await announce(repository, document)

    async def _send_contents(self, namespace: str, repository: Repository, load: Holding, report: Report) -> None:
        limit = asyncio.Semaphore(BLOBS_AT_ONCE)

        async def send(descriptor: Descriptor) -> None:
            async with limit:
                await self._send(namespace, repository, descriptor, report)

        async with crew() as tasks:
            for descriptor in load.contents.values():
                report(descriptor.digest, Step.WAITING, 0, descriptor.size_bytes)
                tasks.create_task(send(descriptor))

    async def _send(self, namespace: str, repository: Repository, descriptor: Descriptor, report: Report) -> None:
        digest, size = descriptor.digest, descriptor.size_bytes
        path = self._content.path(digest)
        upload = Upload(repository, descriptor, path, lambda done: report(digest, Step.TRANSFER, done, size))
        if await upload.is_there():
            report(digest, Step.EXISTS, size, size)
            return
        origin = self._database.read_sync(lambda s: origins.elsewhere(s, namespace, digest, repository.reference))
        session = await upload.mounted(origin) if origin else None
        if origin and session is None:
            report(digest, Step.EXISTS, size, size)
            return
        async with self._content.whole(path):
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
