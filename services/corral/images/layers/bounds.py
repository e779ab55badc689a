"""What data may grow to when it is unpacked, and what memory that may take."""

import resource
from collections.abc import Iterator

from corral.images.layers.errors import BadLayer

# Of a header, its extensions and the padding of an entry, in a tar that nobody pads out.
ENTRY_BYTES = 2048


def bounded(chunks: Iterator[bytes], limit_bytes: int) -> Iterator[bytes]:
    """The same chunks, as long as there are not too many bytes of them. Raises BadLayer.

    What counts is what comes out of the decoder, also where nobody wants it: a few kilobytes can keep it at work for
    days.
    """
    total = 0
    for chunk in chunks:
        total += len(chunk)
        if total > limit_bytes:
            raise BadLayer(f"it unpacks to more than {limit_bytes} bytes")
        yield chunk


def bound_memory(limit_bytes: int) -> None:
    """Have this process get MemoryError when it wants more; 0: never. What it may have of its own accord counts too."""
    if limit_bytes:
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        soft = limit_bytes if hard == resource.RLIM_INFINITY else min(limit_bytes, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
