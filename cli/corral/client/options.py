"""What a container shall be, from the words people use: "64m", "/src:/dst:ro", "8080:80/udp".

Pure functions from strings to messages; both clients and the command line build containers through
`container_config`. Every ValueError names the option's value and says what is understood.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Unpack

from corral.api.engine.v1 import engine_pb2 as pb
from corral.api.images.v1 import images_pb2
from corral.api.types.v1 import types_pb2
from corral.client.log_options import log_options
from corral.client.network_options import NetworkOptions, network_config, rates_bps
from corral.client.quantities import duration_s, size_bytes
from corral.client.resource_options import ResourceOptions, device_rule, resources
from corral.client.secret_options import secret_mount

_PROPAGATIONS = frozenset({"rprivate", "private", "rshared", "shared", "rslave", "slave"})
_HEALTH_ACTIONS = {
    "none": pb.ContainerConfig.HEALTH_ACTION_NONE,
    "kill": pb.ContainerConfig.HEALTH_ACTION_KILL,
    "restart": pb.ContainerConfig.HEALTH_ACTION_RESTART,
    "stop": pb.ContainerConfig.HEALTH_ACTION_STOP,
}
_RESTART_MODES = {
    "no": pb.RestartPolicy.MODE_NO,
    "always": pb.RestartPolicy.MODE_ALWAYS,
    "on-failure": pb.RestartPolicy.MODE_ON_FAILURE,
    "unless-stopped": pb.RestartPolicy.MODE_UNLESS_STOPPED,
}


class UpdateOptions(ResourceOptions, total=False):
    """What of a container can be changed later; each as in ContainerOptions."""

    restart: str
    labels: Mapping[str, str]
    net_rate: str  # "0": no limit any more


class ContainerOptions(ResourceOptions, NetworkOptions, total=False):
    """Everything about a container but its image and arguments. Absent: the image's default, then corral's."""

    entrypoint: Sequence[str] | str | None  # replaces the image's; "" resets it
    env: Mapping[str, str] | Sequence[str]
    working_dir: str
    user: str  # "name", "uid", "name:group", "uid:gid"
    group_add: Sequence[str]
    hostname: str
    domainname: str
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    terminal: bool
    stdin: bool
    stdin_once: bool
    console_size: tuple[int, int]  # columns, rows
    volumes: Sequence[str]  # "[name or path:]target[:ro,…]" as docker's -v
    mounts: Sequence[str]  # "type=bind,source=…,target=…" as docker's --mount
    tmpfs: Sequence[str]  # "/path[:size=64m,mode=1777]"
    read_only: bool
    cap_add: Sequence[str]
    cap_drop: Sequence[str]
    privileged: bool
    security: Sequence[str]  # "seccomp=unconfined", "no-new-privileges[=false]", "apparmor=…", "writable-cgroups=true"
    sysctls: Mapping[str, str]
    ulimits: Sequence[str]  # "nofile=1024:2048"
    devices: Sequence[str]
    device_cgroup_rules: Sequence[str]  # "c 42:* rmw": accesses besides, to what is made inside
    shm_size: int | str
    # "size=10g": no more than that is written in the container's own tree.
    storage_options: Iterable[str]
    stop_signal: str
    stop_timeout_s: float
    secrets: Sequence[str]  # "name", "name,target=…,uid=…,gid=…,mode=…,type=mount|env"
    timeout: float | str  # seconds, or "1m30s": killed when it has run so long
    auto_remove: bool
    restart: str  # "no", "always", "on-failure[:N]", "unless-stopped"
    init: bool
    pid: str
    ipc: str
    uts: str
    cgroupns: str
    oom_score_adj: int
    cgroup_parent: str
    health_cmd: str  # a line for the image's shell; "none" switches the image's health check off
    # Seconds, or "1m30s".
    health_interval: float | str
    health_timeout: float | str
    health_start_period: float | str
    health_start_interval: float | str
    health_retries: int
    health_on_failure: str  # "none", "kill", "restart", "stop"
    log_driver: str  # "json-file", "cri", "none", "syslog", "journald", "binary:///path/of/program?argument=value"
    log_options: Mapping[str, str]  # in docker's words


def container_config(image: str, args: Sequence[str] = (), **options: object) -> pb.ContainerConfig:
    """The message for these options. Raises ValueError for what is not understood, TypeError for an unknown option."""
    unknown = options.keys() - ContainerOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown option {', '.join(sorted(unknown))}")
    o: ContainerOptions = options  # type: ignore[assignment]  # its keys were just checked
    if isinstance(args, str):
        raise TypeError(f'args must be a sequence of strings such as ["sh", "-c", {args!r}], not one string')
    config = pb.ContainerConfig(
        image=image,
        args=args,
        entrypoint=_entrypoint(o.get("entrypoint")),
        env=environment(o.get("env", ())),
        working_dir=o.get("working_dir", ""),
        user=o.get("user", ""),
        group_add=o.get("group_add", ()),
        hostname=o.get("hostname", ""),
        domainname=o.get("domainname", ""),
        labels=o.get("labels", {}),
        annotations=o.get("annotations", {}),
        terminal=o.get("terminal", False),
        stdin=o.get("stdin", False),
        stdin_once=o.get("stdin_once", False),
        stop_signal=o.get("stop_signal", ""),
        auto_remove=o.get("auto_remove", False),
        init=o.get("init", False),
        read_only_rootfs=o.get("read_only", False),
        shm_size_bytes=size_bytes(o.get("shm_size", 0)),
        storage_quota_bytes=_storage_quota(o.get("storage_options", ())),
        cgroup_parent=o.get("cgroup_parent", ""),
        cap_add=o.get("cap_add", ()),
        cap_drop=o.get("cap_drop", ()),
        privileged=o.get("privileged", False),
        sysctls=o.get("sysctls", {}),
        devices=o.get("devices", ()),
        device_rules=[device_rule(r) for r in o.get("device_cgroup_rules", ())],
        pid_mode=o.get("pid", ""),
        ipc_mode=o.get("ipc", ""),
        uts_mode=o.get("uts", ""),
        cgroupns_mode=o.get("cgroupns", ""),
        mounts=[
            *(volume(v) for v in o.get("volumes", ())),
            *(mount(m) for m in o.get("mounts", ())),
            *(tmpfs(t) for t in o.get("tmpfs", ())),
        ],
        ulimits=[ulimit(u) for u in o.get("ulimits", ())],
        resources=resources(o),
        network=network_config(o),
        secrets=[secret_mount(s) for s in o.get("secrets", ())],
        log=log_options(o.get("log_driver", ""), o.get("log_options", {})),
    )
    if size := o.get("console_size"):
        config.console_size.CopyFrom(types_pb2.WindowSize(width=size[0], height=size[1]))
    if (grace := o.get("stop_timeout_s")) is not None:
        config.stop_timeout.FromNanoseconds(round(grace * 1e9))
    if timeout := duration_s(o.get("timeout") or 0):
        config.timeout.FromNanoseconds(round(timeout * 1e9))
    if (score := o.get("oom_score_adj")) is not None:
        config.oom_score_adj = score
    if policy := o.get("restart"):
        config.restart.CopyFrom(restart_policy(policy))
    _apply_health(config, o)
    _apply_security(config, o.get("security", ()))
    return config


def update_request(container: str, **options: Unpack[UpdateOptions]) -> pb.UpdateContainerRequest:
    """The message for these changes. Raises ValueError for what is not understood."""
    limits = resources(options)
    request = pb.UpdateContainerRequest(container=container, resources=limits, labels=options.get("labels", {}))
    if policy := options.get("restart"):
        request.restart.CopyFrom(restart_policy(policy))
    if rate := options.get("net_rate"):
        request.network_rate.receive_bps, request.network_rate.send_bps = rates_bps(rate)
        request.network_rate.SetInParent()
    return request


def _apply_health(config: pb.ContainerConfig, o: ContainerOptions) -> None:
    check = config.healthcheck
    if command := o.get("health_cmd", ""):
        check.test.extend(["NONE"] if command == "none" else ["CMD-SHELL", command])
    times = {
        "interval": o.get("health_interval"),
        "timeout": o.get("health_timeout"),
        "start_period": o.get("health_start_period"),
        "start_interval": o.get("health_start_interval"),
    }
    for name, value in times.items():
        if value:
            getattr(check, name).FromNanoseconds(round(duration_s(value) * 1e9))
    if not 0 <= (retries := o.get("health_retries", 0)) < 1 << 31:
        raise ValueError(f"health retries {retries} is not understood: give a number of failures, 1 or more")
    check.retries = retries
    if action := o.get("health_on_failure"):
        if action not in _HEALTH_ACTIONS:
            raise ValueError(f"{action!r} is nothing to do about an unhealthy container: {', '.join(_HEALTH_ACTIONS)}")
        config.health_on_failure = _HEALTH_ACTIONS[action]


def _storage_quota(options: Iterable[str]) -> int:
    quota = 0
    for option in options:
        key, _, value = option.partition("=")
        if key != "size" or not value:
            raise ValueError(f"storage option {option!r} is not understood: give size=10g")
        quota = size_bytes(value)
    return quota


def environment(env: Mapping[str, str] | Iterable[str]) -> list[str]:
    """NAME=value lines. Raises ValueError for a name that is empty or missing."""
    lines = [f"{k}={v}" for k, v in env.items()] if isinstance(env, Mapping) else list(env)
    for line in lines:
        if "=" not in line or line.startswith("="):
            raise ValueError(f"environment {line!r} is not understood: give NAME=value")
    return lines


def volume(text: str) -> pb.VolumeMount:
    """A bind mount or volume in docker's -v form: [SOURCE:]TARGET[:OPTIONS]."""
    parts = text.split(":")
    if len(parts) > 3 or not all(parts):
        raise ValueError(f"volume {text!r} is not understood: give SOURCE:TARGET[:ro]")
    source, target = (parts[0], parts[1]) if len(parts) > 1 else ("", parts[0])
    options = parts[2].split(",") if len(parts) == 3 else []
    if not target.startswith("/"):
        raise ValueError(f"volume {text!r}: the target {target!r} must be an absolute path")
    is_path = source.startswith(("/", ".", "~"))
    result = pb.VolumeMount(
        type=pb.VolumeMount.TYPE_BIND if is_path else pb.VolumeMount.TYPE_VOLUME,
        source=str(Path(source).expanduser().absolute()) if is_path else source,
        target=target,
        create_source=is_path,
    )
    _apply_mount_options(result, options, text)
    return result


