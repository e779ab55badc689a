"""Names of units, and where their cgroups are. Pure. Source: systemd.unit(5), systemd.slice(5)."""

SLICE, SCOPE, ROOT = ".slice", ".scope", "-.slice"

_DASH = ":"
"""In place of a dash, where that would lead to the slice within."""
_IN_NAMES = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789:-_.\\")
_LONGEST = 255


def check_name(unit: str) -> None:
    """Raise ValueError for what is not a unit's name, and so might be more than one component of a path."""
    if not _IN_NAMES.issuperset(unit) or len(unit) > _LONGEST:
        raise ValueError(f"{unit!r} is not the name of a systemd unit")


def slice_path(name: str) -> str:
    """The cgroup of a slice, "" for the root slice. A dash leads to the slice within. Raises ValueError.

    >>> slice_path("machine-web-db.slice")
    '/machine.slice/machine-web.slice/machine-web-db.slice'
    >>> slice_path("-.slice")
    ''
    """
    stem = name.removesuffix(SLICE)
    check_name(name)
    if name == ROOT:
        return ""
    parts = stem.split("-")
    if stem == name or not all(parts):
        raise ValueError(f"{name!r} is not the name of a systemd slice")
    return "".join(f"/{'-'.join(parts[: n + 1])}{SLICE}" for n in range(len(parts)))


def unit_at(path: str) -> str:
    """The unit whose cgroup has a path: a slice, or a scope within one. "" for a cgroup that only is called so.

    >>> unit_at("/machine.slice/machine-web.slice/a.scope"), unit_at("/machine.slice")
    ('a.scope', 'machine.slice')
    >>> unit_at("/corral/default/a.scope"), unit_at("/corral/default/user.slice")
    ('', '')
    """
    parent, _, name = path.rpartition("/")
    try:
        if name.endswith(SCOPE):
            return name if parent == slice_path(parent.rpartition("/")[2] or ROOT) else ""
        return name if path == slice_path(name) else ""
    except ValueError:
        return ""


def slice_of_its_own(scope: str, within: str) -> str:
    """The slice for one scope alone, in another; what that is for see corral.kernel.cgroup.systemd.removal.

    >>> slice_of_its_own("corral-0a1b2c3d-web.scope", "machine.slice"), slice_of_its_own("a.scope", "-.slice")
    ('machine-corral:0a1b2c3d:web.slice', 'a.slice')
    """
    stem = scope.removesuffix(SCOPE).replace("-", _DASH)
    return f"{stem}{SLICE}" if within == ROOT else f"{within.removesuffix(SLICE)}-{stem}{SLICE}"


def scope_alone_in(slice_: str) -> str:
    """The scope whose own slice this would be.

    >>> scope_alone_in("machine-corral:0a1b2c3d:web.slice")
    'corral-0a1b2c3d-web.scope'
    """
    return f"{slice_.removesuffix(SLICE).rpartition('-')[2].replace(_DASH, '-')}{SCOPE}"


def has_slice_of_its_own(path: str) -> bool:
    """Whether the cgroup at a path, or that directory, is of a scope that has.

    >>> has_slice_of_its_own("/machine.slice/machine-a.slice/a.scope"), has_slice_of_its_own("/machine.slice/a.scope")
    (True, False)
    """
    if not path.endswith(SCOPE):
        return False
    within, slice_, scope = ["", "", *path.split("/")][-3:]
    return slice_ == slice_of_its_own(scope, within if within.endswith(SLICE) else ROOT)
