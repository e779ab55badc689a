"""What cosign signs: a JSON object that says of which repository which manifest is.

    {"critical": {"identity": {"docker-reference": "registry.example/team/app"},
                  "image": {"docker-manifest-digest": "sha256:…"},
                  "type": "cosign container image signature"},
     "optional": …}

Source: cosign, specs/SIGNATURE_SPEC.md "Payload"; containers/image, docs/containers-signature.5.md.
"""

from dataclasses import dataclass

from corral.images.digest import Digest, parse_digest
from corral.images.document import Document, parse_document
from corral.images.reference import parse_reference

MAX_PAYLOAD_BYTES = 64 << 10
TYPE = "cosign container image signature"


@dataclass(frozen=True, slots=True)
class Payload:
    """tag: only where the signer has named one."""

    digest: Digest
    repository: str
    tag: str


def parse_payload(data: bytes) -> Payload:
    """Raises InvalidArgument."""
    critical = _child(parse_document(data, "the signature's payload", max_bytes=MAX_PAYLOAD_BYTES), "critical")
    if critical.text("type") != TYPE:
        raise critical.refusal("type", f"is not {TYPE!r}")
    image, identity = _child(critical, "image"), _child(critical, "identity")
    digest = parse_digest(image.required_text("docker-manifest-digest"), f"{image.where}: docker-manifest-digest")
    name = identity.required_text("docker-reference")
    reference = parse_reference(name)
    has_tag = ":" in name.partition("@")[0].rpartition("/")[2]
    return Payload(digest, reference.repository, reference.tag if has_tag else "")


def _child(document: Document, key: str) -> Document:
    found = document.child(key)
    if found is None:
        raise document.refusal(key, "is missing")
    return found
