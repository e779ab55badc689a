"""The v2 io controller.

Source: kernel cgroup-v2.rst "IO"; OCI config-linux "Block IO".
"""

from pathlib import Path

from corral.kernel.cgroup import convert, files
from corral.kernel.cgroup.resources import IoDeviceLimits, IoLimits
from corral.kernel.cgroup.stats import IoStats
from corral.kernel.cgroup.steps import Step, Write, check_range, unsupported

MAX = "io.max"
WEIGHT = "io.weight"
BFQ_WEIGHT = "io.bfq.weight"
STAT = "io.stat"


def plan(directory: str, wanted: IoLimits) -> list[Step]:
    """The writes that give a cgroup these limits."""
    steps: list[Step] = []
    if wanted.weight is not None:
        steps.append(_weight(directory, wanted.weight, "default"))
    for device in wanted.devices:
        if device.weight is not None:
            steps.append(_weight(directory, device.weight, f"{device.major}:{device.minor}"))
        steps += _rates(f"{directory}/{MAX}", device)
    return steps


def _weight(directory: str, weight: int, key: str) -> Step:
    """BFQ's file keeps OCI's range; the kernel's own has another. Undone by the line that it has now."""
    path, value = f"{directory}/{BFQ_WEIGHT}", weight
    if not Path(path).exists():
        path, value = f"{directory}/{WEIGHT}", convert.io_weight(weight)
    if not Path(path).exists():
        raise unsupported(path, "this kernel has no I/O weights")
    check_range(path, weight, convert.IO_WEIGHT_MIN, convert.IO_WEIGHT_MAX, what="an I/O weight")
    lines = (line for line in files.read(path).splitlines() if line.split()[0] == key)
    return Write(path, f"{key} {value}", undo=next(lines, f"{key} default"))


def _rates(path: str, device: IoDeviceLimits) -> list[Step]:
    keys = {
        "rbps": device.read_bytes_per_s,
        "wbps": device.write_bytes_per_s,
        "riops": device.read_ops_per_s,
        "wiops": device.write_ops_per_s,
    }
    # OCI has 0 for "no limit", the kernel "max".
    pairs = [f"{key}={value or 'max'}" for key, value in keys.items() if value is not None]
    if not pairs:
        return []
    number = f"{device.major}:{device.minor}"
    now = dict(files.nested_keyed(files.read(path))).get(number, {})
    undo = [f"{key}={now.get(key, 'max')}" for key, value in keys.items() if value is not None]
    return [Write(path, " ".join([number, *pairs]), undo=" ".join([number, *undo]))]


def read(directory: str) -> tuple[IoStats, ...]:
    """What went through each device, sub-cgroups included."""
    found = []
    for number, values in files.nested_keyed(files.read(f"{directory}/{STAT}")):
        if "rbytes" in values:
            major, minor = number.split(":")
            read_bytes, write_bytes, reads, writes = (
                int(values.get(key, 0)) for key in ("rbytes", "wbytes", "rios", "wios")
            )
            found.append(IoStats(int(major), int(minor), read_bytes, write_bytes, reads, writes))
    return tuple(found)
