"""config.json as frozen dataclasses: OCI runtime-spec 1.3, Linux.

`Spec.from_json` refuses what is malformed with a ValueError that begins with the JSON path; members that this version
does not know are ignored, as the specification wants. An empty tuple or None stands for "absent".
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated

from corral.kernel.namespaces import Kind
from corral.oci.decode import JSON, Choice, Range, decode, encode

OCI_VERSION = "1.3.0"
"""The version of the specification that is spoken here; of config.json, every version 1 is understood."""

U16 = Annotated[int, Range(0, 2**16 - 1)]
U32 = Annotated[int, Range(0, 2**32 - 1)]
U64 = Annotated[int, Range(0, 2**64 - 1)]
I32 = Annotated[int, Range(-(2**31), 2**31 - 1)]
I64 = Annotated[int, Range(-(2**63), 2**63 - 1)]
Uid = Annotated[int, Range(0, 2**32 - 2)]
"""(uid_t) -1 means "leave as it is" to the kernel, so it can't be anybody's."""


@dataclass(frozen=True, slots=True)
class Box:
    """Size of a terminal, in characters."""

    height: Annotated[int, Range(0, 65535)]
    width: Annotated[int, Range(0, 65535)]


@dataclass(frozen=True, slots=True)
class User:
    """Who runs the process, by number."""

    uid: Uid = 0
    gid: Uid = 0
    umask: U32 | None = None
    additional_gids: tuple[Uid, ...] = ()
    username: str = ""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The five sets, of CAP_* names."""

    bounding: tuple[str, ...] = ()
    effective: tuple[str, ...] = ()
    inheritable: tuple[str, ...] = ()
    permitted: tuple[str, ...] = ()
    ambient: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rlimit:
    """One RLIMIT_*; 2^64 - 1 is no limit."""

    type: str
    soft: U64
    hard: U64


SchedulerPolicy = Annotated[
    str, Choice("SCHED_OTHER", "SCHED_FIFO", "SCHED_RR", "SCHED_BATCH", "SCHED_ISO", "SCHED_IDLE", "SCHED_DEADLINE")
]
"""How the kernel picks the process among others. Source: sched(7)."""


SchedulerFlag = Annotated[
    str,
    Choice(
        "SCHED_FLAG_RESET_ON_FORK",
        "SCHED_FLAG_RECLAIM",
        "SCHED_FLAG_DL_OVERRUN",
        "SCHED_FLAG_KEEP_POLICY",
        "SCHED_FLAG_KEEP_PARAMS",
        "SCHED_FLAG_UTIL_CLAMP_MIN",
        "SCHED_FLAG_UTIL_CLAMP_MAX",
    ),
]
"""Source: sched_setattr(2)."""


@dataclass(frozen=True, slots=True)
class Scheduler:
    """nice counts for OTHER and BATCH, priority for FIFO and RR; the times, in nanoseconds, for DEADLINE."""

    policy: SchedulerPolicy
    nice: I32 = 0
    priority: I32 = 0
    flags: tuple[SchedulerFlag, ...] = ()
    runtime: U64 = 0
    deadline: U64 = 0
    period: U64 = 0


IOPriorityClass = Annotated[str, Choice("IOPRIO_CLASS_RT", "IOPRIO_CLASS_BE", "IOPRIO_CLASS_IDLE")]
"""Source: ioprio_set(2)."""


@dataclass(frozen=True, slots=True)
class IOPriority:
    """0 is the highest priority of a class."""

    class_: IOPriorityClass
    priority: Annotated[int, Range(0, 7)]


@dataclass(frozen=True, slots=True)
class CPUAffinity:
    """Lists of CPUs (0-3,7) for a process that joins: before it is in the container's cgroup, and once it is."""

    initial: str = ""
    final: str = ""


@dataclass(frozen=True, slots=True)
class Process:
    """What to run, and as whom. cwd is a path inside the container."""

    cwd: str
    args: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    terminal: bool = False
    console_size: Box | None = None
    user: User = User()
    capabilities: Capabilities | None = None
    rlimits: tuple[Rlimit, ...] = ()
    no_new_privileges: bool = False
    oom_score_adj: Annotated[int, Range(-1000, 1000)] | None = None
    apparmor_profile: str = ""
    selinux_label: str = ""
    scheduler: Scheduler | None = None
    io_priority: IOPriority | None = None
    exec_cpu_affinity: CPUAffinity | None = None

    @classmethod
    def from_json(cls, value: object, path: str = "process") -> "Process":
        """From the process object of config.json, or of an exec."""
        process = decode(cls, value, path)
        _check_process(process, path)
        return process


