"""Where a registry is reached: which hosts to ask, in which order, for what.

    certs.d/<host>_<port>_/hosts.toml      or <host>:<port>, <host>, and _default for all that have none

    server = "https://registry.example"            the registry itself, asked last; in _default, where it is of all
                                                   registries, a mirror of those whose name is another
    [host."https://mirror.example"]                asked before it, in this order
      capabilities = ["pull", "resolve"]           of pull, resolve, push, referrers; all if not given
      ca = "ca.crt"                                or a list; relative to the file
      client = [["client.cert", "client.key"]]     or a file with both, or a list of such
      skip_verify = true
      override_path = true                         the address is whole: no /v2 behind it
      dial_timeout = "3s"
      [host."https://mirror.example".header]
        x-name = ["value"]

The form is containerd's (docs/hosts.md). Without the file, *.crt, *.cert and *.key beside each other are taken as
docker takes them. The files are read for each pull and push, so a change needs no restart.
"""

import re
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from corral.images.reference import DEFAULT_DOMAIN
from corral.rpc.errors import FailedPrecondition

HOSTS_FILE = "hosts.toml"
DEFAULT_DIRECTORY = "_default"
HUB = "https://registry-1.docker.io"
CONNECT_S = 15.0

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")
_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


class Capability(StrEnum):
    PULL = "pull"
    RESOLVE = "resolve"
    PUSH = "push"
    REFERRERS = "referrers"


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Whom to trust beside the system's CAs, and what to show. A pair without a key has it in the same file."""

    ca: tuple[Path, ...] = ()
    client: tuple[tuple[Path, Path | None], ...] = ()
    skip_verify: bool = False


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One address of a registry, or of a mirror of it."""

    base: str  # with the API's path, "https://registry.example/v2"
    capabilities: frozenset[Capability] = frozenset(Capability)
    tls: TlsFiles = TlsFiles()
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    connect_s: float = CONNECT_S
    # The registry itself, which the call's credentials are for; a mirror never sees them.
    is_registry: bool = True
    # What a mirror is told about whose content is wanted.
    mirror_of: str = ""

    @property
    def authority(self) -> str:
        return urlsplit(self.base).netloc


def endpoints(certs: Path, domain: str, *, insecure: bool = False) -> tuple[Endpoint, ...]:
    """Those of a registry, as a reference names it. Blocking. Raises FailedPrecondition, naming file and key."""
    found = _configured(certs, domain, insecure=insecure)
    if found is None:
        found = list(_defaults(domain, TlsFiles(), insecure=insecure))
    if insecure:
        found = [replace(e, tls=replace(e.tls, skip_verify=True)) if e.is_registry else e for e in found]
    return tuple(found)


def own_endpoints(certs: Path, domain: str, *, insecure: bool = False) -> tuple[Endpoint, ...]:
    """Those at which the registry itself is, not mirrors of it. Errors as above.

    Where _default's server stands before all registries, they are at their own addresses all the same.
    """
    own = tuple(endpoint for endpoint in endpoints(certs, domain, insecure=insecure) if endpoint.is_registry)
    return own or _defaults(domain, TlsFiles(), insecure=insecure)


def is_loopback(domain: str) -> bool:
    host = urlsplit(f"//{domain}").hostname or ""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _defaults(domain: str, tls: TlsFiles, *, insecure: bool) -> tuple[Endpoint, ...]:
    """A loopback registry may have any certificate, or none: whoever listens there is this host."""
    if domain == DEFAULT_DOMAIN:
        return (Endpoint(f"{HUB}/v2", tls=tls),)
    secure = Endpoint(f"https://{domain}/v2", tls=tls)
    if not is_loopback(domain) and not insecure:
        return (secure,)
    secure = replace(secure, tls=replace(tls, skip_verify=not tls.ca or insecure))
    plain = Endpoint(f"http://{domain}/v2")
    return (plain,) if domain.endswith(":80") else (secure, plain)


def _configured(certs: Path, domain: str, *, insecure: bool) -> list[Endpoint] | None:
    host, colon, port = domain.rpartition(":")
    names = ([f"{host}_{port}_"] if colon and port.isdigit() else []) + [domain, DEFAULT_DIRECTORY]
    try:
        directory = next((certs / name for name in names if (certs / name).is_dir()), None)
        if directory is None:
            return None
        if (directory / HOSTS_FILE).exists():
            return _read(directory / HOSTS_FILE, domain, insecure=insecure)
        return list(_defaults(domain, _docker_files(directory), insecure=insecure))
    except OSError as e:
        raise FailedPrecondition(f"cannot read {e.filename or certs}: {e.strerror}", reason="BAD_HOSTS_FILE") from e


def _docker_files(directory: Path) -> TlsFiles:
    """Source: docker, "Verify repository client with certificates"."""
    files = sorted(directory.iterdir())
    keys = {path.stem: path for path in files if path.suffix == ".key"}
    return TlsFiles(
        ca=tuple(path for path in files if path.suffix == ".crt"),
        client=tuple((path, keys.get(path.stem)) for path in files if path.suffix == ".cert"),
    )


def _read(path: Path, domain: str, *, insecure: bool) -> list[Endpoint]:
    try:
        document = tomllib.loads(path.read_text("utf-8"))
        return list(_from_document(document, domain, path.parent, insecure=insecure))
    except (ValueError, TypeError) as e:
        raise FailedPrecondition(f"{path}: {e}", reason="BAD_HOSTS_FILE") from e


def _from_document(document: Mapping[str, object], domain: str, directory: Path, *, insecure: bool) -> list[Endpoint]:
    """Raises ValueError, naming the key."""
    server = document.get("server", "")
    hosts = document.get("host", {})
    if not isinstance(server, str) or not isinstance(hosts, dict):
        raise ValueError("server must be an address, and host a table of tables")
    if server:
        own = {domain, urlsplit(HUB).netloc} if domain == DEFAULT_DOMAIN else {domain}
        found = _endpoint(server, document, directory, where="server")
        registry = [found if directory.name != DEFAULT_DIRECTORY else _judged(found, own, domain)]
    else:
        tls = _tls(document, directory, "server")
        registry = [
            replace(_with_options(e, document, "server"), tls=e.tls if tls == TlsFiles() else tls)
            for e in _defaults(domain, tls, insecure=insecure)
        ]
    own = {domain, *(e.authority for e in registry if e.is_registry)}
    mirrors = []
    for address, table in hosts.items():
        if not isinstance(table, dict):
            raise ValueError(f"host.{address!r} must be a table")
        mirrors.append(_judged(_endpoint(address, table, directory, where=f"host.{address!r}"), own, domain))
    return [*mirrors, *registry]


def _judged(endpoint: Endpoint, own: Collection[str], domain: str) -> Endpoint:
    """As the registry itself if it is at one of its `own` addresses, else as a mirror."""
    return endpoint if endpoint.authority in own else replace(endpoint, is_registry=False, mirror_of=domain)


def _endpoint(address: str, table: Mapping[str, object], directory: Path, *, where: str) -> Endpoint:
    address = address if "://" in address else f"https://{address}"
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or "@" in parts.netloc:
        raise ValueError(f"{where} {address!r} is not of the form https://HOST[:PORT][/PATH]")
    path = parts.path.rstrip("/")
    if not path.endswith("/v2") and table.get("override_path") is not True:
        path += "/v2"
    made = Endpoint(f"{parts.scheme}://{parts.netloc}{path}", tls=_tls(table, directory, where))
    return _with_options(made, table, where)


def _with_options(endpoint: Endpoint, table: Mapping[str, object], where: str) -> Endpoint:
    return replace(
        endpoint,
        capabilities=_capabilities(table.get("capabilities"), where),
        headers=_headers(table.get("header", {}), where),
        connect_s=_duration_s(table.get("dial_timeout"), where),
    )


def _capabilities(value: object, where: str) -> frozenset[Capability]:
    if value is None or value == []:
        return frozenset(Capability)
    try:
        return frozenset(Capability(word.lower()) for word in _texts(value, f"{where}: capabilities"))
    except ValueError as e:
        raise ValueError(f"{where}: capabilities are of {', '.join(Capability)}: {e}") from e


def _tls(table: Mapping[str, object], directory: Path, where: str) -> TlsFiles:
    skip = table.get("skip_verify", False)
    if not isinstance(skip, bool):
        raise ValueError(f"{where}: skip_verify is neither true nor false")
    ca = table.get("ca", [])
    names = [ca] if isinstance(ca, str) else _texts(ca, f"{where}: ca")
    return TlsFiles(tuple(directory / name for name in names), _client(table.get("client", []), directory, where), skip)


def _client(value: object, directory: Path, where: str) -> tuple[tuple[Path, Path | None], ...]:
    entries = [value] if isinstance(value, str) else value
    if not isinstance(entries, list):
        raise ValueError(f"{where}: client is neither a file nor a list of files or pairs")
    pairs: list[tuple[Path, Path | None]] = []
    for entry in entries:
        names = [entry] if isinstance(entry, str) else _texts(entry, f"{where}: client")
        if not 1 <= len(names) <= 2:
            raise ValueError(f"{where}: client holds {names!r}, which is no pair of certificate and key")
        pairs.append((directory / names[0], directory / names[1] if names[1:] and names[1] else None))
    return tuple(pairs)


def _headers(value: object, where: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: header must be a table")
    headers = []
    for name, content in value.items():
        for text in [content] if isinstance(content, str) else _texts(content, f"{where}: header {name}"):
            if not text.isprintable() or not re.fullmatch(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+", name):
                raise ValueError(f"{where}: header {name!r} is none that HTTP has")
            headers.append((name, text))
    return tuple(headers)


def _duration_s(value: object, where: str) -> float:
    if value is None:
        return CONNECT_S
    parts = list(_DURATION.finditer(value)) if isinstance(value, str) else []
    if not parts or "".join(part[0] for part in parts) != value:
        raise ValueError(f'{where}: dial_timeout {value!r} is no time such as "3s"')
    return sum(float(part[1]) * _UNITS_S[part[2]] for part in parts)


def _texts(value: object, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{where} must be a string or a list of strings")
    return [str(item) for item in value]
