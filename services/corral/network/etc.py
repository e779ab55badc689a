"""/etc/hosts, /etc/resolv.conf and /etc/hostname of an endpoint, as texts. Pure, but for reading the host's own."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Self

from corral.network.model import Dns, Endpoint, Mode
from corral.rpc.errors import FailedPrecondition

HOST_GATEWAY = "host-gateway"

_LOCALHOST = (
    ("127.0.0.1", "localhost"),
    ("::1", "localhost ip6-localhost ip6-loopback"),
    ("fe00::", "ip6-localnet"),
    ("ff00::", "ip6-mcastprefix"),
    ("ff02::1", "ip6-allnodes"),
    ("ff02::2", "ip6-allrouters"),
)


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
    return "".join(f"{address}\t{name}\n" for address, name in (*_LOCALHOST, *names))


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
    """Those name servers that can be asked from another network namespace: no loopback addresses, no link-local ones with a
    zone, and IPv6 ones only where the endpoint has IPv6."""
    return tuple(server for server in servers if _is_reachable(server, ipv6=ipv6))


def _is_reachable(server: str, *, ipv6: bool) -> bool:
    try:
        address = ip_address(server)
    except ValueError:
        return False
    if address.is_loopback or address.is_unspecified or address.is_link_local:
        return False
    return address.version == 4 or ipv6


def resolver_for(host: Resolver, resolved: Resolver, dns: Dns, *, fallback: Sequence[str], ipv6: bool) -> Resolver:
    """What an endpoint of its own namespace gets: what it asked for, else what the host has.

    `resolved` is what systemd-resolved forwards to; it counts where all the host names is a loopback address.
    """
    servers = dns.servers or reachable(host.servers, ipv6=ipv6) or reachable(resolved.servers, ipv6=ipv6)
    # `search .` is the user's way to say: none.
    search = () if dns.search == (".",) else dns.search or host.search or resolved.search
    # Options of the stub (edns0, trust-ad) speak about it, not about the servers behind it.
    inherited = host.options if reachable(host.servers, ipv6=ipv6) else resolved.options
    return Resolver(tuple(servers or fallback), search, dns.options or inherited)


def read_or_empty(path: Path) -> str:
    """A file of the host that may be missing."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


@dataclass(frozen=True, slots=True)
class HostFiles:
    """What the host itself has."""

    hosts: str
    resolver: Resolver
    resolved: Resolver  # what systemd-resolved forwards to; empty where it does not run

    @classmethod
    def read(cls, resolv_conf: Path, resolved_conf: Path) -> Self:
        """Read them now: they change with the networks of the host."""
        resolver = parse_resolv_conf(read_or_empty(resolv_conf))
        resolved = parse_resolv_conf(read_or_empty(resolved_conf))
        return cls(read_or_empty(Path("/etc/hosts")), resolver, resolved)


def compose(endpoint: Endpoint, host: HostFiles, fallback: Sequence[str]) -> EtcFiles:
    """The three files of an endpoint. Raises FailedPrecondition for `host-gateway` where there is no gateway."""
    request = endpoint.request
    hostname = hostname_of(endpoint)
    extra = [(_resolved(address, endpoint), name) for name, address in request.extra_hosts]
    if endpoint.mode is Mode.HOST:
        hosts = host.hosts + "".join(f"{address}\t{name}\n" for address, name in extra)
        asked = request.dns
        own = host.resolver
        search = asked.search or own.search
        resolver = Resolver(asked.servers or own.servers, search, asked.options or own.options)
        return EtcFiles(hosts, resolver.text(), f"{hostname}\n")
    names = f"{hostname}.{request.domainname} {hostname}" if request.domainname else hostname
    held = [str(address) for interface in endpoint.interfaces for address, _ in interface.addresses] or ["127.0.0.1"]
    hosts = hosts_text([*((address, names) for address in held), *extra])
    ipv6 = any(":" in address for address in held)
    resolver = resolver_for(host.resolver, host.resolved, request.dns, fallback=fallback, ipv6=ipv6)
    return EtcFiles(hosts, resolver.text(), f"{hostname}\n")


def hostname_of(endpoint: Endpoint) -> str:
    """The name a container calls itself: the one asked for, the host's in its namespace, else the beginning of the id."""
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
