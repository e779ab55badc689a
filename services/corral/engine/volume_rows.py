"""Rows of volumes, and of who uses them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from corral.engine.bounded_volumes import quota_bytes
from corral.engine.mounted_volumes import source_of
from corral.rpc.errors import NotFound
from corral.store import Referenced, Row, Snapshot, Transaction


@dataclass(frozen=True, slots=True)
class VolumeRecord:
    """One row, with the ids of the containers that use it."""

    namespace: str
    name: str
    anonymous: bool
    created_ns: int
    labels: Mapping[str, str]
    options: Mapping[str, str]
    containers: tuple[str, ...] = ()

    @property
    def quota_bytes(self) -> int:
        """0 if it is not bounded."""
        return quota_bytes(self.options)

    @property
    def lies_elsewhere(self) -> bool:
        """It is mounted from there, by who uses it."""
        return source_of(self.options) is not None


def insert_volume(tx: Transaction, volume: VolumeRecord) -> None:
    """Raises Duplicate if the name is taken."""
    tx.execute("INSERT OR IGNORE INTO namespace VALUES (?)", (volume.namespace,))
    tx.execute(
        "INSERT INTO volume (namespace, name, anonymous, labels, options, created_ns) VALUES (?, ?, ?, ?, ?, ?)",
        (
            volume.namespace,
            volume.name,
            int(volume.anonymous),
            json.dumps(dict(volume.labels)),
            json.dumps(dict(volume.options)),
            volume.created_ns,
        ),
    )
    tx.journal("volume.created", volume.name, {"anonymous": volume.anonymous}, namespace=volume.namespace)


def use_volumes(tx: Transaction, namespace: str, container: str, volumes: Iterable[VolumeRecord]) -> None:
    """Note that a container uses these volumes; those that do not exist are made."""
    for volume in volumes:
        known = tx.one("SELECT 1 FROM volume WHERE namespace = ? AND name = ?", (namespace, volume.name))
        if known is None:
            insert_volume(tx, volume)
        tx.execute("INSERT OR IGNORE INTO volume_use VALUES (?, ?, ?)", (namespace, volume.name, container))


def delete_volume(tx: Transaction, namespace: str, name: str) -> None:
    """Raises Referenced while a container uses it, NotFound."""
    if not tx.execute("DELETE FROM volume WHERE namespace = ? AND name = ? RETURNING name", (namespace, name)):
        raise NotFound(f"no such volume: {name}", reason="NO_VOLUME")
    tx.journal("volume.removed", name, namespace=namespace)


def delete_anonymous_volumes(tx: Transaction, namespace: str, container: str) -> list[str]:
    """Forget the anonymous volumes that only this container uses; returns their names."""
    rows = tx.execute(
        "SELECT v.name FROM volume_use u JOIN volume v ON v.namespace = u.namespace AND v.name = u.volume"
        " WHERE u.namespace = ? AND u.container = ? AND v.anonymous = 1",
        (namespace, container),
    )
    tx.execute("DELETE FROM volume_use WHERE namespace = ? AND container = ?", (namespace, container))
    removed = []
    for row in rows:
        try:
            delete_volume(tx, namespace, row["name"])
        except Referenced:
            continue
        removed.append(row["name"])
    return removed


def volumes(view: Snapshot, namespace: str | None) -> list[VolumeRecord]:
    """All volumes of a namespace, or of all, by name."""
    users: dict[tuple[str, str], list[str]] = {}
    for row in view.execute("SELECT namespace, volume, container FROM volume_use ORDER BY container"):
        users.setdefault((row["namespace"], row["volume"]), []).append(row["container"])
    rows = view.execute(
        "SELECT * FROM volume WHERE :namespace IS NULL OR namespace = :namespace ORDER BY namespace, name",
        {"namespace": namespace},
    )
    return [_volume(row, users.get((row["namespace"], row["name"]), ())) for row in rows]


def get_volume(view: Snapshot, namespace: str, name: str) -> VolumeRecord:
    """Raises NotFound."""
    row = view.one("SELECT * FROM volume WHERE namespace = ? AND name = ?", (namespace, name))
    if row is None:
        raise NotFound(f"no such volume: {name}", reason="NO_VOLUME")
    users = view.execute(
        "SELECT container FROM volume_use WHERE namespace = ? AND volume = ? ORDER BY container", (namespace, name)
    )
    return _volume(row, [user[0] for user in users])


def _volume(row: Row, users: Sequence[str]) -> VolumeRecord:
    return VolumeRecord(
        namespace=row["namespace"],
        name=row["name"],
        anonymous=bool(row["anonymous"]),
        created_ns=row["created_ns"],
        labels=json.loads(row["labels"]),
        options=json.loads(row["options"]),
        containers=tuple(users),
    )
