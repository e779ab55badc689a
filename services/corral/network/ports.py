"""Ports of the host that lead to containers: chosen, held, and where they lead.

    hold     a socket of ours is bound to each, so that no program of the host can have it too
    row      so that no other container can, and to find them after a crash
    rules    elements in maps of the firewall's table (corral.network.rules)
    proxy    what listens at ::1 (corral.network.proxying)

No caller reaches a held socket: what comes for the port is sent on before, but for ::1, whose socket is the proxy's.
Everything that binds or closes runs on the netlink thread, which is in the host's network namespace.
"""

import contextlib
import errno
import fcntl
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from corral.network.cni.driver import maps_ports
from corral.network.ipam import Address
from corral.network.model import ANY_HOST_IPS, Endpoint, EndpointKey, Forward, Port
from corral.network.proxy.wire import Target
from corral.rpc.errors import AlreadyExists, InvalidArgument, ResourceExhausted, from_os_error

TRIES = 20
LOOPBACK6 = "::1"
_PROXIED = frozenset((protocol, host_ip) for protocol in ("tcp", "udp") for host_ip in ("", "::", LOOPBACK6))
_KINDS = {
    "tcp": (socket.SOCK_STREAM, socket.IPPROTO_TCP),
    "udp": (socket.SOCK_DGRAM, socket.IPPROTO_UDP),
    "sctp": (socket.SOCK_STREAM, socket.IPPROTO_SCTP),
}
_SELECTABLE = 1024  # FD_SETSIZE: libnftables ends the process where a socket of its own has a higher number
_UNSUPPORTED = (errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT, errno.ESOCKTNOSUPPORT)


def forwards(endpoint: Endpoint, ports: Iterable[Port]) -> list[Forward]:
    """Where ports of it lead: to its first address of each IP version in a network that has a way out. Pure."""
    return [forward for port in ports for forward in _forwards(endpoint, port)]


def _forwards(endpoint: Endpoint, port: Port) -> list[Forward]:
    if port.host_ip == LOOPBACK6:
        return []
    found = []
    for version in (4, 6):
        if port.version in (None, version):
            address = _reachable(endpoint, version)
            if address is not None:
                found.append(Forward(port.protocol, port.host_ip, port.host_port, address, port.container_port))
    return found


def _reachable(endpoint: Endpoint, version: int) -> Address | None:
    ways = (each for each in endpoint.interfaces if each.network.is_bridge and not each.network.internal)
    held = (each.address(version) for each in ways)
    return next((each[0] for each in held if each is not None), None)


def proxy_target(endpoint: Endpoint, port: Port) -> Target | None:
    """Where a port of it leads from ::1, by IPv6 if it has that; None: nowhere, it is for other addresses. Pure."""
    if (port.protocol, port.host_ip) not in _PROXIED:
        return None
    address = _reachable(endpoint, 6) or _reachable(endpoint, 4)
    return None if address is None else (str(address), port.container_port)


def check_reachable(endpoint: Endpoint, asked: Iterable[Port]) -> None:
    """Raises InvalidArgument for a port that would lead nowhere."""
    if any(maps_ports(interface.network) for interface in endpoint.interfaces):
        return
    for port in asked:
        if not _forwards(endpoint, port) and not proxy_target(endpoint, port):
            version = f"IPv{port.version} " if port.version else ""
            raise InvalidArgument(
                f"port {port.container_port}/{port.protocol} cannot be published: the container has no {version}address"
                " in a bridge network with a way out",
                reason="PORT_UNREACHABLE",
            )


@dataclass(frozen=True, slots=True)
class Held:
    """The sockets that hold a port; `loopback`, which is one of them, is for callers of ::1."""

    loopback: socket.socket | None = None
    others: list[socket.socket] = field(default_factory=list)

    @property
    def sockets(self) -> Sequence[socket.socket]:
        """The one at ::1 first."""
        return self.others if self.loopback is None else [self.loopback, *self.others]


_NONE: Mapping[Port, Sequence[int]] = MappingProxyType({})


class HostPorts:
    """What holds ports, by endpoint. For the netlink thread."""

    def __init__(self) -> None:
        self._held: dict[EndpointKey, dict[Port, Held]] = {}

    def hold(self, key: EndpointKey, asked: Sequence[Port], free: Mapping[Port, Sequence[int]] = _NONE) -> list[Port]:
        """Take these ports, a free one for each that names none; returns them with their numbers. `free` are those that
        one of several may become.

        Raises AlreadyExists, InvalidArgument; then none of them is held.
        """
        taken: dict[Port, Held] = {}
        try:
            # Those that can be but one first: what is left is for those that can be others.
            for port in sorted(asked, key=lambda port: not port.is_chosen):
                chosen, held = _take_of(port, free[port]) if port in free else _take(port)
                taken[chosen] = held
        except BaseException:
            _close(taken)
            raise
        self._held.setdefault(key, {}).update(taken)
        return list(taken)

    def inherit(self, key: EndpointKey, port: Port, sockets: Sequence[socket.socket]) -> None:
        """Hold it by what another process has kept: the one at ::1 first."""
        loopback, *others = sockets
        self._held.setdefault(key, {})[port] = Held(loopback, others)

    def held(self, key: EndpointKey, port: Port) -> Held | None:
        """What holds it for this endpoint; None: nothing."""
        return self._held.get(key, {}).get(port)

    def release(self, key: EndpointKey, ports: Iterable[Port] | None = None) -> None:
        """Let go of these, or of all that an endpoint has; no error for what is not held."""
        held = self._held.get(key, {})
        _close({port: held.pop(port) for port in (list(held) if ports is None else set(ports)) if port in held})
        if not held:
            self._held.pop(key, None)

    def close(self) -> None:
        """Let go of everything."""
        for key in list(self._held):
            self.release(key)