@dataclass(frozen=True, slots=True)
class Root:
    """The root file system: a directory of the host, relative to the bundle."""

    path: str
    readonly: bool = False


@dataclass(frozen=True, slots=True)
class IdMapping:
    """A range of ids of a user namespace."""

    container_id: U32
    host_id: U32
    size: U32


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount; destination is a path inside the container ("" for the root file system itself)."""

    destination: str = ""
    type: str = ""
    source: str = ""
    options: tuple[str, ...] = ()
    uid_mappings: tuple[IdMapping, ...] = ()
    gid_mappings: tuple[IdMapping, ...] = ()


@dataclass(frozen=True, slots=True)
class Hook:
    """A program the runtime runs at a point of the container's life, for at most timeout seconds."""

    path: str
    args: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    timeout: I64 | None = None


@dataclass(frozen=True, slots=True)
class Hooks:
    """The six hook points."""

    prestart: tuple[Hook, ...] = ()
    create_runtime: tuple[Hook, ...] = ()
    create_container: tuple[Hook, ...] = ()
    start_container: tuple[Hook, ...] = ()
    poststart: tuple[Hook, ...] = ()
    poststop: tuple[Hook, ...] = ()


HOOK_POINTS = {
    "prestart": "prestart",
    "create_runtime": "createRuntime",
    "create_container": "createContainer",
    "start_container": "startContainer",
    "poststart": "poststart",
    "poststop": "poststop",
}
"""Field of Hooks: its name in JSON; in the order in which they are run."""


@dataclass(frozen=True, slots=True)
class Namespace:
    """A namespace: a new one, or with path that of the file."""

    type: Kind
    path: str = ""


class DeviceType(Enum):
    """Kind of a device node; u is an unbuffered character device, a (in rules only) any."""

    ALL = "a"
    BLOCK = "b"
    CHAR = "c"
    UNBUFFERED = "u"
    FIFO = "p"


@dataclass(frozen=True, slots=True)
class Device:
    """A device node to make."""

    path: str
    type: DeviceType
    major: I64 = 0
    minor: I64 = 0
    file_mode: U32 | None = None
    uid: Uid = 0
    gid: Uid = 0


@dataclass(frozen=True, slots=True)
class DeviceRule:
    """One rule of the device cgroup; None is any number."""

    allow: bool = False
    type: DeviceType = DeviceType.ALL
    major: I64 | None = None
    minor: I64 | None = None
    access: str = ""


@dataclass(frozen=True, slots=True)
class Memory:
    """Limits in bytes; -1 is unlimited."""

    limit: I64 | None = None
    reservation: I64 | None = None
    swap: I64 | None = None
    swappiness: U64 | None = None
    disable_oom_killer: bool | None = None


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


@dataclass(frozen=True, slots=True)
class Resources:
    """Cgroup limits: applied by who makes the cgroup, not by the runtime core."""

    devices: tuple[DeviceRule, ...] = ()
    memory: Memory | None = None
    cpu: Cpu | None = None
    pids: Pids | None = None
    block_io: BlockIO | None = None
    hugepage_limits: tuple[HugepageLimit, ...] = ()
    network: Network | None = None
    rdma: Mapping[str, Rdma] = field(default_factory=dict)
    unified: Mapping[str, str] = field(default_factory=dict)


class Action(Enum):
    """What seccomp does about a call."""

    KILL_PROCESS = "SCMP_ACT_KILL_PROCESS"
    KILL_THREAD = "SCMP_ACT_KILL_THREAD"
    KILL = "SCMP_ACT_KILL"
    TRAP = "SCMP_ACT_TRAP"
    ERRNO = "SCMP_ACT_ERRNO"
    TRACE = "SCMP_ACT_TRACE"
    ALLOW = "SCMP_ACT_ALLOW"
    LOG = "SCMP_ACT_LOG"
    NOTIFY = "SCMP_ACT_NOTIFY"


class Operator(Enum):
    """How an argument of a call is compared."""

    NE = "SCMP_CMP_NE"
    LT = "SCMP_CMP_LT"
    LE = "SCMP_CMP_LE"
    EQ = "SCMP_CMP_EQ"
    GE = "SCMP_CMP_GE"
    GT = "SCMP_CMP_GT"
    MASKED_EQ = "SCMP_CMP_MASKED_EQ"


@dataclass(frozen=True, slots=True)
class SeccompArg:
    """A condition on argument `index`; with MASKED_EQ value is the mask and value_two what must remain."""

    index: Annotated[int, Range(0, 5)]
    value: U64
    op: Operator
    value_two: U64 = 0


