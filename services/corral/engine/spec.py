"""From a container's config and the leaves' answers to its OCI spec, as docker would have it. Pure.

Only the typed fields of the config count. Image and container labels steer nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from corral.api.engine.v1.engine_pb2 import ContainerConfig
from corral.api.network.v1.network_pb2 import Endpoint
from corral.engine.devices import GrantedDevice
from corral.engine.mounts import build_mounts
from corral.engine.options import capability_name, rlimit_name
from corral.engine.resolve import lay_env
from corral.engine.seccomp import UNCONFINED, Host, parse_profile
from corral.kernel import capabilities as kernel_capabilities
from corral.kernel.namespaces import Kind
from corral.kernel.rlimits import UNLIMITED
from corral.oci import OCI_VERSION, defaults, reaper
from corral.oci.spec import Capabilities, Linux, Namespace, Process, Rlimit, Root, Seccomp, Spec, User
from corral.rpc.errors import InvalidArgument

DEFAULT_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What of the host the spec depends on."""

    hostname: str
    machine: str
    kernel: tuple[int, int]
    # What our own processes hold; nobody can hand on more.
    capabilities: frozenset[str]


@dataclass(frozen=True, slots=True)
class Facts:
    """What of one container the spec depends on, besides its config."""

    id: str
    host: HostFacts
    endpoint: Endpoint
    # Directories of the volumes, by name.
    volume_paths: Mapping[str, str] = field(default_factory=dict)
    # Namespace files of other containers that are joined.
    joined: Mapping[Kind, str] = field(default_factory=dict)
    devices: Sequence[GrantedDevice] = ()
    # It has never run: what it is given begins as the image has it.
    is_new: bool = False


def build(config: ContainerConfig, facts: Facts) -> Spec:
    """The spec of a container. Raises InvalidArgument."""
    capabilities = capability_set(config, facts.host)
    own_uts = config.uts_mode in ("", "private")
    return Spec(
        oci_version=OCI_VERSION,
        root=Root("rootfs", readonly=config.read_only_rootfs),
        process=_process(config, facts, capabilities),
        hostname=config.hostname if own_uts else "",
        domainname=config.domainname if own_uts else "",
        mounts=build_mounts(config, facts.endpoint, facts.volume_paths, fill_volumes=facts.is_new),
        linux=Linux(
            namespaces=_namespaces(config, facts),
            devices=tuple(granted.device for granted in facts.devices),
            sysctl={key.replace("/", "."): value for key, value in config.sysctls.items()},
            seccomp=seccomp(config, facts.host, capabilities),
            masked_paths=_paths(config, config.masked_paths, defaults.MASKED_PATHS),
            readonly_paths=_paths(config, config.readonly_paths, defaults.READONLY_PATHS),
            mount_label=config.selinux_label,
        ),
        annotations={**config.annotations, **({reaper.ANNOTATION: "true"} if config.init else {})},
    )


def _process(config: ContainerConfig, facts: Facts, capabilities: Sequence[str]) -> Process:
    hostname = facts.host.hostname if config.uts_mode == "host" else config.hostname
    given = [DEFAULT_PATH, f"HOSTNAME={hostname}"] if hostname else [DEFAULT_PATH]
    if config.terminal:
        given.append("TERM=xterm")
    return Process(
        cwd=config.working_dir or "/",
        args=(*config.entrypoint, *config.args),
        env=tuple(lay_env(given, config.env)),
        terminal=config.terminal,
        user=_groups(config.group_add),
        capabilities=_in_sets(capabilities),
        rlimits=_rlimits(config),
        no_new_privileges=not config.HasField("no_new_privileges") or config.no_new_privileges,
        oom_score_adj=config.oom_score_adj if config.HasField("oom_score_adj") else None,
        apparmor_profile=config.apparmor_profile.removeprefix(UNCONFINED),
        selinux_label=config.selinux_label,
    )


def _in_sets(names: Sequence[str]) -> Capabilities:
    """Bounding, effective and permitted; ambient and inheritable stay empty (CVE-2022-24769)."""
    held = tuple(names)
    return Capabilities(bounding=held, effective=held, permitted=held)


def capability_set(config: ContainerConfig, host: HostFacts) -> tuple[str, ...]:
    """The capabilities of the container's processes, in the kernel's order.

    ALL means all that the host can give. Raises InvalidArgument for one asked for by name that it cannot.
    """
    return _capability_set(config.privileged, tuple(config.cap_add), tuple(config.cap_drop), host.capabilities)


