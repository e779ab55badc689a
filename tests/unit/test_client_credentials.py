"""Logins as docker keeps them: read, written, and left to helpers."""

import base64
import json
import stat
from pathlib import Path

import pytest

from corral.api.images.v1.images_pb2 import RegistryAuth
from corral.client import credentials


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory for config.json, and an empty one for helpers on the path."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return tmp_path


def config(home: Path) -> dict[str, object]:
    document: dict[str, object] = json.loads((home / "docker" / "config.json").read_text())
    return document


def write(home: Path, document: object) -> None:
    (home / "docker").mkdir(exist_ok=True)
    (home / "docker" / "config.json").write_text(document if isinstance(document, str) else json.dumps(document))


def helper(home: Path, name: str, script: str) -> Path:
    """docker-credential-NAME, which notes what it is asked in a file of its own."""
    path = home / "bin" / f"docker-credential-{name}"
    path.write_text(f'#!/bin/sh\ninput=$(cat)\nprintf "%s %s\\n" "$1" "$input" >>{home}/asked\n{script}\n')
    path.chmod(0o755)
    return home / "asked"


def packed(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    ("name", "registry"),
    [
        ("busybox", "docker.io"),
        ("alice/app:1", "docker.io"),
        ("docker.io/x", "docker.io"),
        ("index.docker.io/library/x", "docker.io"),
        ("localhost/x", "localhost"),
        ("localhost:5000/x", "localhost:5000"),
        ("ghcr.io/a/b@sha256:00", "ghcr.io"),
        ("[::1]:5000/x", "[::1]:5000"),
        ("HOST/x", "HOST"),
    ],
)
def test_the_registry_of_a_name(name: str, registry: str) -> None:
    assert credentials.registry_of(name) == registry


def test_without_a_login_there_is_nothing(home: Path) -> None:
    assert credentials.find("r.example") == RegistryAuth()
    assert credentials.registry_auth("busybox") == RegistryAuth()
    write(home, "")
    assert credentials.find("r.example") == RegistryAuth()


