"""What the engine asks of the leaves for one container. Pure translations of its config."""

import re
from collections.abc import Iterable, Mapping, Sequence

from corral.api.cgroups.v1.cgroups_pb2 import CreateCgroupRequest
from corral.api.engine.v1.engine_pb2 import ContainerConfig, NetworkConfig
from corral.api.images.v1.images_pb2 import PrepareSnapshotRequest
from corral.api.network.v1.network_pb2 import AttachRequest, NetworkAttachment, PortMapping
from corral.api.tasks.v1.tasks_pb2 import CreateTaskRequest, LogOptions
from corral.api.types.v1.types_pb2 import DeviceRule, Mount, Resources
from corral.engine.log_subject import log_options
from corral.engine.port_mappings import missing, range_of, superfluous
from corral.engine.records import ContainerRecord
from corral.engine.resolve import default_hostname
from corral.rpc.errors import InvalidArgument

OWNER = "engine"
DEFAULT_NETWORK = "bridge"
ROOT = "0"
"""The user where nobody names one, with the groups that the image's databases give it, as with docker."""
_HOST_NAME = re.compile(r"[a-zA-Z0-9_]([a-zA-Z0-9_-]*[a-zA-Z0-9_])?(\.[a-zA-Z0-9_]([a-zA-Z0-9_-]*[a-zA-Z0-9_])?)*")
"""Not every name of a container is one."""
_PLAIN_MODES = {"host": AttachRequest.MODE_HOST, "none": AttachRequest.MODE_NONE}


def labels(namespace: str, id_: str) -> Mapping[str, str]:
    """On everything that leaves keep for us, so that what no record describes can be found and removed."""
    return {"corral.owner": OWNER, "corral.namespace": namespace, "corral.container": id_}


def snapshot(config: ContainerConfig, namespace: str, id_: str) -> PrepareSnapshotRequest:
    """The container's writable tree on top of its image."""
    return PrepareSnapshotRequest(
        key=id_,
        image=config.image,
        quota_bytes=config.storage_quota_bytes,
        labels=labels(namespace, id_),
    )


def cgroup(
    config: ContainerConfig, devices: Iterable[DeviceRule], namespace: str, id_: str, *, swap_default: bool
) -> CreateCgroupRequest:
    """The container's limits. With swap_default a memory limit alone also limits swap, see with_default_swap."""
    resources = with_default_swap(config.resources) if swap_default else config.resources
    request = CreateCgroupRequest(
        id=id_, parent=config.cgroup_parent, resources=resources, labels=labels(namespace, id_)
    )
    if not request.resources.devices:
        request.resources.devices.extend(devices)
        request.resources.devices.extend(config.device_rules)
    return request


def with_default_swap(resources: Resources) -> Resources:
    """As docker's -m: with a memory limit and none for swap, memory and swap together get twice the limit."""
    memory = resources.memory
    if not memory.HasField("limit_bytes") or memory.limit_bytes <= 0 or memory.HasField("swap_bytes"):
        return resources
    filled = Resources()
    filled.CopyFrom(resources)
    filled.memory.swap_bytes = 2 * memory.limit_bytes
    return filled


def has_default_swap(resources: Resources) -> bool:
    """Whether with_default_swap would add something."""
    return with_default_swap(resources) is not resources


def network(
    config: ContainerConfig, namespace: str, id_: str, *, name: str, host_hostname: str, exposed: Iterable[str] = ()
) -> AttachRequest:
    """The container's place in networks, where it is known by its name. `exposed` are the image's ports, used with
    publish_all.

    Raises InvalidArgument.
    """
    asked = config.network
    hostname = host_hostname if config.uts_mode == "host" else config.hostname or default_hostname(id_)
    request = AttachRequest(
        endpoint_id=id_,
        hostname=hostname,
        domainname=config.domainname,
        dns=asked.dns,
        extra_hosts=asked.extra_hosts,
        ports=asked.ports,
        labels=labels(namespace, id_),
    )
    kind, _, rest = asked.mode.partition(":")
    if kind in _PLAIN_MODES and not rest:
        request.mode = _PLAIN_MODES[kind]
    elif kind == "container" and rest:
        request.mode = AttachRequest.MODE_CONTAINER
        request.container_endpoint = rest
    elif kind == "ns" and rest:
        request.mode = AttachRequest.MODE_PATH
        request.netns_path = rest
    else:
        request.mode = AttachRequest.MODE_NETWORKS
        request.networks.extend(attachments(asked))
        if _HOST_NAME.fullmatch(name):
            for attachment in request.networks:
                if name not in attachment.aliases:
                    attachment.aliases.insert(0, name)
    if asked.publish_all:
        taken = {(port.container_port, port.protocol or "tcp") for port in request.ports}
        request.ports.extend(port for port in map(_port, exposed) if (port.container_port, port.protocol) not in taken)
    return request


def network_again(record: ContainerRecord, *, host_hostname: str, other_ports: bool = False) -> AttachRequest:
    """The same for a container that had it before: the ports that were chosen stay, its name may be another.

    other_ports: those that nobody named are chosen anew.
    """
    request = network(record.config, record.namespace, record.id, name=record.name, host_hostname=host_hostname)
    if record.endpoint is not None:
        named = {port.host_port for port in record.config.network.ports if not port.host_port_last}
        del request.ports[:]
        request.ports.extend(port for port in record.endpoint.ports if port not in superfluous(record))
        request.ports.extend(missing(record))
        for port in request.ports:
            if other_ports and port.host_port not in named:
                asked = range_of(record, port) or PortMapping()
                port.host_port, port.host_port_last = asked.host_port, asked.host_port_last
    return request


def attachments(asked: NetworkConfig) -> Sequence[NetworkAttachment]:
    """The networks to join, copied: those given, the first of which is the mode's. None in a mode of another kind."""
    if asked.mode in _PLAIN_MODES or ":" in asked.mode:
        return ()
    found = [NetworkAttachment() for _ in asked.attachments or (None,)]
    for copy, given in zip(found, asked.attachments, strict=False):
        copy.CopyFrom(given)
    if not found[0].network or asked.mode not in ("", found[0].network):
        found[0].network = asked.mode or DEFAULT_NETWORK
    return found


def _port(text: str) -> PortMapping:
    number, _, protocol = text.partition("/")
    if not (number.isascii() and number.isdigit()) or not 0 < int(number) < 65536:
        raise InvalidArgument(f"the image exposes {text!r}, which is no port: publish ports one by one instead")
    return PortMapping(container_port=int(number), protocol=protocol or "tcp")


def log_of(record: ContainerRecord, path: str) -> LogOptions:
    """Where its log goes, at `path` if it names no place itself. Raises InvalidArgument."""
    log = log_options(record.config, record.id, record.name, record.image_id)
    if not log.path and log.driver != LogOptions.DRIVER_NONE:
        log.path = path
    return log


def task(
    record: ContainerRecord,
    *,
    spec: bytes,
    rootfs: Iterable[Mount],
    log_path: str,
) -> CreateTaskRequest:
    """The running side, but for its cgroup. Its log is kept over restarts, so it is ours to name and to remove.

    Raises InvalidArgument.
    """
    config = record.config
    return CreateTaskRequest(
        id=record.id,
        spec=spec,
        rootfs=rootfs,
        user=config.user or ROOT,
        stdin=config.stdin,
        stdin_once=config.stdin_once,
        timeout=config.timeout if config.HasField("timeout") else None,
        log=log_of(record, log_path),
        console_size=config.console_size if config.HasField("console_size") else None,
        labels=labels(record.namespace, record.id),
    )
