"""A thin pool of the device mapper: devices that take room only for what is written, and share what is the same.

The pool lies on two devices, for data and for metadata, or on two files that become loop devices. It outlives the
process that made it, as containers use what is in it; whoever comes next finds it by its name.

Every message to the pool is committed before it returns. So whoever writes down a number before asking for a device of
that number, and forgets it after the device is deleted, knows of all there are, whenever he is killed.

Source: Documentation/admin-guide/device-mapper/thin-provisioning.rst; drivers/md/dm-thin.c.
"""

import errno
import hashlib
import os
import secrets
import stat
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from corral.kernel import block, device_mapper, loop
from corral.kernel.device_mapper import BUSY_S, SECTOR_BYTES, Target
from corral.store.files import atomic_write

MAX_NUMBER = (1 << 24) - 1
DATA_BYTES = 100 << 30
"""Of a file that is made for the data. It takes only what is used."""
DEVICE_BYTES = 1 << 44
"""Of every device: the file system on it says how much of that can be used."""
LOW_PERCENT = 5
"""With less free no device is made any more, so that those there are can still be written to."""
_BLOCK_SECTORS = 128
_METADATA_PER_BLOCK = 48
_MIN_METADATA_BYTES = 2 << 20


class ThinPool:
    """Devices have a number here, and while they are active a name of the caller's. Methods raise OSError."""

    def __init__(self, root: Path, data: Path | None = None, metadata: Path | None = None) -> None:
        """root: a directory, whose path gives the pool its name. data, metadata: devices, or files; else made there."""
        self._root = root
        self._data, self._metadata = data or root / "data", metadata or root / "metadata"
        self._prefix = f"corral-{hashlib.sha256(os.fsencode(root.absolute())).hexdigest()[:12]}"
        self._pool = f"{self._prefix}-pool"
        self._lock = threading.Lock()
        self._is_known = False

    def create(self, number: int, *, of: int | None = None) -> None:
        """An empty device, or a copy of one that nobody writes to."""
        self._start()
        text = f"create_thin {number}" if of is None else f"create_snap {number} {of}"
        try:
            device_mapper.message(self._pool, text)
        except FileExistsError:  # the number is the caller's, so what has it is nobody's
            device_mapper.message(self._pool, f"delete {number}")
            device_mapper.message(self._pool, text)

    def delete(self, number: int, name: str) -> None:
        """Remove a device, and give back its room. None there is no error."""
        self._start()
        self.deactivate(name)
        self._discard(number, name)
        try:
            device_mapper.message(self._pool, f"delete {number}")
        except OSError as e:
            if e.errno != errno.ENODATA:
                raise

    def _discard(self, number: int, name: str) -> None:
        """What a deleted device had is the pool's, and would never be given back to what the pool lies on."""
        node = self._root / f"going-{name}"
        try:
            self.activate(number, name, node)
        except OSError as e:
            if e.errno == errno.ENODATA:  # it was never made
                return
            raise
        try:
            mapped, _, highest = device_mapper.status(self._name(name)).partition(" ")
            if mapped.isdigit() and int(mapped):
                fd = os.open(node, os.O_RDWR | os.O_CLOEXEC)
                try:
                    block.discard(fd, (int(highest) + 1) * SECTOR_BYTES)
                finally:
                    os.close(fd)
        finally:
            node.unlink(missing_ok=True)
            self.deactivate(name)

    def activate(self, number: int, name: str, node: Path, *, read_only: bool = False) -> None:
        """Have a device, and a node for it at that path. Does nothing if both are there."""
        device = self._name(name)
        found = device_mapper.find(device)
        if found is None:
            self._start()
            pool = device_mapper.find(self._pool)
            assert pool is not None, "it was started"
            target = Target("thin", DEVICE_BYTES // SECTOR_BYTES, f"{_numbers(pool.number)} {number}")
            try:
                found = device_mapper.create(device, target, read_only=read_only)
            except OSError:
                if (found := device_mapper.find(device)) is None:  # else somebody else made it at the same moment
                    raise
        with suppress(FileNotFoundError):
            if node.stat().st_rdev == found.number:
                return
            node.unlink()  # of an earlier boot
        with suppress(FileExistsError):
            os.mknod(node, stat.S_IFBLK | 0o600, found.number)

    def deactivate(self, name: str, *, wait_s: float = BUSY_S) -> None:
        """Its content stays. EBUSY if it is in use."""
        device_mapper.remove(self._name(name), wait_s=wait_s)

    def close(self, names: Iterable[str]) -> None:
        """Let go of what nobody uses: of the devices with these names, and of the pool once there are none."""
        for name in names:
            with suppress(OSError):
                self.deactivate(name, wait_s=0)
        with self._lock, suppress(OSError):
            device_mapper.remove(self._pool, wait_s=0)
            self._is_known = False

    def check_room(self) -> None:
        """Raises OSError, with a sentence, if nothing more can, or should, be put into the pool."""
        self._start()
        fields = device_mapper.status(self._pool).split()
        if len(fields) < 5 or fields[4] == "ro":
            raise OSError(
                errno.EIO,
                f"thin pool {self._pool} cannot be written to: the kernel's log tells why, thin_check(8) more",
            )
        for what, counted, path in (("data", fields[2], self._data), ("metadata", fields[1], self._metadata)):
            used, total = map(int, counted.split("/"))
            if (total - used) * 100 < total * LOW_PERCENT:
                raise OSError(
                    errno.ENOSPC,
                    f"the thin pool's {what} on {path} are full to {used * 100 // total} %, and nothing new is made"
                    f" with less than {LOW_PERCENT} % free: enlarge that and start corral anew",
                )

    def _start(self) -> None:
        """Make the pool known to the kernel, if it is not."""
        with self._lock:
            if self._is_known:
                return
            if device_mapper.find(self._pool) is None:
                self._make_files()
                self._make_pool()
            self._prove()
            self._is_known = True

    def _make_files(self) -> None:
        if self._data == self._root / "data" and not self._data.exists():
            _make_file(self._data, DATA_BYTES)
        if self._metadata == self._root / "metadata" and not self._metadata.exists():
            blocks = _size_of(self._data) // (_BLOCK_SECTORS * SECTOR_BYTES)
            _make_file(self._metadata, max(blocks * _METADATA_PER_BLOCK, _MIN_METADATA_BYTES))

    def _make_pool(self) -> None:
        with _opened_device(self._metadata) as metadata, _opened_device(self._data) as data:
            on = f"{_numbers(os.fstat(metadata).st_rdev)} {_numbers(os.fstat(data).st_rdev)}"
            # Who writes to a pool that is full is told at once; the kernel's default is to let him wait for a minute.
            parameters = f"{on} {_BLOCK_SECTORS} 0 1 error_if_no_space"
            sectors = block.size_bytes(data) // SECTOR_BYTES
            device_mapper.create(self._pool, Target("thin-pool", sectors, parameters))

    def _prove(self) -> None:
        """The pool is the one that the numbers in this directory are of: it has an identity, its transaction id."""
        found = device_mapper.status(self._pool).split()[0]
        path = self._root / "pool"
        wanted = path.read_text("ascii").strip() if path.exists() else ""
        if not wanted and found == "0":
            wanted = str(secrets.randbits(63) | 1)
            atomic_write(path, wanted.encode())
        if found == "0" and not self._has_numbers():
            device_mapper.message(self._pool, f"set_transaction_id 0 {wanted}")
        elif found != wanted:
            raise OSError(
                errno.EINVAL,
                f"thin pool {self._pool} on {self._data} and {self._metadata} is not the one that was used with"
                f" {self._root}: bring that back, or begin anew with an empty directory and metadata that are zeroed",
            )

    def _has_numbers(self) -> bool:
        return any(self._root.glob("*/*/thin"))

    def _name(self, name: str) -> str:
        return f"{self._prefix}-{name}"


def _make_file(path: Path, size_bytes: int) -> None:
    """Whoever is killed meanwhile leaves none, or the whole one: it is empty."""
    new = path.with_suffix(".new")
    with new.open("wb") as file:
        file.truncate(size_bytes)
    new.chmod(0o600)
    new.rename(path)


def _size_of(path: Path) -> int:
    with path.open("rb") as file:
        if stat.S_ISBLK(os.fstat(file.fileno()).st_mode):
            return block.size_bytes(file.fileno())
        return os.fstat(file.fileno()).st_size


@contextmanager
def _opened_device(path: Path) -> Iterator[int]:
    """What is mapped onto it keeps a loop device when it is closed here."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC) if path.is_block_device() else loop.attach(str(path))
    try:
        yield fd
    finally:
        os.close(fd)


def _numbers(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"