@dataclass(frozen=True, slots=True)
class SeccompSyscall:
    """A rule: for these calls, when all args match, this action."""

    names: tuple[str, ...]
    action: Action
    errno_ret: U32 | None = None
    args: tuple[SeccompArg, ...] = ()


@dataclass(frozen=True, slots=True)
class Seccomp:
    """A seccomp profile; architectures other than the native one are refused unless listed."""

    default_action: Action
    default_errno_ret: U32 | None = None
    architectures: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    listener_path: str = ""
    listener_metadata: str = ""
    syscalls: tuple[SeccompSyscall, ...] = ()


MemoryPolicyMode = Annotated[
    str,
    Choice(
        "MPOL_DEFAULT",
        "MPOL_BIND",
        "MPOL_INTERLEAVE",
        "MPOL_WEIGHTED_INTERLEAVE",
        "MPOL_PREFERRED",
        "MPOL_PREFERRED_MANY",
        "MPOL_LOCAL",
    ),
]
"""Where memory comes from. Source: set_mempolicy(2)."""


MemoryPolicyFlag = Annotated[str, Choice("MPOL_F_NUMA_BALANCING", "MPOL_F_RELATIVE_NODES", "MPOL_F_STATIC_NODES")]
"""Source: set_mempolicy(2)."""


@dataclass(frozen=True, slots=True)
class MemoryPolicy:
    """The NUMA policy of the container's processes; nodes is a list (0-3,7)."""

    mode: MemoryPolicyMode
    nodes: str = ""
    flags: tuple[MemoryPolicyFlag, ...] = ()


PersonalityDomain = Annotated[str, Choice("LINUX", "LINUX32")]
"""Source: personality(2)."""


@dataclass(frozen=True, slots=True)
class Personality:
    """The execution domain: with LINUX32 uname shows a 32-bit machine. There are no flags."""

    domain: PersonalityDomain
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TimeOffset:
    """How far a clock of a time namespace is ahead of the host's."""

    secs: I64 = 0
    nanosecs: Annotated[int, Range(0, 10**9 - 1)] = 0


@dataclass(frozen=True, slots=True)
class NetDevice:
    """What a network device of the host is called inside; "" is the same."""

    name: str = ""


@dataclass(frozen=True, slots=True)
class IntelRdt:
    """A share of the processor's caches and its memory's bandwidth."""

    clos_id: str = ""


@dataclass(frozen=True, slots=True)
class Linux:
    """What only Linux has."""

    namespaces: tuple[Namespace, ...] = ()
    uid_mappings: tuple[IdMapping, ...] = ()
    gid_mappings: tuple[IdMapping, ...] = ()
    time_offsets: Mapping[str, TimeOffset] = field(default_factory=dict)
    devices: tuple[Device, ...] = ()
    net_devices: Mapping[str, NetDevice] = field(default_factory=dict)
    sysctl: Mapping[str, str] = field(default_factory=dict)
    resources: Resources | None = None
    cgroups_path: str = ""
    rootfs_propagation: str = ""
    seccomp: Seccomp | None = None
    masked_paths: tuple[str, ...] = ()
    readonly_paths: tuple[str, ...] = ()
    mount_label: str = ""
    memory_policy: MemoryPolicy | None = None
    personality: Personality | None = None
    intel_rdt: IntelRdt | None = None


@dataclass(frozen=True, slots=True)
class Spec:
    """A whole config.json."""

    oci_version: str
    root: Root | None = None
    process: Process | None = None
    hostname: str = ""
    domainname: str = ""
    mounts: tuple[Mount, ...] = ()
    hooks: Hooks | None = None
    annotations: Mapping[str, str] = field(default_factory=dict)
    linux: Linux = field(default_factory=Linux)

    @classmethod
    def from_json(cls, value: object) -> "Spec":
        """From a decoded config.json. Raises ValueError that begins with the JSON path of what is wrong."""
        spec = decode(cls, value)
        _check_spec(spec)
        return spec

    def to_json(self) -> JSON:
        """The JSON object; members that hold their default are left out."""
        return encode(self)


def _check_process(process: Process, path: str) -> None:
    if not process.cwd.startswith("/"):
        raise ValueError(f"{path}.cwd: {process.cwd!r} is not an absolute path")
    if not process.args or not process.args[0]:
        raise ValueError(f"{path}.args: names no program")
    _check_env(process.env, f"{path}.env")
    types = [limit.type for limit in process.rlimits]
    if len(set(types)) != len(types):
        raise ValueError(f"{path}.rlimits: one limit is given twice")
    if process.scheduler is not None:
        _check_scheduler(process.scheduler, f"{path}.scheduler")
    if process.exec_cpu_affinity is not None:
        number_set(process.exec_cpu_affinity.initial, f"{path}.execCPUAffinity.initial")
        number_set(process.exec_cpu_affinity.final, f"{path}.execCPUAffinity.final")


