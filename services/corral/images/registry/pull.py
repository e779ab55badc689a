"""Pull: a name becomes an image, or nothing that anybody sees.

    resolve      the name to a digest, by a host that is trusted with it
    walk         index and manifests, each stored as a blob as it comes; from here on all is named by digest
    prove        that a key of the policy has signed one of them, where there is a policy
    fetch        config and layers, several at a time; a layer is unpacked while others are still on their way
    admit        one transaction makes the image visible

What has arrived when a pull ends early, whole blobs and parts of them, is kept a while for the next one.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from corral.images import catalog, holders, leases, origins
from corral.images.admission import Admission, Admitted
from corral.images.archives.found import FoundImage
from corral.images.blobs import Blobs, Expected, is_stored
from corral.images.catalog import ImageRecord
from corral.images.collector import Collector
from corral.images.content import ContentStore
from corral.images.details import Details, make_details
from corral.images.digest import Digest
from corral.images.model import (
    MAX_CONFIG_BYTES,
    MAX_MANIFEST_BYTES,
    Descriptor,
    Platform,
    check_runnable,
    parse_config,
)
from corral.images.platforms import host_platform, matches
from corral.images.policy import proofs
from corral.images.policy.gate import Demand, Gate
from corral.images.policy.rules import Kind
from corral.images.progress import Report, Step
from corral.images.reference import Reference
from corral.images.registry.credentials import ANONYMOUS, Credentials
from corral.images.registry.crew import crew
from corral.images.registry.downloads import Downloads, Wanted
from corral.images.registry.http import Http
from corral.images.registry.repository import Repository, open_repository
from corral.images.registry.walk import Tree, Walk
from corral.images.store import write_much
from corral.images.unpacker import Unpacker
from corral.rpc.blocking import run_blocking
from corral.rpc.errors import InvalidArgument, NotFound
from corral.store import Database, Snapshot, failpoint

BLOBS_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class PullOptions:
    """What the user asked for. platform None: this host's."""

    namespace: str
    reference: Reference
    platform: Platform | None = None
    all_platforms: bool = False
    credentials: Credentials = field(default=ANONYMOUS, repr=False)
    insecure: bool = False
    lease: str = ""


