"""A look into the database of a service that runs: the file itself is that process' alone."""

import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from shutil import copyfile


@contextmanager
def copied(path: Path) -> Iterator[sqlite3.Connection]:
    """A copy of the database; what is being written just now may be missing."""
    with tempfile.TemporaryDirectory(prefix="corral-test-") as directory:
        copy = Path(directory) / path.name
        for suffix in ("", "-wal"):
            file = path.with_name(path.name + suffix)
            if file.exists():
                copyfile(file, copy.with_name(file.name))
        with closing(sqlite3.connect(copy)) as connection:
            yield connection
