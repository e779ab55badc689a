"""Who may pull and push: passwords and tokens, against a real registry and a token server with a key of its own."""

import json
import ssl
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs

import pytest
from support.faulty import Faulty, Handler, Seen, faulty_registry
from support.images import Entry, image_config, layer, write_oci_archive
from support.images_leaf import ImagesLeaf
from support.registry import Authority, Registry, running, write_hosts
from support.requirements import needs
from support.tokens import TokenServer, token_server

from corral.api.images.v1 import images_pb2 as pb
from corral.rpc.errors import FailedPrecondition, InvalidArgument, PermissionDenied

pytestmark = needs("root", "overlayfs", "docker-registry", "openssl")

ALICE = pb.RegistryAuth(username="alice", password="correct horse")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TokenServer]:
    with token_server(tmp_path_factory.mktemp("tokens")) as made:
        yield made


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, tokens: TokenServer) -> Iterator[Registry]:
    """A registry that believes what the token server signs."""
    with running(tmp_path_factory.mktemp("guarded"), auth=tokens.registry_auth()) as made:
        yield made


@pytest.fixture(autouse=True)
def users(tokens: TokenServer) -> None:
    """alice owns alice/…; anybody may pull public/…."""
    tokens.asked.clear()
    tokens.identities.clear()
    tokens.users = {"alice": "correct horse"}
    tokens.rights = {("alice", name): {"pull", "push"} for name in ("alice/a", "alice/b", "public/p")}
    tokens.rights["", "public/p"] = {"pull"}
    tokens.only_get = tokens.only_post = False
    tokens.life_s = 300


async def load(leaf: ImagesLeaf, tmp_path: Path, what: str = "x") -> pb.Image:
    made = [layer([Entry("f", what.encode() * 1000)])]
    [image] = await leaf.load(write_oci_archive(tmp_path / f"{what}.tar", f"{what}:1", made, image_config(made)))
    return image


async def push(leaf: ImagesLeaf, guarded: Registry, tmp_path: Path, name: str, what: str = "x") -> pb.Image:
    image = await load(leaf, tmp_path, what)
    assert await leaf.push(f"{what}:1", f"{guarded.host}/{name}", auth=ALICE) == image.target.digest
    return image


async def test_a_token_for_what_is_needed_and_no_more(
    leaf: ImagesLeaf, guarded: Registry, tokens: TokenServer, tmp_path: Path
) -> None:
    await push(leaf, guarded, tmp_path, "alice/a:1")
    assert {asked.scopes for asked in tokens.asked} == {("repository:alice/a:pull,push",)}
    assert len(tokens.asked) == 1, "one token serves the whole push"
    tokens.asked.clear()
    await leaf.pull(f"{guarded.host}/alice/a:1", auth=ALICE)
    assert [(asked.method, asked.scopes, asked.user) for asked in tokens.asked] == [
        ("GET", ("repository:alice/a:pull",), "alice")
    ]
    assert tokens.asked[0].fields["service"] == ["corral-tests"]


async def test_anybody_pulls_what_is_public(
    leaf: ImagesLeaf, guarded: Registry, tokens: TokenServer, tmp_path: Path
) -> None:
    image = await push(leaf, guarded, tmp_path, "public/p:1")
    tokens.asked.clear()
    assert (await leaf.pull(f"{guarded.host}/public/p:1")).id == image.id
    assert [(asked.scopes, asked.user) for asked in tokens.asked] == [(("repository:public/p:pull",), "")]


