"""Device access rules: what a list of them comes to. Pure; v1 and v2 both apply the result.

The result is what a v1 device cgroup can hold: a default, and exceptions from it.

Source: OCI config-linux "Allowed Device list"; kernel cgroup-v1/devices.rst.
"""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from corral.kernel.cgroup.resources import DeviceRule

ALL_ACCESS = frozenset("rwm")


@dataclass(frozen=True, slots=True, order=True)
class Node:
    """Device nodes of one type; "*" is any number."""

    type: str
    major: str
    minor: str

    def covers(self, other: "Node") -> bool:
        """Whether every node of other is one of these."""
        return self.type == other.type and self.major in ("*", other.major) and self.minor in ("*", other.minor)

    def meets(self, other: "Node") -> bool:
        """Whether a node can be both."""
        return (
            self.type == other.type
            and (self.major == other.major or "*" in (self.major, other.major))
            and (self.minor == other.minor or "*" in (self.minor, other.minor))
        )

    def __str__(self) -> str:
        """As the kernel's files have it."""
        return f"{self.type} {self.major}:{self.minor}"


@dataclass(frozen=True, slots=True)
class Access:
    """A default, and the accesses for which the opposite holds."""

    allowed: bool = True
    exceptions: Mapping[Node, frozenset[str]] = field(default_factory=dict)


DEFAULT_RULES = (
    DeviceRule(allow=False),
    # mknod gives no access: opening the node is what counts.
    DeviceRule(allow=True, type="c", access="m"),
    DeviceRule(allow=True, type="b", access="m"),
    DeviceRule(allow=True, type="c", major=1, minor=3),  # /dev/null
    DeviceRule(allow=True, type="c", major=1, minor=5),  # /dev/zero
    DeviceRule(allow=True, type="c", major=1, minor=7),  # /dev/full
    DeviceRule(allow=True, type="c", major=1, minor=8),  # /dev/random
    DeviceRule(allow=True, type="c", major=1, minor=9),  # /dev/urandom
    DeviceRule(allow=True, type="c", major=5, minor=0),  # /dev/tty
    DeviceRule(allow=True, type="c", major=5, minor=1),  # /dev/console
    DeviceRule(allow=True, type="c", major=5, minor=2),  # /dev/ptmx
    DeviceRule(allow=True, type="c", major=136),  # /dev/pts/*
)
"""What a container may use if nothing else is said. Source: OCI config-linux "Default Devices"."""


def fold(rules: Iterable[DeviceRule]) -> Access:
    """The access that a list of rules comes to, where the last that matches wins.

    Raises ValueError for a malformed rule, and for one that would cut a hole into an earlier, wider one: no v1
    kernel can hold that.
    """
    return _fold(tuple(rules))


@functools.lru_cache(maxsize=64)  # most cgroups have the same few rules
def _fold(rules: tuple[DeviceRule, ...]) -> Access:
    access = Access()
    for rule in rules:
        _check(rule)
        if _is_default(rule):
            access = Access(rule.allow)
            continue
        for kind in "cb" if rule.type == "a" else rule.type:
            node = Node(kind, _number(rule.major), _number(rule.minor))
            access = _with(access, node, frozenset(rule.access), allow=rule.allow)
    return access


def _check(rule: DeviceRule) -> None:
    if rule.type not in ("a", "b", "c"):
        raise ValueError(f"device type must be a, b or c, not {rule.type!r}")
    if not rule.access or not set(rule.access) <= ALL_ACCESS:
        raise ValueError(f"device access must be made of r, w and m, not {rule.access!r}")


def _is_default(rule: DeviceRule) -> bool:
    everything = _number(rule.major) == _number(rule.minor) == "*"
    return rule.type == "a" and everything and frozenset(rule.access) == ALL_ACCESS


def _number(value: int | None) -> str:
    return "*" if value is None or value < 0 else str(value)


def _with(access: Access, node: Node, bits: frozenset[str], *, allow: bool) -> Access:
    exceptions = dict(access.exceptions)
    if allow != access.allowed:
        exceptions[node] = exceptions.get(node, frozenset()) | bits
        return Access(access.allowed, exceptions)
    for each, had in access.exceptions.items():
        if not node.meets(each) or not had & bits:
            continue
        if not node.covers(each):
            raise ValueError(f"device rule {node} cannot be taken out of the wider {each}")
        if left := had - bits:
            exceptions[each] = left
        else:
            del exceptions[each]
    return Access(access.allowed, exceptions)


def parse_list(text: str) -> Access:
    """The content of a v1 `devices.list`. With everything allowed, the kernel does not show what is denied.

    >>> parse_list("a *:* rwm").allowed
    True
    """
    exceptions: dict[Node, frozenset[str]] = {}
    for line in text.splitlines():
        kind, numbers, bits = line.split()
        if kind == "a":
            return Access()
        node = Node(kind, *numbers.split(":"))
        exceptions[node] = exceptions.get(node, frozenset()) | frozenset(bits)
    return Access(allowed=False, exceptions=exceptions)
