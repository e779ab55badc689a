"""What a user is known by to registries, kept where docker keeps it, so that a login with either serves both.

    $DOCKER_CONFIG/config.json, else ~/.docker/config.json
    {"auths": {"registry.example": {"auth": base64("user:password")} or {"identitytoken": …}},
     "credHelpers": {"registry.example": "NAME"}, "credsStore": "NAME"}

$DOCKER_AUTH_CONFIG may hold such a document with "auths", which is asked before the file and is not written to.
With a helper, the program docker-credential-NAME keeps the secrets: `get`, `store` and `erase` as its argument, the
registry or a JSON object on stdin.
Source: docker/cli "config.json" and "DOCKER_AUTH_CONFIG"; docker/docker-credential-helpers, README "Development".
"""

import asyncio
import base64
import binascii
import json
import os
import secrets
import subprocess
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from corral.api.images.v1.images_pb2 import RegistryAuth

ENVIRONMENT = "DOCKER_AUTH_CONFIG"
DEFAULT_REGISTRY = "docker.io"
# As docker writes it, for historical reasons.
DEFAULT_KEY = "https://index.docker.io/v1/"
TOKEN_USER = "<token>"  # noqa: S105  # the user name by which a helper says that the secret is an identity token
HELPER_TIMEOUT_S = 60.0
_NOT_FOUND = "credentials not found"

type _Config = dict[str, object]


def registry_of(name: str) -> str:
    """The registry that an image's name begins with; docker.io if with none. Source: distribution/reference."""
    first, slash, _ = name.partition("/")
    is_registry = bool(slash) and (any(c in first for c in ".:[") or first == "localhost" or first.lower() != first)
    return DEFAULT_REGISTRY if not is_registry or first == "index.docker.io" else first


def config_path() -> Path:
    directory = os.environ.get("DOCKER_CONFIG")
    return (Path(directory) if directory else Path.home() / ".docker") / "config.json"


def registry_auth(name: str) -> RegistryAuth:
    """What is kept for the registry of an image's name; empty if nothing is. Raises ValueError, OSError."""
    return find(registry_of(name))


async def async_registry_auth(name: str) -> RegistryAuth:
    """As above: a helper may ask its user something first."""
    return await asyncio.to_thread(registry_auth, name)


def find(registry: str) -> RegistryAuth:
    """What is kept for a registry; empty if nothing is. Raises ValueError, OSError."""
    if (found := _in_auths(_environment(), registry)) is not None:
        return found
    config = _read()
    helper = _helper(config, registry)
    if helper and (found := _ask_helper(helper, registry)) is not None:
        return found
    return _in_auths(config, registry) or RegistryAuth()


def _in_auths(config: _Config, registry: str) -> RegistryAuth | None:
    for key, entry in _table(config, "auths").items():
        if _registry_of_key(key) == registry and isinstance(entry, dict):
            return _from_entry(entry, registry)
    return None


def _environment() -> _Config:
    """As build services hand logins on. Its text, which is a secret, is not repeated in errors."""
    try:
        config = json.loads(os.environ.get(ENVIRONMENT) or "{}")
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"${ENVIRONMENT} is not a JSON object as docker's config.json is: correct it, or unset it")
    return config


def store(registry: str, auth: RegistryAuth) -> str:
    """Keep it; returns where, "" if a helper has it. Raises ValueError, OSError."""
    config = _read()
    auths = _table(config, "auths")
    for key in [key for key in auths if _registry_of_key(key) == registry]:
        del auths[key]
    helper = _helper(config, registry)
    if helper:
        secret = {"Username": TOKEN_USER, "Secret": auth.identity_token}
        if not auth.identity_token:
            secret = {"Username": auth.username, "Secret": auth.password}
        _run_helper(helper, "store", json.dumps({"ServerURL": _key(registry), **secret}))
        auths[_key(registry)] = {}
    else:
        auths[_key(registry)] = _to_entry(auth)
    config["auths"] = auths
    _write(config)
    return "" if helper else str(config_path())


