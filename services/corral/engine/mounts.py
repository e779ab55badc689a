"""The mounts of a container: the system's, the network's files, and those that were asked for. Pure."""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import PurePosixPath

from corral.api.engine.v1.engine_pb2 import ContainerConfig, VolumeMount
from corral.api.network.v1.network_pb2 import Endpoint
from corral.oci import defaults
from corral.oci.spec import Mount

DEFAULT_SHM_BYTES = 64 << 20
SHM = "/dev/shm"  # noqa: S108 (a mount point)
_HOST_BIND = ("rbind", "nosuid", "noexec", "nodev")


def build_mounts(
    config: ContainerConfig, endpoint: Endpoint, volume_paths: Mapping[str, str], *, fill_volumes: bool = False
) -> tuple[Mount, ...]:
    """All mounts in the order in which they are made; one that was asked for replaces ours at the same place.

    fill_volumes: those that are empty begin with what the image has in their place.
    """
    system = _system_mounts(
        privileged=config.privileged,
        may_write_cgroups=config.writable_cgroups if config.HasField("writable_cgroups") else config.privileged,
        shm_bytes=0 if config.ipc_mode == "host" else config.shm_size_bytes or DEFAULT_SHM_BYTES,
    )
    own = (*system, *_network_files(config, endpoint))
    if not config.mounts:
        return own
    # Those of images, and parts of volumes, the task is told of apart.
    given = [mount for mount in config.mounts if mount.type != VolumeMount.TYPE_IMAGE and not mount.subpath]
    asked = sorted((_asked(mount, volume_paths, fill=fill_volumes) for mount in given), key=_depth)
    targets = {PurePosixPath(mount.target) for mount in config.mounts}
    return (*(mount for mount in own if PurePosixPath(mount.destination) not in targets), *asked)


def asked_binds(config: ContainerConfig, volume_paths: Mapping[str, str]) -> tuple[Mount, ...]:
    """Those volumes and directories of the host that were asked for, in the order in which they are made."""
    kinds = (VolumeMount.TYPE_BIND, VolumeMount.TYPE_VOLUME)
    given = (mount for mount in config.mounts if mount.type in kinds and not mount.subpath)
    asked = (_asked(mount, volume_paths, fill=False) for mount in given)
    return tuple(sorted(asked, key=_depth))


def _depth(mount: Mount) -> tuple[int, str]:
    """Parents first, else a mount on /a would hide the one on /a/b."""
    return len(PurePosixPath(mount.destination).parts), mount.destination


@lru_cache(maxsize=64)
def _system_mounts(*, privileged: bool, may_write_cgroups: bool, shm_bytes: int) -> tuple[Mount, ...]:
    """shm_bytes: 0 for the host's."""
    found = []
    for mount in defaults.MOUNTS:
        match mount.destination:
            case "/dev/shm":  # noqa: S108
                found.append(_shm(shm_bytes, mount))
            case "/sys" if privileged:
                found.append(_writable(mount))
            case "/sys/fs/cgroup" if may_write_cgroups:
                found.append(_writable(mount))
            case _:
                found.append(mount)
    return tuple(found)


def _shm(size: int, default: Mount) -> Mount:
    if not size:  # a mqueue shows its namespace's queues by itself, a tmpfs does not
        return Mount(SHM, "bind", SHM, _HOST_BIND)
    kept = tuple(option for option in default.options if not option.startswith("size="))
    return replace(default, options=(*kept, f"size={size}"))


def _writable(mount: Mount) -> Mount:
    return replace(mount, options=tuple(option for option in mount.options if option != "ro"))


def _network_files(config: ContainerConfig, endpoint: Endpoint) -> list[Mount]:
    """Writable where the root is, as docker mounts them: programs inside edit /etc/hosts."""
    options = ("rbind", "rprivate", *(["ro"] if config.read_only_rootfs else []))
    files = {
        "/etc/resolv.conf": endpoint.resolv_conf_path,
        "/etc/hostname": endpoint.hostname_path,
        "/etc/hosts": endpoint.hosts_path,
    }
    return [Mount(target, "bind", source, options) for target, source in files.items() if source]


def _asked(mount: VolumeMount, volume_paths: Mapping[str, str], *, fill: bool) -> Mount:
    access = ("ro",) if mount.read_only else ()
    if mount.type == VolumeMount.TYPE_TMPFS:
        sizes = (f"size={mount.tmpfs_size_bytes}",) if mount.tmpfs_size_bytes else ()
        mode = (f"mode={mount.tmpfs_mode:o}",) if mount.tmpfs_mode else ()
        options = (*_tmpfs_defaults(mount), *sizes, *mode, *access, *mount.options)
        return Mount(mount.target, "tmpfs", "tmpfs", options)
    source = volume_paths[mount.source] if mount.type == VolumeMount.TYPE_VOLUME else mount.source
    # What the source brings along is read-only too (as docker does from 25 on): a mount in it is easily overlooked.
    below = ("rro",) if mount.read_only else ()
    begun = ("copyup",) if fill and mount.type == VolumeMount.TYPE_VOLUME and not mount.no_copy else ()
    options = ("rbind", mount.propagation or "rprivate", *access, *below, *begun, *mount.options)
    return Mount(mount.target, "bind", source, options)


def _tmpfs_defaults(mount: VolumeMount) -> tuple[str, ...]:
    """As docker's --tmpfs, unless the caller wants the opposite."""
    opposite = {"noexec": "exec", "nosuid": "suid", "nodev": "dev"}
    return tuple(option for option, other in opposite.items() if other not in mount.options)
