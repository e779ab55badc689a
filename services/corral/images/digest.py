"""Digests: the names of content.

Source: OCI image-spec descriptor.md "digests", with both registered algorithms. What gets its digest here gets the
canonical one.
"""

import hashlib
import re
from typing import TYPE_CHECKING, NewType

from corral.rpc.errors import InvalidArgument

if TYPE_CHECKING:
    from hashlib import _Hash as Hash

Digest = NewType("Digest", str)

ALGORITHM = "sha256"
PREFIX = f"{ALGORITHM}:"
HEX_DIGITS = {ALGORITHM: 64, "sha512": 128}
PATTERN = "|".join(rf"{algorithm}:[0-9a-f]{{{digits}}}" for algorithm, digits in HEX_DIGITS.items())

_PATTERN = re.compile(PATTERN)
_ALGORITHMS = {digits: algorithm for algorithm, digits in HEX_DIGITS.items()}


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


def algorithm_of(digest: str) -> str:
    return digest.partition(":")[0]


def hex_of(digest: str) -> str:
    return digest.partition(":")[2]


def digest_of_hex(digits: str) -> Digest | None:
    """The digest that has these: how many they are tells the algorithm. None if they are no digest's."""
    text = f"{_ALGORITHMS.get(len(digits), '')}:{digits}"
    return Digest(text) if is_digest(text) else None


def hasher(like: str = "") -> "Hash":
    """That finds digests of the same algorithm; of the canonical one where there is none to be like."""
    return hashlib.new(algorithm_of(like) or ALGORITHM)


def digest_by(found: "Hash") -> Digest:
    """What a hasher() has come to."""
    return Digest(f"{found.name}:{found.hexdigest()}")


def digest_of(data: bytes, like: str = "") -> Digest:
    """By the algorithm of another digest, or the canonical one."""
    found = hasher(like)
    found.update(data)
    return digest_by(found)


def chain_ids(diff_ids: tuple[Digest, ...]) -> tuple[Digest, ...]:
    """The name of each layer together with all below it.

    Source: OCI image-spec config.md "Layer ChainID".
    """
    chain: list[Digest] = []
    for diff_id in diff_ids:
        chain.append(digest_of(f"{chain[-1]} {diff_id}".encode()) if chain else diff_id)
    return tuple(chain)
