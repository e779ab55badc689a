"""The rows of the network leaf. Every function works inside the snapshot or transaction it is given.

networks 1--n ranges            a network that has interfaces cannot be deleted
endpoints 1--n interfaces n--1 networks
interfaces 1--n allocations n--1 ranges       deleting an endpoint row frees its addresses with it
"""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from ipaddress import ip_address, ip_network
from typing import Any

from corral.network.cni.documents import addresses as addresses_of
from corral.network.model import (
    BUILTIN_NAMESPACE,
    Attachment,
    Dns,
    Endpoint,
    EndpointKey,
    EndpointState,
    Interface,
    Mode,
    Network,
    NetworkState,
    Port,
    Range,
    Request,
)
from corral.store import Row, Snapshot, Transaction

MIGRATIONS: Sequence[str] = (
    """
    CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
    CREATE TABLE networks (
        id TEXT PRIMARY KEY,
        namespace TEXT NOT NULL,          -- '' for those corral itself made
        name TEXT NOT NULL,
        driver TEXT NOT NULL,
        bridge TEXT NOT NULL UNIQUE,
        mtu INTEGER NOT NULL,
        internal INTEGER NOT NULL,
        ipv6 INTEGER NOT NULL,
        options TEXT NOT NULL,            -- JSON object, as are labels
        labels TEXT NOT NULL,
        created_ns INTEGER NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('creating', 'ready', 'removing')),
        UNIQUE (namespace, name)
    ) STRICT;
    CREATE TABLE ranges (
        id INTEGER PRIMARY KEY,
        network TEXT NOT NULL REFERENCES networks (id) ON DELETE CASCADE,
        subnet TEXT NOT NULL,
        gateway TEXT NOT NULL,
        part TEXT NOT NULL,               -- '' for all of the subnet
        reserved TEXT NOT NULL,           -- JSON array
        cursor INTEGER NOT NULL DEFAULT 0 -- where the search for the next address begins
    ) STRICT;
    CREATE INDEX ranges_of_network ON ranges (network);
    CREATE TABLE endpoints (
        namespace TEXT NOT NULL,
        id TEXT NOT NULL,
        mode TEXT NOT NULL,
        request TEXT NOT NULL,            -- JSON, as asked for
        netns TEXT NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('attaching', 'ready')),
        boot_id TEXT NOT NULL,
        created_ns INTEGER NOT NULL,
        owner TEXT NOT NULL,              -- whose namespace and files it shares; '' for its own
        PRIMARY KEY (namespace, id)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE interfaces (
        id INTEGER PRIMARY KEY,
        namespace TEXT NOT NULL,
        endpoint TEXT NOT NULL,
        network TEXT NOT NULL REFERENCES networks (id),
        name TEXT NOT NULL,               -- inside
        host_name TEXT NOT NULL UNIQUE,
        mac TEXT NOT NULL,
        aliases TEXT NOT NULL,            -- JSON array
        UNIQUE (namespace, endpoint, network),
        UNIQUE (namespace, endpoint, name),
        FOREIGN KEY (namespace, endpoint) REFERENCES endpoints (namespace, id) ON DELETE CASCADE
    ) STRICT;
    CREATE INDEX interfaces_of_network ON interfaces (network);
    CREATE TABLE allocations (
        range INTEGER NOT NULL REFERENCES ranges (id),
        address TEXT NOT NULL,
        interface INTEGER NOT NULL REFERENCES interfaces (id) ON DELETE CASCADE,
        PRIMARY KEY (range, address)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX allocations_of_interface ON allocations (interface);
    """,
    """
    CREATE TABLE ports (
        protocol TEXT NOT NULL,
        host_port INTEGER NOT NULL,
        host_ip TEXT NOT NULL,            -- '' for all
        container_port INTEGER NOT NULL,
        namespace TEXT NOT NULL,
        endpoint TEXT NOT NULL,
        PRIMARY KEY (protocol, host_port, host_ip),
        FOREIGN KEY (namespace, endpoint) REFERENCES endpoints (namespace, id) ON DELETE CASCADE
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX ports_of_endpoint ON ports (namespace, endpoint);
    """,
    """
    CREATE TABLE cni_results (
        namespace TEXT NOT NULL,
        endpoint TEXT NOT NULL,
        network TEXT NOT NULL,
        result TEXT NOT NULL,             -- JSON; '' while ADD is under way
        PRIMARY KEY (namespace, endpoint, network),
        FOREIGN KEY (namespace, endpoint, network) REFERENCES interfaces (namespace, endpoint, network)
            ON DELETE CASCADE
    ) STRICT, WITHOUT ROWID;
    """,
    # All that is read of an endpoint's ports is in it.
    """
    DROP INDEX ports_of_endpoint;
    CREATE INDEX ports_of_endpoint ON ports (namespace, endpoint, container_port);
    """,
)

