"""The v1 blkio controller: throttling per device, and the weights of the BFQ scheduler.

Source: kernel cgroup-v1/blkio-controller.rst, block/bfq-iosched.rst; OCI config-linux "Block IO".
"""

from collections import defaultdict
from pathlib import Path

from corral.kernel.cgroup import convert, files
from corral.kernel.cgroup.resources import IoDeviceLimits, IoLimits
from corral.kernel.cgroup.stats import IoStats
from corral.kernel.cgroup.steps import Step, Write, check_range, unsupported

WEIGHTS = ("blkio.weight", "blkio.bfq.weight")
"""The first went with the CFQ scheduler, in Linux 5.0."""
DEVICE_WEIGHTS = ("blkio.weight_device", "blkio.bfq.weight_device")
READ_BPS = "blkio.throttle.read_bps_device"
WRITE_BPS = "blkio.throttle.write_bps_device"
READ_IOPS = "blkio.throttle.read_iops_device"
WRITE_IOPS = "blkio.throttle.write_iops_device"
BYTES = "blkio.throttle.io_service_bytes_recursive"
OPS = "blkio.throttle.io_serviced_recursive"


def plan(directory: str, wanted: IoLimits) -> list[Step]:
    """The writes that give a cgroup these limits."""
    steps: list[Step] = []
    if wanted.weight is not None:
        path = _first(directory, WEIGHTS)
        _check_weight(path, wanted.weight)
        steps.append(Write(path, str(wanted.weight), undo=_own_weight(path)))
    for device in wanted.devices:
        steps += _device(directory, device)
    return steps


def _device(directory: str, device: IoDeviceLimits) -> list[Step]:
    number = f"{device.major}:{device.minor}"
    steps: list[Step] = []
    if device.weight is not None:
        path = _first(directory, DEVICE_WEIGHTS)
        _check_weight(path, device.weight)
        steps.append(Write(path, f"{number} {device.weight}", undo=_line(path, number)))
    for name, rate in (
        (READ_BPS, device.read_bytes_per_s),
        (WRITE_BPS, device.write_bytes_per_s),
        (READ_IOPS, device.read_ops_per_s),
        (WRITE_IOPS, device.write_ops_per_s),
    ):
        if rate is not None:
            path = f"{directory}/{name}"
            steps.append(Write(path, f"{number} {rate}", undo=_line(path, number)))
    return steps


def _line(path: str, number: str) -> str:
    """What restores a device's present value; 0 means that it has none."""
    lines = (line for line in files.read(path).splitlines() if line.split()[:1] == [number])
    return next(lines, f"{number} 0")


def _own_weight(path: str) -> str:
    # Reads as "100" or, once devices have weights of their own, as "default 100" among them.
    return files.read(path).splitlines()[0].split()[-1]


def _check_weight(path: str, weight: int) -> None:
    check_range(path, weight, convert.IO_WEIGHT_MIN, convert.IO_WEIGHT_MAX, what="an I/O weight")


def _first(directory: str, names: tuple[str, ...]) -> str:
    for name in names:
        if Path(directory, name).exists():
            return f"{directory}/{name}"
    raise unsupported(f"{directory}/{names[-1]}", "this kernel has no I/O weights (no BFQ scheduler)")


def read(directory: str) -> tuple[IoStats, ...]:
    """What went through each device, sub-cgroups included."""
    counts: dict[str, dict[str, int]] = defaultdict(dict)
    for name, unit in ((BYTES, "bytes"), (OPS, "ops")):
        content = files.read_bytes(f"{directory}/{name}")
        if content.startswith(b"Total"):  # of no device
            continue
        for line in content.decode().splitlines():
            fields = line.split()
            if len(fields) == 3:  # the last line is a total
                counts[fields[0]][f"{fields[1]} {unit}"] = int(fields[2])
    return tuple(
        IoStats(
            major=int(number.split(":")[0]),
            minor=int(number.split(":")[1]),
            read_bytes=each.get("Read bytes", 0),
            write_bytes=each.get("Write bytes", 0),
            read_ops=each.get("Read ops", 0),
            write_ops=each.get("Write ops", 0),
        )
        for number, each in counts.items()
    )
