"""The rows of published ports: whose each is, on which address of the host. They go with the endpoint's row."""

from bisect import insort
from collections.abc import Iterable
from dataclasses import replace
from operator import attrgetter

from corral.network.model import ANY_HOST_IPS, EndpointKey, Port
from corral.rpc.errors import AlreadyExists
from corral.store import Snapshot, Transaction

_ORDER = attrgetter("container_port", "protocol", "host_port", "host_ip")


def joined(ports: Iterable[Port], more: Iterable[Port]) -> tuple[Port, ...]:
    """As an endpoint that is read has them, which `ports` are. Pure."""
    found = list(ports)
    for port in more:
        insort(found, port, key=_ORDER)
    return tuple(found)


def check(snapshot: Snapshot, key: EndpointKey, ports: Iterable[Port]) -> None:
    """Raises AlreadyExists, naming the container, for one that another has."""
    for port in ports:
        if port.is_chosen and (other := holder(snapshot, port)) not in (None, key):
            assert other is not None
            raise AlreadyExists(
                f"port {port} of the host is published by container {other.id[:12]} already: choose another one",
                reason="PORT_TAKEN",
            )


def without_taken(snapshot: Snapshot, port: Port) -> list[int]:
    """Of the ports of the host that it can be, those that nobody publishes."""
    return [
        number for number in port.numbers if holder(snapshot, replace(port, host_port=number, last_host_port=0)) is None
    ]


def check_own(snapshot: Snapshot, key: EndpointKey, ports: Iterable[Port]) -> None:
    """Raises AlreadyExists for one that leads to another port of the same endpoint."""
    for port in ports:
        if port.is_chosen and holder(snapshot, port) == key:
            raise AlreadyExists(
                f"port {port} of the host leads to another port of the container already: withdraw that first",
                reason="PORT_TAKEN",
            )


def insert(transaction: Transaction, key: EndpointKey, ports: Iterable[Port]) -> None:
    """Publish ports of an endpoint. Raises AlreadyExists."""
    check(transaction, key, ports)
    for port in ports:
        transaction.execute(
            "INSERT OR IGNORE INTO ports VALUES (?, ?, ?, ?, ?, ?)",
            (port.protocol, port.host_port, port.host_ip, port.container_port, key.namespace, key.id),
        )


def holder(snapshot: Snapshot, port: Port) -> EndpointKey | None:
    """Who publishes a port on that address, or on one that covers it or is covered by it."""
    rows = snapshot.execute(
        "SELECT namespace, endpoint, host_ip FROM ports WHERE protocol = ? AND host_port = ?",
        (port.protocol, port.host_port),
    )
    for namespace, endpoint_id, host_ip in rows:
        other = Port(port.protocol, 0, port.host_port, host_ip)
        alike = port.version is None or other.version in (None, port.version)
        if alike and (port.host_ip == host_ip or port.host_ip in ANY_HOST_IPS or host_ip in ANY_HOST_IPS):
            return EndpointKey(namespace, endpoint_id)
    return None


def delete(transaction: Transaction, key: EndpointKey, ports: Iterable[Port]) -> None:
    """Withdraw ports of an endpoint; no error for those it has not."""
    for port in ports:
        transaction.execute(
            "DELETE FROM ports WHERE protocol = ? AND host_port = ? AND host_ip = ? AND namespace = ? AND endpoint = ?",
            (port.protocol, port.host_port, port.host_ip, key.namespace, key.id),
        )


def forget_other_boots(transaction: Transaction, boot_id: str) -> None:
    """Nothing stands of them; who attaches such an endpoint again publishes its ports again."""
    transaction.execute(
        "DELETE FROM ports WHERE EXISTS (SELECT 1 FROM endpoints AS e"
        " WHERE e.namespace = ports.namespace AND e.id = ports.endpoint AND e.boot_id <> ?)",
        (boot_id,),
    )
