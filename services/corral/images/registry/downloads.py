"""Blobs under way. Who wants one that his namespace is fetching already waits for that; the last who leaves ends it.

Of what other namespaces fetch none hears anything: they may have a right to it, and a way there, that this one has not.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from corral.images.blobs import Blobs
from corral.images.digest import Digest
from corral.images.errors import explained
from corral.images.model import Descriptor
from corral.images.partials import Partial, Partials
from corral.images.progress import Report, Step
from corral.images.registry.download import Download
from corral.images.registry.host import Host
from corral.images.registry.repository import Repository
from corral.images.store import uninterrupted
from corral.rpc.blocking import run_blocking
from corral.rpc.errors import CorralError, InvalidArgument
from corral.store import failpoint

log = structlog.get_logger()


@dataclass(slots=True, eq=False)
class _Shared:
    """One download, and who listens."""

    task: asyncio.Task[None]
    is_ending: bool = False
    listeners: list[Callable[[Step, int], None]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A blob, for whom, and how long it is kept until an image has it."""

    descriptor: Descriptor
    namespace: str
    lease: str
    keep_s: float


class Downloads:
    """See the module."""

    def __init__(self, partials: Partials, blobs: Blobs) -> None:
        self._partials = partials
        self._blobs = blobs
        self._under_way: dict[tuple[str, Digest], _Shared] = {}

    async def fetch(self, repository: Repository, wanted: Wanted, report: Report) -> None:
        """Have the blob here, proven. Raises the error for the user; what came until then is kept."""
        while not await self._join(repository, wanted, report):
            pass

    async def _join(self, repository: Repository, wanted: Wanted, report: Report) -> bool:
        """False if somebody else's download failed, whose rights or mirrors may have been others than ours."""
        descriptor = wanted.descriptor
        shared = self._under_way.get((wanted.namespace, descriptor.digest))
        if shared is not None and shared.is_ending:
            await asyncio.wait((shared.task,))
            return False
        is_mine = shared is None
        if shared is None:
            shared = self._begin(repository, wanted)

        def listener(step: Step, done: int) -> None:
            report(descriptor.digest, step, done, descriptor.size_bytes)

        shared.listeners.append(listener)
        try:
            await asyncio.shield(shared.task)
        except CorralError:
            if is_mine:
                raise
            await asyncio.wait((shared.task,))  # until it is out of the table too: a done task alone suspends nobody
            return False
        finally:
            shared.listeners.remove(listener)
            if not shared.listeners and not shared.task.done():
                await self._end(shared)
        return True

    async def _end(self, shared: _Shared) -> None:
        """Nobody waits for it any more."""
        shared.is_ending = True
        shared.task.cancel()
        await asyncio.wait((shared.task,))
        if not shared.task.cancelled():
            shared.task.exception()  # there is nobody to tell it to

    def _begin(self, repository: Repository, wanted: Wanted) -> _Shared:
        key = wanted.namespace, wanted.descriptor.digest

        def tell(step: Step, done: int) -> None:
            for listener in list(shared.listeners):
                listener(step, done)

        shared = _Shared(asyncio.ensure_future(self._fetch(repository, wanted, tell)))
        self._under_way[key] = shared
        shared.task.add_done_callback(lambda _: self._under_way.pop(key))
        return shared

    async def _fetch(self, repository: Repository, wanted: Wanted, tell: Callable[[Step, int], None]) -> None:
        descriptor = wanted.descriptor
        try:
            tried: set[Host] = set()
            while True:
                async with self._partials.opened(wanted.namespace, descriptor.digest, descriptor.size_bytes) as partial:
                    download = Download(repository, descriptor, partial, lambda done: tell(Step.TRANSFER, done))
                    await download.run()
                    if partial.is_proven:
                        await self._take(partial, wanted, tell)
                        return
                    await self._discard(partial)
                    if not partial.recalled:
                        self._blame(partial, repository, download.hosts, tried)
                        tried |= download.hosts
        except OSError as e:
            raise explained(e, f"cannot store blob {descriptor.digest}") from e

    async def _take(self, partial: Partial, wanted: Wanted, tell: Callable[[Step, int], None]) -> None:
        tell(Step.VERIFY, partial.size_bytes)
        await uninterrupted(run_blocking(partial.sync))
        failpoint("images.pull.before_blob")
        await self._blobs.admit(
            partial.path,
            partial.digest,
            partial.size_bytes,
            wanted.namespace,
            wanted.lease,
            keep_s=wanted.keep_s,
        )
        failpoint("images.pull.after_blob")
        await uninterrupted(run_blocking(partial.remove))

    async def _discard(self, partial: Partial) -> None:
        """It is fetched once more, since bytes from before a power loss, or a mirror, may be to blame."""
        await uninterrupted(run_blocking(partial.remove))
        log.warning("images.blob_wrong", digest=partial.digest, found=partial.found_digest)

    def _blame(self, partial: Partial, repository: Repository, hosts: set[Host], tried: set[Host]) -> None:
        """Raises InvalidArgument if there is no other to ask, or none that gave it in place of those tried before."""
        if repository.distrust(hosts) or hosts <= tried:
            raise InvalidArgument(
                f"registry {repository.reference.domain} gave blob {partial.digest} with the digest"
                f" {partial.found_digest}: it is damaged there or on its way, nothing was stored",
                reason="DIGEST_MISMATCH",
            )
