"""An image's defaults under what was asked for: the config of the container as it is kept and shown. Pure."""

from collections.abc import Callable, Iterable
from pathlib import PurePosixPath

from corral.api.engine.v1.engine_pb2 import ContainerConfig, VolumeMount
from corral.api.images.v1.images_pb2 import ImageConfig
from corral.engine.health_rules import resolved as resolved_healthcheck
from corral.engine.options import check_mount_target
from corral.engine.signals import parse_signal
from corral.rpc.errors import InvalidArgument


def resolve(
    asked: ContainerConfig, image: ImageConfig, *, id_: str, new_volume_name: Callable[[], str]
) -> ContainerConfig:
    """`asked` with every default filled in that the image, or docker's rules, give.

    Raises InvalidArgument if neither names a program.
    """
    config = ContainerConfig()
    config.CopyFrom(asked)
    entrypoint, args = command(asked, image)
    config.ClearField("entrypoint")
    config.ClearField("args")
    config.entrypoint.extend(entrypoint)
    config.args.extend(args)
    config.ClearField("env")
    config.env.extend(lay_env(image.env, asked.env))
    config.user = asked.user or image.user
    config.working_dir = asked.working_dir or image.working_dir or "/"
    config.stop_signal = asked.stop_signal or _stop_signal(image)
    config.ClearField("healthcheck")
    if (check := resolved_healthcheck(asked.healthcheck, image.healthcheck)).test:
        config.healthcheck.CopyFrom(check)
    if asked.uts_mode != "host":
        config.hostname = asked.hostname or default_hostname(id_)
    for key, value in image.labels.items():
        if key not in asked.labels:
            config.labels[key] = value
    covered = {PurePosixPath(mount.target) for mount in asked.mounts}
    for path in image.volumes:
        check_mount_target(path)
        if PurePosixPath(path) not in covered:
            config.mounts.add(type=VolumeMount.TYPE_VOLUME, target=path)
    for mount in config.mounts:
        if mount.type == VolumeMount.TYPE_VOLUME and not mount.source:
            mount.source = new_volume_name()
    return config


def _stop_signal(image: ImageConfig) -> str:
    """The image's, if there is such a signal: else its containers could not be stopped."""
    if not image.stop_signal:
        return ""
    try:
        parse_signal(image.stop_signal)
    except InvalidArgument:
        return ""
    return image.stop_signal


def default_hostname(id_: str) -> str:
    """As docker: the short id. What no hostname may contain or begin with is replaced."""
    return id_[:12].replace("_", "-").strip("-.") or "corral"


def command(asked: ContainerConfig, image: ImageConfig) -> tuple[list[str], list[str]]:
    """Entrypoint and arguments. An entrypoint that was asked for voids the image's cmd together with its entrypoint.

    Source: docker run reference, "ENTRYPOINT (default command to execute at runtime)".
    """
    entrypoint, args = list(asked.entrypoint), list(asked.args)
    if not entrypoint:
        entrypoint = list(image.entrypoint)
        args = args or list(image.cmd)
    elif entrypoint == [""]:
        entrypoint = []
    words = entrypoint + args
    if not words or not words[0]:
        raise InvalidArgument("there is nothing to run: the image names no command, so give one", reason="NO_COMMAND")
    return entrypoint, args


def lay_env(*layers: Iterable[str]) -> list[str]:
    """Environments, later over earlier, each name once, where it came first. "NAME" without "=" unsets it."""
    values: dict[str, str | None] = {}
    for layer in layers:
        for assignment in layer:
            name, assigned, value = assignment.partition("=")
            values[name] = value if assigned else None
    return [f"{name}={value}" for name, value in values.items() if value is not None]
