"""Annotations that set properties of a container's systemd unit.

Clients hand down what users, and images, say. So only what can do no more than a limit, or say how the container is to
be stopped, is taken: no property that runs something, starts or stops another unit, or takes back a restriction
(CVE-2024-3154).
"""

from collections.abc import Mapping

from corral.kernel.cgroup.systemd.properties import Property
from corral.kernel.dbus import text
from corral.kernel.dbus.marshalling import Variant
from corral.runtime.errors import CommandError

ANNOTATION = "org.systemd.property."
"""In front of a property's name."""

_SHORTEST_NAME = 3
_SECOND_US = 1_000_000
_TOO_LONG_US = 2**64

_STOPPING = (
    *("KillMode", "KillSignal", "RestartKillSignal", "FinalKillSignal", "SendSIGHUP", "SendSIGKILL", "OOMPolicy"),
    *("TimeoutStopUSec", "RuntimeMaxUSec", "RuntimeRandomizedExtraUSec", "CollectMode", "DefaultDependencies"),
)
_TELLING = ("Description", "Documentation", "After", "Before")
_LIMITS = (
    *("CPUAccounting", "CPUWeight", "StartupCPUWeight", "CPUShares", "StartupCPUShares"),
    *("CPUQuotaPerSecUSec", "CPUQuotaPeriodUSec", "AllowedCPUs", "StartupAllowedCPUs"),
    *("AllowedMemoryNodes", "StartupAllowedMemoryNodes", "MemoryAccounting", "MemoryMin", "MemoryLow"),
    *("MemoryHigh", "MemoryMax", "MemorySwapMax", "MemoryZSwapMax", "MemoryZSwapWriteback", "MemoryLimit"),
    *("TasksAccounting", "TasksMax", "IPAccounting", "IPAddressDeny"),
    *("IOAccounting", "IOWeight", "StartupIOWeight", "IODeviceWeight", "IODeviceLatencyTargetUSec"),
    *("IOReadBandwidthMax", "IOWriteBandwidthMax", "IOReadIOPSMax", "IOWriteIOPSMax"),
    *("BlockIOAccounting", "BlockIOWeight", "StartupBlockIOWeight", "BlockIODeviceWeight"),
    *("BlockIOReadBandwidth", "BlockIOWriteBandwidth"),
)
"""Those of config.json are told after them, and count. Source: systemd.resource-control(5)."""
ALLOWED = frozenset((*_STOPPING, *_TELLING, *_LIMITS))
"""Not among them: Exec*, *Action, OnFailure and whatever else names a unit to be started or stopped; Slice, PIDs and
Delegate, for the processes and cgroups of others; DevicePolicy, DeviceAllow, IPAddressAllow, BPFProgram, User; and
ManagedOOMPreference, by which somebody else would be killed instead."""


def annotated(annotations: Mapping[str, str]) -> list[Property]:
    """The properties that annotations set. Raises CommandError naming one that is not allowed, or not understood."""
    return [_annotated(key, value) for key, value in annotations.items() if key.startswith(ANNOTATION)]


def _annotated(key: str, written: str) -> Property:
    name = key.removeprefix(ANNOTATION)
    if len(name) < _SHORTEST_NAME or not (name.isascii() and name.isalpha()):
        raise CommandError(f"annotations: {key!r} does not end with the name of a property")
    stem = name.removesuffix("Sec")  # as unit files have it, where properties are of microseconds
    in_seconds = stem != name and stem[-1:].islower()
    if (f"{stem}USec" if in_seconds else name) not in ALLOWED:
        raise CommandError(f"annotations: {key!r}: it is not for an annotation to set")
    try:
        value = text.parse(written)
    except ValueError as e:
        raise CommandError(f"annotations: {key!r}: {e}") from None
    if in_seconds:
        if isinstance(value.value, bool) or not isinstance(value.value, int | float):
            raise CommandError(f"annotations: {key!r}: not a number")
        if not 0 <= value.value * _SECOND_US < _TOO_LONG_US:
            raise CommandError(f"annotations: {key!r}: {written} is not a time in seconds")
        return f"{stem}USec", Variant("t", int(value.value * _SECOND_US))
    return name, value
