"""Who a container's process runs as: `NAME|UID[:GROUP|GID]` against the image's own /etc/passwd and /etc/group.

Those files are the image's, so hostile: read only up to a limit, and a line that is not exactly right counts as absent.
A string that is all decimal digits is always a number, never a name, and nothing is ever rounded: `0x0`, `-1` and
numbers from 2^32 - 1 on are refused instead of becoming root.
"""

import os
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from corral.kernel import paths
from corral.kernel.syscalls import PROC_SUPER_MAGIC, filesystem_magic
from corral.oci.errors import SETUP, ExecFailed

MAX_FILE_BYTES = 4 << 20
MAX_ID = 2**32 - 2
"""(uid_t) -1 means "no change" to the kernel."""
MAX_GROUPS = 65536
"""NGROUPS_MAX. Source: setgroups(2)."""


@dataclass(frozen=True, slots=True)
class Account:
    """A line of /etc/passwd."""

    name: str
    uid: int
    gid: int
    home: str


@dataclass(frozen=True, slots=True)
class Group:
    """A line of /etc/group."""

    name: str
    gid: int
    members: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Identity:
    """What a process becomes."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str


DATABASES = ("/etc/passwd", "/etc/group")
_LATELY_NS = 2_000_000_000
"""A file that was changed that short a time ago may change once more and look as before."""


@dataclass(frozen=True, slots=True)
class Sighting:
    """Who a process became, and what DATABASES looked like: as long as they do, it is who the same process becomes.

    looks: of each its device, inode, size, and when content and inode were changed; None if there was none.
    """

    identity: Identity
    looks: tuple[tuple[int, int, int, int, int] | None, ...]


def look(root: int) -> tuple[tuple[int, int, int, int, int] | None, ...] | None:
    """What DATABASES look like; None if that does not tell whether they are the same another time."""
    looks: list[tuple[int, int, int, int, int] | None] = []
    for path in DATABASES:
        try:
            with paths.opened(paths.open_in_root(root, path)) as fd:
                status = os.fstat(fd)
        except FileNotFoundError:
            looks.append(None)
            continue
        except OSError:
            return None
        if status.st_ctime_ns > time.time_ns() - _LATELY_NS:
            return None
        looks.append((status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    return tuple(looks)


def parse_id(text: str) -> int | None:
    """A uid or gid written in decimal digits, or None if the text is not one, or out of range."""
    if not (text.isascii() and text.isdigit()) or len(text) > 10:
        return None
    number = int(text)
    return number if number <= MAX_ID else None


def parse_passwd(data: bytes) -> Iterator[Account]:
    """The well-formed lines of an /etc/passwd."""
    for fields in _lines(data, 6):
        uid, gid = parse_id(fields[2]), parse_id(fields[3])
        if fields[0] and uid is not None and gid is not None:
            yield Account(fields[0], uid, gid, fields[5] if fields[5].startswith("/") else "/")


def parse_group(data: bytes) -> Iterator[Group]:
    """The well-formed lines of an /etc/group."""
    for fields in _lines(data, 4):
        gid = parse_id(fields[2])
        if fields[0] and gid is not None:
            yield Group(fields[0], gid, tuple(member for member in fields[3].split(",") if member))


def _lines(data: bytes, least: int) -> Iterator[list[str]]:
    for line in data.split(b"\n"):
        # First of all what sorts out most lines of a file that is made to take long (CVE-2026-47262).
        if line.count(b":") < least - 1 or line.startswith(b"#") or b"\0" in line:
            continue
        yield line.decode("utf-8", "surrogateescape").split(":")


def resolve(user: str, passwd: bytes, group: bytes) -> Identity:
    """The identity that a user string stands for. Raises ExecFailed with a sentence when it stands for none.

    Its groups begin with its own: what makes another group the effective one, a setgid program, would else leave that
    behind, with all that is closed to it (CVE-2022-36109).
    """
    name, colon, group_name = user.partition(":")
    account, uid = _find_user(user, name, passwd)
    if colon:
        gid = _find_group(user, group_name, group)
        groups: tuple[int, ...] = (gid,)
    else:
        gid = account.gid if account else 0
        groups = _memberships(account, group)
    return Identity(uid, gid, groups, account.home if account else "/")


def _find_user(user: str, name: str, passwd: bytes) -> tuple[Account | None, int]:
    if not name:
        raise ExecFailed(SETUP, f"user {user!r} names no user")
    if name.isascii() and name.isdigit():
        uid = parse_id(name)
        if uid is None:
            raise ExecFailed(SETUP, f"user {user!r}: a uid lies between 0 and {MAX_ID}")
        return next((account for account in parse_passwd(passwd) if account.uid == uid), None), uid
    account = next((account for account in parse_passwd(passwd) if account.name == name), None)
    if account is None:
        raise ExecFailed(SETUP, f"unable to find user {name}: no matching entries in the container's /etc/passwd")
    return account, account.uid


def _find_group(user: str, name: str, data: bytes) -> int:
    if not name:
        raise ExecFailed(SETUP, f"user {user!r} names no group after the colon")
    if name.isascii() and name.isdigit():
        gid = parse_id(name)
        if gid is None:
            raise ExecFailed(SETUP, f"user {user!r}: a gid lies between 0 and {MAX_ID}")
        return gid
    for group in parse_group(data):
        if group.name == name:
            return group.gid
    raise ExecFailed(SETUP, f"unable to find group {name}: no matching entries in the container's /etc/group")


def find_groups(root: int, names: Sequence[str]) -> tuple[int, ...]:
    """The gids of groups that are called so in root. Raises ExecFailed for one that is not there."""
    if not names:
        return ()
    data = read_database(root, "/etc/group", required=True)
    return tuple(_find_group(name, name, data) for name in names)


def _memberships(account: Account | None, data: bytes) -> tuple[int, ...]:
    if account is None:
        return (0,)
    found = {account.gid: None} | {group.gid: None for group in parse_group(data) if account.name in group.members}
    if len(found) > MAX_GROUPS:
        raise ExecFailed(SETUP, f"user {account.name} is in more groups than a process can have ({MAX_GROUPS})")
    return tuple(found)


def read_database(root: int, path: str, *, required: bool) -> bytes:
    """/etc/passwd or /etc/group inside root. Where it can't be used: b"", or if required ExecFailed saying why."""
    try:
        # Looked at before it is opened, for opening a device can do things; and O_NONBLOCK, for it may be exchanged for
        # a FIFO meanwhile, which must not make us wait for a writer.
        with paths.opened(paths.open_in_root(root, path)) as found:
            if not stat.S_ISREG(os.fstat(found).st_mode):
                return _unusable(path, "it is not a plain file", required)
        fd = paths.open_in_root(root, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError:
        return b""
    except OSError as e:
        return _unusable(path, e.strerror or str(e), required)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or filesystem_magic(fd) == PROC_SUPER_MAGIC:
            return _unusable(path, "it is not a plain file", required)
        if status.st_size > MAX_FILE_BYTES:
            return _unusable(path, f"it is larger than {MAX_FILE_BYTES >> 20} MiB", required)
        return _read(fd, MAX_FILE_BYTES)
    finally:
        os.close(fd)


def _read(fd: int, limit: int) -> bytes:
    parts: list[bytes] = []
    while limit > 0 and (part := os.read(fd, min(limit, 65536))):
        parts.append(part)
        limit -= len(part)
    return b"".join(parts)


def _unusable(path: str, reason: str, required: bool) -> bytes:
    if required:
        raise ExecFailed(SETUP, f"the container's {path} can't be used to look up the user: {reason}")
    return b""


def identify(root: int, user: str | None, uid: int, gid: int, groups: tuple[int, ...]) -> Identity:
    """The identity of a process in root: by its user string, or without one by the numbers of the specification."""
    if user:
        name, _, group = user.partition(":")
        passwd = read_database(root, "/etc/passwd", required=not name.isdigit())
        # Without a group of its own the memberships of a user who has a name count.
        group_data = read_database(root, "/etc/group", required=not (group or name).isdigit())
        found = resolve(user, passwd, group_data)
        return Identity(found.uid, found.gid, tuple(dict.fromkeys([*found.groups, *groups])), found.home)
    passwd = read_database(root, "/etc/passwd", required=False)
    account = next((account for account in parse_passwd(passwd) if account.uid == uid), None)
    return Identity(uid, gid, groups, account.home if account else "/")
