"""/etc/hosts, /etc/resolv.conf and /etc/hostname of an endpoint, as texts. Pure, but for reading the host's own."""

import functools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path

from corral.network.cni import documents
from corral.network.model import Dns, Endpoint, Mode
from corral.rpc.errors import FailedPrecondition

HOST_GATEWAY = "host-gateway"
# Names of containers have no dots: they are asked for as they are, before any search domain is tried.
NDOTS = "ndots:0"

_LOCALHOST = """\
127.0.0.1\tlocalhost
::1\tlocalhost ip6-localhost ip6-loopback
fe00::\tip6-localnet
ff00::\tip6-mcastprefix
ff02::1\tip6-allnodes
ff02::2\tip6-allrouters
"""


@dataclass(frozen=True, slots=True)
class EtcFiles:
    """Texts of the three files."""

    hosts: str
    resolv_conf: str
    hostname: str


@dataclass(frozen=True, slots=True)
class Resolver:
    """What a resolv.conf says. Source: resolv.conf(5)."""

    servers: tuple[str, ...] = ()
    search: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    def text(self) -> str:
        """As a file."""
        lines = [f"nameserver {server}" for server in self.servers]
        lines += [f"search {' '.join(self.search)}"] if self.search else []
        lines += [f"options {' '.join(self.options)}"] if self.options else []
        return "".join(f"{line}\n" for line in lines)


def hosts_text(names: Iterable[tuple[str, str]]) -> str:
    """A hosts file: the loopback names, then (address, names) lines."""
    return _LOCALHOST + "".join([f"{address}\t{name}\n" for address, name in names])


def parse_resolv_conf(text: str) -> Resolver:
    """What a resolv.conf says; lines that mean nothing to resolv.conf(5) are dropped, the last `search` wins."""
    servers: list[str] = []
    search: tuple[str, ...] = ()
    options: list[str] = []
    for line in text.splitlines():
        keyword, *values = line.split("#")[0].split(";")[0].split() or [""]
        if keyword == "nameserver" and values:
            servers.append(values[0])
        elif keyword in ("search", "domain"):
            search = tuple(values)
        elif keyword == "options":
            options += values
    return Resolver(tuple(servers), search, tuple(options))


def reachable(servers: Iterable[str], *, ipv6: bool) -> tuple[str, ...]:
    """Those name servers that can be asked from another network namespace: no loopback addresses, no link-local ones
    with a zone, and IPv6 ones only where the endpoint has IPv6."""
    return tuple(server for server in servers if _is_reachable(server, ipv6=ipv6))


@functools.lru_cache(maxsize=64)
def _is_reachable(server: str, *, ipv6: bool) -> bool:
    try:
        address = ip_address(server)
    except ValueError:
        return False
    if address.is_loopback or address.is_unspecified or address.is_link_local:
        return False
    return address.version == 4 or ipv6


