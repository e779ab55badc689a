"""`corral pull`, `push`, `login` and `logout`, and `run` of what is not here yet."""

import asyncio
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.amounts import amount
from support.corrald import CORRAL, Corrald, running
from support.images import Entry, busybox_layer, image_config, layer, write_busybox, write_oci_archive
from support.registry import Registry, skopeo, write_hosts
from support.registry import running as registry_running
from support.requirements import needs
from support.throttle import throttled

from corral.client.aio import AsyncClient

pytestmark = needs("root", "overlayfs", "busybox", "docker-registry", "skopeo", "openssl")

MIB = 1 << 20
HUGE_BYTES = amount(200, in_ci=100) * MIB


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """Open to all, with busybox in it."""
    with registry_running(tmp_path_factory.mktemp("registry")) as made:
        archive = write_busybox(tmp_path_factory.mktemp("box") / "b.tar", "busybox:latest")
        skopeo("--insecure-policy", "copy", "-q", "--dest-tls-verify=false",
               f"docker-archive:{archive}", f"docker://{made.host}/busybox:1")  # fmt: skip
        yield made


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """For alice alone."""
    with registry_running(tmp_path_factory.mktemp("private"), credentials=("alice", "pass:word")) as made:
        yield made


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("certs.d")


@pytest.fixture(scope="module")
def box(request: pytest.FixtureRequest, certs: Path) -> Iterator[Corrald]:
    with running(settings={"images": {"certs": str(certs)}}) as daemon:
        yield daemon


@pytest.fixture(autouse=True)
def logins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where logins are kept."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    return tmp_path / "docker" / "config.json"


@pytest.fixture
def image(registry: Registry, box: Corrald) -> Iterator[str]:
    """busybox in the registry; afterwards it is not here any more."""
    yield f"{registry.host}/busybox:1"
    box.corral("image", "rm", "-f", f"{registry.host}/busybox:1")


def test_pull_says_what_it_has_got(box: Corrald, registry: Registry, image: str) -> None:
    result = box.corral("pull", image, check=True)
    digest = f"Digest: {registry.digest('busybox', '1')}"
    status = f"Status: Downloaded newer image for {image}"
    assert result.stdout.decode().splitlines() == [digest, status, image]
    again = box.corral("pull", image, check=True)
    assert again.stdout.decode().splitlines() == [digest, f"Status: Image is up to date for {image}", image]
    lines = result.stderr.decode().splitlines()
    assert [line.split(": ")[1].split(" (")[0] for line in lines] == ["fetched", "done"], lines
    again = box.corral("image", "pull", "-q", image, check=True)
    assert (again.stdout.decode(), again.stderr) == (f"{image}\n", b"")
    assert box.corral("run", "--rm", image, "echo", "ok").stdout == b"ok\n"


def test_run_fetches_what_is_not_here(box: Corrald, image: str) -> None:
    result = box.corral("run", "--rm", image, "echo", "ok")
    assert (result.returncode, result.stdout) == (0, b"ok\n")
    assert f"Unable to find image '{image}' locally" in result.stderr.decode()
    result = box.corral("run", "--rm", image, "echo", "ok")
    assert (result.returncode, result.stdout, result.stderr) == (0, b"ok\n", b"")
    made = box.corral("create", "--pull", "always", image, "true", check=True).stdout.decode().strip()
    box.corral("rm", made, check=True)


def test_run_fetches_only_if_it_may(box: Corrald, image: str) -> None:
    result = box.corral("run", "--rm", "--pull", "never", image, "true")
    assert result.returncode == 125
    assert result.stderr.decode().count("\n") == 1
    assert "there is no image" in result.stderr.decode()


def test_run_asks_the_registry_again_if_it_always_shall(box: Corrald, registry: Registry, image: str) -> None:
    box.corral("pull", "-q", image, check=True)
    before = registry.log().count("/v2/busybox/manifests/1")
    box.corral("run", "--rm", "--pull", "always", image, "true", check=True)
    assert registry.log().count("/v2/busybox/manifests/1") > before


