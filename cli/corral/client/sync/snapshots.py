# Generated from corral/client/aio/snapshots.py by cli/generate_sync.py.
"""Snapshots."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from corral.api.images.v1 import images_pb2
from corral.api.types.v1 import types_pb2

if TYPE_CHECKING:
    from corral.client.sync import Client


class Snapshots:
    """The trees of containers, and the layers below them. `key` is an active one's key or a committed one's name."""

    def __init__(self, client: "Client") -> None:
        self._client = client

    def get(self, key: str) -> images_pb2.Snapshot:
        """All facts about one."""
        from corral.api.images.v1 import images_pb2_grpc

        leaf = self._client.leaf("images")
        stub = images_pb2_grpc.SnapshotsStub(leaf.channel)
        return leaf.unary(stub.Get, images_pb2.SnapshotRequest(key=key))

    def list(self) -> Sequence[images_pb2.Snapshot]:
        """The namespace's own, and the layers of all images."""
        from corral.api.images.v1 import images_pb2_grpc

        leaf = self._client.leaf("images")
        stub = images_pb2_grpc.SnapshotsStub(leaf.channel)
        return (leaf.unary(stub.List, images_pb2.ListSnapshotsRequest())).snapshots

    def mounts(self, key: str) -> Sequence[types_pb2.Mount]:
        """How one is mounted."""
        from corral.api.images.v1 import images_pb2_grpc

        leaf = self._client.leaf("images")
        stub = images_pb2_grpc.SnapshotsStub(leaf.channel)
        return (leaf.unary(stub.Mounts, images_pb2.SnapshotRequest(key=key))).mounts

    def usage(self, key: str) -> images_pb2.SnapshotUsage:
        """What one takes on disk beyond what is below it."""
        from corral.api.images.v1 import images_pb2_grpc

        leaf = self._client.leaf("images")
        stub = images_pb2_grpc.SnapshotsStub(leaf.channel)
        return leaf.unary(stub.Usage, images_pb2.SnapshotRequest(key=key))

    def remove(self, key: str) -> None:
        """Removes one that nothing lies on."""
        from corral.api.images.v1 import images_pb2_grpc

        leaf = self._client.leaf("images")
        stub = images_pb2_grpc.SnapshotsStub(leaf.channel)
        leaf.unary(stub.Remove, images_pb2.RemoveSnapshotRequest(key=key, must_exist=True))

    def mount(self, image: str, directory: str, *, writable: bool = False) -> images_pb2.Snapshot:
        """Mounts an image on a directory of the daemon's host; the snapshot that it has for that."""
        from corral.api.images.v1 import images_pb2_grpc

        leaf = self._client.leaf("images")
        stub = images_pb2_grpc.SnapshotsStub(leaf.channel)
        request = images_pb2.MountImageRequest(image=image, directory=directory, writable=writable)
        return leaf.unary(stub.Mount, request)

    def unmount(self, directory: str) -> None:
        """Unmounts an image again, and removes what was written to it."""
        from corral.api.images.v1 import images_pb2_grpc

        leaf = self._client.leaf("images")
        stub = images_pb2_grpc.SnapshotsStub(leaf.channel)
        leaf.unary(stub.Unmount, images_pb2.UnmountImageRequest(directory=directory))

    def drivers(self) -> Sequence[images_pb2.Driver]:
        """The ways to stack layers, and which of them this host can run."""
        from corral.api.images.v1 import images_pb2_grpc

        leaf = self._client.leaf("images")
        stub = images_pb2_grpc.SnapshotsStub(leaf.channel)
        return (leaf.unary(stub.Drivers, images_pb2.DriversRequest())).drivers
