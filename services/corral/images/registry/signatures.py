"""Signatures of an image, as cosign leaves them beside it, and what they prove.

    tag sha256-<hex>.sig                            an artifact, each layer a payload, its signature an annotation of it
    referrers whose artifact type is a signature's  the same, one artifact for each

A signature is over the payload, and the payload names repository and digest. By ECDSA and RSA what is signed is the
payload's digest, which its descriptor gives: what no key of the policy has signed is not even fetched.
Source: cosign, specs/SIGNATURE_SPEC.md; distribution-spec 1.1 "Listing Referrers".
"""

import base64
import binascii
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from corral.images.digest import Digest
from corral.images.document import parse_document
from corral.images.model import MAX_MANIFEST_BYTES, Descriptor, parse_descriptor
from corral.images.policy.gate import Demand
from corral.images.policy.keys import PublicKey
from corral.images.policy.payload import MAX_PAYLOAD_BYTES, Payload, parse_payload
from corral.images.policy.proofs import Proof
from corral.images.registry.referrers import list_referrers
from corral.images.registry.repository import Repository
from corral.rpc.blocking import run_blocking
from corral.rpc.errors import FailedPrecondition, InvalidArgument, NotFound

PAYLOAD_TYPE = "application/vnd.dev.cosign.simplesigning.v1+json"
ANNOTATION = "dev.cosignproject.cosign/signature"
ARTIFACT_TYPES = frozenset({"application/vnd.dev.cosign.artifact.sig.v1+json", PAYLOAD_TYPE})
BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle"

MAX_SIGNATURES = 1000  # of one artifact
MAX_ARTIFACTS = 100  # that refer to one image
MAX_PAYLOADS = 100  # that are fetched


@dataclass(frozen=True, slots=True)
class Signature:
    """value: None where it is none that can be read."""

    payload: Descriptor
    value: bytes | None


@dataclass(slots=True)
class _Findings:
    """Why what was looked at proves nothing; the reason that came closest is told."""

    reasons: dict[int, str] = field(default_factory=dict)

    def add(self, closeness: int, reason: str) -> None:
        self.reasons.setdefault(closeness, reason)

    @property
    def best(self) -> str:
        return self.reasons[max(self.reasons)] if self.reasons else "it has no signature"


