"""Ports of the host that lead to containers: chosen, held, and where they lead.

    hold     a socket of ours is bound to each, so that no program of the host can have it too
    row      so that no other container can, and to find them after a crash
    rules    elements in maps of the firewall's table (corral.network.rules)

No caller reaches a held socket: what comes for the port is sent on before. Everything that binds or
closes runs on the netlink thread, which is in the host's network namespace.
"""

import contextlib
import errno
import socket
from collections.abc import Iterable, Sequence
from dataclasses import replace

from corral.network.cni.driver import maps_ports
from corral.network.model import ANY_HOST_IPS, Endpoint, EndpointKey, Forward, Port
from corral.rpc.errors import AlreadyExists, InvalidArgument, ResourceExhausted, from_os_error

TRIES = 20
_KINDS = {
    "tcp": (socket.SOCK_STREAM, socket.IPPROTO_TCP),
    "udp": (socket.SOCK_DGRAM, socket.IPPROTO_UDP),
    "sctp": (socket.SOCK_STREAM, socket.IPPROTO_SCTP),
}
_UNSUPPORTED = (errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT, errno.ESOCKTNOSUPPORT)


def forwards(endpoint: Endpoint, ports: Iterable[Port]) -> list[Forward]:
    """Where ports of it lead: to its first address of each IP version in a network that has a way out. Pure."""
    return [forward for port in ports for forward in _forwards(endpoint, port)]


def _forwards(endpoint: Endpoint, port: Port) -> list[Forward]:
    found = []
    for version in (4, 6):
        if port.version not in (None, version):
            continue
        ways = (each for each in endpoint.interfaces if each.network.is_bridge and not each.network.internal)
        reachable = (each.address(version) for each in ways)
        held = next((each for each in reachable if each is not None), None)
        if held is not None:
            found.append(Forward(port.protocol, port.host_ip, port.host_port, held[0], port.container_port))
    return found


def check_reachable(endpoint: Endpoint, asked: Iterable[Port]) -> None:
    """Raises InvalidArgument for a port that would lead nowhere."""
    if any(maps_ports(interface.network) for interface in endpoint.interfaces):
        return
    for port in asked:
        if not _forwards(endpoint, port):
            version = f"IPv{port.version} " if port.version else ""
            raise InvalidArgument(
                f"port {port.container_port}/{port.protocol} cannot be published: the container has no {version}address"
                " in a bridge network with a way out",
                reason="PORT_UNREACHABLE",
            )


class HostPorts:
    """The sockets that hold ports, by endpoint. For the netlink thread."""

    def __init__(self) -> None:
        self._held: dict[EndpointKey, dict[Port, list[socket.socket]]] = {}

    def hold(self, key: EndpointKey, asked: Sequence[Port]) -> list[Port]:
        """Take these ports, a free one for each that names none; returns them with their numbers.

        Raises AlreadyExists, InvalidArgument; then none of them is held.
        """
        taken: dict[Port, list[socket.socket]] = {}
        try:
            for port in asked:
                chosen, sockets = _take(port)
                taken[chosen] = sockets
        except BaseException:
            _close(taken)
            raise
        self._held.setdefault(key, {}).update(taken)
        return list(taken)

    def holds(self, key: EndpointKey, port: Port) -> bool:
        """Whether it is held for this endpoint."""
        return port in self._held.get(key, {})

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


def _close(taken: dict[Port, list[socket.socket]]) -> None:
    for sockets in taken.values():
        for each in sockets:
            each.close()


def _take(port: Port) -> tuple[Port, list[socket.socket]]:
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


def _bind(port: Port) -> list[socket.socket]:
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
    except BaseException:
        for each in held:
            each.close()
        raise
    return held


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
    made = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, kind, protocol)
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
