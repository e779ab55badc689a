"""Between the leaf's own values and the messages on the wire."""

from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from corral.api.images.v1 import images_pb2 as pb
from corral.api.types.v1 import types_pb2 as types
from corral.images import model
from corral.images.accounting import DiskUsage, ImageUsage, StoreUsage
from corral.images.blobs import BlobRecord
from corral.images.collector import Collected
from corral.images.details import Details
from corral.images.images import ImageView
from corral.images.leases import Lease
from corral.images.platforms import host_platform
from corral.images.reference import parse_reference
from corral.images.registry.credentials import Credentials
from corral.images.snapshotter import Mount, Usage
from corral.images.trees import TreeRecord
from corral.rpc.errors import InvalidArgument


def timestamp(time_ns: int) -> Timestamp:
    return Timestamp(seconds=time_ns // 10**9, nanos=time_ns % 10**9)


def time_ns(stamp: Timestamp) -> int:
    return stamp.seconds * 10**9 + stamp.nanos


def _from_datetime(time: datetime | None) -> Timestamp | None:
    if time is None:
        return None
    stamp = Timestamp()
    stamp.FromDatetime(time)
    return stamp


def duration_ns(duration: Duration) -> int:
    return duration.seconds * 10**9 + duration.nanos


def duration(time_ns: int) -> Duration:
    return Duration(seconds=time_ns // 10**9, nanos=time_ns % 10**9)


def from_platform(platform: model.Platform) -> types.Platform:
    return types.Platform(
        os=platform.os,
        architecture=platform.architecture,
        variant=platform.variant,
        os_version=platform.os_version,
        os_features=platform.os_features,
    )


def to_platform(message: types.Platform) -> model.Platform:
    """What is left out is as this host has it."""
    if not message.architecture:
        return host_platform()
    return model.Platform(
        message.os or "linux",
        message.architecture,
        message.variant,
        message.os_version,
        tuple(message.os_features),
    )


def to_credentials(message: pb.RegistryAuth) -> Credentials:
    """Raises InvalidArgument for what cannot be sent."""
    if ":" in message.username:
        raise InvalidArgument("a user name at a registry has no colon", reason="BAD_CREDENTIALS")
    if not (message.identity_token + message.registry_token).isascii():
        raise InvalidArgument("a token at a registry is made of ASCII characters", reason="BAD_CREDENTIALS")
    return Credentials(message.username, message.password, message.identity_token, message.registry_token)


def from_descriptor(descriptor: model.Descriptor) -> types.Descriptor:
    return types.Descriptor(
        media_type=descriptor.media_type,
        digest=descriptor.digest,
        size_bytes=descriptor.size_bytes,
        annotations=descriptor.annotations,
        platform=from_platform(descriptor.platform) if descriptor.platform else None,
        artifact_type=descriptor.artifact_type,
    )


def from_config(config: model.ImageConfig) -> pb.ImageConfig:
    return pb.ImageConfig(
        user=config.user,
        env=config.env,
        entrypoint=config.entrypoint,
        cmd=config.cmd,
        working_dir=config.working_dir,
        volumes=config.volumes,
        exposed_ports=config.exposed_ports,
        stop_signal=config.stop_signal,
        labels=config.labels,
        healthcheck=_from_healthcheck(config.healthcheck) if config.healthcheck else None,
    )


def _from_healthcheck(check: model.Healthcheck) -> pb.Healthcheck:
    return pb.Healthcheck(
        test=check.test,
        interval=duration(check.interval_ns) if check.interval_ns else None,
        timeout=duration(check.timeout_ns) if check.timeout_ns else None,
        start_period=duration(check.start_period_ns) if check.start_period_ns else None,
        start_interval=duration(check.start_interval_ns) if check.start_interval_ns else None,
        retries=check.retries,
    )


def to_config(message: pb.ImageConfig) -> model.ImageConfig:
    """Raises InvalidArgument."""
    for variable in message.env:
        if "=" not in variable.lstrip("="):
            raise InvalidArgument(f"environment {variable[:100]!r} is not of the form NAME=value")
    return model.ImageConfig(
        user=message.user,
        env=tuple(message.env),
        entrypoint=tuple(message.entrypoint),
        cmd=tuple(message.cmd),
        working_dir=message.working_dir,
        volumes=tuple(message.volumes),
        exposed_ports=tuple(message.exposed_ports),
        stop_signal=message.stop_signal,
        labels=dict(message.labels),
        healthcheck=_to_healthcheck(message.healthcheck) if message.HasField("healthcheck") else None,
    )


def _to_healthcheck(message: pb.Healthcheck) -> model.Healthcheck:
    return model.Healthcheck(
        test=tuple(message.test),
        interval_ns=duration_ns(message.interval),
        timeout_ns=duration_ns(message.timeout),
        start_period_ns=duration_ns(message.start_period),
        start_interval_ns=duration_ns(message.start_interval),
        retries=message.retries,
    )


def from_image(view: ImageView) -> pb.Image:
    record = view.record
    message = pb.Image()
    message.CopyFrom(_from_details(view.details, view.layer_bytes))
    message.name = record.name
    message.id = record.image_id
    message.target.CopyFrom(from_descriptor(record.target))
    message.manifest.CopyFrom(from_descriptor(record.manifest))
    message.chain_id = record.chain_id
    message.updated_at.CopyFrom(timestamp(record.updated_ns))
    message.names.extend(view.names)
    message.familiar_name = parse_reference(record.name).familiar if record.name else ""
    return message


class _Identity:
    """A key for the cache below: details are compared by being the same object, which is kept alive here."""

    __slots__ = ("details", "layer_bytes")

    def __init__(self, details: Details, layer_bytes: tuple[int, ...]) -> None:
        self.details = details
        self.layer_bytes = layer_bytes

    def __hash__(self) -> int:
        return hash((id(self.details), self.layer_bytes))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.details is other.details and self.layer_bytes == other.layer_bytes


def _from_details(details: Details, layer_bytes: tuple[int, ...]) -> pb.Image:
    return _built(_Identity(details, layer_bytes))


@lru_cache(maxsize=256)
def _built(key: _Identity) -> pb.Image:
    """The part that is the same under every name; not to be changed by callers."""
    details, sizes = key.details, key.layer_bytes
    config = details.config
    return pb.Image(
        config=from_config(config.config),
        layers=_layers(details, sizes),
        size_bytes=sum(sizes),
        created_at=_from_datetime(config.created),
        platform=from_platform(config.platform),
        history=[
            pb.History(
                created_at=_from_datetime(entry.created),
                created_by=entry.created_by,
                author=entry.author,
                comment=entry.comment,
                empty_layer=entry.empty_layer,
            )
            for entry in config.history
        ],
    )


def _layers(details: Details, sizes: Sequence[int]) -> list[pb.Layer]:
    sizes = sizes or (0,) * len(details.chain)
    rows = zip(details.config.diff_ids, details.manifest.layers, details.chain, sizes, strict=True)
    return [
        pb.Layer(diff_id=diff_id, blob=from_descriptor(blob), chain_id=chain_id, size_bytes=size)
        for diff_id, blob, chain_id, size in rows
    ]


def from_blob(blob: BlobRecord) -> pb.BlobInfo:
    return pb.BlobInfo(digest=blob.digest, size_bytes=blob.size_bytes, created_at=timestamp(blob.created_ns))


def from_mount(mount: Mount) -> types.Mount:
    parts = map(from_mount, mount.parts)
    return types.Mount(type=mount.type, source=mount.source, target=mount.target, options=mount.options, parts=parts)


def from_tree(record: TreeRecord, parent_key: str) -> pb.Snapshot:
    return pb.Snapshot(
        key=record.key,
        kind=pb.Snapshot.Kind.ValueType(record.kind),
        parent=parent_key,
        driver=record.driver,
        created_at=timestamp(record.created_ns),
        size_bytes=record.size_bytes,
        labels=record.labels,
        quota_bytes=record.quota_bytes,
    )


def from_usage(usage: Usage, below_bytes: int) -> pb.SnapshotUsage:
    return pb.SnapshotUsage(size_bytes=usage.size_bytes, inodes=usage.inodes, below_bytes=below_bytes)


_CHANGES = {
    "A": pb.SnapshotChange.KIND_ADDED,
    "C": pb.SnapshotChange.KIND_CHANGED,
    "D": pb.SnapshotChange.KIND_DELETED,
}


def from_change(kind: str, path: str) -> pb.SnapshotChange:
    text = path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return pb.SnapshotChange(kind=_CHANGES[kind], path=f"/{text}")


def from_lease(lease: Lease) -> pb.Lease:
    return pb.Lease(
        id=lease.id,
        created_at=timestamp(lease.created_ns),
        expires_at=timestamp(lease.expires_ns),
        labels=lease.labels,
        resources=lease.resources,
    )


def from_collected(collected: Collected) -> tuple[Sequence[str], int]:
    return collected.names, collected.reclaimed_bytes


def from_disk_usage(usage: DiskUsage) -> pb.DiskUsageResponse:
    return pb.DiskUsageResponse(
        images=[_from_image_usage(image) for image in usage.images],
        images_size_bytes=usage.images_size_bytes,
        images_reclaimable_bytes=usage.images_reclaimable_bytes,
        blobs=_from_store_usage(usage.blobs),
        layers=_from_store_usage(usage.layers),
        partials=_from_store_usage(usage.partials),
        snapshots=[
            pb.TreeUsage(
                key=tree.record.key, kind=pb.Snapshot.Kind.ValueType(tree.record.kind), size_bytes=tree.size_bytes
            )
            for tree in usage.snapshots
        ],
    )


def _from_image_usage(image: ImageUsage) -> pb.ImageUsage:
    return pb.ImageUsage(
        id=image.image_id,
        names=[parse_reference(name).familiar for name in image.names],
        created_at=timestamp(image.created_ns) if image.created_ns else None,
        used_at=timestamp(image.used_ns),
        size_bytes=image.size_bytes,
        shared_bytes=image.shared_bytes,
        snapshots=image.snapshots,
    )


def _from_store_usage(usage: StoreUsage) -> pb.StoreUsage:
    return pb.StoreUsage(
        total=usage.total,
        active=usage.active,
        size_bytes=usage.size_bytes,
        reclaimable_bytes=usage.reclaimable_bytes,
    )
