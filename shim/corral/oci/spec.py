"""config.json as frozen dataclasses: OCI runtime-spec 1.3, Linux.

`Spec.from_json` refuses what is malformed with a ValueError that begins with the JSON path; members that this version
does not know are ignored, as the specification wants. An empty tuple or None stands for "absent".
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Annotated

from corral.kernel.namespaces import Kind
from corral.oci import validity
from corral.oci.decode import I64, JSON, U32, U64, Range, decode, encode, json_name
from corral.oci.resources import BlockIO, Cpu, HugepageLimit, Memory, Network, Pids, Rdma
from corral.oci.scheduling import CPUAffinity, IOPriority, MemoryPolicy, Personality, Scheduler

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
    group_names: tuple[str, ...] = ()
    """Further groups, by name, of the container's own /etc/group. No runtime-spec has it; corral's engine asks so."""


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
        validity.check_process(process, path)
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


HOOK_POINTS = {member.name: json_name(member.name) for member in fields(Hooks)}
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

    def __hash__(self) -> int:
        # What comes of a profile is remembered by it, several times an exec: all its names are not worth that time.
        return hash((self.default_action, self.flags, self.listener_path, len(self.syscalls)))


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
        validity.check_spec(spec)
        return spec

    def to_json(self) -> JSON:
        """The JSON object; members that hold their default are left out."""
        return encode(self)
