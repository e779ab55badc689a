"""Mounts of images: trees that a container has beside its own, under keys that tell whose they are.

    <container>.image-<n>    the n-th mount of its config: a view, or an active tree if it may be written to

They are made with the container, kept over its restarts, and removed with it; what a crash leaves is found by labels.

Volumes of which a part is wanted are mounted in the same way: what lies in them is as hostile.
"""

from collections.abc import Mapping, Sequence

from corral.api.engine.v1.engine_pb2 import ContainerConfig, VolumeMount
from corral.api.images.v1.images_pb2 import PrepareSnapshotRequest, SnapshotRequest
from corral.api.tasks.v1.tasks_pb2 import ImageMount
from corral.api.types.v1.types_pb2 import Mount
from corral.engine.leaves import Leaves, persistently
from corral.engine.records import ContainerRecord
from corral.engine.requests import labels
from corral.rpc.errors import FailedPrecondition, NotFound
from corral.store import failpoint


def keys(config: ContainerConfig, id_: str) -> Mapping[str, VolumeMount]:
    """The mounts of images, by the key of the tree."""
    every = enumerate(config.mounts)
    return {f"{id_}.image-{n}": mount for n, mount in every if mount.type == VolumeMount.TYPE_IMAGE}


async def prepare(leaves: Leaves, record: ContainerRecord) -> None:
    """Make the trees; again is no error. Raises NotFound, FailedPrecondition, CorralError."""
    for key, mount in keys(record.config, record.id).items():
        request = PrepareSnapshotRequest(key=key, image=mount.source, labels=labels(record.namespace, record.id))
        make = leaves.snapshots.Prepare if mount.writable else leaves.snapshots.View
        try:
            prepared = await persistently(lambda make=make, request=request: make(request))  # type: ignore[misc]
        except NotFound as e:  # with a reason of its own: it is not the container's image that is to be fetched
            raise NotFound(f"the mount at {mount.target}: {e.message}; pull it first", reason="NO_MOUNT_IMAGE") from e
        failpoint("engine.create.after_image_tree")
        _single(prepared.mounts, prepared.driver)


async def mounted(leaves: Leaves, record: ContainerRecord) -> list[ImageMount]:
    """What the task is to be told. Raises NotFound if a tree is lost, CorralError."""
    found = []
    for key, mount in keys(record.config, record.id).items():
        request = SnapshotRequest(key=key)
        answer = await persistently(lambda request=request: leaves.snapshots.Mounts(request))  # type: ignore[misc]
        tree = _single(answer.mounts, record.snapshot_driver)
        found.append(ImageMount(target=mount.target, tree=tree, subpath=mount.subpath, writable=mount.writable))
    return found


def parts_of_volumes(config: ContainerConfig, paths: Mapping[str, str]) -> list[ImageMount]:
    """What the task is to be told of them. paths: the volumes' own, by name."""
    return [
        ImageMount(
            target=mount.target,
            tree=Mount(type="bind", source=paths[mount.source], options=["bind", "suid", "dev"]),
            subpath=mount.subpath,
            writable=not mount.read_only,
        )
        for mount in config.mounts
        if mount.type == VolumeMount.TYPE_VOLUME and mount.subpath
    ]


def _single(mounts: Sequence[Mount], driver: str) -> Mount:
    """Raises FailedPrecondition for a driver whose trees take more than one mount."""
    if len(mounts) != 1 or mounts[0].parts:
        raise FailedPrecondition(
            f"the snapshot driver {driver} cannot mount images in containers: use a bind mount of"
            " 'corral image mount' instead, or another driver (overlayfs, btrfs, native)",
            reason="NO_IMAGE_MOUNTS",
        )
    return mounts[0]