def mount(text: str) -> pb.VolumeMount:
    """A mount in docker's --mount form: type=bind,source=/a,target=/b[,readonly]."""
    types = {
        "bind": pb.VolumeMount.TYPE_BIND,
        "volume": pb.VolumeMount.TYPE_VOLUME,
        "tmpfs": pb.VolumeMount.TYPE_TMPFS,
        "image": pb.VolumeMount.TYPE_IMAGE,
    }
    result = pb.VolumeMount(type=pb.VolumeMount.TYPE_VOLUME)
    for part in text.split(","):
        key, _, value = part.partition("=")
        match key:
            case "type" if value in types:
                result.type = types[value]
            case "source" | "src":
                result.source = value
            case "target" | "destination" | "dst":
                result.target = value
            case "readonly" | "ro":
                result.read_only = value in ("", "true", "1")
            case "bind-propagation":
                _apply_mount_options(result, [value], text)
            case "tmpfs-size":
                result.tmpfs_size_bytes = size_bytes(value)
            case "tmpfs-mode":
                result.tmpfs_mode = int(value, 8)
            case "volume-nocopy":
                result.no_copy = value in ("", "true", "1")
            case "rw" | "readwrite":
                result.writable = value in ("", "true", "1")
            case "subpath" | "image-subpath" | "volume-subpath":
                result.subpath = value
            case _:
                raise ValueError(
                    f"mount {text!r}: {part!r} is not understood; known are type=bind|volume|tmpfs|image, source, "
                    "target, readonly, bind-propagation, tmpfs-size, tmpfs-mode, volume-nocopy, volume-subpath, and of "
                    "an image rw, subpath"
                )
    if result.type != pb.VolumeMount.TYPE_IMAGE:
        if result.writable:  # as all others are, unless they are read-only
            result.read_only = result.writable = False
    elif not result.writable:
        result.read_only = True
    if not result.target.startswith("/"):
        raise ValueError(f"mount {text!r} needs target= with an absolute path")
    if result.type == pb.VolumeMount.TYPE_BIND and not result.source.startswith("/"):
        raise ValueError(f"mount {text!r} needs source= with an absolute path")
    return result


