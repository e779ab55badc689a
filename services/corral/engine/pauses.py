"""Containers that are paused for a moment only, by a commit: who dies meanwhile leaves a note to resume them."""

from corral.store import Snapshot, Transaction

SCHEMA = """
CREATE TABLE passing_pause (
    namespace TEXT NOT NULL,
    container TEXT NOT NULL,
    PRIMARY KEY (namespace, container),
    FOREIGN KEY (namespace, container) REFERENCES container (namespace, id) ON DELETE CASCADE
) STRICT;
"""


def note(tx: Transaction, namespace: str, container: str) -> None:
    """Belongs in the transaction that says that it is paused."""
    tx.execute("INSERT OR REPLACE INTO passing_pause VALUES (?, ?)", (namespace, container))


def forget(tx: Transaction, namespace: str, container: str) -> None:
    """Belongs in the transaction that says that it goes on. No note is no error."""
    tx.execute("DELETE FROM passing_pause WHERE namespace = ? AND container = ?", (namespace, container))


def everything(view: Snapshot) -> list[tuple[str, str]]:
    """Namespace and id of each."""
    return [(row[0], row[1]) for row in view.execute("SELECT namespace, container FROM passing_pause")]
