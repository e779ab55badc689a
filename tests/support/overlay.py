"""Mounts that a snapshotter describes, made and unmade by a test."""

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol


class Described(Protocol):
    """A mount as data, from a driver or from the wire."""

    @property
    def type(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def options(self) -> Sequence[str]: ...


@contextmanager
def mounted(mounts: Sequence[Described], target: Path) -> Iterator[Path]:
    """The tree, mounted at `target` as a host would; unmounted at the end."""
    target.mkdir(exist_ok=True)
    # mount(8) hands options over one by one where it can, and each may have 255 bytes then; mount(2) takes a page.
    environment = {**os.environ, "LIBMOUNT_FORCE_MOUNT2": "always"}
    done = 0
    try:
        for mount in mounts:
            command = ["mount", "-t", mount.type, "-o", ",".join(mount.options), mount.source, str(target)]
            if mount.type == "bind":
                command[1:3] = []
            subprocess.run(command, check=True, env=environment)
            done += 1
        yield target
    finally:
        for _ in range(done):
            subprocess.run(["umount", str(target)], check=True)
