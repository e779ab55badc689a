"""Rows and kernel brought together again when the leaf starts.

row, cgroup       keep it, whatever runs inside, and watch it; systemd, if it has made it, is told of its limits again
row, no cgroup    (a reboot, or a crash during delete) delete the row, with an event; a scope's stays, which goes and
                  comes with its container
intent            (a crash during create) remove both
cgroup, no row    (likewise) remove it; it has no container, since nobody was told of it
"""

import errno
from collections.abc import Sequence

import structlog

from corral.api.types.v1 import types_pb2
from corral.cgroups import store, wire
from corral.cgroups.parent import Parent
from corral.cgroups.store import Key, Record, State
from corral.kernel.cgroup import Driver, OomWatch
from corral.store import JSON, Database

log = structlog.get_logger()


def reconcile(database: Database, driver: Driver, parent: Parent, *, timeout_s: float) -> dict[Key, OomWatch]:
    """Put right what a crash or a reboot left; returns a watch for each cgroup that is there. Blocks."""
    records = database.read_sync(store.every)
    there = [record for record in records if _settle(database, driver, parent, record, timeout_s)]
    paths = {record.path for record in records}
    for path in parent.groups():
        if path not in paths:
            _remove(driver, path, timeout_s)
    _settle_again(driver, there)
    watches = {record.key: _watch(driver, record) for record in there}
    return {key: watch for key, watch in watches.items() if watch is not None}


def _settle_again(driver: Driver, records: Sequence[Record]) -> None:
    """What a crash may have come in between of. A limit that is refused now was not when it was made: it goes on.

    Each container is settled before it starts, too.
    """
    wanted = {record.path: wire.resources(types_pb2.Resources.FromString(record.resources)) for record in records}
    for path, e in driver.settle_all(wanted).items():
        log.warning("cgroup.not_settled", path=path, error=str(e))


def _watch(driver: Driver, record: Record) -> OomWatch | None:
    """None if it has gone meanwhile, as a scope does."""
    try:
        return OomWatch.open(driver.open(record.path).paths(), since_creation=True, known=record.oom_kills)
    except OSError as e:
        if e.errno not in (errno.ENOENT, errno.ENODEV):
            raise
        return None


def _settle(database: Database, driver: Driver, parent: Parent, record: Record, timeout_s: float) -> bool:
    """Bring one row together with its cgroup; whether there is one."""
    group = driver.open(record.path)
    if record.state is State.MAKING:
        _remove(driver, record.path, timeout_s)
    elif group.keeps_counts():
        return True
    elif parent.unit(record.path):
        return False
    log.info("cgroup.row_removed", namespace=record.key.namespace, id=record.key.id, state=record.state)
    payload: dict[str, JSON] = {"oom_kills": record.oom_kills, "reason": "it was gone when the service started"}
    database.write_sync(lambda transaction: store.delete(transaction, record, payload))
    return False


def _remove(driver: Driver, path: str, timeout_s: float) -> None:
    try:
        driver.remove(path, timeout_s)
    except OSError as e:
        if e.errno != errno.EBUSY:
            raise
        log.warning("cgroup.leftover_stays", path=path, error=str(e))
    else:
        log.info("cgroup.leftover_removed", path=path)
