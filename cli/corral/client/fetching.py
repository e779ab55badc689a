"""Whether the image of a new container is fetched first, in docker's words for it."""

import re
from typing import Literal

from corral.api.images.v1 import images_pb2
from corral.client.options import platform_message
from corral.rpc.errors import NotFound

type Pull = Literal["missing", "always", "never"]

PULLS: tuple[Pull, ...] = ("missing", "always", "never")
_ID = re.compile(r"(sha256:)?[0-9a-f]{64}|sha512:[0-9a-f]{128}")


def check_pull(pull: str) -> None:
    """Raises ValueError."""
    if pull not in PULLS:
        raise ValueError(f"pull {pull!r} is not understood: give missing, always or never")


def may_fetch(error: NotFound, image: str, pull: Pull) -> bool:
    """Whether an image that is not here is fetched. Nobody gives an image by its id."""
    return pull != "never" and error.reason == "NO_IMAGE" and _ID.fullmatch(image) is None


def is_to_be_exchanged(image: images_pb2.Image, name: str, platform: str, pull: Pull) -> bool:
    """Whether what is here is for another platform than was asked for. Raises NotFound if it cannot be fetched."""
    wanted, here = platform_message(platform), image.platform
    if wanted is None or (
        (wanted.os, wanted.architecture) == (here.os, here.architecture)
        and (wanted.variant == here.variant or not wanted.variant or not here.variant)
    ):
        return False
    if pull == "never" or _ID.fullmatch(name):
        shown = "/".join(part for part in (here.os, here.architecture, here.variant) if part)
        raise NotFound(
            f"image {name!r} is here for {shown}, not for {platform}: pull it with --platform", reason="NO_PLATFORM"
        )
    return True