@pytest.mark.parametrize(
    "auth",
    [
        None,
        pb.RegistryAuth(username="alice", password="wrong horse"),
        pb.RegistryAuth(identity_token="forged"),
        pb.RegistryAuth(registry_token="forged"),
    ],
    ids=["nobody", "wrong password", "forged identity", "forged token"],
)
async def test_who_has_no_right_is_told_to_log_in(
    leaf: ImagesLeaf,
    guarded: Registry,
    tmp_path: Path,
    auth: pb.RegistryAuth | None,
    capfd: pytest.CaptureFixture[str],
) -> None:
    await push(leaf, guarded, tmp_path, "alice/a:1")
    for work in (
        leaf.pull(f"{guarded.host}/alice/a:1", auth=auth),
        leaf.push("x:1", f"{guarded.host}/alice/b:1", auth=auth),
    ):
        with pytest.raises(PermissionDenied, match=f"corral login {guarded.host}") as caught:
            await work
        told = str(caught.value) + str(caught.value.metadata) + capfd.readouterr().out
        assert "horse" not in told
        assert "forged" not in told


async def test_a_right_to_pull_is_none_to_push(
    leaf: ImagesLeaf, guarded: Registry, tokens: TokenServer, tmp_path: Path
) -> None:
    await load(leaf, tmp_path)
    with pytest.raises(PermissionDenied):
        await leaf.push("x:1", f"{guarded.host}/public/p:2")


@pytest.mark.parametrize("only", ["get", "post"])
async def test_both_kinds_of_token_servers_are_understood(
    leaf: ImagesLeaf, guarded: Registry, tokens: TokenServer, tmp_path: Path, only: str
) -> None:
    tokens.only_get, tokens.only_post = only == "get", only == "post"
    await push(leaf, guarded, tmp_path, "alice/a:1")
    assert tokens.asked[-1].method == only.upper()


async def test_a_login_gives_an_identity_that_serves_instead_of_the_password(
    leaf: ImagesLeaf, guarded: Registry, tokens: TokenServer, tmp_path: Path
) -> None:
    answer = await leaf.images.Login(pb.LoginRequest(registry=guarded.host, auth=ALICE))
    assert tokens.identities == {answer.identity_token: "alice"}
    image = await push(leaf, guarded, tmp_path, "alice/a:1")
    tokens.asked.clear()
    auth = pb.RegistryAuth(username="alice", identity_token=answer.identity_token)
    assert (await leaf.pull(f"{guarded.host}/alice/a:1", auth=auth)).id == image.id
    assert [asked.method for asked in tokens.asked] == ["POST"]
    assert tokens.asked[0].fields["grant_type"] == ["refresh_token"]
    wrong = pb.RegistryAuth(username="alice", password="no")
    with pytest.raises(PermissionDenied, match="does not take these credentials"):
        await leaf.images.Login(pb.LoginRequest(registry=guarded.host, auth=wrong))


async def test_a_bearer_token_may_be_brought_along(
    leaf: ImagesLeaf, guarded: Registry, tokens: TokenServer, tmp_path: Path
) -> None:
    image = await push(leaf, guarded, tmp_path, "alice/a:1")
    tokens.asked.clear()
    token = tokens.token("alice", ["repository:alice/a:pull"])
    assert (await leaf.pull(f"{guarded.host}/alice/a:1", auth=pb.RegistryAuth(registry_token=token))).id == image.id
    assert not tokens.asked


async def test_a_mount_asks_for_both_repositories(
    leaf: ImagesLeaf, guarded: Registry, tokens: TokenServer, tmp_path: Path
) -> None:
    await push(leaf, guarded, tmp_path, "alice/a:1", "mount")
    tokens.asked.clear()
    await push(leaf, guarded, tmp_path, "alice/b:1", "mount")
    assert ("repository:alice/b:pull,push", "repository:alice/a:pull") in {asked.scopes for asked in tokens.asked}
    assert f"from={'alice%2Fa'}" in guarded.log()


async def test_a_mount_that_is_not_allowed_becomes_an_upload(
    leaf: ImagesLeaf, guarded: Registry, tokens: TokenServer, tmp_path: Path
) -> None:
    await push(leaf, guarded, tmp_path, "alice/a:2", "unmountable")
    tokens.rights["alice", "alice/a"] = set()
    tokens.rights["alice", "alice/c"] = {"pull", "push"}
    image = await push(leaf, guarded, tmp_path, "alice/c:1", "unmountable")
    tokens.rights["", "alice/c"] = {"pull"}
    assert (await leaf.pull(f"{guarded.host}/alice/c:1")).id == image.id


