"""Completing an unpacked directory with what the directories below it can tell."""

from collections.abc import Sequence
from pathlib import Path

from corral.images.snapshotter import Missing, Work


def complete(work: Work, layer: Path, below: Sequence[Path], missing: Missing) -> int:
    """Have what is missing in `layer` taken from `below`, the uppermost first. Returns the bytes added.

    Raises OSError, BadLayer.
    """
    if not below or not missing:
        return 0
    job = {
        "op": "complete",
        "layer": str(layer),
        "below": [str(path) for path in below],
        "implicit": missing.implicit,
        "links": missing.links,
    }
    added: int = work(job)["size_bytes"]
    return added