def test_what_is_stored_is_found_again_and_is_nobody_elses_to_read(home: Path) -> None:
    write(home, {"HttpHeaders": {"a": "b"}, "auths": {"other.example": {"auth": packed("o:p")}}})
    where = credentials.store("r.example:5000", RegistryAuth(username="alice", password="pass:word ü"))
    path = home / "docker" / "config.json"
    assert where == str(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    found = credentials.registry_auth("r.example:5000/a/b:1")
    assert (found.username, found.password) == ("alice", "pass:word ü")
    assert credentials.find("other.example").username == "o"
    assert config(home)["HttpHeaders"] == {"a": "b"}, "what others keep there stays"
    assert credentials.erase("r.example:5000")
    assert not credentials.erase("r.example:5000")
    assert credentials.find("r.example:5000") == RegistryAuth()
    assert credentials.find("other.example").username == "o"


def test_the_hub_has_the_name_that_docker_gives_it(home: Path) -> None:
    credentials.store("docker.io", RegistryAuth(username="alice", password="x"))
    assert config(home)["auths"] == {"https://index.docker.io/v1/": {"auth": packed("alice:x")}}
    assert credentials.registry_auth("busybox").username == "alice"
    assert credentials.erase("docker.io")


def test_an_identity_token_is_kept_instead_of_the_password(home: Path) -> None:
    credentials.store("r.example", RegistryAuth(username="alice", password="x", identity_token="t"))
    assert config(home)["auths"] == {"r.example": {"auth": packed("alice:"), "identitytoken": "t"}}
    found = credentials.find("r.example")
    assert (found.username, found.password, found.identity_token) == ("alice", "", "t")


def test_what_docker_wrote_is_understood(home: Path) -> None:
    write(home, {"auths": {"https://old.example/v1/": {"auth": packed("alice:secret\0\0")},
                           "token.example": {"registrytoken": "abc"}}})  # fmt: skip
    found = credentials.find("old.example")
    assert (found.username, found.password) == ("alice", "secret")
    assert credentials.find("token.example").registry_token == "abc"


def test_the_environment_is_asked_before_the_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(home, {"auths": {registry: {"auth": packed("file:secret")} for registry in ("a.example", "b.example")}})
    monkeypatch.setenv("DOCKER_AUTH_CONFIG", json.dumps({"auths": {"https://a.example": {"auth": packed("ci:job")}}}))
    assert credentials.find("a.example") == RegistryAuth(username="ci", password="job")
    assert credentials.find("b.example").username == "file"
    for text in ("secret{", "[]"):
        monkeypatch.setenv("DOCKER_AUTH_CONFIG", text)
        with pytest.raises(ValueError, match="DOCKER_AUTH_CONFIG is not a JSON object") as caught:
            credentials.find("a.example")
        assert "secret" not in str(caught.value)


def test_a_link_to_the_file_stays_one(home: Path) -> None:
    write(home, {})
    path = home / "docker" / "config.json"
    path.rename(home / "real.json")
    path.symlink_to(home / "real.json")
    credentials.store("r.example", RegistryAuth(username="a", password="b"))
    assert path.is_symlink()
    assert "r.example" in (home / "real.json").read_text()


@pytest.mark.parametrize(
    "document",
    ["{", "[]", '{"auths": 5}', '{"auths": {"r.example": {"auth": "%%%"}}}', '{"credsStore": "../../x"}'],
)
def test_a_file_that_is_wrong_is_named(home: Path, document: str) -> None:
    write(home, document)
    with pytest.raises(ValueError, match=r"config\.json"):
        credentials.find("r.example")


@pytest.mark.parametrize(
    "document", [{"credsStore": "test"}, {"credHelpers": {"r.example": "test"}, "credsStore": "other"}]
)
def test_a_helper_is_asked_by_its_protocol(home: Path, document: dict[str, object]) -> None:
    write(home, document)
    asked = helper(home, "test", 'echo \'{"ServerURL":"r.example","Username":"alice","Secret":"s3cret"}\'')
    found = credentials.find("r.example")
    assert (found.username, found.password) == ("alice", "s3cret")
    assert asked.read_text() == "get r.example\n"


def test_a_helper_may_hold_an_identity_token(home: Path) -> None:
    write(home, {"credsStore": "test"})
    helper(home, "test", 'echo \'{"Username":"<token>","Secret":"t0ken"}\'')
    assert credentials.find("r.example") == RegistryAuth(identity_token="t0ken")


def test_a_helper_that_has_nothing_is_no_failure(home: Path) -> None:
    write(home, {"credsStore": "test", "auths": {"r.example": {"auth": packed("from:file")}}})
    helper(home, "test", "echo credentials not found in native keychain; exit 1")
    assert credentials.find("none.example") == RegistryAuth()
    assert credentials.find("r.example").username == "from"


def test_a_helper_that_fails_is_named_and_secrets_are_not(home: Path) -> None:
    write(home, {"credsStore": "test"})
    with pytest.raises(ValueError, match="docker-credential-test, which is not installed"):
        credentials.find("r.example")
    helper(home, "test", 'echo "cannot keep $input" >&2; exit 3')
    with pytest.raises(ValueError, match="docker-credential-test store failed with code 3") as caught:
        credentials.store("r.example", RegistryAuth(username="a", password="hunter2"))
    assert "hunter2" not in str(caught.value)
    helper(home, "test", "echo nonsense")
    with pytest.raises(ValueError, match="no answer that can be read"):
        credentials.find("r.example")


def test_a_helper_keeps_and_forgets_instead_of_the_file(home: Path) -> None:
    write(home, {"credsStore": "test"})
    asked = helper(home, "test", '[ "$1" != get ] || echo \'{"Username":"a","Secret":"b"}\'')
    assert credentials.store("docker.io", RegistryAuth(username="alice", password="hunter2")) == ""
    assert "hunter2" not in (home / "docker" / "config.json").read_text()
    assert credentials.erase("docker.io")
    words = [line.partition(" ") for line in asked.read_text().splitlines()]
    assert [word for word, _, _ in words] == ["store", "erase"]
    told = {"ServerURL": "https://index.docker.io/v1/", "Username": "alice", "Secret": "hunter2"}
    assert json.loads(words[0][2]) == told
    assert words[1][2] == "https://index.docker.io/v1/"