@pytest.mark.parametrize("verb", ["pull", "run"])
def test_what_cannot_be_had_is_one_sentence_with_a_remedy(box: Corrald, registry: Registry, verb: str) -> None:
    for name, words in {
        f"{registry.host}/none:1": "check name and tag",
        "127.0.0.1:1/x:1": "Connection refused",
        "registry.invalid/x": "cannot be resolved",
    }.items():
        result = box.corral(verb, name)
        assert result.returncode == (125 if verb == "run" else 1)
        last = result.stderr.decode().splitlines()[-1]
        assert last.startswith("corral: registry" if "none" in name else "corral: cannot reach registry"), last
        assert words in last
    result = box.corral("pull", "Not/A/Name")
    assert (result.returncode, result.stderr.decode().count("\n")) == (1, 1)
    result = box.corral("pull", "--platform", "a/b/c/d", f"{registry.host}/busybox:1")
    assert (result.returncode, b"linux/arm64" in result.stderr) == (1, True)
    result = box.corral("pull", "--platform", "linux/s390x", f"{registry.host}/busybox:1")
    assert (result.returncode, b"not for linux/s390x" in result.stderr) == (1, True)


def test_push_to_a_name_of_its_own_and_to_another(box: Corrald, registry: Registry, image: str) -> None:
    box.corral("pull", "-q", image, check=True)
    digest = registry.digest("busybox", "1")
    result = box.corral("push", image, f"{registry.host}/copies/box:2", check=True)
    assert result.stdout.decode() == f"Digest: {digest}\n"
    box.corral("image", "tag", image, f"{registry.host}/tagged:3", check=True)
    assert box.corral("push", "-q", f"{registry.host}/tagged:3", check=True).stdout.decode() == f"{digest}\n"
    box.corral("image", "rm", f"{registry.host}/tagged:3", check=True)
    for name in ("copies/box:2", "tagged:3"):
        assert registry.digest(*name.split(":")) == digest


def test_a_login_serves_pull_push_and_run_until_the_logout(
    box: Corrald, private: Registry, registry: Registry, image: str, logins: Path
) -> None:
    box.corral("pull", "-q", image, check=True)
    name = f"{private.host}/mine:1"
    denied = box.corral("push", image, name)
    assert denied.returncode == 1
    assert f"corral login {private.host}" in denied.stderr.decode().splitlines()[-1]
    wrong = box.corral("login", "-u", "alice", "--password-stdin", private.host, stdin=b"no\n")
    assert (wrong.returncode, wrong.stderr.decode().count("\n")) == (1, 1)
    assert not logins.exists()
    login = box.corral("login", "-u", "alice", "--password-stdin", private.host, stdin=b"pass:word\n", check=True)
    assert login.stdout == b"Login Succeeded\n"
    assert logins.stat().st_mode & 0o777 == 0o600
    assert b"pass:word" not in login.stdout + login.stderr
    box.corral("push", image, name, check=True)
    assert box.corral("run", "--rm", name, "echo", "mine").stdout == b"mine\n"
    box.corral("image", "rm", name, check=True)
    assert box.corral("logout", private.host, check=True).stdout.decode().startswith("Removing login")
    assert box.corral("logout", private.host, check=True).stdout.decode().startswith("Not logged in")
    assert box.corral("pull", name).returncode == 1
    assert "pass:word" not in box.log()
    assert json.loads(logins.read_text()) == {"auths": {}}


def test_what_docker_has_kept_serves_too(box: Corrald, private: Registry, registry: Registry, logins: Path) -> None:
    skopeo("--insecure-policy", "copy", "-q", "--src-tls-verify=false", "--dest-tls-verify=false",
           "--dest-creds", "alice:pass:word", f"docker://{registry.host}/busybox:1",
           f"docker://{private.host}/dockers:1")  # fmt: skip
    logins.parent.mkdir()
    skopeo("login", "--authfile", logins, "--tls-verify=false", "-u", "alice", "-p", "pass:word", private.host)
    box.corral("pull", "-q", f"{private.host}/dockers:1", check=True)
    box.corral("image", "rm", f"{private.host}/dockers:1", check=True)


def test_a_mirror_fails_over(box: Corrald, registry: Registry, certs: Path) -> None:
    write_hosts(certs, "r.example", f'server = "http://{registry.host}"\n[host."http://127.0.0.1:1"]\n')
    assert box.corral("run", "--rm", "r.example/busybox:1", "echo", "ok").stdout == b"ok\n"
    box.corral("image", "rm", "r.example/busybox:1", check=True)


def test_insecure_is_only_what_was_asked_for(box: Corrald, registry: Registry, certs: Path) -> None:
    """A registry without TLS, by a name of this host that is not loopback's."""
    write_hosts(certs, "plain.example", f'server = "https://{registry.host}"\n')
    refused = box.corral("pull", "plain.example/busybox:1")
    assert refused.returncode == 1
    assert b"does not speak TLS" in refused.stderr


