"""What the network service and its proxy say to each other: JSON objects, each a packet of a SOCK_SEQPACKET socket.

    serve   ports, with their sockets; one that is served already comes without, and has another target from then on
                               ->   served: how many; all are, or it hangs up
    drop    keys of ports      ->   dropped: how many
    list    true               ->   serve: the ports, with their sockets; more: whether others follow

A proxy lives on under later versions of the service, so both ignore what they do not know.
"""

import errno
import json
import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import batched
from typing import cast

type Key = tuple[str, str, int]
"""A published port: its protocol, the address of the host as it was named, its number."""
type Target = tuple[str, int]
type Message = Mapping[str, object]

_PORTS_AT_ONCE, _SOCKETS_AT_ONCE = 60, 250  # SCM_MAX_FD is 253
_LONGEST = 1 << 16


@dataclass(frozen=True, slots=True)
class Port:
    """One that is served: the first of its sockets is bound to ::1, the others are but kept from other programs."""

    key: Key
    target: Target
    sockets: Sequence[socket.socket]


def send(control: socket.socket, message: Message, ports: Sequence[Port] = ()) -> None:
    """Send a message and what it says of ports. Raises OSError."""
    fields = [{"key": port.key, "target": port.target, "sockets": len(port.sockets)} for port in ports]
    data = json.dumps({**message, **({"serve": fields} if fields else {})}).encode()
    socket.send_fds(control, [data], [each.fileno() for port in ports for each in port.sockets])


def in_packets(ports: Iterable[Port]) -> Iterator[Sequence[Port]]:
    """Split them into as many as one message can have."""
    return batched(ports, _PORTS_AT_ONCE)


def receive(control: socket.socket) -> tuple[Message, Sequence[Port]] | None:
    """The next message, and the ports in it; None at the end.

    Raises OSError: EMFILE if there was no room for all sockets, of which none is kept then; ValueError.
    """
    data, fds, flags, _ = socket.recv_fds(control, _LONGEST, _SOCKETS_AT_ONCE, socket.MSG_CMSG_CLOEXEC)
    if flags & socket.MSG_CTRUNC:
        for fd in fds:
            os.close(fd)
        raise OSError(errno.EMFILE, "too many open files: not all sockets of ports have come")
    if not data:
        return None
    sockets = [socket.socket(fileno=fd) for fd in fds]
    message = json.loads(data)
    ports = []
    for fields in message.get("serve", ()):
        count = fields["sockets"]
        ports.append(Port(key_of(fields["key"]), _target_of(fields["target"]), sockets[:count]))
        del sockets[:count]
    return message, ports


def key_of(fields: object) -> Key:
    """As it is in JSON. Raises ValueError."""
    protocol, host_ip, host_port = cast("Sequence[object]", fields)
    return str(protocol), str(host_ip), cast("int", host_port)


def _target_of(fields: Sequence[object]) -> Target:
    address, port = fields
    return str(address), cast("int", port)
