"""How fast images are unpacked, beside containerd, podman and umoci, and how much memory that takes.

Everybody takes the same two images of Debian's files, of about 300 MB: one with a single layer, one with twenty. All
roots lie on one file system of the bench's own, what was written before is flushed before each, and each begins without
the image. corral, containerd and podman take an archive: they store its blobs too, and prove their digests. umoci only
unpacks, out of a layout that lies there already. corral alone has flushed it all to the disk when it says it is done.
"""

import contextlib
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import memory
from debian import Sample, files_of_host, in_parts, make_sample
from peers import Ctr, Peer, Podman, memory_directory, quiet, wait_until
from support import registry
from support.corrald import CORRAL, Corrald, Place, PlaceOn, running
from support.file_systems import file_system, lacking_file_system

ROUNDS = 3
IMAGE_BYTES = 300_000_000
LAYERS = 20
DISK_MB = 12_000
SAMPLED_EVERY_S = 0.02


class Unpacking:
    """One that unpacks images. Both methods return when it is done."""

    name = ""

    def take(self, sample: Sample) -> None:
        raise NotImplementedError

    def forget(self, sample: Sample) -> None:
        """So that the next take() does all of it again."""
        raise NotImplementedError


class ByCorral(Unpacking):
    def __init__(self, daemon: Corrald, name: str = "corral") -> None:
        self.daemon, self.name = daemon, name

    def corral(self, *words: str) -> None:
        quiet([str(CORRAL), *words], CORRAL_ADDRESS=self.daemon.address)

    def take(self, sample: Sample) -> None:
        self.corral("image", "import", str(sample.archive))

    def forget(self, sample: Sample) -> None:
        self.corral("image", "rm", sample.reference)
        wait_until(self._check_removed)

    def _check_removed(self) -> None:
        """Trees are removed behind the command's back. Raises RuntimeError while any is there."""
        if any(below for _, below, _ in os.walk(self.daemon.root / "images") if "usr" in below):
            raise RuntimeError("a removed layer is still there")


class ByCtr(Unpacking):
    name = "ctr"

    def __init__(self, peer: Ctr) -> None:
        self.command = peer.command

    def take(self, sample: Sample) -> None:
        quiet([*self.command, "images", "import", str(sample.archive)])

    def forget(self, sample: Sample) -> None:
        quiet([*self.command, "images", "rm", "--sync", sample.reference])


class ByPodman(Unpacking):
    name = "podman"

    def __init__(self, peer: Podman) -> None:
        self.command = peer.command

    def take(self, sample: Sample) -> None:
        quiet([*self.command, "load", "--quiet", "--input", str(sample.archive)])

    def forget(self, sample: Sample) -> None:
        quiet([*self.command, "rmi", "--all", "--force"])


class ByUmoci(Unpacking):
    name = "umoci"

    def __init__(self, directory: Path) -> None:
        self.bundle = directory / "umoci"

    def take(self, sample: Sample) -> None:
        quiet(["umoci", "unpack", "--image", f"{sample.layout}:latest", str(self.bundle)])

    def forget(self, sample: Sample) -> None:
        shutil.rmtree(self.bundle)


# ---------------------------------------------------------------- memory of processes


@dataclass
class Watch:
    """Bytes that a daemon and the processes that unpack for it took at most. Of each by itself the RSS; of all together
    the PSS, since what they share, the interpreter's code say, is there once."""

    daemon: int = 0
    worker: int = 0
    together: int = 0
    _end: threading.Event = field(default_factory=threading.Event)

    def look(self, daemon: int) -> None:
        while not self._end.is_set():
            taken = {pid: memory.of_processes([pid]) for pid in (daemon, *_workers(daemon))}
            self.together = max(self.together, sum(each.pss for each in taken.values()))
            self.daemon = max(self.daemon, taken.pop(daemon).rss)
            self.worker = max(self.worker, *(each.rss for each in taken.values()), 0)
            time.sleep(SAMPLED_EVERY_S)


@contextlib.contextmanager
def watched(daemon: Corrald) -> Iterator[Watch]:
    """What the daemon's processes take within the block."""
    watch = Watch()
    [process] = daemon.processes.values()
    thread = threading.Thread(target=watch.look, args=(process.pid,))
    thread.start()
    try:
        yield watch
    finally:
        watch._end.set()
        thread.join()


