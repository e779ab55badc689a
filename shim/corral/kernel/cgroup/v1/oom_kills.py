"""What v1 tells of OOM kills: each cgroup counts those of its own processes, and a removed one nothing any more.

Source: kernel cgroup-v1/memory.rst "OOM Control".
"""

import os

from corral.kernel.cgroup import files, membership

OOM_CONTROL = "memory.oom_control"


def below(directory: str) -> dict[int, int]:
    """The kills in each sub-cgroup that had any, by its inode."""
    found: dict[int, int] = {}
    for fd in membership.below(directory):
        try:
            kills = int(files.read_counts(f"/proc/self/fd/{fd}/{OOM_CONTROL}").get(b"oom_kill", 0))
            if kills:
                found[os.fstat(fd).st_ino] = kills
        except OSError as e:
            if not membership.gone(e):
                raise
    return found


class Below:
    """The kills in all sub-cgroups that there ever were, as far as somebody looked while they were there."""

    __slots__ = ("_directory", "_kills", "_removed")

    def __init__(self, directory: str) -> None:
        """Of this cgroup."""
        self._directory = directory
        self._kills: dict[int, int] = {}
        self._removed = 0

    def count(self) -> int:
        """Looked up now; never less than before."""
        now = below(self._directory) if membership.has_any_below(self._directory) else {}
        self._removed += sum(kills for inode, kills in self._kills.items() if now.get(inode, 0) < kills)
        self._kills = now
        return self._removed + sum(now.values())