def read_or_empty(path: Path) -> str:
    """A file of the host that may be missing."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


type _Stamp = tuple[int, int, int, int, int]


class HostFiles:
    """What the host itself has, read when asked for if it has changed: it does with the networks of the host."""

    def __init__(self, resolv_conf: Path, resolved_conf: Path) -> None:
        """`resolved_conf` is what systemd-resolved forwards to; it need not exist."""
        self._resolv_conf = str(resolv_conf)
        self._resolved_conf = str(resolved_conf)
        self._read: dict[str, tuple[_Stamp | None, Resolver]] = {}

    def hosts(self) -> str:
        """Its /etc/hosts."""
        return read_or_empty(Path("/etc/hosts"))

    def resolver(self) -> Resolver:
        """Its resolver."""
        return self._resolver(self._resolv_conf)

    def resolved(self) -> Resolver:
        """What is behind its resolver, where that listens on a loopback address."""
        return self._resolver(self._resolved_conf)

    def _resolver(self, path: str) -> Resolver:
        stamp = _stamp(path)
        known = self._read.get(path)
        if known is None or known[0] != stamp:
            # Stamped before it was read: what is written meanwhile is read at the next time.
            known = self._read[path] = stamp, parse_resolv_conf(read_or_empty(Path(path)))
        return known[1]


def _stamp(path: str) -> _Stamp | None:
    """Differs after every change of a file; None: it cannot be read."""
    try:
        status = os.stat(path)  # noqa: PTH116 - a string
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def choose_host_resolver(host: HostFiles, *, ipv6: bool) -> Resolver:
    """The host's resolver as seen from another namespace: its servers that can be reached from there, or, where it
    names only loopback addresses, those that systemd-resolved forwards to. Options of the stub (edns0, trust-ad)
    speak about the stub, so they come from the same file as the servers."""
    own = host.resolver()
    if servers := reachable(own.servers, ipv6=ipv6):
        return Resolver(servers, own.search, own.options)
    behind = host.resolved()
    return Resolver(reachable(behind.servers, ipv6=ipv6), own.search or behind.search, behind.options)


def merged(host: Resolver, dns: Dns, fallback: Sequence[str] = ()) -> Resolver:
    """What an endpoint asked for, each empty field as the host has it. `search .` is the user's way to say: none."""
    search = () if dns.search == (".",) else dns.search or host.search
    return Resolver(dns.servers or host.servers or tuple(fallback), search, dns.options or host.options)


def compose(endpoint: Endpoint, host: HostFiles, fallback: Sequence[str], own_resolver: str = "") -> EtcFiles:
    """The three files of an endpoint; own_resolver is the address of one that knows its networks' names.

    Raises FailedPrecondition for `host-gateway` where there is no gateway."""
    request = endpoint.request
    hostname = hostname_of(endpoint)
    extra = [(_resolved(address, endpoint), name) for name, address in request.extra_hosts]
    if endpoint.mode is Mode.HOST:
        hosts = host.hosts() + "".join(f"{address}\t{name}\n" for address, name in extra)
        return EtcFiles(hosts, merged(host.resolver(), request.dns).text(), f"{hostname}\n")
    names = f"{hostname}.{request.domainname} {hostname}" if request.domainname else hostname
    held = [str(address) for interface in endpoint.interfaces for address, _ in interface.addresses] or ["127.0.0.1"]
    ipv6 = any(":" in address for address in held)
    resolver = merged(merged(choose_host_resolver(host, ipv6=ipv6), _plugins_dns(endpoint)), request.dns, fallback)
    if own_resolver:
        options = resolver.options if any("ndots:" in one for one in resolver.options) else (*resolver.options, NDOTS)
        resolver = replace(resolver, servers=(own_resolver,), options=options)
    return EtcFiles(hosts_text([*((one, names) for one in held), *extra]), resolver.text(), f"{hostname}\n")


def _plugins_dns(endpoint: Endpoint) -> Dns:
    """What plugins of CNI say, of the first of its networks of which they do."""
    said = (documents.dns_of(interface.cni_result) for interface in endpoint.interfaces)
    return next((dns for dns in said if dns != Dns()), Dns())


def upstream(endpoint: Endpoint, host: HostFiles, fallback: Sequence[str]) -> Sequence[str]:
    """Whom a resolver on the host asks for an endpoint: also servers that only the host reaches."""
    return endpoint.request.dns.servers or host.resolver().servers or tuple(fallback)


def hostname_of(endpoint: Endpoint) -> str:
    """The name a container calls itself: the one asked for, the host's in its namespace, else the beginning of the
    id."""
    if endpoint.request.hostname:
        return endpoint.request.hostname
    return os.uname().nodename if endpoint.mode is Mode.HOST else endpoint.key.id[:12]


def _resolved(address: str, endpoint: Endpoint) -> str:
    if address != HOST_GATEWAY:
        return address
    if endpoint.mode is Mode.HOST:
        return "127.0.0.1"
    for interface in endpoint.interfaces:
        if (held := interface.address(4)) is not None:
            return str(held[1].gateway)
    raise FailedPrecondition("host-gateway needs a network: this container has none", reason="NO_GATEWAY")
