"""What is here of an image: its documents, and the content that they refer to. For who passes images on."""

from dataclasses import dataclass, field

from corral.images.blobs import is_stored
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
from corral.images.platforms import choices
from corral.rpc.errors import FailedPrecondition, NotFound
from corral.store import Database

# Layers that may not be passed on: who wants them has them from where their descriptor says.
_NOT_OURS = ("nondistributable", "foreign")


@dataclass(frozen=True, slots=True)
class Document:
    """A manifest or index, proven."""

    descriptor: Descriptor
    data: bytes


@dataclass(slots=True)
class Holding:
    """Documents with children before parents, content once each."""

    documents: dict[Digest, Document] = field(default_factory=dict)
    contents: dict[Digest, Descriptor] = field(default_factory=dict)
    missing: list[Digest] = field(default_factory=list)


class Holdings:
    """Blocking: it reads what it tells of."""

    def __init__(self, database: Database, content: ContentStore, *, for_owner: bool = False) -> None:
        """for_owner: with what may not be passed on to others."""
        self._database = database
        self._content = content
        self._for_owner = for_owner

    def gathered(self, target: Descriptor) -> Holding:
        """All that is here below `target`, itself included."""
        found = Holding()
        self._gather(target, found)
        return found

    def whole(self, target: Descriptor, name: str) -> Holding:
        """As gathered(). Raises FailedPrecondition if something is missing."""
        found = self.gathered(target)
        if found.missing:
            raise incomplete(name, found)
        return found

    def chosen(self, target: Descriptor, platform: Platform) -> Descriptor:
        """The manifest for `platform`. Raises NotFound."""
        if (found := self._choose(target, platform, set())) is None:
            raise NotFound(f"the image has nothing for {platform}: choose with --platform", reason="NO_PLATFORM")
        return found

    def _choose(self, target: Descriptor, platform: Platform, barren: set[Digest]) -> Descriptor | None:
        """None if there is none below. barren: indexes of which that is known, to which this adds."""
        if target.media_type not in INDEXES or not self._is_here(target.digest):
            return target
        if target.digest in barren:
            return None
        document = parsed(self._document(target))
        if isinstance(document, Manifest):
            return target
        for wanted in choices(document.manifests, platform):
            if (found := self._choose(wanted, platform, barren)) is not None:
                return found
        barren.add(target.digest)
        return None

    def _gather(self, target: Descriptor, found: Holding) -> None:
        if target.digest in found.documents or target.digest in found.missing:
            return
        if not self._is_here(target.digest):
            found.missing.append(target.digest)
            return
        document = self._document(target)
        content = parsed(document)
        if isinstance(content, Index):
            for child in content.manifests:
                if child.media_type in MANIFESTS | INDEXES:
                    self._gather(child, found)
                else:
                    self._add(child, found)
        else:
            for child in (content.config, *content.layers):
                self._add(child, found)
        found.documents[target.digest] = document

    def _add(self, child: Descriptor, found: Holding) -> None:
        if not self._for_owner and is_foreign(child):
            return
        if self._is_here(child.digest):
            found.contents[child.digest] = child
        else:
            found.missing.append(child.digest)

    def _document(self, descriptor: Descriptor) -> Document:
        return Document(descriptor, self._content.read(descriptor.digest, max_bytes=MAX_MANIFEST_BYTES))

    def _is_here(self, digest: Digest) -> bool:
        return self._database.read_sync(lambda s: is_stored(s, self._content, digest))


def is_foreign(layer: Descriptor) -> bool:
    """Whether registries may not pass it on."""
    return any(word in layer.media_type for word in _NOT_OURS)


def parsed(document: Document) -> Manifest | Index:
    descriptor = document.descriptor
    return parse_manifest_or_index(document.data, f"manifest {descriptor.digest}", media_type=descriptor.media_type)


def incomplete(name: str, holding: Holding) -> FailedPrecondition:
    return FailedPrecondition(
        f"of image {name!r} {len(holding.missing)} blobs are not here ({holding.missing[0]}, …):"
        f" fetch them with `corral pull --all-platforms {name}`, or choose with --platform",
        reason="INCOMPLETE",
    )
