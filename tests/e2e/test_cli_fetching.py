"""Which image a new container gets: that of a platform, what is missing, and only what the policy lets in."""

import json
from collections.abc import Iterator

import pytest
from support import cosign
from support.corrald import Corrald, running
from support.cosign import Key, Signed, payload
from support.images import busybox_layer, image_config, write_docker_archive
from support.registry import Registry, skopeo
from support.registry import running as registry_running
from support.requirements import needs

from corral.client.aio import AsyncClient
from corral.rpc.errors import NotFound, PermissionDenied

pytestmark = needs("root", "overlayfs", "busybox", "docker-registry", "skopeo", "openssl")

INDEX = "application/vnd.oci.image.index.v1+json"


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """With busybox for amd64 and, as it says, for arm64."""
    with registry_running(tmp_path_factory.mktemp("registry")) as made:
        where, layers = tmp_path_factory.mktemp("archives"), [busybox_layer()]
        entries = []
        for architecture in ("amd64", "arm64"):
            config = json.loads(image_config(layers, Env=[f"FOR={architecture}", "PATH=/bin"]))
            data = json.dumps(config | {"architecture": architecture}).encode()
            archive = write_docker_archive(where / f"{architecture}.tar", "box:latest", layers, data)
            skopeo("--insecure-policy", "copy", "-q", "--dest-tls-verify=false", "--format", "oci",
                   f"docker-archive:{archive}", f"docker://{made.host}/box:{architecture}")  # fmt: skip
            accept = {"Accept": cosign.MANIFEST}
            _, manifest = made.request("GET", f"box/manifests/{architecture}", accept)
            entry = {"mediaType": cosign.MANIFEST, "digest": made.digest("box", architecture), "size": len(manifest)}
            entries.append(entry | {"platform": {"os": "linux", "architecture": architecture}})
        document = json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries}).encode()
        cosign.put_manifest(made, "box", "1", document, INDEX)
        yield made


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Key:
    return Key.make(tmp_path_factory.mktemp("keys"), "ours")


@pytest.fixture(scope="module")
def box() -> Iterator[Corrald]:
    with running() as daemon:
        yield daemon


@pytest.fixture
def image(registry: Registry, box: Corrald) -> Iterator[str]:
    yield f"{registry.host}/box:1"
    box.corral("image", "rm", "-f", f"{registry.host}/box:1")


FOR = ("sh", "-c", "echo $FOR")


def test_run_takes_the_image_for_the_platform_asked_for(box: Corrald, image: str) -> None:
    """The program is this host's own all the same, so it runs."""
    result = box.corral("run", "--rm", "--platform", "linux/arm64", image, *FOR, check=True)
    assert result.stdout == b"arm64\n"
    assert f"Unable to find image '{image}' for linux/arm64 locally" in result.stderr.decode()
    result = box.corral("run", "--rm", "--platform", "arm64", image, *FOR, check=True)
    assert (result.stdout, result.stderr) == (b"arm64\n", b"")
    result = box.corral("run", "--rm", "-q", "--platform", "linux/amd64", image, *FOR, check=True)
    assert (result.stdout, result.stderr) == (b"amd64\n", b"")
    refused = box.corral("create", "--pull", "never", "--platform", "linux/arm64", image, "true")
    assert refused.returncode == 125
    assert f"image '{image}' is here for linux/amd64, not for linux/arm64" in refused.stderr.decode()
    none = box.corral("create", "--platform", "linux/s390x", image, "true")
    assert (none.returncode, b"has nothing for linux/s390x" in none.stderr) == (125, True)
    odd = box.corral("run", "--platform", "a/b/c/d", image, "true")
    assert (odd.returncode, b"is not understood" in odd.stderr) == (125, True)


def test_pull_takes_the_image_for_the_platform_asked_for(box: Corrald, image: str) -> None:
    for architecture in ("arm64", "amd64"):
        box.corral("image", "pull", "--platform", f"linux/{architecture}", image, check=True)
        [shown] = json.loads(box.corral("image", "inspect", image, check=True).stdout)
        assert shown["platform"]["architecture"] == architecture


def test_a_program_gets_what_is_missing_as_the_command_does(box: Corrald, registry: Registry, image: str) -> None:
    with box.client() as client:
        with pytest.raises(NotFound, match="there is no image"):
            client.containers.create(image, pull="never")
        with pytest.raises(ValueError, match="missing, always or never"):
            client.containers.create(image, pull="sometimes")  # type: ignore[arg-type]
        made = client.containers.run(image, ["true"], platform="linux/arm64")
        assert client.images.get(image).platform.architecture == "arm64"
        client.containers.remove(made.id, force=True)
        with pytest.raises(NotFound, match="not for linux/amd64"):
            client.containers.create(image, pull="never", platform="linux/amd64")
        before = registry.log().count("/v2/box/manifests/")
        client.containers.remove(client.containers.create(image).id)
        assert registry.log().count("/v2/box/manifests/") == before
        client.containers.remove(client.containers.create(image, pull="always", platform="linux/amd64").id)
        assert client.images.get(image).platform.architecture == "amd64"


async def test_so_does_an_asyncio_program(box: Corrald, image: str) -> None:
    async with AsyncClient(box.address) as client:
        made = await client.containers.run(image, ["true"])
        await client.containers.remove(made.id, force=True)


def test_a_policy_holds_for_the_command_and_for_programs(registry: Registry, image: str, key: Key) -> None:
    policy = [{"pattern": registry.host, "keys": [str(key.public)]}, {"pattern": "*", "type": "reject"}]
    with running(settings={"images": {"policy": policy}}) as box:
        for verb, code in (("run", 125), ("create", 125), ("pull", 1)):
            result = box.corral(verb, image)
            assert result.returncode == code
            last = result.stderr.decode().splitlines()[-1]
            assert last.startswith(f"corral: image {image} (sha256:"), last
            assert last.endswith(f"is refused by the policy for {registry.host}: it has no signature"), last
        result = box.corral("pull", "busybox")
        assert b"image busybox:latest is refused by the policy for *: it takes none" in result.stderr
        with box.client() as client, pytest.raises(PermissionDenied, match="it has no signature"):
            client.containers.run(image)
        digest = registry.digest("box", "1")
        cosign.attach(registry, "box", digest, [Signed.by(key, payload(f"{registry.host}/box", digest))])
        assert box.corral("run", "--rm", image, "echo", "ok").stdout == b"ok\n"