def erase(registry: str) -> bool:
    """Forget it; whether there was anything. Raises ValueError, OSError."""
    config = _read()
    auths = _table(config, "auths")
    keys = [key for key in auths if _registry_of_key(key) == registry]
    helper = _helper(config, registry)
    known = bool(keys) or (bool(helper) and _ask_helper(helper, registry) is not None)
    if helper and known:
        _run_helper(helper, "erase", _key(registry))
    if keys:
        for key in keys:
            del auths[key]
        config["auths"] = auths
        _write(config)
    return known


def _key(registry: str) -> str:
    return DEFAULT_KEY if registry == DEFAULT_REGISTRY else registry


def _registry_of_key(key: str) -> str:
    """Old entries are whole addresses."""
    host = urlsplit(key).netloc if "://" in key else key.split("/", maxsplit=1)[0]
    return DEFAULT_REGISTRY if host in ("index.docker.io", "registry-1.docker.io") else host


def _read() -> _Config:
    path = config_path()
    try:
        config = json.loads(path.read_text(encoding="utf-8") or "{}")
    except FileNotFoundError:
        return {}
    except ValueError as e:
        raise ValueError(f"{path} is not JSON: repair it, or move it away and log in again") from e
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a JSON object: repair it, or move it away and log in again")
    return config


def _write(config: _Config) -> None:
    """Whole or not at all, and for its owner only; a link stays one."""
    path = config_path()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = path.resolve()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "w", encoding="utf-8") as file:
            json.dump(config, file, indent="\t")
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _table(config: _Config, key: str) -> dict[str, object]:
    value = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{config_path()}: {key} is not an object")
    return dict(value)


def _helper(config: _Config, registry: str) -> str:
    """The helper of the registry, or of all. Raises ValueError for one that would not be a program of its own name."""
    helpers = _table(config, "credHelpers")
    name = helpers.get(registry, helpers.get(_key(registry), config.get("credsStore"))) or ""
    if not isinstance(name, str) or "/" in name:
        raise ValueError(f"{config_path()}: {name!r} names no credential helper")
    return name


def _from_entry(entry: Mapping[str, object], registry: str) -> RegistryAuth:
    auth = RegistryAuth(
        username=_text(entry, "username"),
        password=_text(entry, "password"),
        identity_token=_text(entry, "identitytoken"),
        registry_token=_text(entry, "registrytoken"),
    )
    if encoded := _text(entry, "auth"):
        try:
            auth.username, _, password = base64.b64decode(encoded, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError) as e:
            raise ValueError(f"{config_path()}: what is kept for {registry} cannot be read: log in again") from e
        auth.password = password.rstrip("\0")
    return auth


def _text(entry: Mapping[str, object], key: str) -> str:
    value = entry.get(key)
    return value if isinstance(value, str) else ""


def _to_entry(auth: RegistryAuth) -> dict[str, str]:
    password = "" if auth.identity_token else auth.password
    entry = {"auth": base64.b64encode(f"{auth.username}:{password}".encode()).decode("ascii")}
    return entry | ({"identitytoken": auth.identity_token} if auth.identity_token else {})


def _ask_helper(helper: str, registry: str) -> RegistryAuth | None:
    output = _run_helper(helper, "get", _key(registry), may_lack=True)
    if output is None:
        return None
    try:
        answer = json.loads(output)
        username, secret = str(answer["Username"]), str(answer["Secret"])
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"docker-credential-{helper} gave no answer that can be read") from e
    if username == TOKEN_USER:
        return RegistryAuth(identity_token=secret)
    return RegistryAuth(username=username, password=secret)


def _run_helper(helper: str, verb: str, text: str, *, may_lack: bool = False) -> str | None:
    """What it prints; None if it has nothing. What it was given is not repeated in errors."""
    program = f"docker-credential-{helper}"
    try:
        done = subprocess.run(
            [program, verb], input=text, capture_output=True, text=True, timeout=HELPER_TIMEOUT_S, check=False
        )
    except FileNotFoundError as e:
        raise ValueError(
            f"{config_path()} names {program}, which is not installed: install it, or edit the file"
        ) from e
    except subprocess.TimeoutExpired as e:
        raise ValueError(f"{program} does not answer") from e
    if done.returncode == 0:
        return done.stdout
    if may_lack and _NOT_FOUND in done.stdout + done.stderr:
        return None
    raise ValueError(f"{program} {verb} failed with code {done.returncode}")
