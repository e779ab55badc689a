"""Credentials go to the host that they are for, wherever a registry sends us."""

import ssl
import threading
from pathlib import Path

import pytest
from support.faulty import Faulty, Handler, Seen, faulty_registry
from support.faulty_images import SECRETS, fails, login_wanted, small
from support.images import Entry, digest, layer
from support.images_leaf import ImagesLeaf, images_leaf
from support.registry import Authority, write_hosts
from support.requirements import needs

from corral.api.images.v1 import images_pb2 as pb
from corral.rpc.errors import CorralError, FailedPrecondition, NotFound

pytestmark = needs("root", "overlayfs")


async def test_a_redirect_to_another_host_takes_no_credentials_along(
    leaf: ImagesLeaf, faulty: Faulty, mirror: Faulty, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = small(faulty)
    mirror.blobs = faulty.blobs
    write_hosts(tmp_path / "certs.d", faulty.host, f'server = "http://{faulty.host}"\n[header]\nX-Own = "t0ken"\n')

    def on(handler: Handler, seen: Seen) -> bool:
        if "/blobs/" not in seen.path:
            return False
        handler.answer(307, Location=f"http://{mirror.host}{seen.path}?signature=abc")
        return True

    faulty.on = on
    auth = await login_wanted(faulty)
    await leaf.pull(f"{faulty.host}/x:1", auth=auth)
    assert all("authorization" in seen.headers and "x-own" in seen.headers for seen in faulty.of("/blobs/"))
    elsewhere = mirror.of("/blobs/")
    assert len(elsewhere) == 2
    assert not [seen for seen in elsewhere if "authorization" in seen.headers or "x-own" in seen.headers]
    mirror.blobs = {}
    mirror.on = lambda handler, seen: handler.answer(404) is None
    await leaf.images.Remove(pb.RemoveImageRequest(name=f"{faulty.host}/x:1"))
    faulty.add_image("2", [layer([Entry("other", b"1")])])
    with pytest.raises(NotFound) as caught:
        await leaf.pull(f"{faulty.host}/x:2", auth=auth)
    told = str(caught.value) + str(caught.value.metadata) + capfd.readouterr().out
    assert not [secret for secret in SECRETS if secret in told]
    assert digest(made)


async def test_a_redirect_from_https_to_http_is_not_followed(tmp_path: Path, mirror: Faulty) -> None:
    authority = Authority.make(tmp_path / "ca")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority.certificate, authority.key)
    with faulty_registry(tls=context) as secure:
        small(secure)
        mirror.blobs = secure.blobs

        def on(handler: Handler, seen: Seen) -> bool:
            if "/blobs/" in seen.path:
                handler.answer(307, Location=f"http://{mirror.host}{seen.path}")
            return "/blobs/" in seen.path

        secure.on = on
        hosts = f'server = "https://{secure.host}"\nca = "{authority.ca}"\n'
        write_hosts(tmp_path / "certs.d", secure.host, hosts)
        async with images_leaf(tmp_path / "images", certs=tmp_path / "certs.d") as leaf:
            await fails(leaf, f"{secure.host}/x:1", FailedPrecondition, "not encrypted")
            assert not mirror.seen


@pytest.mark.parametrize("location", ["file:///etc/passwd", "gopher://x/", "http://", "//", "http://[::1/"])
async def test_a_redirect_to_what_is_no_web_address_is_not_followed(
    leaf: ImagesLeaf, faulty: Faulty, location: str
) -> None:
    small(faulty)

    def on(handler: Handler, seen: Seen) -> bool:
        handler.answer(302, Location=location)
        return True

    faulty.on = on
    await fails(leaf, f"{faulty.host}/x:1", CorralError, "redirects|no address")


async def test_redirects_in_a_circle_end(leaf: ImagesLeaf, faulty: Faulty) -> None:
    faulty.on = lambda handler, seen: handler.answer(302, Location=seen.path) is None
    await fails(leaf, f"{faulty.host}/x:1", FailedPrecondition, "redirects more than")


async def test_two_that_are_asked_for_a_password_at_once_both_give_it(leaf: ImagesLeaf, faulty: Faulty) -> None:
    """Manifests are for anybody there; both blobs meet the challenge before either knows of it."""
    one, two = layer([Entry("a", b"1")]), layer([Entry("b", b"2")])
    faulty.add_image("1", [one, two])
    together = threading.Barrier(2, timeout=20)

    def on(handler: Handler, seen: Seen) -> bool:
        if not (digest(one) in seen.path or digest(two) in seen.path) or "authorization" in seen.headers:
            return False
        together.wait()
        handler.answer(401, WWW_Authenticate='Basic realm="x"')
        return True

    faulty.on = on
    await leaf.pull(f"{faulty.host}/x:1", auth=pb.RegistryAuth(username="alice", password=SECRETS[0]))