class Puller:
    """See the module."""

    def __init__(
        self,
        database: Database,
        content: ContentStore,
        blobs: Blobs,
        unpacker: Unpacker,
        collector: Collector,
        admission: Admission,
        gate: Gate,
        downloads: Downloads,
        http: Http,
        *,
        certs: Path,
        keep_s: float,
    ) -> None:
        self._database = database
        self._content = content
        self._blobs = blobs
        self._unpacker = unpacker
        self._collector = collector
        self._admission = admission
        self._gate = gate
        self._downloads = downloads
        self._http = http
        self._certs = certs
        self._keep_s = keep_s

    async def run(self, options: PullOptions, report: Report) -> ImageRecord:
        """Raises NotFound, PermissionDenied, Unavailable, InvalidArgument, ResourceExhausted, FailedPrecondition."""
        if options.lease:
            self._database.read_sync(lambda s: leases.check_alive(s, options.namespace, options.lease))
        demand = self._gate.demand(options.reference)
        if demand.kind is Kind.REJECT:
            raise demand.refusal(options.reference.familiar, options.reference.digest, "it takes none")
        repository = await open_repository(
            self._http, self._certs, options.reference, options.credentials, insecure=options.insecure
        )
        async with AsyncExitStack() as pins:
            tree = await self._walk(options, repository, pins)
            if demand.kind is Kind.SIGNED:
                await self._prove(options, repository, tree, demand)
            await pins.enter_async_context(self._collector.pinned(tree.contents))
            details = await self._details(options, repository, tree, report)
            await pins.enter_async_context(self._collector.pinned(details.chain))
            record = await self._fetch(options, repository, tree, details, report)
        digests = {tree.target.digest, *(child for _, child in tree.edges)}
        await write_much(self._database, lambda t: origins.record(t, options.namespace, digests, options.reference))
        return record

    # Documents

    async def _walk(self, options: PullOptions, repository: Repository, pins: AsyncExitStack) -> Tree:
        reference = options.reference
        first: dict[Digest, bytes] = {}

        async def source(descriptor: Descriptor) -> bytes:
            await pins.enter_async_context(self._collector.pinned([descriptor.digest]))
            if descriptor.digest not in first and self._is_here(options.namespace, descriptor):
                return await run_blocking(lambda: self._content.read(descriptor.digest, max_bytes=MAX_MANIFEST_BYTES))
            data = first.get(descriptor.digest)
            if data is None:
                data = (await repository.manifest(descriptor.digest, descriptor)).data
            await self._store(options, descriptor, data)
            return data

        target = await self._known(options, repository)
        if target is None:
            document = await repository.manifest(reference.digest or reference.tag)
            target, first[document.descriptor.digest] = document.descriptor, document.data
        platform = options.platform or host_platform()
        walk = Walk(source, f"image {reference.familiar}", platform, everything=options.all_platforms)
        return await walk.run(target)

    async def _known(self, options: PullOptions, repository: Repository) -> Descriptor | None:
        """What the name points at here, if in the registry too. To ask that is no pull, where pulls are counted."""
        record = self._database.read_sync(
            lambda s: catalog.by_reference(s, options.namespace, _name(options.reference))
        )
        if record is None or not self._is_here(options.namespace, record.target):
            return None
        if options.reference.digest:
            return record.target if record.target.digest == options.reference.digest else None
        head = await repository.resolve(options.reference.tag)
        return record.target if head is not None and head.digest == record.target.digest else None

    async def _prove(self, options: PullOptions, repository: Repository, tree: Tree, demand: Demand) -> None:
        """Raises PermissionDenied. What was signed is proven once; a signature of an index is one for all in it."""
        images = [tree.target] if options.all_platforms or tree.chosen == tree.target else [tree.target, tree.chosen]
        digests = [image.digest for image in images]
        if self._database.read_sync(lambda s: demand.is_met(s, options.reference, digests)):
            return
        from corral.images.registry.signatures import Prover

        proof = await Prover(repository, demand).prove(images)
        await self._database.write(lambda t: proofs.record(t, proof))

    async def _store(self, options: PullOptions, descriptor: Descriptor, data: bytes) -> None:
        expected = Expected(descriptor.digest, len(data))
        await self._blobs.write(expected, _once(data), options.namespace, options.lease)

    def _is_here(self, namespace: str, descriptor: Descriptor) -> bool:
        """Nothing is that only others have brought. Raises InvalidArgument if it is not as long as it should be."""

        def look_up(snapshot: Snapshot) -> bool:
            digest = descriptor.digest
            return holders.has(snapshot, namespace, digest) and is_stored(snapshot, self._content, digest)

        found = self._database.read_sync(look_up)
        if found and (size := self._blobs.info(descriptor.digest).size_bytes) != descriptor.size_bytes:
            raise InvalidArgument(
                f"blob {descriptor.digest} has {size} bytes, not {descriptor.size_bytes} as its manifest says",
                reason="SIZE_MISMATCH",
            )
        return found

    async def _details(self, options: PullOptions, repository: Repository, tree: Tree, report: Report) -> Details:
        what = f"image {options.reference.familiar}"
        check_runnable(tree.manifest, what)
        config = tree.manifest.config
        await self._have(options, repository, config, lambda *_: None)
        data = await run_blocking(lambda: self._content.read(config.digest, max_bytes=MAX_CONFIG_BYTES))
        parsed = await run_blocking(parse_config, data, f"config {config.digest}")
        asked = options.platform if not options.all_platforms else None
        if asked is not None and not matches(asked, parsed.platform):
            raise NotFound(
                f"{what} is for {parsed.platform}, not for {asked}: choose with --platform",
                reason="NO_PLATFORM",
            )
        return make_details(tree.manifest, parsed, what)

    # Content

    async def _fetch(
        self, options: PullOptions, repository: Repository, tree: Tree, details: Details, report: Report
    ) -> ImageRecord:
        limit = asyncio.Semaphore(BLOBS_AT_ONCE)

        async def arrive(descriptor: Descriptor) -> None:
            async with limit:
                await self._have(options, repository, descriptor, report)

        layers = {layer.digest: layer for layer in details.manifest.layers}
        async with crew() as tasks:
            arrivals = {
                digest: tasks.create_task(arrive(descriptor))
                for digest, descriptor in (layers | tree.contents).items()
                if digest != details.manifest.config.digest
            }

            async def path_of(digest: Digest) -> Path:
                await asyncio.shield(arrivals[digest])
                return self._content.path(digest)

            async with self._unpacker.unpacked(details, path_of, _by_blob(details, report)) as staged:
                await asyncio.gather(*map(asyncio.shield, arrivals.values()))
                failpoint("images.pull.before_admit")
                how = Admitted(options.namespace, "image.pulled", options.lease, _name(options.reference))
                found = FoundImage((), tree.target, tree.chosen, details, {}, tree.edges)
                [record] = await self._admission.admit(how, [found], [staged])
        return record

    async def _have(self, options: PullOptions, repository: Repository, descriptor: Descriptor, report: Report) -> None:
        if self._is_here(options.namespace, descriptor):
            report(descriptor.digest, Step.EXISTS, descriptor.size_bytes, descriptor.size_bytes)
            return
        wanted = Wanted(descriptor, options.namespace, options.lease, self._keep_s)
        await self._downloads.fetch(repository, wanted, report)


def _name(reference: Reference) -> Reference:
    """With both, the digest decides; the tag may point elsewhere by now."""
    return replace(reference, tag="") if reference.digest else reference


def _by_blob(details: Details, report: Report) -> Report:
    """The unpacker speaks of diff ids; to the user a layer is one thing from registry to disk."""
    blobs = {str(diff_id): str(descriptor.digest) for _, diff_id, descriptor in details.layers}
    return lambda item, step, done, total: report(blobs.get(item, item), step, done, total)


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data
