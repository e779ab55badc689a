"""The directory of a shim's one container, where the shim may have begun before it is told which that is."""

import os
from pathlib import Path

_FLAGS = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


class Bundle:
    """`directory`: a descriptor of it, always of the same number, by which nothing can be written before become()."""

    __slots__ = ("directory", "path")

    def __init__(self) -> None:
        self.path: Path | None = None
        self.directory = os.open("/proc/self", _FLAGS)

    def become(self, path: Path) -> None:
        """It is this one from here on. Raises OSError if it is not there."""
        fd = os.open(path, _FLAGS)
        os.dup2(fd, self.directory, inheritable=False)
        os.close(fd)
        self.path = path

    def known(self) -> Path:
        """Where it is, for who is called after become() only."""
        assert self.path is not None
        return self.path

    def close(self) -> None:
        """Let go of it."""
        os.close(self.directory)
