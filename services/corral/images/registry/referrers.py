"""What refers to an image: signatures, attestations and other artifacts whose `subject` it is.

    GET referrers/<digest>          an index of them
    GET manifests/sha256-<hex>      the same, kept under a tag by the clients of a registry without that API

Source: distribution-spec 1.1 "Listing Referrers", "Unavailable Referrers API".
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from urllib.parse import urlencode

from corral.images.digest import algorithm_of, digest_of, hex_of
from corral.images.document import parse_document
from corral.images.holdings import Document
from corral.images.model import MAX_MANIFEST_BYTES, OCI_INDEX, Descriptor, Index, parse_descriptor, parse_index
from corral.images.registry.endpoints import Capability
from corral.images.registry.errors import Untrusted
from corral.images.registry.host import Host, Request
from corral.images.registry.repository import Repository
from corral.rpc.blocking import run_blocking
from corral.rpc.errors import InvalidArgument, NotFound

MAX_REFERRERS = 10_000
MAX_TAG_DIGITS = 64  # of a digest, in the tag that stands for its referrers
MAX_BYTES = 16 << 20  # of all pages together


async def find_referrers(repository: Repository, artifact_type: str = "") -> tuple[Descriptor, Sequence[Descriptor]]:
    """The image that the repository's reference means, and what refers to it. Raises NotFound and the like."""
    reference = repository.reference
    subject = (await repository.manifest(reference.digest or reference.tag)).descriptor
    found = await list_referrers(repository, subject, artifact_type)
    return subject, found


async def list_referrers(repository: Repository, subject: Descriptor, artifact_type: str = "") -> Sequence[Descriptor]:
    """Those of the type, all if none is given. A registry may leave it to us to choose."""
    try:
        found: Sequence[Descriptor] = await _by_api(repository, subject, artifact_type)
    except NotFound:
        found = await _by_tag(repository, subject)
    return [each for each in found if artifact_type in ("", each.artifact_type)]


async def _by_api(repository: Repository, subject: Descriptor, artifact_type: str) -> list[Descriptor]:
    query = f"?{urlencode({'artifactType': artifact_type})}" if artifact_type else ""
    first = f"{repository.path}/referrers/{subject.digest}{query}"

    async def attempt(host: Host) -> list[Descriptor]:
        found: list[Descriptor] = []
        path, size = first, 0
        while path:
            reply = await host.ask(Request("GET", path, repository.pulling, {"Accept": OCI_INDEX}))
            data = await reply.read(MAX_MANIFEST_BYTES)
            page = (await run_blocking(_index, data, host.endpoint.authority)).manifests
            found += page
            size += len(data)
            if (not page and reply.next_page) or len(found) > MAX_REFERRERS or size > MAX_BYTES:
                raise Untrusted(f"{host.endpoint.authority} gave a list of referrers without end")
            path = reply.next_page
        return found

    return await repository.first(Capability.REFERRERS, attempt, f"referrers of {subject.digest}")


def _index(data: bytes, where: str) -> Index:
    try:
        return parse_index(data, "the list of referrers")
    except InvalidArgument as e:
        raise Untrusted(f"{where} gave no list of referrers: {e}") from e


def fallback_tag(subject: Descriptor) -> str:
    return f"{algorithm_of(subject.digest)}-{hex_of(subject.digest)[:MAX_TAG_DIGITS]}"


async def _by_tag(repository: Repository, subject: Descriptor) -> Sequence[Descriptor]:
    try:
        document = await repository.manifest(fallback_tag(subject))
    except NotFound:
        return ()
    return (await run_blocking(parse_index, document.data, f"tag {fallback_tag(subject)}")).manifests


async def announce(repository: Repository, document: Document) -> None:
    """Tell those who look for referrers of what a manifest's subject is, where the registry itself does not.

    Source: distribution-spec "Pushing Manifests with Subject".
    """
    fields = parse_document(document.data, "manifest", max_bytes=MAX_MANIFEST_BYTES)
    subject = fields.child("subject")
    if subject is None:
        return
    tag = fallback_tag(parse_descriptor(subject))
    config = fields.child("config")
    artifact_type = fields.text("artifactType") or (config.text("mediaType") if config else "")
    try:
        before = (await repository.manifest(tag)).data
    except NotFound:
        before = b"{}"
    old = (await run_blocking(json.loads, before)).get("manifests", [])
    mine = document.descriptor
    if any(entry.get("digest") == mine.digest for entry in old):
        return
    entry: dict[str, object] = {"mediaType": mine.media_type, "digest": mine.digest, "size": mine.size_bytes}
    if artifact_type:
        entry["artifactType"] = artifact_type
    if annotations := fields.text_map("annotations"):
        entry["annotations"] = annotations
    data = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [*old, entry]}).encode()
    index = replace(mine, media_type=OCI_INDEX, digest=digest_of(data), size_bytes=len(data))
    await repository.put_manifest(Document(index, data), tag)
