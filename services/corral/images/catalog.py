"""Images by name: the rows, and what a name that somebody typed means."""

import fnmatch
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

from corral.images.digest import ALGORITHM, Digest, hex_of, is_digest
from corral.images.model import Descriptor
from corral.images.reference import DEFAULT_DOMAIN, Reference, parse_reference
from corral.rpc.errors import CorralError, InvalidArgument, NotFound
from corral.store import Row, Snapshot, Transaction

_ID_PREFIX = re.compile(r"(?:(sha256|sha512):)?([0-9a-f]{4,128})")


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One name of an image. An empty name: the image lost its last one."""

    namespace: str
    name: str
    image_id: Digest
    target: Descriptor
    manifest: Descriptor
    chain_id: str
    updated_ns: int


def _record(row: Row) -> ImageRecord:
    return ImageRecord(
        namespace=row["namespace"],
        name=row["name"],
        image_id=Digest(row["image_id"]),
        target=Descriptor(row["target_type"], Digest(row["target_digest"]), row["target_size"]),
        manifest=Descriptor(row["manifest_type"], Digest(row["manifest_digest"]), row["manifest_size"]),
        chain_id=row["chain_id"],
        updated_ns=row["updated_ns"],
    )


def find(snapshot: Snapshot, namespace: str, text: str) -> ImageRecord:
    """The image that `text` means: a name, an id, or the beginning of an id. Raises NotFound, InvalidArgument."""
    try:
        reference = None if is_digest(text) else parse_reference(text)
        problem = None
    except InvalidArgument as e:
        reference, problem = None, e
    if reference is not None and (record := by_reference(snapshot, namespace, reference)) is not None:
        return record
    if (match := _ID_PREFIX.fullmatch(text)) is not None:
        record = _by_id_prefix(snapshot, namespace, f"{match[1] or ALGORITHM}:{match[2]}", text)
        if record is not None:
            return record
    raise problem if problem and not match else _unknown(text, reference)


def _unknown(text: str, reference: Reference | None) -> CorralError:
    meant = f" ({reference})" if reference is not None and str(reference) != text else ""
    return NotFound(
        f"there is no image {text!r}{meant}: `corral image ls` lists what is here, `corral pull` fetches more",
        reason="NO_IMAGE",
        metadata={"image": text},
    )


def by_reference(snapshot: Snapshot, namespace: str, reference: Reference) -> ImageRecord | None:
    """The image of exactly that name; with a digest, any name of the repository that points there."""
    # Which index is said: else SQLite looks at each value whether the others, which are of some rows only, would do as
    # well, and plans anew every time.
    row = snapshot.one(
        "SELECT * FROM images INDEXED BY images_by_name WHERE namespace = ? AND name = ? AND name != ''",
        (namespace, str(reference)),
    )
    if row is None and reference.digest is not None:
        repository = _glob_quoted(reference.repository)
        row = snapshot.one(
            "SELECT * FROM images WHERE namespace = ? AND ? IN (target_digest, manifest_digest)"
            " AND (name GLOB ? OR name GLOB ?) ORDER BY name",
            (
                namespace,
                reference.digest,
                f"{repository}:*",
                f"{repository}@*",
            ),
        )
    return None if row is None else _record(row)


def _glob_quoted(text: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", text)


def _by_id_prefix(snapshot: Snapshot, namespace: str, prefix: str, text: str) -> ImageRecord | None:
    rows = snapshot.execute(
        "SELECT * FROM images WHERE namespace = ? AND image_id BETWEEN ? AND ? ORDER BY image_id, name DESC",
        (namespace, prefix, prefix + "g"),
    )
    ids = {row["image_id"] for row in rows}
    if len(ids) > 1:
        shown = ", ".join(sorted(hex_of(i)[:16] for i in ids)[:4])
        raise InvalidArgument(
            f"{text!r} is the beginning of {len(ids)} image ids ({shown}, …): write more of it", reason="AMBIGUOUS"
        )
    return _record(rows[0]) if rows else None


def by_id(snapshot: Snapshot, namespace: str, image_id: str) -> list[ImageRecord]:
    """All names of one image."""
    rows = snapshot.execute(
        "SELECT * FROM images WHERE namespace = ? AND image_id = ? ORDER BY name", (namespace, image_id)
    )
    return [_record(row) for row in rows]


def by_chain_id(snapshot: Snapshot, namespace: str, chain_id: str) -> list[ImageRecord]:
    """All names of the images whose uppermost layer that is."""
    rows = snapshot.execute("SELECT * FROM images WHERE namespace = ? AND chain_id = ?", (namespace, chain_id))
    return [_record(row) for row in rows]


def names_of(snapshot: Snapshot, namespace: str, image_id: str) -> list[str]:
    rows = snapshot.execute(
        "SELECT name FROM images WHERE namespace = ? AND image_id = ? AND name != '' ORDER BY name",
        (namespace, image_id),
    )
    return [row[0] for row in rows]


def everything(snapshot: Snapshot, namespace: str, pattern: str = "") -> list[ImageRecord]:
    """The images whose familiar name, with or without the tag, fits the shell pattern; by name."""
    rows = snapshot.execute("SELECT * FROM images WHERE namespace = ? ORDER BY name", (namespace,))
    return [record for record in map(_record, rows) if not pattern or _fits(record, pattern)]


def _fits(record: ImageRecord, pattern: str) -> bool:
    if not record.name:
        return False
    reference = parse_reference(record.name)
    forms = [reference.familiar, reference.familiar_repository]
    if pattern.startswith(f"{DEFAULT_DOMAIN}/"):
        forms = [record.name, reference.repository]
    return any(fnmatch.fnmatchcase(form, pattern) for form in forms)


def set_name(transaction: Transaction, record: ImageRecord) -> None:
    """Give the name to the image; whoever had it loses it, and stays without a name if it was his last.

    With an empty name: have the image here at least nameless.
    """
    if not record.name:
        if by_id(transaction, record.namespace, record.image_id):
            return
    else:
        _take_name(transaction, record)
    transaction.execute(
        "INSERT INTO images (namespace, name, image_id, target_digest, target_type, target_size, manifest_digest,"
        " manifest_type, manifest_size, chain_id, updated_ns, used_ns) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            record.namespace, record.name, record.image_id,
            record.target.digest, record.target.media_type, record.target.size_bytes,
            record.manifest.digest, record.manifest.media_type, record.manifest.size_bytes,
            record.chain_id, record.updated_ns, record.updated_ns,
        ),
    )  # fmt: skip


def _take_name(transaction: Transaction, record: ImageRecord) -> None:
    where = (record.namespace, record.name)
    old = transaction.one("SELECT row, image_id FROM images WHERE namespace = ? AND name = ?", where)
    # The nameless row of the same image gives way to the name.
    transaction.execute(
        "DELETE FROM images WHERE namespace = ? AND image_id = ? AND name = ''", (record.namespace, record.image_id)
    )
    if old is None:
        return
    others = transaction.one(
        "SELECT 1 FROM images WHERE namespace = ? AND image_id = ? AND row != ?",
        (record.namespace, old["image_id"], old["row"]),
    )
    if others is None and old["image_id"] != record.image_id:
        transaction.execute("UPDATE images SET name = '' WHERE row = ?", (old["row"],))
    else:
        transaction.execute("DELETE FROM images WHERE row = ?", (old["row"],))


def set_unpacked(transaction: Transaction, record: ImageRecord, chain_id: str) -> None:
    """Of all with the same manifest. One with the same config alone may have other blobs, which were not proven."""
    transaction.execute("UPDATE images SET chain_id = ? WHERE manifest_digest = ?", (chain_id, record.manifest.digest))


def note_use(transaction: Transaction, namespace: str, image_id: str) -> None:
    """A container gives the image up now, having used it until now."""
    transaction.execute(
        "UPDATE images SET used_ns = ? WHERE namespace = ? AND image_id = ?", (now_ns(), namespace, image_id)
    )


def remove(transaction: Transaction, records: Sequence[ImageRecord], *, reason: str = "") -> None:
    """reason: why, if nobody asked for it."""
    for record in records:
        facts = {"id": str(record.image_id)} | ({"reason": reason} if reason else {})
        transaction.execute(
            "DELETE FROM images WHERE namespace = ? AND name = ? AND image_id = ?",
            (record.namespace, record.name, record.image_id),
        )
        transaction.journal("image.removed", record.name or record.image_id, facts, namespace=record.namespace)


def now_ns() -> int:
    return time.time_ns()
