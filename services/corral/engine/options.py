"""What a caller asks of a container, checked before anything is made. Pure: it looks at what it is given alone."""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import PurePosixPath

from corral.api.engine.v1.engine_pb2 import ContainerConfig, RestartPolicy, Ulimit, VolumeMount
from corral.api.network.v1.network_pb2 import NetworkAttachment
from corral.engine import log_subject
from corral.engine.health_rules import check_healthcheck
from corral.engine.signals import parse_signal
from corral.kernel import capabilities, rlimits
from corral.kernel.cgroup import Kind, Layout
from corral.oci import reaper
from corral.rpc.context import check_id
from corral.rpc.errors import FailedPrecondition, InvalidArgument, Unimplemented

_HOSTNAME = re.compile(r"[a-zA-Z0-9]([a-zA-Z0-9.-]{0,62}[a-zA-Z0-9])?")
PROPAGATIONS = ("rprivate", "private", "rshared", "shared", "rslave", "slave")
# Sysctls that belong to a namespace the container has of its own. Source: docker run, "--sysctl".
_IPC_SYSCTLS = frozenset(
    f"kernel.{name}" for name in ("msgmax", "msgmnb", "msgmni", "sem", "shmall", "shmmax", "shmmni", "shm_rmid_forced")
)
_UTS_SYSCTLS = frozenset(("kernel.domainname", "kernel.hostname"))


_POLICIES = frozenset(RestartPolicy.Mode.values())
_HEALTH_ACTIONS = frozenset(ContainerConfig.HealthAction.values())


def check(config: ContainerConfig) -> None:
    """Raises InvalidArgument for what can never work, Unimplemented for what is not there yet; both name the option."""
    if not config.image:
        raise InvalidArgument("no image is named", reason="NO_IMAGE")
    _refuse_what_is_not_there_yet(config)
    check_restart_policy(config.restart)
    check_healthcheck(config.healthcheck)
    if config.health_on_failure not in _HEALTH_ACTIONS:
        raise InvalidArgument(f"{config.health_on_failure} is nothing that can be done about an unhealthy container")
    if config.auto_remove and config.restart.mode > RestartPolicy.MODE_NO:
        raise InvalidArgument("a container that is removed when it ends (--rm) cannot be restarted: leave one out")
    _check_process(config)
    _check_annotations(config.annotations)
    _check_host_names(config)
    log_subject.check(config.log)
    for mount in config.mounts:
        _check_mount(mount)
    _check_targets(config.mounts)
    for ulimit in config.ulimits:
        rlimit_name(ulimit)
    for name in (*config.cap_add, *config.cap_drop):
        capability_name(name)
    _check_namespaces(config)
    _check_sysctls(config)
    if config.HasField("oom_score_adj") and not -1000 <= config.oom_score_adj <= 1000:
        raise InvalidArgument(f"the OOM score adjustment {config.oom_score_adj} is not between -1000 and 1000")
    if config.storage_quota_bytes < 0:
        raise InvalidArgument(f"the size of the writable layer cannot be negative ({config.storage_quota_bytes})")
    if config.shm_size_bytes < 0:
        raise InvalidArgument(f"the size of /dev/shm cannot be negative ({config.shm_size_bytes})")
    if config.HasField("timeout") and config.timeout.ToNanoseconds() <= 0:
        raise InvalidArgument("the time after which a container is killed (--timeout) must be more than 0")
    if config.HasField("stop_timeout") and config.stop_timeout.ToNanoseconds() < 0:
        raise InvalidArgument("the stop timeout cannot be negative")


def _check_annotations(annotations: Mapping[str, str]) -> None:
    for key in annotations:
        if not key or key.startswith(reaper.OWN):
            raise InvalidArgument(
                f"annotation {key!r} cannot be set: it needs a name, and those that begin with {reaper.OWN} are"
                " corral's own",
                reason="BAD_ANNOTATION",
            )