class Prover:
    """For one pull."""

    def __init__(self, repository: Repository, demand: Demand) -> None:
        self._repository = repository
        self._demand = demand
        self._findings = _Findings()
        self._payloads: dict[Digest, bytes | None] = {}  # None: cannot be had

    async def prove(self, images: Sequence[Descriptor]) -> Proof:
        """The proof that a key of the policy has signed one of the manifests for the repository's name.

        Raises PermissionDenied with the reason that it has not; NotFound, Unavailable and the like.
        """
        for image in images:
            async with aclosing(self._artifacts(image)) as artifacts:
                async for signatures in artifacts:
                    if (proof := await self._proof(image, signatures)) is not None:
                        return proof
        raise self._demand.refusal(self._repository.reference.familiar, images[0].digest, self._findings.best)

    # Where signatures are

    async def _artifacts(self, image: Descriptor) -> AsyncGenerator[Sequence[Signature]]:
        """The signatures of one artifact after the other; the next one is not asked for before it is wanted."""
        if (signatures := await self._artifact(f"{image.digest.replace(':', '-')}.sig")) is not None:
            yield signatures
        referrers = await self._referrers(image)
        if any(each.artifact_type.startswith(BUNDLE_TYPE) for each in referrers):
            self._findings.add(0, "it has a signature in sigstore's bundle form, which is not understood here")
        artifacts = [each for each in referrers if each.artifact_type in ARTIFACT_TYPES]
        for each in artifacts[:MAX_ARTIFACTS]:
            if (signatures := await self._artifact(each.digest, each)) is not None:
                yield signatures
        if len(artifacts) > MAX_ARTIFACTS:
            self._findings.add(0, f"none of its first {MAX_ARTIFACTS} signatures is by a key of the policy")

    async def _referrers(self, image: Descriptor) -> Sequence[Descriptor]:
        try:
            return await list_referrers(self._repository, image)
        except (InvalidArgument, FailedPrecondition) as e:
            self._findings.add(0, f"it has no signature under its tag, and what refers to it is not told: {e}")
            return ()

    async def _artifact(self, name: str, expected: Descriptor | None = None) -> Sequence[Signature] | None:
        """None if there is none, or none that can be read."""
        try:
            document = await self._repository.manifest(name, expected)
            return await run_blocking(lambda: list(_signatures(document.data)))
        except NotFound:
            return None
        except (InvalidArgument, FailedPrecondition) as e:
            self._findings.add(0, f"its signatures cannot be read: {e}")
            return None

    # What they prove

    async def _proof(self, image: Descriptor, signatures: Sequence[Signature]) -> Proof | None:
        keys = self._demand.keys
        for signature in signatures:
            value = signature.value
            if value is None:
                self._findings.add(0, "its signature is not in base64")
                continue
            key = await run_blocking(_signer, keys, value, signature.payload.digest)
            if key is None and not any(key.needs_content for key in keys):
                self._other_key(signatures)
                continue
            content = await self._content(signature.payload)
            if content is None:
                continue
            key = key or await run_blocking(_signer, keys, value, signature.payload.digest, content)
            if key is None:
                self._other_key(signatures)
            elif (payload := await self._fitting(content, image)) is not None:
                return Proof(image.digest, payload.repository, payload.tag, key.id)
        return None

    def _other_key(self, signatures: Sequence[Signature]) -> None:
        many = f"none of its {len(signatures)} signatures is" if len(signatures) > 1 else "its signature is not"
        self._findings.add(1, f"{many} by a key of the policy")

    async def _content(self, payload: Descriptor) -> bytes | None:
        if payload.size_bytes > MAX_PAYLOAD_BYTES:
            self._findings.add(2, f"its signature has a payload of {payload.size_bytes} bytes, which is too much")
            return None
        if payload.digest not in self._payloads:
            if len(self._payloads) >= MAX_PAYLOADS:
                self._findings.add(2, f"more than {MAX_PAYLOADS} payloads of its signatures would have to be read")
                return None
            try:
                self._payloads[payload.digest] = await self._repository.small_blob(payload, MAX_PAYLOAD_BYTES)
            except (NotFound, FailedPrecondition) as e:
                self._findings.add(2, f"what its signature is for cannot be read: {e}")
                self._payloads[payload.digest] = None
        return self._payloads[payload.digest]

    async def _fitting(self, content: bytes, image: Descriptor) -> Payload | None:
        """What was signed, if it is this image under this name."""
        reference = self._repository.reference
        try:
            payload = await run_blocking(parse_payload, content)
        except InvalidArgument as e:
            self._findings.add(2, str(e))
            return None
        if payload.digest != image.digest:
            self._findings.add(3, f"its signature is for another image, {payload.digest}")
        elif payload.repository != (name := self._demand.signed_name(reference)):
            wanted = f" instead of {name}" if name != reference.repository else ""
            self._findings.add(3, f"its signature is for another repository, {payload.repository}{wanted}")
        elif payload.tag and not reference.digest and payload.tag != reference.tag:
            self._findings.add(3, f"its signature is for another tag, {payload.tag!r}")
        else:
            return payload
        return None


def _signer(
    keys: Sequence[PublicKey], signature: bytes, digest: Digest, content: bytes | None = None
) -> PublicKey | None:
    return next((key for key in keys if key.verifies(signature, digest, content)), None)


def _signatures(data: bytes) -> Iterator[Signature]:
    """Those in an artifact's manifest. Raises InvalidArgument."""
    manifest = parse_document(data, "the manifest of signatures", max_bytes=MAX_MANIFEST_BYTES)
    for layer in manifest.children("layers", at_most=MAX_SIGNATURES):
        payload = parse_descriptor(layer)
        if payload.media_type == PAYLOAD_TYPE:
            yield Signature(payload, _decoded(payload.annotations.get(ANNOTATION, "")))


def _decoded(text: str) -> bytes | None:
    try:
        return base64.b64decode(text, validate=True) or None
    except (binascii.Error, ValueError):
        return None
