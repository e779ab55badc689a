"""What an index offers: its manifests, each with its platform. Read from its blob once, which never changes."""

from collections import OrderedDict
from collections.abc import Sequence

from corral.images.catalog import ImageRecord
from corral.images.content import ContentStore
from corral.images.digest import Digest
from corral.images.model import MAX_MANIFEST_BYTES, Descriptor, Index, parse_manifest_or_index
from corral.rpc.blocking import run_blocking
from corral.rpc.errors import InvalidArgument, NotFound

MAX_KEPT = 64


class Offers:
    """See the module."""

    def __init__(self, content: ContentStore) -> None:
        self._content = content
        self._kept: OrderedDict[Digest, Sequence[Descriptor]] = OrderedDict()

    async def of(self, record: ImageRecord) -> Sequence[Descriptor]:
        """Empty if the name points at a manifest, or the index is not here any more."""
        if record.target.digest == record.manifest.digest:
            return ()
        found = self._kept.get(record.target.digest)
        if found is None:
            found = self._kept[record.target.digest] = await run_blocking(self._read, record.target)
            if len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        return found

    def _read(self, target: Descriptor) -> Sequence[Descriptor]:
        try:
            data = self._content.read(target.digest, max_bytes=MAX_MANIFEST_BYTES)
            document = parse_manifest_or_index(data, f"index {target.digest}", media_type=target.media_type)
        except (NotFound, InvalidArgument):  # who wants to know about an image is told what there is
            return ()
        return document.manifests if isinstance(document, Index) else ()
