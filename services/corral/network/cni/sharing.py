"""Which engines of this host have networks of which names, as plugins of CNI tell networks by their names alone.

    <directory>/<name>/<id of a network>    a line: the root of the engine that has it

GC makes plugins forget all that the caller does not name, so it is not asked for where another engine has a network of
that name, running or not. What is told by an engine whose database is gone is not heeded.

Source: CNI specification 1.1, section 4, "GC" and section 1 ("disableGC").
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

DATABASE = "network.db"


@dataclass(frozen=True, slots=True)
class SharedNames:
    """See the module. root: of this engine."""

    directory: Path
    root: Path

    def claim(self, name: str, network_id: str) -> None:
        """Tell others that this engine has such a network; no error if it has done so. Raises OSError."""
        where = self.directory / name
        where.mkdir(mode=0o700, parents=True, exist_ok=True)
        (where / network_id).write_text(f"{self.root.resolve()}\n")

    def release(self, name: str, network_id: str) -> None:
        """It has no more; no error if it had not."""
        where = self.directory / name
        (where / network_id).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty, or not there
            where.rmdir()

    def others(self, name: str) -> Sequence[str]:
        """The roots of other engines that have one. Raises OSError."""
        where = self.directory / name
        said = {path.read_text().strip() for path in where.iterdir()} if where.is_dir() else set()
        return sorted(root for root in said - {str(self.root.resolve())} if Path(root, DATABASE).exists())
