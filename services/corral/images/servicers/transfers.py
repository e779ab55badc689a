"""What corral.images.v1.Images has to do with registries."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Protocol

from corral.api.images.v1 import images_pb2 as pb
from corral.api.types.v1 import types_pb2 as types
from corral.images import wire
from corral.images.catalog import ImageRecord
from corral.images.model import Platform
from corral.images.reference import DEFAULT_DOMAIN, Reference, parse_reference
from corral.images.registries import Registries
from corral.images.servicers.progress import ProgressQueue
from corral.rpc.context import current_namespace
from corral.rpc.errors import InvalidArgument


class Spare(Protocol):
    """What is done about the blobs of an image that is unpacked."""

    async def __call__(self, record: ImageRecord, *, keep: bool | None) -> None: ...


class Transfers:
    """Loads what pulls and pushes need when one is asked for."""

    def __init__(self, registries: Registries, message: Callable[[ImageRecord], pb.Image], spare: Spare) -> None:
        self._registries = registries
        self._message = message
        self._spare = spare

    async def pull(self, request: pb.PullRequest, lease: str) -> AsyncGenerator[pb.PullResponse]:
        from corral.images.registry.pull import PullOptions

        options = PullOptions(
            namespace=current_namespace(),
            reference=parse_reference(request.name),
            platform=_platform(request.platform),
            all_platforms=request.all_platforms,
            credentials=wire.to_credentials(request.auth),
            insecure=request.insecure,
            lease=lease,
        )
        progress = ProgressQueue()
        work = asyncio.ensure_future(self._registries.puller.run(options, progress.report))
        async with aclosing(progress.of(work)) as items:
            async for item in items:
                yield pb.PullResponse(progress=item)
        await self._spare(work.result(), keep=request.keep_blobs if request.HasField("keep_blobs") else None)
        yield pb.PullResponse(image=self._message(work.result()))

    async def push(self, request: pb.PushRequest) -> AsyncGenerator[pb.PushResponse]:
        from corral.images.registry.push import PushOptions

        options = PushOptions(
            namespace=current_namespace(),
            name=request.name,
            destination=_destination(request.destination) if request.destination else None,
            platform=_platform(request.platform),
            all_platforms=request.all_platforms,
            credentials=wire.to_credentials(request.auth),
            insecure=request.insecure,
        )
        progress = ProgressQueue()
        work = asyncio.ensure_future(self._registries.pusher.run(options, progress.report))
        async with aclosing(progress.of(work)) as items:
            async for item in items:
                yield pb.PushResponse(progress=item)
        yield pb.PushResponse(pushed=wire.from_descriptor(work.result()))

    async def login(self, request: pb.LoginRequest) -> pb.LoginResponse:
        from corral.images.registry.login import login

        registry = parse_reference(f"{request.registry or DEFAULT_DOMAIN}/login").domain
        token = await login(
            self._registries.http,
            self._registries.certs,
            registry,
            wire.to_credentials(request.auth),
            insecure=request.insecure,
        )
        return pb.LoginResponse(identity_token=token)

    async def referrers(self, request: pb.ReferrersRequest) -> pb.ReferrersResponse:
        from corral.images.registry.referrers import find_referrers
        from corral.images.registry.repository import open_repository

        repository = await open_repository(
            self._registries.http,
            self._registries.certs,
            parse_reference(request.name),
            wire.to_credentials(request.auth),
            insecure=request.insecure,
        )
        subject, found = await find_referrers(repository, request.artifact_type)
        return pb.ReferrersResponse(
            subject=wire.from_descriptor(subject), referrers=[wire.from_descriptor(each) for each in found]
        )


def _platform(message: types.Platform) -> Platform | None:
    return wire.to_platform(message) if message.architecture else None


def _destination(text: str) -> Reference:
    reference = parse_reference(text)
    if reference.digest is not None:
        raise InvalidArgument(f"{text!r} holds a digest, which the image has already: give a tag to push to")
    return reference
