"""Images in a registry that does wrong, and pulls of them that shall fail."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from corral.api.images.v1 import images_pb2 as pb
from corral.rpc.errors import CorralError
from support.faulty import Faulty, Handler, Seen
from support.images import Entry, layer
from support.images_leaf import ImagesLeaf
from support.registry import write_hosts

BIG = 40 << 20
SECRETS = ("s3cret-password", "Basic ", "signature=", "t0ken")


def small(faulty: Faulty, what: bytes = b"x") -> bytes:
    """An image x:1 of one layer, which is returned."""
    made = layer([Entry("f", what * 5000)])
    faulty.add_image("1", [made])
    return made


def big(faulty: Faulty) -> bytes:
    """One whose layer is fetched in parts."""
    made = layer([Entry("f", bytes(range(256)) * (BIG >> 8))])
    faulty.add_image("1", [made])
    return made


async def fails(leaf: ImagesLeaf, name: str, kind: type[CorralError], match: str, **request: object) -> CorralError:
    """The error of a pull, one sentence; nothing is to be seen of the image."""
    with pytest.raises(kind, match=match) as caught:
        await leaf.pull(name, **request)
    assert "\n" not in str(caught.value)
    assert await leaf.names() == []
    await leaf.settled()
    assert not [path for path in leaf.disk() if path.startswith(("overlay/", "ingest/"))]
    return caught.value


async def until(is_so: Callable[[], bool]) -> None:
    for _ in range(2000):
        if is_so():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it does not come about")


async def login_wanted(faulty: Faulty) -> pb.RegistryAuth:
    """From now on it wants basic credentials."""
    inner = faulty.on

    def on(handler: Handler, seen: Seen) -> bool:
        if "authorization" not in seen.headers:
            handler.answer(401, WWW_Authenticate='Basic realm="x"')
            return True
        return inner(handler, seen)

    faulty.on = on
    return pb.RegistryAuth(username="alice", password=SECRETS[0])


def mirrored(tmp_path: Path, faulty: Faulty, mirror: Faulty, capabilities: str = '["pull", "resolve"]') -> str:
    """An image's name in a registry that `mirror` stands before."""
    write_hosts(
        tmp_path / "certs.d",
        "r.example",
        f'server = "http://{faulty.host}"\n[host."http://{mirror.host}"]\ncapabilities = {capabilities}\n',
    )
    return "r.example/x:1"