def _check_env(env: tuple[str, ...], path: str) -> None:
    for i, assignment in enumerate(env):
        if assignment.startswith("=") or "=" not in assignment:
            raise ValueError(f"{path}[{i}]: {assignment!r} is not NAME=VALUE")


def _check_scheduler(scheduler: Scheduler, path: str) -> None:
    policy = scheduler.policy
    if policy in ("SCHED_OTHER", "SCHED_BATCH") and not -20 <= scheduler.nice <= 19:
        raise ValueError(f"{path}.nice: {scheduler.nice} is not between -20 and 19")
    if scheduler.priority and policy not in ("SCHED_FIFO", "SCHED_RR"):
        raise ValueError(f"{path}.priority: {policy} has none")
    for name in ("runtime", "deadline", "period"):
        if getattr(scheduler, name) and policy != "SCHED_DEADLINE":
            raise ValueError(f"{path}.{name}: {policy} has none")


def _check_spec(spec: Spec) -> None:
    major = spec.oci_version.partition(".")[0]
    if major != "1":
        raise ValueError(f"ociVersion: {spec.oci_version!r} is not a version 1 specification")
    if spec.process is not None:
        _check_process(spec.process, "process")
    for i, mount in enumerate(spec.mounts):
        if not mount.destination:
            raise ValueError(f"mounts[{i}].destination: missing")
    kinds = [namespace.type for namespace in spec.linux.namespaces]
    if len(set(kinds)) != len(kinds):
        raise ValueError("linux.namespaces: one type is given twice")
    if spec.hooks is not None:
        _check_hooks(spec.hooks)
    if spec.linux.seccomp is not None:
        _check_seccomp(spec.linux.seccomp)
    if spec.linux.memory_policy is not None:
        _check_memory_policy(spec.linux.memory_policy)
    if spec.linux.personality is not None and spec.linux.personality.flags:
        raise ValueError(f"linux.personality.flags[0]: there is no flag {spec.linux.personality.flags[0]!r}")


def _check_hooks(hooks: Hooks) -> None:
    for name, path in HOOK_POINTS.items():
        for i, hook in enumerate(getattr(hooks, name)):
            if not hook.path.startswith("/"):
                raise ValueError(f"hooks.{path}[{i}].path: {hook.path!r} is not an absolute path")
            if hook.timeout is not None and hook.timeout <= 0:
                raise ValueError(f"hooks.{path}[{i}].timeout: {hook.timeout} is not greater than zero")
            _check_env(hook.env, f"hooks.{path}[{i}].env")


def _check_seccomp(profile: Seccomp) -> None:
    for i, rule in enumerate(profile.syscalls):
        if not rule.names:
            raise ValueError(f"linux.seccomp.syscalls[{i}].names: names no system call")
    if profile.listener_metadata and not profile.listener_path:
        raise ValueError("linux.seccomp.listenerMetadata: must not be set without listenerPath")


def _check_memory_policy(policy: MemoryPolicy) -> None:
    nodes, mode = number_set(policy.nodes, "linux.memoryPolicy.nodes"), policy.mode
    if nodes and mode in ("MPOL_DEFAULT", "MPOL_LOCAL"):
        raise ValueError(f"linux.memoryPolicy.nodes: {mode} takes none")
    if not nodes and mode not in ("MPOL_DEFAULT", "MPOL_LOCAL", "MPOL_PREFERRED"):
        raise ValueError(f"linux.memoryPolicy.nodes: {mode} needs at least one")


LARGEST_NUMBER = 8191
"""Of a CPU or memory node: what the kernel can be built for."""


def number_set(text: str, path: str) -> frozenset[int]:
    """The numbers of a list like 0-3,7, of CPUs or memory nodes. Raises ValueError that begins with path."""
    numbers: set[int] = set()
    for part in text.split(",") if text.strip() else ():
        first, dash, last = part.strip().partition("-")
        ends = (first, last if dash else first)
        if not all(end.isascii() and end.isdigit() and len(end) < 9 for end in ends):
            raise ValueError(f"{path}: {text!r} is not a list of numbers and ranges, like 0-3,7")
        low, high = map(int, ends)
        if low > high or high > LARGEST_NUMBER:
            raise ValueError(f"{path}: {part.strip()!r} is not a range within 0-{LARGEST_NUMBER}")
        numbers.update(range(low, high + 1))
    return frozenset(numbers)