def _workers(daemon: int) -> list[int]:
    """The zygote of containers is no part of this."""
    found: list[int] = []
    for children in Path(f"/proc/{daemon}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, children.read_text().split())
    return [child for child in found if b"layers.worker" in _command(child)]


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


# ---------------------------------------------------------------- what is measured


def bench_unpack(daemon: Corrald, peers: list[Peer]) -> None:
    """The part `unpack` of the bench. Its daemons and peers are its own: those that are given have other roots."""
    with tempfile.TemporaryDirectory(prefix="corral-bench-") as scratch, contextlib.ExitStack() as stack:
        disk = _disk(Path(scratch), stack)
        paths = files_of_host(IMAGE_BYTES)
        groups = {"debian": [paths], "layered": in_parts(paths, LAYERS)}
        with ThreadPoolExecutor() as threads:  # zlib is what takes the time
            samples = list(threads.map(partial(make_sample, disk), groups, groups.values()))
        everybody = [ByCorral(stack.enter_context(_daemon_on(disk))), *_others(disk, samples, peers, stack)]
        for sample in samples:
            _speed(everybody, sample)
        _memory(samples, disk)
        _erofs(samples, disk)


def _disk(scratch: Path, stack: contextlib.ExitStack) -> Path:
    """An ext4 with a journal, whatever this machine's disk has: one without makes files more slowly for minutes after
    others were removed, whoever did that."""
    if reason := lacking_file_system("ext4"):
        print(f"unpack: on the disk as it is ({reason})")
        return scratch
    where = stack.enter_context(file_system("ext4", scratch, size_mb=DISK_MB))
    for device in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            if device.read_text().strip() == f"{scratch}/ext4.img":  # else everything would be cached twice
                quiet(["losetup", "--direct-io=on", f"/dev/{device.parent.parent.name}"])
    return where


def _others(disk: Path, samples: Sequence[Sample], peers: list[Peer], stack: contextlib.ExitStack) -> list[Unpacking]:
    """Those that work on this machine, with roots on the disk, and without any of the images."""
    found: list[Unpacking] = []
    archive = samples[0].archive
    if any(isinstance(peer, Ctr) for peer in peers):
        found.append(ByCtr(Ctr(disk, archive, stack)))
    if any(isinstance(peer, Podman) for peer in peers):
        found.append(ByPodman(Podman(disk, archive, stack)))
    for each in found:
        each.forget(samples[0])
    return [*found, ByUmoci(disk)] if shutil.which("umoci") else found


def _daemon_on(disk: Path, driver: str = "overlayfs") -> contextlib.AbstractContextManager[Corrald]:
    place = Place.make(run_in=memory_directory())
    on_disk = PlaceOn(place.tag, place.directory, place.run, disk / place.tag)
    return _removed_after(on_disk, running(place=on_disk, settings={"images": {"driver": driver}}))


@contextlib.contextmanager
def _removed_after(place: PlaceOn, daemon: contextlib.AbstractContextManager[Corrald]) -> Iterator[Corrald]:
    try:
        with daemon as running_daemon:
            yield running_daemon
    finally:
        shutil.rmtree(place.root, ignore_errors=True)


def _speed(everybody: Sequence[Unpacking], sample: Sample) -> None:
    samples: dict[str, list[float]] = {each.name: [] for each in everybody}
    for _ in range(ROUNDS):
        for each in everybody:
            samples[each.name].append(_timed_s(partial(each.take, sample)))
            each.forget(sample)
    size = f"{sample.bytes / 1e6:.0f} MB in {sample.files} files"
    _table(f"unpack of an image of Debian's files, {size}, {_layers(sample)}", samples)


def _table(title: str, samples: Mapping[str, Sequence[float]]) -> None:
    """Medians, and their ratio to the first one's."""
    print(f"\n{title}")
    base = statistics.median(next(iter(samples.values())))
    for name, taken in samples.items():
        median = statistics.median(taken)
        print(f"  {name:<28} {median * 1000:9.0f} ms   {median / base:6.2f}x", flush=True)


def _layers(sample: Sample) -> str:
    return f"{sample.layers} layer{'s' if sample.layers > 1 else ''}"


def _timed_s(job: Callable[[], object]) -> float:
    os.sync()
    began = time.perf_counter()
    job()
    return time.perf_counter() - began


def _memory(samples: Sequence[Sample], disk: Path) -> None:
    print("\nmemory while an image comes in, at most: RSS of the daemon, of a worker, PSS of all of them")
    for sample in samples:
        with _daemon_on(disk) as daemon, watched(daemon) as watch:
            ByCorral(daemon).take(sample)
        _tell(f"import, {_layers(sample)}", watch)
    if not all(map(shutil.which, ("docker-registry", "skopeo"))):
        print("  pull: docker-registry or skopeo is not installed")
        return
    with registry.running(disk / "registry") as served:
        for sample in samples:
            name = f"{served.host}/{sample.name}:latest"
            registry.skopeo(
                "copy", "--quiet", "--dest-tls-verify=false", f"oci:{sample.layout}:latest", f"docker://{name}"
            )
            with _daemon_on(disk) as daemon, watched(daemon) as watch:
                took = _timed_s(partial(ByCorral(daemon).corral, "pull", "--quiet", name))
            _tell(f"pull, {_layers(sample)}", watch, f"in {took * 1000:.0f} ms")


def _tell(what: str, watch: Watch, more: str = "") -> None:
    figures = (watch.daemon, watch.worker, watch.together)
    print(f"  {what:<22}", *(f"{figure / 2**20:6.0f}" for figure in figures), "MiB", more, flush=True)


def _erofs(samples: Sequence[Sample], disk: Path) -> None:
    """Layers as images of EROFS, which are mounted, beside directories."""
    with contextlib.ExitStack() as stack:
        drivers = [ByCorral(stack.enter_context(_daemon_on(disk, name)), name) for name in ("overlayfs", "erofs")]
        for sample in samples:
            whole: dict[str, list[float]] = {each.name: [] for each in drivers}
            started: dict[str, list[float]] = {each.name: [] for each in drivers}
            for _ in range(ROUNDS):
                for each in drivers:
                    took = _timed_s(partial(each.take, sample))
                    start = _timed_s(partial(each.corral, "run", "--rm", "--network", "none", sample.reference))
                    started[each.name].append(start)
                    whole[each.name].append(took + start)
                    each.forget(sample)
            _table(f"from an archive to a container that has run, {_layers(sample)}", whole)
            _table(f"of which its start, {_layers(sample)}", started)
