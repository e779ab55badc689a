"""A tree as a value: two that are equal look the same to whoever uses them."""

import hashlib
import os
import stat
import time
from collections import defaultdict
from pathlib import Path

DAY_NS = 24 * 3600 * 10**9

type Fingerprint = dict[str, tuple[object, ...]]


def fingerprint(root: Path, *, marks: bool = False) -> Fingerprint:
    """Everything below and with `root`: kind, mode, owner, time, content or target, device, attributes, other names.

    marks: also those of overlayfs.
    """
    found: Fingerprint = {}
    names: dict[tuple[int, int], list[str]] = defaultdict(list)
    for directory, below, files in os.walk(root):
        for path in (Path(directory), *(Path(directory, name) for name in (*below, *files))):
            key = str(path.relative_to(root))
            status = path.stat() if path == root else path.lstat()
            if key not in found and stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
                names[status.st_dev, status.st_ino].append(key)
            found[key] = _of(path, status, marks)
    for group in names.values():
        for key in group if len(group) > 1 else ():  # other names may be hidden
            found[key] = (*found[key], tuple(sorted(group)))
    return found


def _of(path: Path, status: os.stat_result, marks: bool) -> tuple[object, ...]:
    what: object = status.st_rdev
    if stat.S_ISREG(status.st_mode):
        what = (status.st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    elif stat.S_ISLNK(status.st_mode):
        what = str(path.readlink())
    attributes = tuple(
        (name, os.getxattr(path, name, follow_symlinks=False))
        for name in sorted(os.listxattr(path, follow_symlinks=False))
        if marks or not name.startswith("trusted.overlay.")
    )
    # The time of what no entry describes is that of its making.
    made_now = time.time_ns() - status.st_mtime_ns < DAY_NS
    return (oct(status.st_mode), status.st_uid, status.st_gid, made_now or status.st_mtime_ns, what, attributes)