@lru_cache(maxsize=64)
def _capability_set(
    privileged: bool,
    added: Sequence[str],
    dropped: Sequence[str],
    available: frozenset[str],
) -> tuple[str, ...]:
    add = {capability_name(name) for name in added}
    drop = {capability_name(name) for name in dropped}
    if privileged:
        held = set(available)
    elif "ALL" in add:
        held = set(available) - drop
    else:
        named = add - {"ALL"}
        if missing := named - available:
            raise InvalidArgument(
                f"this host cannot give {', '.join(sorted(missing))}: corral itself does not hold it",
                reason="NO_CAPABILITY",
            )
        base = set() if "ALL" in drop else set(defaults.CAPABILITIES) - drop
        held = (base & available) | named
    return tuple(name for name in map(_cap, kernel_capabilities.NAMES) if name in held)


def _cap(name: str) -> str:
    return f"CAP_{name}"


def _groups(groups: Iterable[str]) -> User:
    """Further groups: numbers, and names that are looked up inside, when the process begins."""
    gids, names = [], []
    for group in groups:
        if not (group.isascii() and group.isdigit()):
            if not group or not group.isprintable() or ":" in group:
                raise InvalidArgument(f"{group!r} is no name of a group, and no number")
            names.append(group)
            continue
        if int(group) > 2**32 - 2:
            raise InvalidArgument(f"the group id {group} is too large")
        gids.append(int(group))
    return User(additional_gids=tuple(gids), group_names=tuple(names))


def _rlimits(config: ContainerConfig) -> tuple[Rlimit, ...]:
    limits = {limit.type: limit for limit in defaults.RLIMITS}
    for ulimit in config.ulimits:
        name = rlimit_name(ulimit)
        limits[name] = Rlimit(name, _rlimit_value(ulimit.soft), _rlimit_value(ulimit.hard))
    return tuple(limits.values())


def _rlimit_value(value: int) -> int:
    return UNLIMITED if value == -1 else value


def _namespaces(config: ContainerConfig, facts: Facts) -> tuple[Namespace, ...]:
    """New ones, but for those that are the host's (left out) or another container's (joined by path)."""
    wanted = [Namespace(Kind.MOUNT)]
    modes = (
        (Kind.PID, config.pid_mode),
        (Kind.IPC, config.ipc_mode),
        (Kind.UTS, config.uts_mode),
        (Kind.CGROUP, config.cgroupns_mode),
    )
    for kind, mode in modes:
        if mode != "host":
            wanted.append(Namespace(kind, facts.joined.get(kind, "")))
    if facts.endpoint.netns_path:
        wanted.append(Namespace(Kind.NETWORK, facts.endpoint.netns_path))
    return tuple(wanted)


def seccomp(config: ContainerConfig, host: HostFacts, capabilities: Sequence[str]) -> Seccomp | None:
    """The filter of the container; None: none. A privileged container has none unless it names one."""
    if config.seccomp_profile == UNCONFINED or (config.privileged and not config.seccomp_profile):
        return None
    if not config.seccomp_profile:
        return defaults.seccomp(capabilities)
    return parse_profile(config.seccomp_profile, Host(host.machine, host.kernel, frozenset(capabilities)))


def _paths(config: ContainerConfig, own: Sequence[str], default: Sequence[str]) -> tuple[str, ...]:
    if config.override_paths:
        return tuple(own)
    return () if config.privileged else tuple(default)


def process_for_exec(
    config: ContainerConfig,
    host: HostFacts,
    *,
    args: tuple[str, ...],
    env: Iterable[str],
    working_dir: str,
    terminal: bool,
    privileged: bool,
) -> Process:
    """A further process of a container: as its first one, but for what is given here. Raises InvalidArgument."""
    if working_dir and not working_dir.startswith("/"):
        raise InvalidArgument(f"the working directory {working_dir!r} is not absolute: it must begin with '/'")
    capabilities = sorted(host.capabilities) if privileged else capability_set(config, host)
    hostname = host.hostname if config.uts_mode == "host" else config.hostname
    given = [DEFAULT_PATH, f"HOSTNAME={hostname}"] if hostname else [DEFAULT_PATH]
    if terminal:
        given.append("TERM=xterm")
    return Process(
        cwd=working_dir or config.working_dir or "/",
        args=args,
        env=tuple(lay_env(given, config.env, env)),
        terminal=terminal,
        user=_groups(config.group_add),
        capabilities=_in_sets(capabilities),
        rlimits=_rlimits(config),
        no_new_privileges=not privileged and (not config.HasField("no_new_privileges") or config.no_new_privileges),
        oom_score_adj=config.oom_score_adj if config.HasField("oom_score_adj") else None,
        apparmor_profile=config.apparmor_profile.removeprefix(UNCONFINED),
        selinux_label=config.selinux_label,
    )
