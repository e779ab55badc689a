"""Room for a database on a disk that is full: who removes something must be able to write that down.

What is committed goes to the end of the log (FILE-wal), and at a checkpoint into the file itself, after which the log
is written from its beginning again. So it takes little to go on for long: some room beyond either's end, asked for
while there is some, and a checkpoint when the log has none left.
"""

import os
from contextlib import suppress
from pathlib import Path

from corral.kernel.fallocate import reserve

LOG_BYTES = 512 << 10
# Beyond the end. SQLite cuts this off at every checkpoint.
FILE_BYTES = 128 << 10
LARGEST_SHARE = 32
"""Of what is free: a small disk is there for what it is to hold."""


class Room:
    """Of one database. To be closed after the last connection: a file's locks go with any descriptor of it."""

    def __init__(self, path: Path) -> None:
        self._log = Path(f"{path}-wal")
        self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def keep(self) -> None:
        """Ask for what is missing; where there is none, things are as they were."""
        disk = os.fstatvfs(self._file)
        most = disk.f_bavail * disk.f_frsize // LARGEST_SHARE
        with suppress(OSError):
            reserve(self._file, os.fstat(self._file).st_size, min(FILE_BYTES, most))
        with suppress(OSError):
            log = os.open(self._log, os.O_RDWR | os.O_CLOEXEC)
            try:
                reserve(log, 0, min(LOG_BYTES, most))
            finally:
                os.close(log)

    def close(self) -> None:
        os.close(self._file)
