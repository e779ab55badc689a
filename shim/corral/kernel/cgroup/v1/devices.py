"""The v1 devices controller.

Source: kernel cgroup-v1/devices.rst; OCI config-linux "Allowed Device list".
"""

import functools
from collections.abc import Sequence

from corral.kernel.cgroup import files
from corral.kernel.cgroup.device_rules import Access, Node, fold, parse_list
from corral.kernel.cgroup.resources import DeviceRule
from corral.kernel.cgroup.steps import Step, Write, invalid

ALLOW = "devices.allow"
DENY = "devices.deny"
LIST = "devices.list"
EVERYTHING = "a"


def plan(directory: str, wanted: Sequence[DeviceRule]) -> list[Step]:
    """The writes that lead from the present rules to the wanted ones; what both allow is allowed throughout."""
    path = f"{directory}/{LIST}"
    target = _target(directory, wanted)
    return transition(directory, parse_list(files.read(path)), target)


def plan_fresh(directory: str, wanted: Sequence[DeviceRule]) -> list[Step]:
    """The same for a cgroup that nothing is in yet, whatever rules it has from its parent: the default clears them."""
    default = _target(directory, wanted).allowed
    exceptions, _ = _paths(directory, allow=not default)
    return [_default(directory, allow=default), *(Write(exceptions, line) for line in _lines(tuple(wanted)))]


@functools.lru_cache(maxsize=64)  # most cgroups have the same few rules
def _lines(wanted: tuple[DeviceRule, ...]) -> list[str]:
    """What rules except from the default that they come to, as it is written."""
    return [_line(node, bits) for node, bits in fold(wanted).exceptions.items()]


def _target(directory: str, wanted: Sequence[DeviceRule]) -> Access:
    try:
        return fold(wanted)
    except ValueError as e:
        raise invalid(f"{directory}/{LIST}", str(e)) from e


def transition(directory: str, now: Access, target: Access) -> list[Step]:
    """The writes between two rule sets, each with its opposite as undo."""
    steps: list[Step] = []
    have = dict(now.exceptions)
    if now.allowed != target.allowed or now.allowed:
        # Taken out one by one although the default resets them, so that undo brings them back. While everything
        # is allowed the kernel hides its exceptions: setting the default again clears them.
        steps += [_set(directory, node, bits, allow=now.allowed) for node, bits in have.items()]
        steps.append(_default(directory, allow=target.allowed))
        have = {}
    for node, bits in target.exceptions.items():
        if missing := bits - have.get(node, frozenset()):
            steps.append(_set(directory, node, missing, allow=not target.allowed))
    for node, bits in have.items():
        if surplus := bits - target.exceptions.get(node, frozenset()):
            steps.append(_set(directory, node, surplus, allow=target.allowed))
    return steps


def _default(directory: str, *, allow: bool) -> Write:
    path, opposite = _paths(directory, allow=allow)
    return Write(path, EVERYTHING, undo=EVERYTHING, undo_path=opposite)


def _set(directory: str, node: Node, bits: frozenset[str], *, allow: bool) -> Write:
    path, opposite = _paths(directory, allow=allow)
    line = _line(node, bits)
    return Write(path, line, undo=line, undo_path=opposite)


def _line(node: Node, bits: frozenset[str]) -> str:
    return f"{node} {''.join(bit for bit in 'rwm' if bit in bits)}"


def _paths(directory: str, *, allow: bool) -> tuple[str, str]:
    paths = f"{directory}/{ALLOW}", f"{directory}/{DENY}"
    return paths if allow else (paths[1], paths[0])