def test_a_program_has_the_same_verbs(box: Corrald, registry: Registry, image: str) -> None:
    async def copy() -> str:
        async with AsyncClient(box.address) as client:
            pulled = await client.images.pull(image)
            pushed = await client.images.push(image, f"{registry.host}/program:1")
            assert pushed.digest == pulled.target.digest
            return pushed.digest

    assert asyncio.run(copy()) == registry.digest("program", "1") == registry.digest("busybox", "1")
    with box.client() as client:
        assert client.images.pull(image).target.digest == registry.digest("busybox", "1")
        assert client.images.push(image, f"{registry.host}/program:2").digest == registry.digest("program", "2")
        assert client.images.referrers(image).subject.digest == registry.digest("busybox", "1")


def test_ctrl_c_ends_a_pull_and_the_next_one_goes_on(box: Corrald, registry: Registry, tmp_path: Path) -> None:
    noise = os.urandom(20 * MIB)  # another one each time: what is here already is not fetched
    put(registry, tmp_path, "slow", [layer([Entry("noise", noise)])])
    with throttled(registry.port, 4 * MIB) as throttle:
        command = [CORRAL, "pull", f"{throttle.host}/slow:1"]
        with subprocess.Popen(
            command, env=os.environ | {"CORRAL_ADDRESS": box.address}, stderr=subprocess.PIPE
        ) as pull:
            wait_until(lambda: throttle.sent > 8 * MIB)
            pull.send_signal(signal.SIGINT)
            _, errors = pull.communicate(timeout=20)
        assert pull.returncode == 130
        assert b"Traceback" not in errors
        throttle.bytes_per_s = 0
        box.corral("pull", "-q", f"{throttle.host}/slow:1", check=True)
        assert throttle.sent < 1.2 * 20 * MIB
        box.corral("image", "rm", f"{throttle.host}/slow:1", check=True)


def put(registry: Registry, tmp_path: Path, name: str, layers: list[bytes]) -> None:
    archive = write_oci_archive(tmp_path / "put.tar", f"{name}:1", layers, image_config(layers), compress=False)
    skopeo("--insecure-policy", "copy", "-q", "--dest-tls-verify=false", f"oci-archive:{archive}",
           f"docker://{registry.host}/{name}:1")  # fmt: skip


def wait_until(is_so: object, timeout_s: float = 60.0) -> None:
    assert callable(is_so)
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, "it does not come about"
        time.sleep(0.01)


def test_everything_killed_in_the_middle_of_a_large_image_resumes_and_runs(registry: Registry, tmp_path: Path) -> None:
    """kill -9 of the whole daemon and the command; at most 1.1 times the size is fetched in total."""
    noise = random.Random(5).randbytes(HUGE_BYTES)
    put(registry, tmp_path, "huge", [busybox_layer(), layer([Entry("noise", noise)])])
    with Corrald() as daemon, throttled(registry.port, 40 * MIB) as throttle:
        name = f"{throttle.host}/huge:1"
        daemon.start()
        with subprocess.Popen(
            [CORRAL, "pull", "-q", name], env=os.environ | {"CORRAL_ADDRESS": daemon.address}, stderr=subprocess.PIPE
        ) as pull:
            wait_until(lambda: throttle.sent > HUGE_BYTES // 2)
            daemon.kill9()
            pull.kill()
        throttle.bytes_per_s = 0
        daemon.start()
        assert daemon.corral("images", "-q").stdout == b""
        result = daemon.corral("run", "--rm", name, "sha256sum", "/noise")
        import hashlib

        assert result.stdout.decode().split() == [hashlib.sha256(noise).hexdigest(), "/noise"], result.stderr
        status = Path(f"/proc/{daemon.processes['corrald'].pid}/status").read_text().splitlines()
        [most] = [int(line.split()[1]) for line in status if line.startswith("VmHWM:")]
        assert most < 150 * 1024, f"the daemon had {most} KiB"
        share = throttle.sent / HUGE_BYTES
        assert share <= 1.1, f"{share:.3f} times the size was fetched"


def test_neither_start_nor_memory_of_a_daemon_that_never_pulls_knows_of_http(box: Corrald, image: str) -> None:
    box.corral("pull", "-q", image, check=True)
    with running(services=("images",), private_names=False) as daemon:
        maps = Path(f"/proc/{daemon.processes['corrald'].pid}/maps").read_text()
        assert "aiohttp" not in maps
    maps = Path(f"/proc/{box.processes['corrald'].pid}/maps").read_text()
    assert "aiohttp" in maps, "the other one has, so the test would see it"