def tmpfs(text: str) -> pb.VolumeMount:
    """A tmpfs in docker's --tmpfs form: TARGET[:size=64m,mode=1777,noexec]."""
    target, _, rest = text.partition(":")
    if not target.startswith("/"):
        raise ValueError(f"tmpfs {text!r}: the target must be an absolute path")
    result = pb.VolumeMount(type=pb.VolumeMount.TYPE_TMPFS, target=target)
    for option in filter(None, rest.split(",")):
        key, _, value = option.partition("=")
        if key == "size":
            result.tmpfs_size_bytes = size_bytes(value)
        elif key == "mode":
            result.tmpfs_mode = int(value, 8)
        elif key in ("ro", "rw"):
            result.read_only = key == "ro"
        else:
            result.options.append(option)
    return result


def ulimit(text: str) -> pb.Ulimit:
    """A limit in docker's --ulimit form: NAME=SOFT[:HARD]."""
    name, _, values = text.partition("=")
    soft, _, hard = values.partition(":")
    try:
        return pb.Ulimit(name=name, soft=int(soft), hard=int(hard or soft))
    except ValueError:
        raise ValueError(f"ulimit {text!r} is not understood: give NAME=SOFT[:HARD]") from None


def restart_policy(text: str) -> pb.RestartPolicy:
    """no, always, unless-stopped, on-failure or on-failure:N."""
    mode, _, retries = text.partition(":")
    if mode not in _RESTART_MODES or (retries and (mode != "on-failure" or not retries.isdigit())):
        raise ValueError(
            f"restart policy {text!r} is not understood: give no, always, unless-stopped or on-failure[:N]"
        )
    return pb.RestartPolicy(mode=_RESTART_MODES[mode], max_retries=int(retries or 0))