type ByNetwork = dict[str, Network]


# Facts: things to remember that belong to no network.


def fact(snapshot: Snapshot, name: str) -> str | None:
    """A remembered value."""
    row = snapshot.one("SELECT value FROM facts WHERE name = ?", (name,))
    return None if row is None else str(row[0])


def remember(transaction: Transaction, name: str, value: str) -> None:
    """Keep a value under a name, in place of an older one."""
    transaction.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))


# Networks


def insert_network(transaction: Transaction, network: Network) -> None:
    """Raises Duplicate if the name or the bridge is taken."""
    transaction.execute(
        "INSERT INTO networks VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            network.id,
            network.namespace,
            network.name,
            network.driver,
            network.bridge,
            network.mtu,
            network.internal,
            network.ipv6,
            json.dumps(dict(network.options)),
            json.dumps(dict(network.labels)),
            network.created_ns,
            network.state,
        ),
    )
    for part in network.ranges:
        transaction.execute(
            "INSERT INTO ranges (network, subnet, gateway, part, reserved) VALUES (?, ?, ?, ?, ?)",
            (
                network.id,
                str(part.subnet),
                str(part.gateway),
                str(part.window or ""),
                json.dumps([str(address) for address in part.reserved]),
            ),
        )


def set_network_state(transaction: Transaction, network_id: str, state: NetworkState) -> None:
    """Move a network on."""
    transaction.execute("UPDATE networks SET state = ? WHERE id = ?", (state, network_id))


def delete_network(transaction: Transaction, network_id: str) -> None:
    """Raises Referenced while interfaces are in it; no error if it is gone."""
    transaction.execute("DELETE FROM networks WHERE id = ?", (network_id,))


def networks(snapshot: Snapshot, namespace: str | None = None) -> list[Network]:
    """All networks, or those that can be seen from a namespace, oldest first."""
    rows = snapshot.execute(
        "SELECT * FROM networks WHERE :namespace IS NULL OR namespace IN (:namespace, :builtin)"
        " ORDER BY created_ns, id",
        {"namespace": namespace, "builtin": BUILTIN_NAMESPACE},
    )
    return [_network(snapshot, row) for row in rows]


def find_networks(snapshot: Snapshot, namespace: str, name: str) -> list[Network]:
    """Those that a user may mean by `name`: one with that name or id, else all whose id begins with it."""
    seen = (namespace, BUILTIN_NAMESPACE, name)
    rows = snapshot.execute("SELECT * FROM networks WHERE namespace IN (?, ?) AND name = ?", seen)
    rows = rows or snapshot.execute("SELECT * FROM networks WHERE namespace IN (?, ?) AND id = ?", seen)
    rows = rows or snapshot.execute(
        "SELECT * FROM networks WHERE namespace IN (?, ?) AND ? = substr(id, 1, ?)", (*seen, len(name))
    )
    return [_network(snapshot, row) for row in rows]


def network_by_id(snapshot: Snapshot, network_id: str) -> Network | None:
    """A network in any namespace."""
    row = snapshot.one("SELECT * FROM networks WHERE id = ?", (network_id,))
    return None if row is None else _network(snapshot, row)


def endpoint_ids(snapshot: Snapshot, network_id: str, namespace: str | None) -> list[EndpointKey]:
    """Who is in a network; namespace=None: of all namespaces."""
    rows = snapshot.execute(
        "SELECT DISTINCT namespace, endpoint FROM interfaces"
        " WHERE network = :network AND (:namespace IS NULL OR namespace = :namespace) ORDER BY 1, 2",
        {"network": network_id, "namespace": namespace},
    )
    return [EndpointKey(row[0], row[1]) for row in rows]