def check_writable_cgroups(config: ContainerConfig, capabilities: Collection[str], layout: Layout) -> None:
    """Raises InvalidArgument, FailedPrecondition where a container with these CAP_* could lift its limits by that.

    The kernel guards only the root of the writer's own cgroup namespace. Who makes a further one from a cgroup below
    writes to that of the container: with CAP_SYS_ADMIN, or in a user namespace. The default seccomp profile keeps
    all others from making either. What is privileged has no such bound.
    Source: kernel cgroup-v2.rst "Delegation Containment".
    """
    if not config.writable_cgroups or config.privileged:
        return
    if config.cgroupns_mode not in ("", "private"):
        raise InvalidArgument(
            "a container that writes to its cgroup needs a cgroup namespace of its own: leave --cgroupns out"
        )
    if "CAP_SYS_ADMIN" in capabilities:
        raise InvalidArgument(
            "a container that writes to its cgroup could lift its limits with CAP_SYS_ADMIN:"
            " leave SYS_ADMIN out of its capabilities"
        )
    if config.seccomp_profile:
        raise InvalidArgument(
            "a container that writes to its cgroup needs the default seccomp profile, which keeps it from namespaces"
            " where it could lift its limits: leave --security-opt seccomp out"
        )
    if layout.kind is not Kind.V2:
        why = "on cgroup v1 it could lift all of its limits and use any device by that: boot with cgroup v2 alone"
    elif layout.unified and not layout.unified.nsdelegate:
        why = f"it could lift its limits by that: mount -o remount,nsdelegate {layout.unified.mount_point}"
    else:
        return
    raise FailedPrecondition(f"a container cannot be given write access to its cgroup here: {why}", reason="NSDELEGATE")


def check_restart_policy(policy: RestartPolicy) -> None:
    """Raises InvalidArgument for what no policy can be."""
    if policy.mode not in _POLICIES:
        raise InvalidArgument(f"{policy.mode} is no restart policy")
    if policy.max_retries and policy.mode != RestartPolicy.MODE_ON_FAILURE:
        raise InvalidArgument("only the restart policy on-failure takes a number of retries")


def _refuse_what_is_not_there_yet(config: ContainerConfig) -> None:
    if config.userns_mode not in ("", "host"):
        raise _not_yet("user namespaces (--userns) are")


def _not_yet(what: str) -> Unimplemented:
    return Unimplemented(f"{what} not there yet in this version of corral: leave the option out", reason="NOT_YET")


def _check_process(config: ContainerConfig) -> None:
    for assignment in config.env:
        if not assignment or assignment.startswith("=") or "\0" in assignment:
            raise InvalidArgument(f"{assignment!r} is no environment variable: give NAME=value")
    if config.working_dir and not config.working_dir.startswith("/"):
        raise InvalidArgument(f"the working directory {config.working_dir!r} is not absolute: it must begin with '/'")
    if config.stop_signal:
        parse_signal(config.stop_signal)
    if any("\0" in word for word in (*config.entrypoint, *config.args)):
        raise InvalidArgument("an argument contains a NUL character")


def _check_host_names(config: ContainerConfig) -> None:
    for what, value in (("hostname", config.hostname), ("domain name", config.domainname)):
        if value and _HOSTNAME.fullmatch(value) is None:
            raise InvalidArgument(
                f"{value!r} is no valid {what}: use up to 64 letters, digits, '-' and '.', with a letter or digit"
                " at both ends"
            )


def check_mount_target(path: str) -> None:
    """Raises InvalidArgument unless something may be mounted there."""
    target = PurePosixPath(path)
    if not target.is_absolute() or ".." in target.parts or "\0" in path:
        raise InvalidArgument(f"the mount target {path!r} is not an absolute path without '..'")
    if target == PurePosixPath("/"):
        raise InvalidArgument("nothing can be mounted over '/', the container's root: choose another mount target")


def _check_mount(mount: VolumeMount) -> None:
    check_mount_target(mount.target)
    if mount.propagation and mount.propagation not in PROPAGATIONS:
        raise InvalidArgument(f"{mount.propagation!r} is no mount propagation: use one of {', '.join(PROPAGATIONS)}")
    if mount.type == VolumeMount.TYPE_BIND and not mount.source.startswith("/"):
        raise InvalidArgument(f"the source of a bind mount must be an absolute path, {mount.source!r} is not")
    if mount.type == VolumeMount.TYPE_VOLUME and mount.source:
        check_id(mount.source, "volume name")
    if mount.type == VolumeMount.TYPE_IMAGE:
        _check_image(mount)
    elif mount.writable or (mount.subpath and mount.type != VolumeMount.TYPE_VOLUME):
        what = "only those of images are rw" if mount.writable else "only those of images and volumes have a subpath"
        raise InvalidArgument(f"the mount at {mount.target}: {what}")
    if mount.subpath:
        _check_subpath(mount)
    if mount.type == VolumeMount.TYPE_UNSPECIFIED:
        raise InvalidArgument(f"the mount at {mount.target} has no type: give bind, volume, tmpfs or image")


