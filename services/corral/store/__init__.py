"""What must not be lost: SQLite with numbered migrations, the journal of events, durable files, locks."""

from corral.kernel.failpoint import failpoint
from corral.store.boots import boot_id
from corral.store.database import ConstraintError, Database, Duplicate, Referenced, Row, Snapshot, Transaction
from corral.store.files import Lock, LockHeld, atomic_write, is_locked
from corral.store.journal import GAP_TOPIC, JSON, Event, Journal, Retention, to_text
from corral.store.trash import Trash, remove_tree

__all__ = [
    "GAP_TOPIC",
    "JSON",
    "ConstraintError",
    "Database",
    "Duplicate",
    "Event",
    "Journal",
    "Lock",
    "LockHeld",
    "Referenced",
    "Retention",
    "Row",
    "Snapshot",
    "Transaction",
    "Trash",
    "atomic_write",
    "boot_id",
    "failpoint",
    "is_locked",
    "remove_tree",
    "to_text",
]
