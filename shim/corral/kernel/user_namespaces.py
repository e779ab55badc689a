"""User namespaces: their id mappings, and ones that nobody lives in, for id-mapped mounts.

A mapping is a list of ranges (id inside, id outside, how many). Whoever may not write it asks newuidmap and newgidmap,
which look at what /etc/subuid and /etc/subgid allow the user.
Source: user_namespaces(7), newuidmap(1).
"""

import contextlib
import os
import stat
from collections.abc import Sequence

from corral.kernel import capabilities, process
from corral.kernel.namespaces import Kind, open_namespace
from corral.kernel.syscalls import failure

type Ranges = Sequence[tuple[int, int, int]]

_LARGEST_TEXT = 4095
"""The kernel takes a mapping as one write of less than a page."""


def write_mappings(pid: int, uids: Ranges, gids: Ranges) -> None:
    """Give the new user namespace of process pid its mappings, as far as the caller may.

    Raises OSError naming the file, or what newuidmap or newgidmap said; FileNotFoundError where they are needed and are
    not installed.
    """
    may = capabilities.effective()
    if may >> capabilities.SETUID & 1 and may >> capabilities.SETGID & 1:
        _write(pid, "gid_map", gids)
        _write(pid, "uid_map", uids)
        return
    if _is_own(gids, os.getegid()):
        # The kernel asks for this: else a group that takes rights away could be left behind (CVE-2014-8989).
        _write_text(pid, "setgroups", "deny")
        _write(pid, "gid_map", gids)
    else:
        _ask("newgidmap", pid, gids)
    if _is_own(uids, os.geteuid()):
        _write(pid, "uid_map", uids)
    else:
        _ask("newuidmap", pid, uids)


def read_mappings(pid: int) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
    """The uids and the gids of the user namespace of process pid, as the caller's own namespace sees them."""
    return _read(pid, "uid_map"), _read(pid, "gid_map")


def new_uninhabited(uids: Ranges, gids: Ranges) -> int:
    """An fd of a new user namespace that nobody lives in. The caller is single-threaded."""
    reader, writer = os.pipe()
    try:
        pid, pidfd = process.clone(Kind.USER.flag)
        if pid == 0:
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
        try:
            write_mappings(pid, uids, gids)
            return open_namespace(f"/proc/{pid}/ns/user")
        finally:
            process.send_signal(pidfd, 9)
            os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
            os.close(pidfd)
    finally:
        os.close(reader)
        os.close(writer)


def to_outside(ranges: Ranges, number: int) -> int | None:
    """The id outside of an id inside; None for one that is not mapped."""
    for inside, outside, count in ranges:
        if inside <= number < inside + count:
            return outside + number - inside
    return None


def _is_own(ranges: Ranges, own: int) -> bool:
    return len(ranges) == 1 and tuple(ranges[0][1:]) == (own, 1)


def _write(pid: int, name: str, ranges: Ranges) -> None:
    text = "".join(f"{inside} {outside} {count}\n" for inside, outside, count in ranges)
    if len(text) > _LARGEST_TEXT:
        raise failure(7, f"write {name}: too many ranges")
    _write_text(pid, name, text)


def _write_text(pid: int, name: str, text: str) -> None:
    path = f"/proc/{pid}/{name}"
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)
    except OSError as e:
        raise failure(e.errno or 0, f"write {text.strip()!r}", path) from e


def _read(pid: int, name: str) -> list[tuple[int, int, int]]:
    with open(f"/proc/{pid}/{name}", encoding="ascii") as file:
        fields = (line.split() for line in file)
        return [(int(inside), int(outside), int(count)) for inside, outside, count in fields]


def _find(program: str) -> str | None:
    for directory in os.environ.get("PATH", os.defpath).split(":"):
        path = f"{directory}/{program}"
        with contextlib.suppress(OSError):
            if directory and stat.S_ISREG(os.stat(path).st_mode) and os.access(path, os.X_OK):  # noqa: PTH116 - a string
                return path
    return None


def _ask(program: str, pid: int, ranges: Ranges) -> None:
    path = _find(program)
    if path is None:
        raise failure(2, f"{program}, which maps more than one's own id, is not installed (package uidmap)")
    numbers = [str(number) for each in ranges for number in each]
    reader, writer = os.pipe()
    try:
        # Its words are few: they fit into the pipe.
        redirect = [(os.POSIX_SPAWN_DUP2, writer, 2)]
        child = os.posix_spawn(path, [program, str(pid), *numbers], os.environ, file_actions=redirect)
        _, status = os.waitpid(child, 0)
        os.close(writer)
        writer = -1
        if status:
            words = os.read(reader, 4096).decode("utf-8", "replace").strip()
            raise failure(1, words or f"{program} ended with status {status}")
    finally:
        os.close(reader)
        if writer >= 0:
            os.close(writer)
