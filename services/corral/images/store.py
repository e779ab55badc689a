"""The database of the leaf: its tables, and how durable they are.

The rows of each subject are written in its own module: images in catalog, trees in snapshots, and so on.
"""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress

from corral.rpc.blocking import run_blocking
from corral.store import Database, Transaction

SHARED = ""  # the namespace of layers, which all share by chain id

MIGRATIONS = (
    """
CREATE TABLE blobs (
    digest TEXT PRIMARY KEY,
    size_bytes INTEGER NOT NULL,
    created_ns INTEGER NOT NULL,
    keep_until_ns INTEGER NOT NULL  -- collected before then only by force, though nothing refers to it
) STRICT, WITHOUT ROWID;

-- What a manifest or index refers to, as far as it is here.
CREATE TABLE blob_edges (
    parent TEXT NOT NULL REFERENCES blobs(digest) ON DELETE CASCADE,
    child TEXT NOT NULL REFERENCES blobs(digest),
    PRIMARY KEY (parent, child)
) STRICT, WITHOUT ROWID;
CREATE INDEX blob_edges_by_child ON blob_edges(child);

-- What a layer's blob was proven to unpack to.
CREATE TABLE diff_ids (
    digest TEXT PRIMARY KEY REFERENCES blobs(digest) ON DELETE CASCADE,
    diff_id TEXT NOT NULL
) STRICT, WITHOUT ROWID;

-- One row per name, and one with the name '' for an image that lost its last name to another.
CREATE TABLE images (
    row INTEGER PRIMARY KEY,
    namespace TEXT NOT NULL,
    name TEXT NOT NULL,
    image_id TEXT NOT NULL,
    target_digest TEXT NOT NULL REFERENCES blobs(digest),
    target_type TEXT NOT NULL,
    target_size INTEGER NOT NULL,
    manifest_digest TEXT NOT NULL REFERENCES blobs(digest),
    manifest_type TEXT NOT NULL,
    manifest_size INTEGER NOT NULL,
    chain_id TEXT NOT NULL,         -- '' while not unpacked
    updated_ns INTEGER NOT NULL
) STRICT;
CREATE UNIQUE INDEX images_by_name ON images(namespace, name) WHERE name != '';
CREATE UNIQUE INDEX images_dangling ON images(namespace, image_id) WHERE name = '';
CREATE INDEX images_by_id ON images(namespace, image_id);
CREATE INDEX images_by_target ON images(target_digest);
CREATE INDEX images_by_manifest ON images(manifest_digest);

CREATE TABLE snapshots (
    id INTEGER PRIMARY KEY,         -- also the number of its tree
    namespace TEXT NOT NULL,        -- '' for layers, which are shared
    key TEXT NOT NULL,
    kind INTEGER NOT NULL,
    parent INTEGER REFERENCES snapshots(id),
    chain TEXT NOT NULL,            -- ids of all below, the uppermost first, "7,3,1"
    driver TEXT NOT NULL,
    image_id TEXT NOT NULL,         -- what an active one was made from, or ''
    image_name TEXT NOT NULL,       -- under this name
    created_ns INTEGER NOT NULL,
    size_bytes INTEGER NOT NULL,    -- of committed ones
    inodes INTEGER NOT NULL,
    quota_bytes INTEGER NOT NULL,
    labels TEXT NOT NULL            -- a JSON object
) STRICT;
CREATE UNIQUE INDEX snapshots_by_key ON snapshots(namespace, key, driver);
CREATE INDEX snapshots_by_parent ON snapshots(parent);
CREATE INDEX snapshots_by_image ON snapshots(namespace, image_id) WHERE image_id != '';

CREATE TABLE leases (
    namespace TEXT NOT NULL,
    id TEXT NOT NULL,
    created_ns INTEGER NOT NULL,
    expires_ns INTEGER NOT NULL,
    labels TEXT NOT NULL,
    PRIMARY KEY (namespace, id)
) STRICT, WITHOUT ROWID;

CREATE TABLE lease_resources (
    namespace TEXT NOT NULL,
    lease TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('blob', 'layer', 'snapshot')),
    key TEXT NOT NULL,
    PRIMARY KEY (namespace, lease, kind, key),
    FOREIGN KEY (namespace, lease) REFERENCES leases(namespace, id) ON DELETE CASCADE
) STRICT, WITHOUT ROWID;
CREATE INDEX lease_resources_by_key ON lease_resources(kind, key);
""",
    """
-- Where a blob was seen, so that a push to the same registry can have it mounted instead of sent.
CREATE TABLE blob_origins (
    digest TEXT NOT NULL REFERENCES blobs(digest) ON DELETE CASCADE,
    domain TEXT NOT NULL,
    path TEXT NOT NULL,
    seen_ns INTEGER NOT NULL,
    PRIMARY KEY (digest, domain, path)
) STRICT, WITHOUT ROWID;
""",
    """
-- When the image was last brought, named, or given up by a container: the longest unused goes first from a full disk.
ALTER TABLE images ADD COLUMN used_ns INTEGER NOT NULL DEFAULT 0;
UPDATE images SET used_ns = updated_ns;
""",
    """
-- Whose signature a manifest or index has: see corral.images.policy.
CREATE TABLE proofs (
    digest TEXT NOT NULL REFERENCES blobs(digest) ON DELETE CASCADE,
    repository TEXT NOT NULL,
    tag TEXT NOT NULL,              -- '' if the signature names none
    key_id TEXT NOT NULL,
    proven_ns INTEGER NOT NULL,
    PRIMARY KEY (digest, repository, tag, key_id)
) STRICT, WITHOUT ROWID;
""",
    """
-- Which namespaces have brought a blob themselves: see corral.images.holders.
CREATE TABLE blob_holders (
    namespace TEXT NOT NULL,
    digest TEXT NOT NULL REFERENCES blobs(digest) ON DELETE CASCADE,
    PRIMARY KEY (namespace, digest)
) STRICT, WITHOUT ROWID;
CREATE INDEX blob_holders_by_digest ON blob_holders(digest);
INSERT INTO blob_holders
WITH RECURSIVE reached(namespace, digest) AS (
    SELECT namespace, target_digest FROM images
    UNION SELECT namespace, manifest_digest FROM images
    UNION SELECT namespace, key FROM lease_resources JOIN blobs ON digest = key WHERE kind = 'blob'
    UNION SELECT namespace, child FROM blob_edges JOIN reached ON parent = digest
)
SELECT namespace, digest FROM reached;

-- As before, but what one namespace knows of repositories is not told to others, nor to registries on their behalf.
DROP TABLE blob_origins;
CREATE TABLE blob_origins (
    namespace TEXT NOT NULL,
    digest TEXT NOT NULL REFERENCES blobs(digest) ON DELETE CASCADE,
    domain TEXT NOT NULL,
    path TEXT NOT NULL,
    seen_ns INTEGER NOT NULL,
    PRIMARY KEY (namespace, digest, domain, path)
) STRICT, WITHOUT ROWID;
CREATE INDEX blob_origins_by_digest ON blob_origins(digest);
""",
    """
-- Blobs that are not kept, and the layer that each is made of again: see corral.images.recipes.
CREATE TABLE recipes (
    digest TEXT PRIMARY KEY REFERENCES blobs(digest) ON DELETE CASCADE,
    tree INTEGER NOT NULL REFERENCES snapshots(id)
) STRICT, WITHOUT ROWID;
CREATE INDEX recipes_by_tree ON recipes(tree);
-- What it takes on disk, if that is not its size.
ALTER TABLE blobs ADD COLUMN stored_bytes INTEGER;
""",
)


async def write_much[T](database: Database, fn: Callable[[Transaction], T]) -> T:
    """Database.write() for what touches many rows: never on the event loop. A cancelled caller's write is done."""
    return await run_blocking(database.write_sync, fn)


async def uninterrupted[T](work: Coroutine[object, object, T]) -> T:
    """Run `work` to its end even if the caller is cancelled meanwhile; the cancellation is raised then.

    For the moment in which files and rows change together: half of it must not be undone while the rest still happens.
    """
    task = asyncio.Task(work, loop=asyncio.get_running_loop(), eager_start=True)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with suppress(asyncio.CancelledError):  # once more: the first is the one that is raised
                await asyncio.wait((task,))
        raise
