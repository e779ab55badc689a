"""A second copy of what only the database knows, beside what it is about: so that a lost database can be made anew.

    marks/<tree>     the row of a tree, as JSON
    names.json       the names of images, and what they point at

They follow the database within a second, off everybody's way: what a kill costs is the last moment, and only if the
database is lost as well. As long as a lost one was not made anew, nothing that is marked here is forgotten.
"""

import asyncio
import json
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import structlog

from corral.images.catalog import ImageRecord
from corral.images.digest import Digest, is_digest
from corral.images.model import Descriptor
from corral.images.snapshotter import TreeId
from corral.images.trees import Kind, TreeRecord
from corral.rpc.blocking import run_blocking
from corral.store import Database, Row, Snapshot, atomic_write

DIRECTORY, NAMES = "marks", "names.json"
PAUSE_S = 1.0

log = structlog.get_logger()

type _Facts = tuple[tuple[str, str | int | None], ...]


@dataclass(frozen=True, slots=True)
class Marked:
    """What the marks tell. Trees without their chains, which follow from their parents."""

    trees: Mapping[TreeId, TreeRecord]
    names: tuple[ImageRecord, ...] | None
    """None: nobody knows."""


class Marks:
    """See the module. Begins with start(); on the event loop."""

    def __init__(self, root: Path, database: Database) -> None:
        self._directory, self._names = root / DIRECTORY, root / NAMES
        self._directory.mkdir(exist_ok=True, mode=0o700)
        self._database = database
        # What they hold as far as this process has written them; None: it does not know.
        self._written: dict[str, _Facts] | None = None
        self._names_written: list[_Facts] | None = None
        self._keeping = False
        self._following: asyncio.Task[None] | None = None

    def start(self, *, keeping: bool) -> None:
        """keeping: nothing is forgotten, for the database is not whole."""
        self._keeping = keeping
        self._following = asyncio.ensure_future(self._follow())

    async def stop(self) -> None:
        if self._following is not None:
            self._following.cancel()
            await asyncio.wait((self._following,))
            await self.follow(keeping=self._keeping)

    async def _follow(self) -> None:
        """Whatever changes is journalled."""
        journal = self._database.journal
        async with aclosing(journal.pages(journal.last_seq(), namespace=None)) as pages:
            await self.follow(keeping=self._keeping)
            async for _ in pages:
                await asyncio.sleep(PAUSE_S)
                await self.follow(keeping=self._keeping)

    async def follow(self, *, keeping: bool) -> None:
        """Bring the marks up to date now."""
        self._keeping = keeping
        try:
            await run_blocking(self._write)
        except OSError as e:
            log.warning("images.marks_not_written", error=str(e))

    def _write(self) -> None:
        rows, names = self._database.read_sync(_everything)
        there = self._written.keys() if self._written is not None else {path.name for path in self._directory.iterdir()}
        known = self._written or {}
        for name, row in rows.items():
            if known.get(name) != row:
                (self._directory / name).write_text(json.dumps(dict(row)), "utf-8")
        if not self._keeping:
            for name in there - rows.keys():
                (self._directory / name).unlink(missing_ok=True)
            if self._names_written != names:
                atomic_write(self._names, json.dumps([dict(name) for name in names]).encode())
                self._names_written = names
            self._written = rows

    def highest_tree(self) -> int:
        """Of all that are marked. Blocking."""
        return max((int(path.name) for path in self._directory.iterdir() if path.name.isdigit()), default=0)

    def read(self) -> Marked:
        """All of them; what cannot be understood is left out. Blocking."""
        found = {}
        for path in self._directory.iterdir():
            if path.name.isdigit() and (record := _read_tree(path)) is not None:
                found[record.id] = record
        return Marked(found, _read_names(self._names))


def _everything(snapshot: Snapshot) -> tuple[dict[str, _Facts], list[_Facts]]:
    """The content of each mark, and of the names."""
    rows = snapshot.execute("SELECT * FROM snapshots")
    names = snapshot.execute("SELECT * FROM images ORDER BY row")
    return {str(row["id"]): _facts(row) for row in rows}, [_facts(row) for row in names]


def _facts(row: Row) -> _Facts:
    """The chain of a tree follows from its parents."""
    return tuple((name, value) for name, value in zip(row.keys(), row, strict=True) if name != "chain")


def _read_tree(path: Path) -> TreeRecord | None:
    try:
        values = json.loads(path.read_text("utf-8"))
        record = TreeRecord(
            id=TreeId(int(path.name)),
            namespace=str(values["namespace"]),
            key=str(values["key"]),
            kind=Kind(values["kind"]),
            parent=None if values["parent"] is None else TreeId(int(values["parent"])),
            chain=(),
            driver=str(values["driver"]),
            image_id=str(values["image_id"]),
            image_name=str(values["image_name"]),
            created_ns=int(values["created_ns"]),
            size_bytes=int(values["size_bytes"]),
            inodes=int(values["inodes"]),
            quota_bytes=int(values["quota_bytes"]),
            labels={str(key): str(value) for key, value in json.loads(values["labels"]).items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:  # the last moment before a kill
        log.info("images.mark_not_understood", tree=path.name, error=str(e))
        return None
    return record


def _read_names(path: Path) -> tuple[ImageRecord, ...] | None:
    try:
        values = json.loads(path.read_text("utf-8"))
        return tuple(_name(value) for value in values)
    except (OSError, ValueError, KeyError, TypeError) as e:
        log.warning("images.names_not_understood", error=str(e))
        return None


def _name(value: Mapping[str, object]) -> ImageRecord:
    return ImageRecord(
        namespace=str(value["namespace"]),
        name=str(value["name"]),
        image_id=_digest(value["image_id"]),
        target=_descriptor(value, "target"),
        manifest=_descriptor(value, "manifest"),
        chain_id="",
        updated_ns=int(str(value["updated_ns"])),
    )


def _descriptor(value: Mapping[str, object], which: str) -> Descriptor:
    return Descriptor(str(value[f"{which}_type"]), _digest(value[f"{which}_digest"]), int(str(value[f"{which}_size"])))


def _digest(value: object) -> Digest:
    text = str(value)
    if not is_digest(text):
        raise ValueError(f"{text[:80]!r} is no digest")
    return Digest(text)