def out_of_the_way(one: socket.socket) -> socket.socket:
    """The same socket by a number that leaves the low ones, of which ports would take all, to who depends on them.

    It stays as it is where so many files are not allowed.
    """
    try:
        number = fcntl.fcntl(one, fcntl.F_DUPFD_CLOEXEC, _SELECTABLE)
    except OSError:
        return one
    one.close()
    return socket.socket(fileno=number)


def _close(taken: Mapping[Port, Held]) -> None:
    for held in taken.values():
        for each in held.sockets:
            each.close()


def _take(port: Port) -> tuple[Port, Held]:
    if port.host_port:
        return port, _bind(port)
    for _ in range(TRIES):
        with contextlib.ExitStack() as stack:
            # The kernel chooses one that is free on the first address; the others may have it taken.
            first = stack.enter_context(_socket(port, 4 if port.version is None else port.version))
            first.bind((port.host_ip or "0.0.0.0", 0))
            chosen = replace(port, host_port=first.getsockname()[1])
        with contextlib.suppress(AlreadyExists):
            return chosen, _bind(chosen)
    raise ResourceExhausted(f"no free port of the host was found for {port.container_port}/{port.protocol}")


def _take_of(port: Port, numbers: Sequence[int]) -> tuple[Port, Held]:
    for number in numbers:
        chosen = replace(port, host_port=number, last_host_port=0)
        with contextlib.suppress(AlreadyExists):
            return chosen, _bind(chosen)
    raise AlreadyExists(
        f"ports {port} of the host are all in use: choose other ones, or stop what has them", reason="PORT_TAKEN"
    )


def _bind(port: Port) -> Held:
    wanted = [(4, "0.0.0.0"), (6, "::")] if port.version is None else [(port.version, port.host_ip)]
    held: list[socket.socket] = []
    try:
        for version, address in wanted:
            try:
                each = _socket(port, version)
                held.append(each)
                _bind_unless_used(each, (address, port.host_port))
            except OSError as e:
                # A kernel without IPv6, or without SCTP, has no program that could have the port either.
                if e.errno in _UNSUPPORTED or (e.errno == errno.EADDRNOTAVAIL and address in ANY_HOST_IPS):
                    continue
                raise _refusal(port, e) from e
        if (port.protocol, port.host_ip) in _PROXIED:
            return _with_loopback(port, held)
    except BaseException:
        for each in held:
            each.close()
        raise
    return Held(None, held)


def _with_loopback(port: Port, held: list[socket.socket]) -> Held:
    """With the socket that the proxy is given, and listens on, if the host has ::1. Raises OSError."""
    covering = next((each for each in held if each.family == socket.AF_INET6), None)
    if covering is None:
        return Held(None, held)
    if port.host_ip == LOOPBACK6:
        return Held(covering)
    loopback = _socket(port, 6)
    try:
        _share(covering, loopback, shared=True)
        loopback.bind((LOOPBACK6, port.host_port))
    except OSError as e:
        loopback.close()
        if e.errno != errno.EADDRNOTAVAIL:
            raise
        return Held(None, held)
    finally:
        _share(covering, shared=False)
    _share(loopback, shared=False)
    return Held(loopback, held)


def _share(*sockets: socket.socket, shared: bool) -> None:
    """Whether others that have it so may have an address too that is covered, while nobody listens there."""
    for each in sockets:
        each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, shared)


def _bind_unless_used(made: socket.socket, where: tuple[str, int]) -> None:
    """Bind it; connections of a server that has ended, which linger for a minute, are no use of the port."""
    try:
        made.bind(where)
    except OSError as e:
        if e.errno != errno.EADDRINUSE or made.type != socket.SOCK_STREAM:
            raise
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(where)
        if made.family == socket.AF_INET:
            made.listen(1)  # else whoever is as forbearing could have it too


def _socket(port: Port, version: int) -> socket.socket:
    kind, protocol = _KINDS[port.protocol]
    made = out_of_the_way(socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, kind, protocol))
    if version == 6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    return made


def _refusal(port: Port, e: OSError) -> Exception:
    if e.errno == errno.EADDRINUSE:
        return AlreadyExists(
            f"port {port} of the host is in use by another program: choose another one, or stop that",
            reason="PORT_TAKEN",
        )
    if e.errno == errno.EADDRNOTAVAIL:
        return InvalidArgument(f"{port.host_ip} is no address of this host: ports cannot be published on it")
    return from_os_error(e, f"port {port} of the host cannot be published")