def _network(snapshot: Snapshot, row: Row) -> Network:
    ranges = snapshot.execute("SELECT * FROM ranges WHERE network = ? ORDER BY id", (row["id"],))
    return Network(
        id=row["id"],
        namespace=row["namespace"],
        name=row["name"],
        driver=row["driver"],
        bridge=row["bridge"],
        ranges=tuple(_range(range_row) for range_row in ranges),
        mtu=row["mtu"],
        internal=bool(row["internal"]),
        ipv6=bool(row["ipv6"]),
        options=json.loads(row["options"]),
        labels=json.loads(row["labels"]),
        created_ns=row["created_ns"],
        state=NetworkState(row["state"]),
    )


_subnet, _address = lru_cache(maxsize=256)(ip_network), lru_cache(maxsize=1024)(ip_address)


def _range(row: Row) -> Range:
    return Range(
        subnet=_subnet(row["subnet"]),
        gateway=_address(row["gateway"]),
        window=_subnet(row["part"]) if row["part"] else None,
        reserved=tuple(_address(text) for text in json.loads(row["reserved"])),
        id=row["id"],
    )


# Endpoints


def insert_endpoint(transaction: Transaction, endpoint: Endpoint) -> None:
    """The endpoint's own row, without its interfaces. Raises Duplicate."""
    transaction.execute(
        "INSERT INTO endpoints VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            endpoint.key.namespace,
            endpoint.key.id,
            endpoint.mode,
            encode_request(endpoint.request),
            endpoint.netns,
            endpoint.state,
            endpoint.boot_id,
            endpoint.created_ns,
            endpoint.owner,
        ),
    )


def insert_interface(transaction: Transaction, key: EndpointKey, interface: Interface) -> int:
    """The interface's own row, without its addresses; returns its id. Raises Duplicate."""
    [row] = transaction.execute(
        "INSERT INTO interfaces (namespace, endpoint, network, name, host_name, mac, aliases)"
        " VALUES (?, ?, ?, ?, ?, ?, ?) RETURNING id",
        (
            key.namespace,
            key.id,
            interface.network.id,
            interface.name,
            interface.host_name,
            interface.mac,
            json.dumps(interface.aliases),
        ),
    )
    return int(row[0])


def endpoint_of_link(snapshot: Snapshot, host_name: str) -> EndpointKey | None:
    """Whose pair has that end on the host."""
    row = snapshot.one("SELECT namespace, endpoint FROM interfaces WHERE host_name = ?", (host_name,))
    return None if row is None else EndpointKey(row[0], row[1])


def set_interface_mac(transaction: Transaction, interface_id: int, mac: str) -> None:
    """Known only once the address is."""
    transaction.execute("UPDATE interfaces SET mac = ? WHERE id = ?", (mac, interface_id))


def update_endpoint(transaction: Transaction, endpoint: Endpoint) -> None:
    """Write what may change of the endpoint's own row: its state, namespace and boot."""
    transaction.execute(
        "UPDATE endpoints SET state = ?, netns = ?, boot_id = ? WHERE namespace = ? AND id = ?",
        (endpoint.state, endpoint.netns, endpoint.boot_id, endpoint.key.namespace, endpoint.key.id),
    )


def set_request(transaction: Transaction, key: EndpointKey, request: Request) -> None:
    """It is asked for in another way from now on."""
    transaction.execute(
        "UPDATE endpoints SET request = ?, mode = ? WHERE namespace = ? AND id = ?",
        (encode_request(request), request.mode, key.namespace, key.id),
    )


def delete_interface(transaction: Transaction, key: EndpointKey, interface: Interface) -> None:
    """Delete its row with its addresses; no error if it is gone."""
    transaction.execute(
        "DELETE FROM interfaces WHERE namespace = ? AND endpoint = ? AND network = ?",
        (key.namespace, key.id, interface.network.id),
    )


def set_aliases(transaction: Transaction, key: EndpointKey, interface: Interface, aliases: Sequence[str]) -> None:
    """It is called so in that network from now on."""
    transaction.execute(
        "UPDATE interfaces SET aliases = ? WHERE namespace = ? AND endpoint = ? AND network = ?",
        (json.dumps(aliases), key.namespace, key.id, interface.network.id),
    )


def delete_endpoint(transaction: Transaction, key: EndpointKey) -> bool:
    """Delete the row with its interfaces and addresses; False if there was none."""
    rows = transaction.execute(
        "DELETE FROM endpoints WHERE namespace = ? AND id = ? RETURNING id", (key.namespace, key.id)
    )
    return bool(rows)


