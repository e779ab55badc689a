"""Pulls and pushes as the leaf hosts them: what they need is imported when the first one comes.

Most daemons start often and pull seldom; the HTTP library alone has 15 MiB and takes a third of a second to load.
"""

from typing import TYPE_CHECKING

from corral.images.admission import Admission
from corral.images.blobs import Blobs
from corral.images.collector import Collector
from corral.images.config import ImagesConfig
from corral.images.content import ContentStore
from corral.images.partials import Partials
from corral.images.policy.gate import Gate
from corral.images.unpacker import Unpacker
from corral.store import Database

if TYPE_CHECKING:
    from corral.images.registry.http import Http
    from corral.images.registry.pull import Puller
    from corral.images.registry.push import Pusher


class Registries:
    """See the module."""

    def __init__(
        self,
        config: ImagesConfig,
        database: Database,
        content: ContentStore,
        partials: Partials,
        blobs: Blobs,
        unpacker: Unpacker,
        collector: Collector,
        admission: Admission,
        gate: Gate,
    ) -> None:
        self.certs = config.certs
        self._config = config
        self._database = database
        self._content = content
        self._partials = partials
        self._blobs = blobs
        self._unpacker = unpacker
        self._collector = collector
        self._admission = admission
        self._gate = gate
        self._http: Http | None = None
        self._puller: Puller | None = None

    async def stop(self) -> None:
        """No pull or push may run any more."""
        if self._http is not None:
            await self._http.close()

    @property
    def http(self) -> "Http":
        if self._http is None:
            from corral.images.registry.http import Http

            self._http = Http()
        return self._http

    @property
    def puller(self) -> "Puller":
        """One for all, which is how two pulls share a download."""
        if self._puller is None:
            from corral.images.registry.downloads import Downloads
            from corral.images.registry.pull import Puller

            self._puller = Puller(
                self._database,
                self._content,
                self._blobs,
                self._unpacker,
                self._collector,
                self._admission,
                self._gate,
                Downloads(self._partials, self._blobs),
                self.http,
                certs=self.certs,
                keep_s=self._config.partial_keep_s,
            )
        return self._puller

    @property
    def pusher(self) -> "Pusher":
        from corral.images.registry.push import Pusher

        return Pusher(self._database, self._content, self._collector, self.http, certs=self.certs)
