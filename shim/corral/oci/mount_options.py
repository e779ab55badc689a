"""The options of a mount in config.json, sorted by what the kernel wants done with them.

Source: runtime-spec config.md "mounts", mount_setattr(2).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from corral.kernel.mount import (
    MOUNT_ATTR_NOATIME,
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_NODIRATIME,
    MOUNT_ATTR_NOEXEC,
    MOUNT_ATTR_NOSUID,
    MOUNT_ATTR_NOSYMFOLLOW,
    MOUNT_ATTR_RDONLY,
    MOUNT_ATTR_STRICTATIME,
    MS_PRIVATE,
    MS_SHARED,
    MS_SLAVE,
    MS_UNBINDABLE,
)

_SET = {
    "ro": MOUNT_ATTR_RDONLY,
    "nosuid": MOUNT_ATTR_NOSUID,
    "nodev": MOUNT_ATTR_NODEV,
    "noexec": MOUNT_ATTR_NOEXEC,
    "nodiratime": MOUNT_ATTR_NODIRATIME,
    "nosymfollow": MOUNT_ATTR_NOSYMFOLLOW,
}
_CLEAR = {
    "rw": MOUNT_ATTR_RDONLY,
    "suid": MOUNT_ATTR_NOSUID,
    "dev": MOUNT_ATTR_NODEV,
    "exec": MOUNT_ATTR_NOEXEC,
    "diratime": MOUNT_ATTR_NODIRATIME,
    "symfollow": MOUNT_ATTR_NOSYMFOLLOW,
}
# One field of the kernel, not independent bits.
_ATIME = {
    "relatime": 0,
    "noatime": MOUNT_ATTR_NOATIME,
    "strictatime": MOUNT_ATTR_STRICTATIME,
    "norelatime": MOUNT_ATTR_STRICTATIME,
    "atime": 0,
    "nostrictatime": 0,
}
_PROPAGATION = {"private": MS_PRIVATE, "slave": MS_SLAVE, "shared": MS_SHARED, "unbindable": MS_UNBINDABLE}
# Flags of the file system itself: set by fsconfig(2), and the same for all mounts of it, so nothing to a bind mount.
_SUPERBLOCK = {
    "sync": ("sync", True),
    "async": ("sync", False),
    "dirsync": ("dirsync", True),
    "lazytime": ("lazytime", True),
    "nolazytime": ("lazytime", False),
}
# No kernel we run on prints a message or takes a mandatory lock; i_version is each file system's own affair.
_IGNORED = frozenset(("defaults", "nomand", "mand", "loud", "silent", "noiversion", "iversion"))
OF_ACLS = ("acl", "noacl")
"""Flags of mount(2) that a tmpfs does not look at, and that fsconfig(2) has no word for; others may have options."""
# For mount(8) and fstab(5) only.
_FSTAB = frozenset(("auto", "noauto", "nouser", "_netdev"))
_UNSUPPORTED = frozenset(("move", "rmove"))


@dataclass(frozen=True, slots=True)
class Attributes:
    """Per-mount attributes to set and to clear (MOUNT_ATTR_*). atime is None where no option spoke of it."""

    set: int = 0
    clear: int = 0
    atime: int | None = None

    def __bool__(self) -> bool:
        return bool(self.set or self.clear or self.atime is not None)


@dataclass(frozen=True, slots=True)
class MountOptions:
    """All options of one mount; data is what is left for the file system itself."""

    attributes: Attributes = Attributes()
    recursive: Attributes = Attributes()
    propagation: int = 0
    propagation_recursive: bool = False
    bind: bool = False
    bind_recursive: bool = False
    data: tuple[str, ...] = ()
    superblock: tuple[str, ...] = ()
    """Flags of the file system, in the form of data."""
    copy_up: bool = False
    """A tmpfs is to begin with what it covers."""
    fill: bool = False
    """So is a directory of the host, if it is empty: "copyup", an option of our own, for volumes."""
    remount: bool = False
    """What is mounted there is to be changed, not covered."""
    idmap: bool = False
    idmap_recursive: bool = False


def parse(options: Iterable[str]) -> MountOptions:
    """Sort options; later ones win over earlier ones. Raises ValueError naming one that is not supported."""
    return _sorted(tuple(options))


@lru_cache(maxsize=64)
def _sorted(options: tuple[str, ...]) -> MountOptions:
    """Most mounts have the options of a few."""
    plain, recursive = Attributes(), Attributes()
    propagation, propagation_recursive = 0, False
    bind = bind_recursive = False
    data: list[str] = []
    rare: list[str] = []
    for option in options:
        if option in ("bind", "rbind"):
            bind, bind_recursive = True, option == "rbind"
        elif option in _PROPAGATION or (option[:1] == "r" and option[1:] in _PROPAGATION):
            propagation_recursive = option not in _PROPAGATION
            propagation = _PROPAGATION[option[1:] if propagation_recursive else option]
        elif (changed := _changed(plain, option)) is not None:
            plain = changed
        elif option[:1] == "r" and (changed := _changed(recursive, option[1:])) is not None:
            recursive = changed
        elif option in _RARE:
            rare.append(option)
        elif option and option not in _IGNORED and option not in _FSTAB and not option.startswith("x-"):
            data.append(option)
    parsed = MountOptions(plain, recursive, propagation, propagation_recursive, bind, bind_recursive, tuple(data))
    return _with_rare(parsed, rare) if rare else parsed


COPIES = frozenset(("tmpcopyup", "copyup"))
"""Options of a mount that init is to fill."""
_RARE = frozenset((*_SUPERBLOCK, *_UNSUPPORTED, *COPIES, "remount", "idmap", "ridmap"))


def _with_rare(options: MountOptions, rare: list[str]) -> MountOptions:
    """options with more of them, which few mounts have."""
    superblock: dict[str, None] = {}
    for option in rare:
        if option in _UNSUPPORTED:
            raise ValueError(f"mount option {option!r} is not supported")
        if option in _SUPERBLOCK:
            flag, on = _SUPERBLOCK[option]
            superblock.pop(flag, None)
            if on:
                superblock[flag] = None
    return replace(
        options,
        superblock=tuple(superblock),
        copy_up="tmpcopyup" in rare,
        fill="copyup" in rare,
        remount="remount" in rare,
        idmap="idmap" in rare or "ridmap" in rare,
        idmap_recursive="ridmap" in rare,
    )


def known() -> set[str]:
    """Every option that parse() does not leave to the file system."""
    recursive = {*_SET, *_CLEAR, *_ATIME, *_PROPAGATION, "bind", "idmap"}
    return recursive | {f"r{name}" for name in recursive} | _IGNORED | (_RARE - _UNSUPPORTED) | {*OF_ACLS}


def _changed(attributes: Attributes, option: str) -> Attributes | None:
    """attributes with one more option, or None if it is no attribute."""
    if bit := _SET.get(option):
        return Attributes(attributes.set | bit, attributes.clear & ~bit, attributes.atime)
    if bit := _CLEAR.get(option):
        return Attributes(attributes.set & ~bit, attributes.clear | bit, attributes.atime)
    if (atime := _ATIME.get(option)) is not None:
        return Attributes(attributes.set, attributes.clear, atime)
    return None