def _check_image(mount: VolumeMount) -> None:
    if not mount.source:
        raise InvalidArgument(f"the mount at {mount.target} names no image: give source=IMAGE", reason="NO_IMAGE")
    if mount.propagation or mount.options or (mount.read_only and mount.writable):
        raise InvalidArgument(f"the mount of an image at {mount.target} is either read-only or rw, and has no options")


def _check_subpath(mount: VolumeMount) -> None:
    if "\0" in mount.subpath or ".." in PurePosixPath(mount.subpath).parts:
        raise InvalidArgument(f"the subpath {mount.subpath!r} is no path without '..'")
    if mount.type == VolumeMount.TYPE_VOLUME and not mount.source:
        raise InvalidArgument(f"the volume at {mount.target} is a new one and has no parts: name one by its source")
    if mount.type == VolumeMount.TYPE_VOLUME and (mount.propagation or mount.options):
        raise InvalidArgument(f"the part of a volume at {mount.target} has neither propagation nor options")


def _check_targets(mounts: Iterable[VolumeMount]) -> None:
    seen = set()
    for mount in mounts:
        target = PurePosixPath(mount.target)
        if target in seen:
            raise InvalidArgument(f"two mounts have the same target {mount.target}")
        seen.add(target)


def _check_namespaces(config: ContainerConfig) -> None:
    if config.init and config.pid_mode not in ("", "private"):
        raise InvalidArgument("an init (--init) needs a PID namespace of the container's own: leave one of them out")
    for option, value in (
        ("pid", config.pid_mode),
        ("ipc", config.ipc_mode),
        ("uts", config.uts_mode),
        ("cgroupns", config.cgroupns_mode),
    ):
        if value not in ("", "private", "host") and not value.removeprefix("container:") != value:
            raise InvalidArgument(f"{value!r} is no {option} mode: use 'private', 'host' or 'container:ID'")
    if config.uts_mode == "host" and (config.hostname or config.domainname):
        raise InvalidArgument("a container in the host's UTS namespace (--uts host) cannot have a hostname of its own")
    asked = config.network
    if (asked.mode in ("host", "none") or ":" in asked.mode) and any(
        one != NetworkAttachment(network=asked.mode) for one in asked.attachments
    ):
        raise InvalidArgument(
            f"the network mode {asked.mode!r} goes with no other network, and has no addresses or aliases of its own"
        )
    if config.network.mode == "host" and config.network.ports:
        raise InvalidArgument("ports cannot be published in the host's network: its ports are the host's already")


def _check_sysctls(config: ContainerConfig) -> None:
    for key in config.sysctls:
        name = key.replace("/", ".")
        if name in _IPC_SYSCTLS or name.startswith("fs.mqueue."):
            owner, mode = "ipc", config.ipc_mode
        elif name.startswith("net."):
            owner, mode = "network", config.network.mode
        elif name in _UTS_SYSCTLS:
            owner, mode = "uts", config.uts_mode
        else:
            raise InvalidArgument(f"the sysctl {key} is not part of any namespace: it would change the whole host")
        if mode == "host":
            raise InvalidArgument(f"the sysctl {key} cannot be set in the host's {owner} namespace")


def rlimit_name(ulimit: Ulimit) -> str:
    """ "nofile" as "RLIMIT_NOFILE". Raises InvalidArgument."""
    name = f"RLIMIT_{ulimit.name.upper()}"
    if name not in rlimits.NAMES:
        raise InvalidArgument(
            f"{ulimit.name!r} is no resource limit: known are {', '.join(sorted(map(_short, rlimits.NAMES)))}"
        )
    for value in (ulimit.soft, ulimit.hard):
        if value < -1:
            raise InvalidArgument(f"the limit {ulimit.name}={value} is negative: -1 stands for unlimited")
    if ulimit.hard != -1 and (ulimit.soft == -1 or ulimit.soft > ulimit.hard):
        raise InvalidArgument(f"the limit {ulimit.name}: soft ({ulimit.soft}) is above hard ({ulimit.hard})")
    return name


def _short(rlimit: str) -> str:
    return rlimit.removeprefix("RLIMIT_").lower()


def capability_name(text: str) -> str:
    """ "net_admin" as "CAP_NET_ADMIN", "all" as "ALL". Raises InvalidArgument."""
    word = text.upper().removeprefix("CAP_")
    if word == "ALL":
        return word
    if word not in capabilities.NAMES:
        raise InvalidArgument(f"{text!r} is no capability: give ALL, or a name such as NET_ADMIN (capabilities(7))")
    return f"CAP_{word}"
