"""What a tree takes on disk. Whoever writes to it may be hostile: every step is by descriptor, no link is followed."""

import os
from pathlib import Path


def measure_tree(path: Path, *, since_ns: int = -1) -> tuple[int, int]:
    """Bytes and inodes of all below `path`; a file with several names counts once. `path` itself does not count.

    With since_ns only of what changed after that time, content or anything else of it: its ctime, which nobody can set.
    Blocking. What goes meanwhile is left out.
    """
    size = inodes = 0
    seen: set[int] = set()
    for directory, names, files, fd in os.fwalk(path, follow_symlinks=False):
        del directory
        for name in (*names, *files):
            try:
                status = os.stat(name, dir_fd=fd, follow_symlinks=False)
            except FileNotFoundError:
                continue
            if status.st_ctime_ns <= since_ns or status.st_ino in seen:
                continue
            if status.st_nlink > 1:
                seen.add(status.st_ino)
            size += status.st_blocks * 512
            inodes += 1
    return size, inodes
