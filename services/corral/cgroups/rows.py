"""The rows of the leaf, kept in memory as well: nobody else writes them, and nearly every call looks one up.

What is in memory is what was committed last, or will be next. Each method that writes returns when it is committed,
but for those that say otherwise.
"""

from collections.abc import Mapping
from functools import partial

from corral.cgroups import store
from corral.cgroups.store import Key, Record, State
from corral.store import JSON, Database, Transaction, failpoint


class Rows:
    """See the module. For one event loop, with one change at a time for each key."""

    def __init__(self, database: Database) -> None:
        """Read them. Blocks."""
        self._database = database
        self._records = {record.key: record for record in database.read_sync(store.every)}

    def find(self, key: Key) -> Record | None:
        """One row, in whatever state."""
        return self._records.get(key)

    def ready(self, key: Key) -> Record | None:
        """The row of a cgroup that exists."""
        record = self._records.get(key)
        return record if record and record.state is State.READY else None

    def all(self) -> list[Record]:
        """Every row, in whatever state."""
        return list(self._records.values())

    def every(self, namespace: str | None = None) -> list[Record]:
        """Those of the cgroups that exist, of a namespace or of all, oldest first."""
        found = [r for r in self._records.values() if r.state is State.READY and namespace in (None, r.key.namespace)]
        return sorted(found, key=lambda record: (record.created_ns, record.key.namespace, record.key.id))

    async def announce(self, record: Record) -> None:
        """Write an intent. Raises Duplicate if the id or the path is taken."""
        intent = record._replace(state=State.MAKING)
        await self._database.write(lambda transaction: store.insert(transaction, intent))
        self._records[record.key] = intent

    async def put_ready(self, record: Record) -> None:
        """The row of a cgroup that now exists, over its intent if there was one, and the event."""
        intent = record.key in self._records
        await self._database.write(lambda transaction: store.put_ready(transaction, record, over_intent=intent))
        self._records[record.key] = record

    async def set_resources(self, key: Key, resources: bytes) -> Record:
        """What an update left, and the event; returns the row."""
        await self._database.write(lambda transaction: store.set_resources(transaction, key, resources))
        after = self._records[key] = self._records[key]._replace(resources=resources)
        return after

    async def set_oom_kills(self, key: Key, kills: int) -> None:
        """A new count of OOM kills and the event, unless the row knows as many or is gone."""
        await self._database.write(lambda transaction: store.set_oom_kills(transaction, key, kills))
        if (record := self._records.get(key)) and record.oom_kills < kills:
            self._records[key] = record._replace(oom_kills=kills)

    async def delete(self, key: Key, payload: Mapping[str, JSON]) -> None:
        """Remove a row that is there; an event only if anybody was told of its cgroup."""
        await self._database.write(partial(_delete, record=self._records[key], payload=payload))
        del self._records[key]

    def delete_soon(self, key: Key, payload: Mapping[str, JSON]) -> None:
        """The same, in the file by the next transaction: of a cgroup that whoever starts next would find gone."""
        self._database.write_soon(partial(_delete, record=self._records.pop(key), payload=payload))


def _delete(transaction: Transaction, record: Record, payload: Mapping[str, JSON]) -> None:
    failpoint("cgroups.delete.before_row")
    store.delete(transaction, record, payload)
