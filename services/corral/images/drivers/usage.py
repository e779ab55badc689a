"""What a tree takes on disk."""

from pathlib import Path

from corral.images.snapshotter import Usage
from corral.store.measuring import measure_tree


def measure(path: Path, *, since_ns: int = -1) -> Usage:
    """See measure_tree()."""
    return Usage(*measure_tree(path, since_ns=since_ns))
