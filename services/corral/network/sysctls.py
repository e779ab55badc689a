"""Kernel parameters of a network namespace, `net.…`: checked, and written inside the namespace."""

import re
from collections.abc import Iterable
from pathlib import Path

from corral.kernel.netns import in_namespace
from corral.rpc.errors import InvalidArgument

_PART = re.compile(r"[a-zA-Z0-9_-][a-zA-Z0-9_.-]*")
ROOT = Path("/proc/sys")


def paths(sysctls: Iterable[tuple[str, str]]) -> list[tuple[Path, str]]:
    """Where to write which value. As in sysctl(8): the first separator, "." or "/", is the separator of them all.

    Raises InvalidArgument for names outside of net: those belong to other namespaces, or to the host.
    """
    return [(_path(name), value) for name, value in sysctls]


def write(netns: Path, parameters: Iterable[tuple[str, str]]) -> None:
    """Write them inside a namespace. Raises InvalidArgument as paths() does, and OSError."""
    found = paths(parameters)

    def work() -> None:
        for path, value in found:
            path.write_text(value)

    if found:
        in_namespace(netns, work)


def of_link(parameters: Iterable[tuple[str, str]], link: str) -> list[tuple[str, str]]:
    """Those of one link. Pure. Raises InvalidArgument as paths() does."""
    return [(name, value) for name, value in parameters if link in _path(name).parts]


def _path(name: str) -> Path:
    separator = "/" if "/" in name and "." not in name.partition("/")[0] else "."
    parts = name.split(separator)
    if parts[0] != "net" or len(parts) < 3 or not all(_PART.fullmatch(part) for part in parts):
        raise InvalidArgument(
            f"sysctl {name!r} is not one of a network namespace, such as net.ipv4.ip_unprivileged_port_start",
            reason="BAD_SYSCTL",
        )
    return ROOT.joinpath(*parts)