async def test_a_password_that_the_registry_itself_checks(leaf: ImagesLeaf, tmp_path: Path) -> None:
    with running(tmp_path / "registry", credentials=("alice", "correct horse")) as basic:
        await leaf.images.Login(pb.LoginRequest(registry=basic.host, auth=ALICE))
        image = await load(leaf, tmp_path)
        assert await leaf.push("x:1", f"{basic.host}/a:1", auth=ALICE) == image.target.digest
        assert (await leaf.pull(f"{basic.host}/a:1", auth=ALICE)).id == image.id
        for auth in (None, pb.RegistryAuth(username="alice", password="no")):
            with pytest.raises(PermissionDenied):
                await leaf.pull(f"{basic.host}/a:1", auth=auth)
        wrong = pb.RegistryAuth(username="mallory", password="no")
        with pytest.raises(PermissionDenied):
            await leaf.images.Login(pb.LoginRequest(registry=basic.host, auth=wrong))


async def test_credentials_that_cannot_be_sent_are_refused(leaf: ImagesLeaf) -> None:
    for auth in (pb.RegistryAuth(username="a:b", password="c"), pb.RegistryAuth(identity_token="ü")):
        with pytest.raises(InvalidArgument):
            await leaf.pull("r.example/x", auth=auth)


async def test_nothing_of_a_login_is_kept_by_the_service(
    leaf: ImagesLeaf, guarded: Registry, tokens: TokenServer, tmp_path: Path
) -> None:
    await push(leaf, guarded, tmp_path, "alice/a:1")
    with pytest.raises(PermissionDenied):
        await leaf.push("x:1", f"{guarded.host}/alice/b:9")
    for path in (tmp_path / "images").rglob("*"):
        if path.is_file():
            assert b"horse" not in path.read_bytes()


@pytest.fixture
def faulty() -> Iterator[Faulty]:
    with faulty_registry() as made:
        yield made


def bearer(faulty: Faulty, realm: str, valid: set[str], more: str = 'error="invalid_token"') -> None:
    """It wants tokens that are in `valid`, from `realm`."""

    def on(handler: Handler, seen: Seen) -> bool:
        if seen.path.startswith("/token"):
            token = f"token-{len(faulty.of('/token'))}"
            valid.add(token)
            handler.answer(200, json.dumps({"token": token, "expires_in": 300}).encode())
            return True
        if seen.headers.get("authorization", "").removeprefix("Bearer ") in valid:
            return False
        handler.answer(401, WWW_Authenticate=f'Bearer realm="{realm}",service="s",{more}')
        return True

    faulty.on = on


async def test_a_token_that_is_over_before_its_time_is_replaced(leaf: ImagesLeaf, faulty: Faulty) -> None:
    faulty.add_image("1", [layer([Entry("f", bytes([i]))]) for i in range(6)])
    valid: set[str] = set()
    bearer(faulty, f"http://{faulty.host}/token", valid)
    inner, revoked = faulty.on, [0]

    def on(handler: Handler, seen: Seen) -> bool:
        if "/blobs/" in seen.path and not revoked[0]:
            revoked[0] = 1
            valid.clear()
        return inner(handler, seen)

    faulty.on = on
    await leaf.pull(f"{faulty.host}/x:1")
    assert 2 <= len(faulty.of("/token")) <= 8


async def test_a_scope_that_the_registry_demands_is_asked_for_too(leaf: ImagesLeaf, faulty: Faulty) -> None:
    """As a mirror does that has the content under another name."""
    faulty.add_image("1", [layer([Entry("f", b"1")])])
    bearer(faulty, f"http://{faulty.host}/token", set(), 'scope="repository:cache/x:pull repository:x:pull,list"')
    await leaf.pull(f"{faulty.host}/x:1")
    [asked] = faulty.of("/token")
    assert parse_qs(asked.path.partition("?")[2])["scope"] == ["repository:x:pull,list", "repository:cache/x:pull"]


