"""Images: here, in archives, and in registries."""

from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from google.protobuf.timestamp_pb2 import Timestamp

from corral.api.images.v1 import images_pb2
from corral.api.types.v1 import types_pb2
from corral.client.credentials import async_registry_auth
from corral.client.fetching import Pull, is_to_be_exchanged, may_fetch
from corral.client.files import whole_file
from corral.client.options import platform_message
from corral.rpc import errors

if TYPE_CHECKING:
    from corral.client.aio import AsyncClient

_CHUNK = 256 * 1024


class Images:
    """Images. `name` is a name, an id, or an unambiguous prefix of an id."""

    def __init__(self, client: "AsyncClient") -> None:
        self._client = client

    async def load(self, archive: str | Path, *, name: str = "") -> Sequence[images_pb2.Image]:
        """Imports an archive file (docker, OCI, or a plain root file system, which needs a `name`)."""
        path = Path(archive)
        header = images_pb2.ImportHeader(name=name, total_bytes=path.stat().st_size)  # noqa: ASYNC240 - one stat
        images: Sequence[images_pb2.Image] = ()
        async for part in self.load_stream(header, _file_chunks(path)):
            if part.HasField("result"):
                images = part.result.images
        return images

    async def load_stream(
        self, header: images_pb2.ImportHeader, chunks: Iterable[bytes]
    ) -> AsyncIterator[images_pb2.ImportResponse]:
        """Imports an archive from its bytes; progress comes back, and last the images."""
        from corral.api.images.v1 import images_pb2_grpc

        leaf = await self._client.leaf("images")
        stub = images_pb2_grpc.ImagesStub(leaf.channel)
        async for part in leaf.exchange(stub.Import, _import_requests(header, chunks)):
            yield part

    async def save(
        self, names: Sequence[str], archive: str | Path, *, form: str = "docker", platform: str = ""
    ) -> None:
        """Writes images to an archive file. `form` is docker (OCI readers take it too) or oci."""
        with whole_file(Path(archive)) as file:
            async for chunk in self.save_stream(names, form=form, platform=platform):
                file.write(chunk)

    async def save_stream(
        self, names: Sequence[str], *, form: str = "docker", platform: str = ""
    ) -> AsyncIterator[bytes]:
        """The bytes of an archive of images, as `save` writes it. Without a platform goes all that is here."""
        from corral.api.images.v1 import images_pb2_grpc

        request = images_pb2.ExportRequest(
            names=names,
            format=images_pb2.ImportHeader.Format.Value(f"FORMAT_{form.upper()}_ARCHIVE"),
            platform=platform_message(platform),
        )
        leaf = await self._client.leaf("images")
        stub = images_pb2_grpc.ImagesStub(leaf.channel)
        async for part in leaf.stream(stub.Export, request):
            yield part.data

    async def get(self, name: str) -> images_pb2.Image:
        """All facts about one image."""
        from corral.api.images.v1 import images_pb2_grpc

        leaf = await self._client.leaf("images")
        stub = images_pb2_grpc.ImagesStub(leaf.channel)
        return await leaf.unary(stub.Get, images_pb2.GetImageRequest(name=name))

    async def list(self, pattern: str = "") -> Sequence[images_pb2.Image]:
        """Images whose name fits a shell pattern; all without one."""
        from corral.api.images.v1 import images_pb2_grpc

        leaf = await self._client.leaf("images")
        stub = images_pb2_grpc.ImagesStub(leaf.channel)
        answer = await leaf.unary(stub.List, images_pb2.ListImagesRequest(pattern=pattern))
        return answer.images

    async def lacks(self, name: str, *, platform: str = "", pull: Pull = "missing") -> bool:
        """Whether an image must be fetched before a container is made of it: it is not here, or for another platform.

        Raises NotFound if it must, and may not.
        """
        try:
            image = await self.get(name)
        except errors.NotFound as error:
            if may_fetch(error, name, pull):
                return True
            raise
        return is_to_be_exchanged(image, name, platform, pull)

    async def pull(
        self,
        name: str,
        *,
        platform: str = "",
        all_platforms: bool = False,
        auth: images_pb2.RegistryAuth | None = None,
        insecure: bool = False,
        keep_blobs: bool | None = None,
    ) -> images_pb2.Image:
        """Fetches an image from its registry. `auth` is by default what `corral login` or docker's has kept.

        keep_blobs=False: blobs of unpacked layers are dropped that can be made again; None: as the daemon is set.
        """
        image = images_pb2.Image()
        async for part in self.pull_stream(
            name,
            platform=platform,
            all_platforms=all_platforms,
            auth=auth,
            insecure=insecure,
            keep_blobs=keep_blobs,
        ):
            image = part.image
        return image

    async def pull_stream(
        self,
        name: str,
        *,
        platform: str = "",
        all_platforms: bool = False,
        auth: images_pb2.RegistryAuth | None = None,
        insecure: bool = False,
        keep_blobs: bool | None = None,
    ) -> AsyncIterator[images_pb2.PullResponse]:
        """As `pull`; progress comes, and last the image."""
        from corral.api.images.v1 import images_pb2_grpc

        request = images_pb2.PullRequest(
            name=name,
            platform=platform_message(platform),
            all_platforms=all_platforms,
            auth=auth or await async_registry_auth(name),
            insecure=insecure,
            keep_blobs=keep_blobs,
        )
        leaf = await self._client.leaf("images")
        stub = images_pb2_grpc.ImagesStub(leaf.channel)
        async for part in leaf.stream(stub.Pull, request, resume=lambda: request):
            yield part

    async def push(
        self,
        name: str,
        destination: str = "",
        *,
        platform: str = "",
        all_platforms: bool = False,
        auth: images_pb2.RegistryAuth | None = None,
        insecure: bool = False,
    ) -> types_pb2.Descriptor:
        """Brings an image to a registry; returns what its name there points at. `auth` as for `pull`."""
        pushed = types_pb2.Descriptor()
        async for part in self.push_stream(
            name, destination, platform=platform, all_platforms=all_platforms, auth=auth, insecure=insecure
        ):
            pushed = part.pushed
        return pushed

    async def push_stream(
        self,
        name: str,
        destination: str = "",
        *,
        platform: str = "",
        all_platforms: bool = False,
        auth: images_pb2.RegistryAuth | None = None,
        insecure: bool = False,
    ) -> AsyncIterator[images_pb2.PushResponse]:
        """As `push`; progress comes, and last the descriptor."""
        from corral.api.images.v1 import images_pb2_grpc

        request = images_pb2.PushRequest(
            name=name,
            destination=destination,
            platform=platform_message(platform),
            all_platforms=all_platforms,
            auth=auth or await async_registry_auth(destination or name),
            insecure=insecure,
        )
        leaf = await self._client.leaf("images")
        stub = images_pb2_grpc.ImagesStub(leaf.channel)
        async for part in leaf.stream(stub.Push, request):
            yield part

    async def login(self, registry: str, username: str, password: str, *, insecure: bool = False) -> str:
        """Proves credentials to a registry; returns the identity token to keep instead of the password, if any."""
        from corral.api.images.v1 import images_pb2_grpc

        auth = images_pb2.RegistryAuth(username=username, password=password)
        request = images_pb2.LoginRequest(registry=registry, auth=auth, insecure=insecure)
        leaf = await self._client.leaf("images")
        answer = await leaf.unary(images_pb2_grpc.ImagesStub(leaf.channel).Login, request)
        return answer.identity_token

    async def referrers(
        self,
        name: str,
        *,
        artifact_type: str = "",
        auth: images_pb2.RegistryAuth | None = None,
        insecure: bool = False,
    ) -> images_pb2.ReferrersResponse:
        """What refers to an image in its registry: signatures, attestations."""
        from corral.api.images.v1 import images_pb2_grpc

        request = images_pb2.ReferrersRequest(
            name=name, artifact_type=artifact_type, auth=auth or await async_registry_auth(name), insecure=insecure
        )
        leaf = await self._client.leaf("images")
        return await leaf.unary(images_pb2_grpc.ImagesStub(leaf.channel).Referrers, request)

    async def tag(self, source: str, target: str) -> images_pb2.Image:
        """Gives an image another name; a name that exists moves."""
        from corral.api.images.v1 import images_pb2_grpc

        leaf = await self._client.leaf("images")
        stub = images_pb2_grpc.ImagesStub(leaf.channel)
        return await leaf.unary(stub.Tag, images_pb2.TagImageRequest(source=source, target=target))

    async def remove(self, name: str, *, force: bool = False) -> images_pb2.RemoveImageResponse:
        """Removes a name, and with the last one the image."""
        from corral.api.images.v1 import images_pb2_grpc

        leaf = await self._client.leaf("images")
        stub = images_pb2_grpc.ImagesStub(leaf.channel)
        return await leaf.unary(stub.Remove, images_pb2.RemoveImageRequest(name=name, force=force))

    async def prune(
        self,
        *,
        all: bool = False,  # noqa: A002 - docker's word
        until: "Timestamp | None" = None,
        labels: Sequence[str] = (),
        without_labels: Sequence[str] = (),
    ) -> images_pb2.PruneResponse:
        """Removes what nothing refers to; with `all` also images that no container uses. `until`: only images that say
        that they were made before; and only those with all `labels`, "KEY" or "KEY=VALUE", and none `without_labels`.
        """
        from corral.api.images.v1 import images_pb2_grpc

        leaf = await self._client.leaf("images")
        stub = images_pb2_grpc.ImagesStub(leaf.channel)
        request = images_pb2.PruneRequest(all=all, until=until, labels=labels, without_labels=without_labels)
        return await leaf.unary(stub.Prune, request)


def _file_chunks(path: Path) -> Iterable[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


async def _import_requests(
    header: images_pb2.ImportHeader, chunks: Iterable[bytes]
) -> AsyncIterator[images_pb2.ImportRequest]:
    yield images_pb2.ImportRequest(header=header)
    for chunk in chunks:
        yield images_pb2.ImportRequest(data=chunk)
