"""Mirrors are asked first, told little, and left for the registry when they fail; proxies likewise."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
from support.faulty import Faulty, Handler, Seen
from support.faulty_images import SECRETS, fails, login_wanted, mirrored, small
from support.images import digest
from support.images_leaf import ImagesLeaf
from support.registry import write_hosts
from support.requirements import needs

from corral.api.images.v1 import images_pb2 as pb
from corral.rpc.errors import CorralError, FailedPrecondition, NotFound

pytestmark = needs("root", "overlayfs")


async def test_a_mirror_is_asked_first_and_told_for_whom(
    leaf: ImagesLeaf, faulty: Faulty, mirror: Faulty, tmp_path: Path
) -> None:
    name = mirrored(tmp_path, faulty, mirror)
    small(mirror)
    image = await leaf.pull(name, auth=pb.RegistryAuth(username="alice", password=SECRETS[0]))
    assert image.name == name
    assert not faulty.seen
    assert mirror.seen
    assert all(seen.path.endswith("?ns=r.example") for seen in mirror.seen)


async def test_a_mirror_never_gets_the_credentials(
    leaf: ImagesLeaf, faulty: Faulty, mirror: Faulty, tmp_path: Path
) -> None:
    name = mirrored(tmp_path, faulty, mirror)
    small(faulty)
    mirror.on = lambda handler, seen: handler.answer(401, WWW_Authenticate='Basic realm="give me"') is None
    auth = await login_wanted(faulty)
    await leaf.pull(name, auth=auth)
    assert mirror.seen
    assert not [seen for seen in mirror.seen if "authorization" in seen.headers]
    assert [seen for seen in faulty.seen if "authorization" in seen.headers]


@pytest.mark.parametrize("status", [404, 403, 429, 500, 503, 0])
async def test_a_mirror_that_fails_is_left_for_the_registry(
    leaf: ImagesLeaf, faulty: Faulty, mirror: Faulty, tmp_path: Path, status: int
) -> None:
    """0: the connection breaks."""
    name = mirrored(tmp_path, faulty, mirror)
    small(faulty)
    mirror.on = lambda handler, seen: (handler.answer(status) if status else handler.hang_up()) is None
    await leaf.pull(name)
    assert mirror.seen


async def test_a_mirror_that_is_not_there_is_left_for_the_registry(
    leaf: ImagesLeaf, faulty: Faulty, tmp_path: Path
) -> None:
    name = mirrored(tmp_path, faulty, Faulty(port=1))
    small(faulty)
    began = time.monotonic()
    await leaf.pull(name)
    assert time.monotonic() - began < 5


async def test_a_mirror_that_breaks_in_the_middle_is_left_for_the_registry(
    leaf: ImagesLeaf, faulty: Faulty, mirror: Faulty, tmp_path: Path
) -> None:
    name = mirrored(tmp_path, faulty, mirror)
    made = small(faulty)
    small(mirror)

    def on(handler: Handler, seen: Seen) -> bool:
        if digest(made) in seen.path:
            handler.answer(200, made[: len(made) // 2], Content_Length=str(len(made)))
            handler.hang_up()
        return digest(made) in seen.path

    mirror.on = on
    await leaf.pull(name)
    [rest] = faulty.of(digest(made))
    assert rest.headers["range"] == f"bytes={len(made) // 2}-{len(made) - 1}"


async def test_a_mirror_that_gives_other_content_is_left_for_the_registry(
    leaf: ImagesLeaf, faulty: Faulty, mirror: Faulty, tmp_path: Path
) -> None:
    name = mirrored(tmp_path, faulty, mirror)
    made = small(faulty)
    small(mirror)
    mirror.blobs[digest(made)] = made[:-1] + b"!"
    await leaf.pull(name)
    assert len(faulty.of(digest(made))) == 1


async def test_a_mirror_that_gives_a_page_for_people_is_left_for_the_registry(
    leaf: ImagesLeaf, faulty: Faulty, mirror: Faulty, tmp_path: Path
) -> None:
    name = mirrored(tmp_path, faulty, mirror)
    small(faulty)
    page = b"<html>please log in to this network</html>"
    mirror.on = lambda handler, _: handler.answer(200, page, Content_Type="text/html") is None
    await leaf.pull(name)
    assert mirror.seen


async def test_a_mirror_that_may_not_resolve_is_not_asked_what_a_tag_means(
    leaf: ImagesLeaf, faulty: Faulty, mirror: Faulty, tmp_path: Path
) -> None:
    name = mirrored(tmp_path, faulty, mirror, '["pull"]')
    small(faulty, b"the real one")
    small(mirror, b"an old one")
    mirror.manifests |= {key: value for key, value in faulty.manifests.items() if key != "1"}
    mirror.blobs |= faulty.blobs
    image = await leaf.pull(name)
    assert image.target.digest == digest(faulty.manifests["1"][1])
    assert len(faulty.of("/manifests/")) == 1
    assert not faulty.of("/blobs/")
    assert not mirror.of("/manifests/1")


async def test_the_registrys_own_answer_is_told_not_the_mirrors(
    leaf: ImagesLeaf, faulty: Faulty, tmp_path: Path
) -> None:
    name = mirrored(tmp_path, faulty, Faulty(port=1))
    await fails(leaf, name, NotFound, "registry r.example has no image r.example/x:1")


async def test_only_the_registry_is_pushed_to(leaf: ImagesLeaf, faulty: Faulty, mirror: Faulty, tmp_path: Path) -> None:
    name = mirrored(tmp_path, faulty, mirror)
    small(faulty)
    await leaf.pull(f"{faulty.host}/x:1")
    with pytest.raises(CorralError):
        await leaf.push(f"{faulty.host}/x:1", name)
    assert not mirror.seen
    write_hosts(tmp_path / "certs.d", "r.example", f'server = "http://{faulty.host}"\ncapabilities = ["pull"]\n')
    with pytest.raises(FailedPrecondition, match=r"hosts\.toml"):
        await leaf.push(f"{faulty.host}/x:1", name)


async def test_settings_that_are_wrong_are_told_at_the_pull(leaf: ImagesLeaf, tmp_path: Path) -> None:
    write_hosts(tmp_path / "certs.d", "r.example", 'server = "https://r.example"\nca = "missing.crt"\n')
    with pytest.raises(FailedPrecondition, match=r"missing\.crt"):
        await leaf.pull("r.example/x:1")


async def test_a_proxy_of_the_environment_is_used_but_not_where_it_shall_not(
    leaf: ImagesLeaf, faulty: Faulty, mirror: Faulty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://user:s3cret-password@{mirror.host}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    write_hosts(tmp_path / "certs.d", "r.example", 'server = "http://r.example"\n')

    def on(handler: Handler, seen: Seen) -> bool:
        if seen.path.startswith("http://r.example/"):
            handler.content(replace(seen, path=seen.path.removeprefix("http://r.example")))
        return True

    small(mirror)
    mirror.on = on
    await leaf.pull("r.example/x:1")
    assert all(seen.headers["proxy-authorization"].startswith("Basic ") for seen in mirror.seen)
    count = len(mirror.seen)
    small(faulty)
    await leaf.pull(f"{faulty.host}/x:1")
    assert len(mirror.seen) == count