def image_config(
    *,
    entrypoint: Sequence[str] = (),
    cmd: Sequence[str] = (),
    env: Sequence[str] = (),
    working_dir: str = "",
    user: str = "",
    stop_signal: str = "",
    labels: Mapping[str, str] | None = None,
) -> images_pb2.ImageConfig:
    """The config of an image made from a plain root file system."""
    return images_pb2.ImageConfig(
        entrypoint=entrypoint,
        cmd=cmd,
        env=environment(env),
        working_dir=working_dir,
        user=user,
        stop_signal=stop_signal,
        labels=labels or {},
    )


def _entrypoint(value: Sequence[str] | str | None) -> Sequence[str]:
    if value is None:
        return ()
    return [value] if isinstance(value, str) else value


def _apply_mount_options(result: pb.VolumeMount, options: Iterable[str], text: str) -> None:
    for option in options:
        if option in ("ro", "rw"):
            result.read_only = option == "ro"
        elif option in _PROPAGATIONS:
            result.propagation = option
        elif option == "nocopy":
            result.no_copy = True
        elif option not in ("z", "Z"):  # SELinux relabelling: nothing to do where SELinux is off
            raise ValueError(f"volume {text!r}: option {option!r} is not known")


def _apply_security(config: pb.ContainerConfig, options: Iterable[str]) -> None:
    for option in options:
        key, _, value = option.partition("=" if "=" in option else ":")
        if key == "seccomp" and value == "unconfined":
            config.seccomp_profile = value
        elif key == "seccomp" and value:
            config.seccomp_profile = Path(value).read_text(encoding="utf-8")
        elif key == "apparmor" and value:
            config.apparmor_profile = value
        elif key == "no-new-privileges" and value in ("", "true", "false"):
            config.no_new_privileges = value != "false"
        elif key == "writable-cgroups" and value in ("true", "false"):
            config.writable_cgroups = value == "true"
        else:
            raise ValueError(
                f"security option {option!r} is not known: give seccomp=unconfined, seccomp=FILE, apparmor=PROFILE, "
                "no-new-privileges[=false] or writable-cgroups=true"
            )


def platform_message(text: str) -> types_pb2.Platform | None:
    """ "linux/arm64/v8", or only "arm64"; None for nothing, which means this host's."""
    if not text:
        return None
    parts = text.split("/")
    if len(parts) == 1:
        parts = ["linux", *parts]
    if len(parts) > 3 or not all(parts):
        raise ValueError(f"platform {text!r} is not understood: give OS/ARCHITECTURE[/VARIANT], such as linux/arm64")
    return types_pb2.Platform(os=parts[0], architecture=parts[1], variant="".join(parts[2:]))