async def test_one_token_serves_all_layers(leaf: ImagesLeaf, faulty: Faulty) -> None:
    faulty.add_image("1", [layer([Entry("f", bytes([i]))]) for i in range(6)])
    bearer(faulty, f"http://{faulty.host}/token", set())
    await leaf.pull(f"{faulty.host}/x:1")
    assert len(faulty.of("/token")) == 1


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"token": 5}', b'{"token": "a\\nb: c"}', b"[" * 5000])
async def test_what_is_no_token_is_not_sent_on(leaf: ImagesLeaf, faulty: Faulty, body: bytes) -> None:
    def on(handler: Handler, seen: Seen) -> bool:
        if seen.path.startswith("/token"):
            handler.answer(200, body)
        else:
            handler.answer(401, WWW_Authenticate=f'Bearer realm="http://{faulty.host}/token"')
        return True

    faulty.on = on
    with pytest.raises(FailedPrecondition, match="gave no token"):
        await leaf.pull(f"{faulty.host}/x:1")
    assert not [seen for seen in faulty.seen if "authorization" in seen.headers]


async def test_a_token_server_sends_nobody_elsewhere_with_a_password(
    leaf: ImagesLeaf, faulty: Faulty, tmp_path: Path
) -> None:
    """Neither by GET, whose secret is a header, nor by POST, whose secret is its body."""
    with faulty_registry() as thief:
        thief.on = lambda handler, seen: handler.answer(200, b'{"token": "x"}') is None

        def on(handler: Handler, seen: Seen) -> bool:
            if seen.path.startswith("/token"):
                handler.answer(307, Location=f"http://{thief.host}/token")
            else:
                handler.answer(401, WWW_Authenticate=f'Bearer realm="http://{faulty.host}/token"')
            return True

        faulty.on = on
        for auth in (ALICE, pb.RegistryAuth(identity_token="secret")):
            with pytest.raises((FailedPrecondition, PermissionDenied)):
                await leaf.pull(f"{faulty.host}/x:1", auth=auth)
        assert thief.seen
        assert not [seen for seen in thief.seen if "authorization" in seen.headers or seen.body]


async def test_an_encrypted_registry_gets_no_password_sent_in_the_clear(leaf: ImagesLeaf, tmp_path: Path) -> None:
    """By its realm."""
    authority = Authority.make(tmp_path / "ca")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority.certificate, authority.key)
    with faulty_registry(tls=context) as secure, faulty_registry() as open_:
        challenge = f'Bearer realm="http://{open_.host}/token"'
        secure.on = lambda handler, seen: handler.answer(401, WWW_Authenticate=challenge) is None
        write_hosts(tmp_path / "certs.d", "r.example", f'server = "https://{secure.host}"\nca = "{authority.ca}"\n')
        with pytest.raises(FailedPrecondition, match="unencrypted"):
            await leaf.pull("r.example/x:1", auth=ALICE)
        assert not open_.seen


async def test_a_client_certificate_is_shown(leaf: ImagesLeaf, tmp_path: Path) -> None:
    authority = Authority.make(tmp_path / "ca")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority.certificate, authority.key)
    context.load_verify_locations(authority.ca)
    context.verify_mode = ssl.CERT_REQUIRED
    with faulty_registry(tls=context) as secure:
        secure.add_image("1", [layer([Entry("f", b"1")])])
        hosts = f'server = "https://{secure.host}"\nca = "{authority.ca}"\n'
        write_hosts(tmp_path / "certs.d", "r.example", hosts)
        with pytest.raises(Exception, match=r"cannot reach|TLS"):
            await leaf.pull("r.example/x:1")
        pair = f'client = [["{authority.certificate}", "{authority.key}"]]\n'
        write_hosts(tmp_path / "certs.d", "r.example", hosts + pair)
        await leaf.pull("r.example/x:1")
