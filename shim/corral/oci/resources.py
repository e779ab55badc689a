"""What linux.resources of config.json is made of; corral.oci.spec has the whole."""

from dataclasses import dataclass

from corral.oci.decode import I64, U16, U32, U64


@dataclass(frozen=True, slots=True)
class Memory:
    """Limits in bytes; -1 is unlimited."""

    limit: I64 | None = None
    reservation: I64 | None = None
    swap: I64 | None = None
    swappiness: U64 | None = None
    disable_oom_killer: bool | None = None
    check_before_update: bool = False


@dataclass(frozen=True, slots=True)
class Cpu:
    """shares are relative; quota and period in microseconds; cpus and mems are lists (0-3,7)."""

    shares: U64 | None = None
    quota: I64 | None = None
    burst: U64 | None = None
    period: U64 | None = None
    realtime_runtime: I64 | None = None
    realtime_period: U64 | None = None
    cpus: str = ""
    mems: str = ""
    idle: I64 | None = None


@dataclass(frozen=True, slots=True)
class Pids:
    """Largest number of processes; -1 is unlimited."""

    limit: I64 | None = None


@dataclass(frozen=True, slots=True)
class WeightDevice:
    """The share of a block device."""

    major: I64
    minor: I64
    weight: U16 | None = None


@dataclass(frozen=True, slots=True)
class ThrottleDevice:
    """The largest rate of a block device, in bytes or operations per second."""

    major: I64
    minor: I64
    rate: U64


@dataclass(frozen=True, slots=True)
class BlockIO:
    """Input and output of block devices; weights are 10 to 1000."""

    weight: U16 | None = None
    weight_device: tuple[WeightDevice, ...] = ()
    throttle_read_bps_device: tuple[ThrottleDevice, ...] = ()
    throttle_write_bps_device: tuple[ThrottleDevice, ...] = ()
    throttle_read_iops_device: tuple[ThrottleDevice, ...] = ()
    throttle_write_iops_device: tuple[ThrottleDevice, ...] = ()


@dataclass(frozen=True, slots=True)
class HugepageLimit:
    """Bytes of huge pages of one size, which is named as the kernel does: 2MB."""

    page_size: str
    limit: U64


@dataclass(frozen=True, slots=True)
class Rdma:
    """What of an RDMA device."""

    hca_handles: U32 | None = None
    hca_objects: U32 | None = None


@dataclass(frozen=True, slots=True)
class InterfacePriority:
    """Of what is sent by a network interface, which is named as the host has it."""

    name: str
    priority: U32


@dataclass(frozen=True, slots=True)
class Network:
    """What marks the packets of a container; 0 is no class."""

    class_id: U32 | None = None
    priorities: tuple[InterfacePriority, ...] = ()
