"""What an earlier process left behind, when it was killed in the middle of something.

Rows are the truth. Files without a row were on their way in or out: they go. Rows without files lost them to somebody
else (a disk check, a hand): layers among them are forgotten, so that the next Prepare unpacks them again; what cannot
be repaired is reported.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import structlog

from corral.images import trees
from corral.images.content import ContentStore
from corral.images.snapshotter import Snapshotter, TreeId
from corral.images.trees import Kind
from corral.store import Database, Referenced, Transaction

log = structlog.get_logger()


@dataclass(slots=True)
class Recovered:
    """`orphans` are trees to be removed, which may take long."""

    highest_tree: int = 0
    orphans: list[TreeId] = field(default_factory=list)


def recover(database: Database, content: ContentStore, drivers: Iterable[Snapshotter], *, lost: bool) -> Recovered:
    """Bring disk and database together. Blocking; runs before anything is served.

    lost: the database does not know all that is on disk, and nothing there is taken for left over.
    """
    left = content.clean()
    blobs = database.read_sync(lambda s: {str(row[0]) for row in s.execute("SELECT digest FROM blobs")})
    stored = set(content.stored()) | set(content.recipes())
    unknown = [] if lost else [digest for digest in stored if digest not in blobs]
    content.remove(unknown)
    gone = blobs - stored
    recovered = Recovered(highest_tree=database.read_sync(trees.highest_id))
    for driver in drivers:
        known = database.read_sync(partial(trees.ids, driver=driver.name))
        there = set(driver.trees())
        recovered.highest_tree = max([recovered.highest_tree, *there])
        if not lost:
            recovered.orphans += sorted(tree for tree in there if tree not in known)
        _repair(database, driver, known, there)
    if left or unknown or recovered.orphans or gone:
        log.info(
            "images.recovered",
            ingests_removed=left,
            blobs_removed=len(unknown),
            trees_removed=len(recovered.orphans),
            blobs_lost=len(gone),
        )
    return recovered


def _repair(database: Database, driver: Snapshotter, known: dict[int, Kind], there: set[TreeId]) -> None:
    """Make layers of trees whose commit was interrupted, and forget layers that are gone."""
    for tree, kind in sorted(known.items(), reverse=True):
        if kind is not Kind.COMMITTED or driver.is_layer(TreeId(tree)):
            continue
        if tree in there:
            driver.adopt(TreeId(tree))
            log.info("images.commit_finished", tree=tree)
            continue
        try:
            database.write_sync(partial(_forget, tree=TreeId(tree)))
            log.warning("images.layer_forgotten", tree=tree)
        except Referenced:
            log.error("images.layer_lost", tree=tree, remedy="remove the containers on it, and import the image again")


def _forget(transaction: Transaction, tree: TreeId) -> None:
    trees.delete(transaction, tree)
