"""Settings of the images leaf."""

import os
from dataclasses import dataclass
from pathlib import Path

from corral.images.policy.rules import Rule


@dataclass(frozen=True, slots=True)
class ImagesConfig:
    """One field per key of the [images] section."""

    # Its own directory: database, blobs, layers and writable trees.
    root: Path
    # Run state; nothing of images lies there.
    state: Path
    # How layers are stacked. `corral snapshot drivers` lists them.
    driver: str = "overlayfs"
    # Of the driver devicemapper: block devices for its pool, the metadata's zeroed at first. Empty: files are made.
    thin_data: str = ""
    thin_metadata: str = ""
    # Processes that unpack layers, started when needed. 0: one per CPU, at most four.
    unpack_workers: int = 0
    # An idle unpacking process ends after this time.
    unpack_idle_s: float = 5.0
    # A layer with more is refused.
    max_layer_entries: int = 10_000_000
    max_layer_bytes: int = 1 << 40
    # Likewise of an archive, once it is decompressed.
    max_archive_bytes: int = 1 << 40
    # A layer that takes an unpacking process more memory is refused. 0: none is.
    unpack_memory_bytes: int = 4 << 30
    # Stored content that no image or lease refers to yet is kept this long for whoever is about to.
    blob_grace_s: float = 3600.0
    # Mirrors, CAs and client certificates of registries: <host>/hosts.toml, see corral.images.registry.endpoints.
    certs: Path = Path("/etc/corral/certs.d")
    # What an interrupted pull has fetched is kept this long for the next one.
    partial_keep_s: float = 86400.0
    # Which repositories images may come from, and whose signature they need; see corral.images.policy.rules. None: any.
    policy: tuple[Rule, ...] = ()
    # False: what a layer came as is dropped once it is unpacked, if it can be made again byte for byte when it is
    # wanted, for a push or an export. A pull or an import may say otherwise.
    keep_blobs: bool = True
    # When so much of the file system is in use, images that nobody uses are removed, the longest unused first, until no
    # more than the low mark is. 100: never.
    gc_high_percent: float = 90.0
    gc_low_percent: float = 80.0
    # An image that was brought, named or used by a container within this time stays all the same.
    gc_min_age_s: float = 3600.0
    # How often that is looked at; also after each pull, import and commit.
    gc_interval_s: float = 60.0

    @property
    def workers(self) -> int:
        return self.unpack_workers or min(len(os.sched_getaffinity(0)), 4)
