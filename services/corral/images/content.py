"""Blobs on disk, each a file named by its digest.

    ingest/<random>          being written; removed when the daemon starts
    blobs/<algorithm>/<hex>  whole and proven
    recipes/<hex>            instead of one that is not kept: see corral.images.recipes

A blob is written once, hashed as it comes, and renamed. Whether it is wanted is for the database to say: a file
without a row is left over from a crash.
"""

import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, nullcontext
from itertools import chain
from pathlib import Path

from corral.images.digest import HEX_DIGITS, Digest, algorithm_of, digest_by, digest_of, digest_of_hex, hasher, hex_of
from corral.rpc.errors import InvalidArgument, NotFound
from corral.store.files import fsync_directory

READ_BYTES = 1 << 20


class Ingest:
    """A blob that is being written. close() or discard() it."""

    def __init__(self, path: Path, like: str = "") -> None:
        """like: a digest whose algorithm is used."""
        self.path = path
        self.size_bytes = 0
        self._hash = hasher(like)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        self._hash.update(view)
        self.size_bytes += len(view)
        while view:
            view = view[os.write(self._fd, view) :]

    @property
    def digest(self) -> Digest:
        return digest_by(self._hash)

    def verify(self, expected: Digest | None, size_bytes: int) -> None:
        """Raises InvalidArgument unless digest and size are as expected; None and 0 expect nothing."""
        if size_bytes and self.size_bytes != size_bytes:
            raise InvalidArgument(
                f"the blob {expected or ''} has {self.size_bytes} bytes instead of {size_bytes}: nothing was stored",
                reason="SIZE_MISMATCH",
            )
        if expected and self.digest != expected:
            raise InvalidArgument(
                f"the blob has the digest {self.digest} instead of {expected}: it is damaged, nothing was stored",
                reason="DIGEST_MISMATCH",
            )

    def sync(self) -> None:
        os.fsync(self._fd)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def discard(self) -> None:
        self.close()
        self.path.unlink(missing_ok=True)


class ContentStore:
    """The files. Blocking; every method is quick but for read and write of large blobs."""

    def __init__(self, root: Path) -> None:
        self._blobs = {algorithm: root / "blobs" / algorithm for algorithm in HEX_DIGITS}
        self._ingests = root / "ingest"
        for directory in self._blobs.values():
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._ingests.mkdir(exist_ok=True, mode=0o700)
        self._recipes = root / "recipes"
        self._recipes.mkdir(exist_ok=True, mode=0o700)
        self._process = secrets.token_hex(4)
        # Whoever wants the bytes of a blob opens its file within this: see corral.images.recipes.
        self.whole: Callable[[Path], AbstractAsyncContextManager[None]] = lambda _path: nullcontext()

    def path(self, digest: Digest) -> Path:
        return self._blobs[algorithm_of(digest)] / hex_of(digest)

    def is_blob(self, path: Path) -> bool:
        return path.parent in self._blobs.values()

    def recipe(self, digest: Digest) -> Path:
        """Where it says how the blob is made again, if it is not kept."""
        return self._recipes / hex_of(digest)

    def has(self, digest: Digest) -> bool:
        """Whether the blob's bytes are here, or can be made."""
        return self.path(digest).exists() or self.recipe(digest).exists()

    def recipes(self) -> Iterator[Digest]:
        """Every blob that there is a recipe of."""
        for path in self._recipes.iterdir():
            if (digest := digest_of_hex(path.name)) is not None:
                yield digest

    def begin(self, like: str = "") -> Ingest:
        return Ingest(self._new_ingest(), like)

    def _new_ingest(self) -> Path:
        return self._ingests / f"{self._process}{secrets.token_hex(8)}"

    def make_ingest_directory(self) -> Path:
        """For who writes many files; its content goes when the daemon starts, if not before."""
        path = self._new_ingest()
        path.mkdir(mode=0o700)
        return path

    def publish(self, path: Path, digest: Digest) -> None:
        """Make the proven and synced file at `path` the blob `digest`."""
        path.rename(self.path(digest))

    def link(self, path: Path, digest: Digest) -> None:
        """As publish(), but the file keeps its own name too."""
        other = self._new_ingest()
        os.link(path, other)
        self.publish(other, digest)

    def sync_names(self) -> None:
        """Make what was published durable."""
        for directory in self._blobs.values():
            fsync_directory(directory)

    def read(self, digest: Digest, *, max_bytes: int) -> bytes:
        """A small blob, proven again. Raises NotFound, InvalidArgument."""
        path = self.path(digest)
        try:
            with path.open("rb") as file:
                data = file.read(max_bytes + 1)
        except FileNotFoundError as e:
            raise NotFound(f"blob {digest} is not here: import or pull its image again", reason="NO_BLOB") from e
        if digest_of(data, digest) != digest:
            raise InvalidArgument(
                f"blob {digest} was changed on disk: remove its image and import or pull it again",
                reason="DIGEST_MISMATCH",
            )
        return data

    def remove(self, digests: Iterable[Digest]) -> None:
        for digest in digests:
            self.path(digest).unlink(missing_ok=True)
            self.recipe(digest).unlink(missing_ok=True)

    def stored(self) -> Iterator[Digest]:
        """Every blob that is there."""
        for path in self._files():
            if self._is_named_rightly(path):
                yield Digest(f"{path.parent.name}:{path.name}")

    def _is_named_rightly(self, path: Path) -> bool:
        digest = digest_of_hex(path.name)
        return digest is not None and algorithm_of(digest) == path.parent.name

    def _files(self) -> Iterator[Path]:
        return chain.from_iterable(directory.iterdir() for directory in self._blobs.values())

    def strangers(self) -> list[Path]:
        """What is among the blobs and is none, and what is being written by nobody here."""
        found = [path for path in self._files() if not self._is_named_rightly(path)]
        return found + [path for path in self._ingests.iterdir() if not path.name.startswith(self._process)]

    def clean(self) -> int:
        """Remove what an earlier process had begun; returns how much that was."""
        left = list(self._ingests.iterdir())
        for path in left:
            discard(path)
        return len(left)


def is_proven(path: Path, digest: Digest) -> bool:
    """Whether the file has the digest. Raises FileNotFoundError, OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm_of(digest)).hexdigest() == hex_of(digest)


def discard(path: Path) -> None:
    """Remove a file, or a directory with all in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