def endpoint(snapshot: Snapshot, key: EndpointKey) -> Endpoint | None:
    """One endpoint with its interfaces and addresses."""
    row = snapshot.one("SELECT * FROM endpoints WHERE namespace = ? AND id = ?", (key.namespace, key.id))
    return None if row is None else _endpoint(snapshot, row, {})


def endpoints(snapshot: Snapshot, *, namespace: str | None = None, network_id: str | None = None) -> list[Endpoint]:
    """All endpoints, or those of a namespace or network, oldest first."""
    rows = snapshot.execute(
        "SELECT * FROM endpoints AS e WHERE (:namespace IS NULL OR namespace = :namespace)"
        " AND (:network IS NULL OR EXISTS (SELECT 1 FROM interfaces AS i"
        " WHERE i.namespace = e.namespace AND i.endpoint = e.id AND i.network = :network))"
        " ORDER BY created_ns, namespace, id",
        {"namespace": namespace, "network": network_id},
    )
    known: ByNetwork = {}
    return [_endpoint(snapshot, row, known) for row in rows]


def _endpoint(snapshot: Snapshot, row: Row, known: ByNetwork) -> Endpoint:
    key = EndpointKey(row["namespace"], row["id"])
    mine = (key.namespace, key.id)
    interfaces = snapshot.execute(
        "SELECT i.*, c.result FROM interfaces AS i LEFT JOIN cni_results AS c USING (namespace, endpoint, network)"
        " WHERE i.namespace = ? AND i.endpoint = ? ORDER BY i.id",
        mine,
    )
    ports = snapshot.one(_PORTS, mine) if interfaces else None
    return Endpoint(
        key=key,
        request=decode_request(row["request"]),
        netns=row["netns"],
        interfaces=tuple(_interface(snapshot, interface, known) for interface in interfaces),
        state=EndpointState(row["state"]),
        boot_id=row["boot_id"],
        created_ns=row["created_ns"],
        owner=row["owner"],
        ports=tuple(map(_port, ports[0].split("\n"))) if ports and ports[0] else (),
    )


# In the order of their index, and of port_rows.joined(). Of a container with many, all are read for each that comes: as
# one text, in a third of the time of as many rows.
_PORTS = """
    SELECT group_concat(protocol || ' ' || container_port || ' ' || host_port || ' ' || host_ip, char(10)) FROM (
        SELECT * FROM ports WHERE namespace = ? AND endpoint = ?
        ORDER BY container_port, protocol, host_port, host_ip
    )
"""


@lru_cache(maxsize=4096)
def _port(text: str) -> Port:
    protocol, container_port, host_port, host_ip = text.split(" ")
    return Port(protocol, int(container_port), int(host_port), host_ip)


def _interface(snapshot: Snapshot, row: Row, known: ByNetwork) -> Interface:
    network = known.get(row["network"]) or network_by_id(snapshot, row["network"])
    assert network is not None, "the foreign key holds it"
    known[network.id] = network
    ranges = {part.id: part for part in network.ranges}
    rows = snapshot.execute("SELECT range, address FROM allocations WHERE interface = ? ORDER BY range", (row["id"],))
    return Interface(
        network=network,
        name=row["name"],
        host_name=row["host_name"],
        mac=row["mac"],
        addresses=tuple((_address(held["address"]), ranges[held["range"]]) for held in rows)
        or (addresses_of(row["result"]) if row["result"] else ()),
        aliases=tuple(json.loads(row["aliases"])),
        cni_result=row["result"] or "",
    )


def encode_request(request: Request) -> str:
    """Equal requests have equal texts."""
    return _to_text(request)


def _fields(value: Request | Dns | Port | Attachment) -> Mapping[str, object]:
    return {name: getattr(value, name) for name in value.__slots__}


_to_text = json.JSONEncoder(default=_fields, sort_keys=True, separators=(",", ":")).encode


@lru_cache(maxsize=256)
def decode_request(text: str) -> Request:
    """The request that encode_request wrote."""
    raw = json.loads(text)
    raw["mode"] = Mode(raw["mode"])
    raw["dns"] = Dns(**_tuples(raw["dns"]))
    raw["ports"] = [Port(**port) for port in raw.get("ports", ())]  # rows of a version without ports have none
    raw["attachments"] = [Attachment(**_tuples(attachment)) for attachment in raw["attachments"]]
    return Request(**_tuples(raw))


def _tuples(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """JSON arrays as the tuples they were, two levels deep."""
    return {name: _tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def _tuple(values: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(tuple(value) if isinstance(value, list) else value for value in values)
