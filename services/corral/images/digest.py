"""Digests: the names of content.

Source: OCI image-spec descriptor.md "digests". Only sha256 is taken; nothing else is in use.
"""

import hashlib
import re
from typing import NewType

from corral.rpc.errors import InvalidArgument

Digest = NewType("Digest", str)

ALGORITHM = "sha256"
PREFIX = f"{ALGORITHM}:"
_PATTERN = re.compile(r"sha256:[0-9a-f]{64}")


def parse_digest(text: str, what: str = "digest") -> Digest:
    """`text`, if it is a digest and so safe as a path component. Raises InvalidArgument naming `what`."""
    if _PATTERN.fullmatch(text) is None:
        raise InvalidArgument(
            f"{what} {text[:140]!r} is not of the form sha256:<64 hex digits>",
            reason="BAD_DIGEST",
            metadata={"what": what},
        )
    return Digest(text)


def is_digest(text: str) -> bool:
    return _PATTERN.fullmatch(text) is not None


def digest_of(data: bytes) -> Digest:
    return Digest(PREFIX + hashlib.sha256(data).hexdigest())


def hex_of(digest: Digest) -> str:
    return digest.removeprefix(PREFIX)


def chain_ids(diff_ids: tuple[Digest, ...]) -> tuple[Digest, ...]:
    """The name of each layer together with all below it.

    Source: OCI image-spec config.md "Layer ChainID".
    """
    chain: list[Digest] = []
    for diff_id in diff_ids:
        chain.append(digest_of(f"{chain[-1]} {diff_id}".encode()) if chain else diff_id)
    return tuple(chain)
