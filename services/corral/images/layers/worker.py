"""The process that unpacks layers: JSON lines in, JSON lines out, one job after the other, until its input ends.

    in   {"op": "apply", "blob": PATH, "target": DIR, "form": FORM, "bottom": BOOL, "diff_id": "sha256:…" or ""}
         {"op": "measure", "blob": PATH, "diff_id": "sha256:…"}
         {"op": "complete", "layer": DIR, "below": [DIR, …], "implicit": […], "links": [[…], …]}
         {"op": "complete_aufs", "layer": DIR, "below": [DIR, …], "implicit": […], "links": [[…], …]}: complete, as one
         that aufs can stack
         {"op": "complete_image", "directory": DIR, "below": [DIR or IMAGE, …], "implicit": […], "links": [[…], …]}
         {"op": "lay", "layers": [DIR, …], "target": DIR}, or with "file" as they are: directories in that ext4 image
         {"op": "fill", "device": PATH, "staged": DIR, "implicit": […], "links": [[…], …]}: complete, and lay on the
         tree of an ext4 file system on that device
         {"op": "pack", "source": DIR, "below": […], "target": FILE}: a layer, gzipped, of the changes in DIR
         {"op": "pack_whole", "layers": [DIR or IMAGE, …], "options": […], "target": FILE}: a tar of all, merged by
         overlayfs, or by "type"
         {"op": "compare", "source": DIR, "below": [DIR or IMAGE, …], "target": FILE}: a line [KIND, PATH] per change
         Of pack and compare: with "since_ns" DIR is no upper directory but the whole tree, as old as that; with "file"
         it lies in that ext4 image, or on that device; with "marks" DIR and what is below it tell in another form than
         overlayfs' what they hide. IMAGE may be a device too, with a tree as fill makes one.
    out  {"progress": BYTES of the blob read}…, then {"ok": {…}} or {"error": KIND, "errno": N, "message": SENTENCE}
         FORM: "directory", or "image" for an EROFS image in the directory
         KIND: "bad" (the data), "os" (the machine), "bug"

Why a process: zlib, sha256 and file writes release the GIL, but a layer of small files is Python code all the way.
Measured with 20,000 files on a busy 2-core machine: in a thread of the daemon 13 s, with the event loop held up for
14 ms (p99) and 79 ms (worst); in a process 5 s, 4 ms and 8 ms, no more than an idle loop has there. Taking an archive
in is large reads, hashes and writes, and stays in a thread.
"""

import hashlib
import json
import os
import signal
import stat
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, TextIO

from corral.images.layers import imaging
from corral.images.layers.apply import Applied, Applier, Limits
from corral.images.layers.below import complete
from corral.images.layers.bounds import bound_memory, bounded
from corral.images.layers.comparing import Change, changes
from corral.images.layers.compression import CHUNK_BYTES, compressed, decompressed
from corral.images.layers.errors import BadLayer
from corral.images.layers.hiding import Marks
from corral.images.layers.laying import lay
from corral.images.layers.packing import packed, packed_changes
from corral.images.layers.stream import ByteStream, prefetched
from corral.images.layers.tar import TarReader
from corral.images.layers.tree import Tree
from corral.kernel.aufs import join_branches, new_aufs
from corral.kernel.loop import mount_file
from corral.kernel.mount import MOUNT_ATTR_RDONLY, clone_tree, set_attributes
from corral.kernel.overlay import new_overlay
from corral.kernel.process import set_parent_death_signal

PROGRESS_BYTES = 4 << 20

type Job = Mapping[str, Any]


class Blob:
    """A file as chunks, and how far it was read."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.done = 0

    def chunks(self) -> Iterator[bytes]:
        with open(self._path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while data := file.read(CHUNK_BYTES):
                self.done += len(data)
                yield data


class Hashed:
    """Chunks, and the digest of those that were passed on."""

    def __init__(self, chunks: Iterator[bytes], like: str = "") -> None:
        """like: a digest whose algorithm is used, if not sha256."""
        self._chunks = chunks
        self._hash = hashlib.new(like.partition(":")[0] or "sha256")

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._chunks:
            self._hash.update(chunk)
            yield chunk

    @property
    def digest(self) -> str:
        return f"{self._hash.name}:{self._hash.hexdigest()}"

    def prove(self, diff_id: str) -> None:
        """Raises BadLayer."""
        if self.digest != diff_id:
            raise BadLayer(f"its content is {self.digest}, but the image's config says {diff_id}")


def unpack(
    blob: Blob, target: Path, *, bottom: bool, diff_id: str, limits: Limits, report: TextIO, form: str = "directory"
) -> dict[str, object]:
    """Apply the layer in `blob` to the empty directory `target`, and prove its diff id if one is given."""
    with ExitStack() as threads:  # which end with it, whatever happens: an interpreter does not end while one works
        # Three threads: one decodes, one hashes, one makes the files; all of them wait for the GIL but seldom.
        decoded = prefetched(bounded(decompressed(blob.chunks()), limits.plain_bytes))
        plain = Hashed(threads.enter_context(closing(decoded)), diff_id)
        stream = ByteStream(threads.enter_context(closing(prefetched(iter(plain)))))
        reader = TarReader(stream, needs_end=not diff_id)
        applied = _apply_to(target, reader, _progress(blob, report), form=form, bottom=bottom, limits=limits)
        stream.drain()
    if diff_id:
        plain.prove(diff_id)
    return {**_as_json(applied), "diff_id": plain.digest}


def _progress(blob: Blob, report: TextIO) -> Callable[[], None]:
    reported = 0

    def on_entry() -> None:
        nonlocal reported
        if blob.done - reported >= PROGRESS_BYTES:
            reported = blob.done
            _say(report, {"progress": reported})

    return on_entry


def _apply_to(
    target: Path, reader: TarReader, on_entry: Callable[[], None], *, form: str, bottom: bool, limits: Limits
) -> Applied:
    if form == "image":
        return _make_image(target, reader, on_entry, bottom=bottom, limits=limits)
    with Tree(target) as tree:
        return Applier(tree, bottom=bottom, limits=limits).apply(reader, on_entry)


def _make_image(
    target: Path, reader: TarReader, on_entry: Callable[[], None], *, bottom: bool, limits: Limits
) -> Applied:
    with imaging.new_image(target) as image:
        imager = imaging.Imager(image, bottom=bottom, limits=limits)
        applied = imager.apply(reader, on_entry)
        if bottom or not (applied.implicit or applied.links):
            imaging.finish(image, imager.tree, bottom=bottom)
        else:
            imaging.wait_for_below(target, imager.tree, image.blocks)
    return applied


def measure(blob: Blob, diff_id: str, limits: Limits) -> dict[str, object]:
    """Prove the diff id of a layer that is here already, and need not be unpacked again."""
    plain = Hashed(bounded(decompressed(blob.chunks()), limits.plain_bytes), diff_id)
    for _ in plain:
        pass
    plain.prove(diff_id)
    return {"diff_id": plain.digest}


def _as_json(applied: Applied) -> dict[str, object]:
    return {
        "size_bytes": applied.size_bytes,
        "inodes": applied.inodes,
        "implicit": applied.implicit,
        "links": applied.links,
    }


def run_job(job: Job, limits: Limits, report: TextIO) -> dict[str, object]:
    """The answer to one job."""
    try:
        answer = _OPERATIONS[str(job["op"])](job, limits, report)
    except BadLayer as e:
        return {"error": "bad", "errno": 0, "message": str(e)}
    except MemoryError:
        return {"error": "bad", "errno": 0, "message": "it takes more memory to unpack than a layer may"}
    except OSError as e:
        return {"error": "os", "errno": e.errno or 0, "message": e.strerror or str(e)}
    except Exception as e:  # noqa: BLE001  whatever it is, the daemon must hear of it
        return {"error": "bug", "errno": 0, "message": f"{type(e).__name__}: {e}"}
    return {"ok": answer}


def _apply(job: Job, limits: Limits, report: TextIO) -> dict[str, object]:
    return unpack(
        Blob(job["blob"]),
        Path(job["target"]),
        bottom=job["bottom"],
        diff_id=job["diff_id"],
        form=job.get("form", "directory"),
        limits=limits,
        report=report,
    )


def _measure(job: Job, limits: Limits, _report: TextIO) -> dict[str, object]:
    return measure(Blob(job["blob"]), job["diff_id"], limits)


def _complete(job: Job, _limits: Limits, _report: TextIO) -> dict[str, object]:
    below = [Path(path) for path in job["below"]]
    added = complete(Path(job["layer"]), below, job["implicit"], [(a, b) for a, b in job["links"]])
    return {"size_bytes": added}


def _complete_aufs(job: Job, _limits: Limits, _report: TextIO) -> dict[str, object]:
    from corral.images.layers.aufs import convert  # which one driver needs

    layer, below = Path(job["layer"]), [Path(path) for path in job["below"]]
    added = complete(layer, below, job["implicit"], [(a, b) for a, b in job["links"]], Marks.AUFS) if below else 0
    convert(layer, bottom=not below)
    return {"size_bytes": added}


def _complete_image(job: Job, _limits: Limits, _report: TextIO) -> dict[str, object]:
    with ExitStack() as stack:
        below = [_opened(path, stack) for path in job["below"]]
        links = [(a, b) for a, b in job["links"]]
        return {"size_bytes": imaging.complete_image(Path(job["directory"]), below, job["implicit"], links)}


def _opened(path: str, stack: ExitStack) -> int:
    """The root of a layer: a directory, or an image or a device, mounted for us alone."""
    mode = os.stat(path).st_mode  # noqa: PTH116 - a string
    if stat.S_ISDIR(mode):
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    elif stat.S_ISBLK(mode):
        from corral.images.layers.devices import TREE, mounted

        root = stack.enter_context(mounted(path))
        fd = os.open(TREE, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=root)
    else:
        fd = mount_file("erofs", path, attributes=MOUNT_ATTR_RDONLY)
    stack.callback(os.close, fd)
    return fd


def _lay(job: Job, _limits: Limits, _report: TextIO) -> dict[str, object]:
    target, file = Path(job["target"]), job.get("file")
    if file is None:
        lay([Path(path) for path in job["layers"]], target)
        return {}
    fd = mount_file("ext4", file, device=True)
    try:
        lay([Path(f"/proc/self/fd/{fd}/{path}") for path in job["layers"]], target, verbatim=True)
    finally:
        os.close(fd)
    return {}


def _fill(job: Job, _limits: Limits, _report: TextIO) -> dict[str, object]:
    from corral.images.layers.devices import fill

    links = [(a, b) for a, b in job["links"]]
    return {"size_bytes": fill(job["device"], Path(job["staged"]), job["implicit"], links)}


def _pack(job: Job, _limits: Limits, _report: TextIO) -> dict[str, object]:
    with ExitStack() as stack:
        plain = Hashed(_packed_changes(job, stack))
        size = 0
        with open(job["target"], "xb") as file:
            stored = Hashed(compressed(iter(plain)))
            for chunk in stored:
                size += file.write(chunk)
        return {"digest": stored.digest, "size_bytes": size, "diff_id": plain.digest}


def _packed_changes(job: Job, stack: ExitStack) -> Iterator[bytes]:
    """The layer of an upper directory, or of what a whole tree has become since it was made."""
    root = _opened_upper(job, stack)
    if not job.get("since_ns"):
        return packed(root, _marks(job))
    return packed_changes(root, ((kind is Change.DELETED, path) for kind, path in _differing(job, root, stack)))


def _marks(job: Job) -> Marks:
    return Marks(job.get("marks") or Marks.OVERLAY)


def _opened_upper(job: Job, stack: ExitStack) -> int:
    """`source`, which may lie in an ext4 file system of its own, in or on the `file`."""
    if not (file := job.get("file")):
        return _opened(job["source"], stack)
    from corral.images.layers.shared import mounted_together

    fs = stack.enter_context(mounted_together(file))
    return _opened(f"/proc/self/fd/{fs}/{job['source']}", stack)


def _differing(job: Job, root: int, stack: ExitStack) -> Iterator[tuple[Change, str]]:
    from corral.images.layers.differing import Differing  # which few drivers need

    return Differing(root, [_opened(path, stack) for path in job["below"]], job["since_ns"]).changes()


def _pack_whole(job: Job, _limits: Limits, _report: TextIO) -> dict[str, object]:
    with ExitStack() as stack:
        fds = [_opened_upper(job, stack)] if job.get("file") else []
        fds += [_opened(path, stack) for path in job["layers"]]
        root = fds[0]
        if job.get("type") == "aufs":
            root = _merged_by_aufs(fds, stack)
        elif len(fds) > 1:
            lower = ":".join(f"/proc/self/fd/{fd}" for fd in fds)
            scratch = os.path.dirname(job["target"])  # noqa: PTH120 - a string
            root = new_overlay((f"lowerdir={lower}", *job["options"]), attributes=MOUNT_ATTR_RDONLY, scratch=scratch)
            stack.callback(os.close, root)
        with open(job["target"], "xb") as file:
            file.writelines(packed(root))
    return {}


def _merged_by_aufs(layers: Sequence[int], stack: ExitStack) -> int:
    """Of read-only mounts of them: aufs would remove its own files from the root of a tree that is in use."""
    branches = []
    for fd in layers:
        tree = clone_tree(fd)
        stack.callback(os.close, tree)
        set_attributes(tree, attr_set=MOUNT_ATTR_RDONLY)
        branches.append((f"/proc/self/fd/{tree}", "ro+wh"))
    root = new_aufs((f"br={join_branches(branches)}", "dirperm1", "noplink"), attributes=MOUNT_ATTR_RDONLY)
    stack.callback(os.close, root)
    return root


def _compare(job: Job, _limits: Limits, _report: TextIO) -> dict[str, object]:
    with ExitStack() as stack:
        root = _opened_upper(job, stack)
        with open(job["target"], "x", encoding="ascii") as file:
            if job.get("since_ns"):
                found = _differing(job, root, stack)
            else:
                found = changes(root, [_opened(path, stack) for path in job["below"]], _marks(job))
            file.writelines(json.dumps([kind.value, path]) + "\n" for kind, path in found)
        return {}


def _recipe(job: Job, _limits: Limits, _report: TextIO) -> dict[str, object]:
    """Write how a blob is made again, and make it once, to nowhere."""
    from corral.images.layers import recipe  # which most workers never need

    target = Path(job["target"])
    with ExitStack() as stack:
        root = _opened(job["layer"], stack)
        facts = {name: job[name] for name in ("digest", "chain_id")}
        blob = Path(job["blob"])
        found = recipe.write(blob, root, target, facts | {"size_bytes": blob.stat().st_size})
        if found:
            made = Hashed(recipe.remade(target, root))
            for _ in made:
                pass
            found = made.digest == job["digest"]
    if not found:
        target.unlink(missing_ok=True)
    return {"found": found}


def _remake(job: Job, _limits: Limits, _report: TextIO) -> dict[str, object]:
    from corral.images.layers import recipe

    with ExitStack() as stack, open(job["target"], "xb") as file:
        made = Hashed(recipe.remade(Path(job["recipe"]), _opened(job["layer"], stack)))
        file.writelines(made)
        file.flush()
        os.fsync(file.fileno())
    return {"digest": made.digest}


_OPERATIONS: Mapping[str, Callable[[Job, Limits, TextIO], dict[str, object]]] = {
    "apply": _apply,
    "measure": _measure,
    "complete": _complete,
    "complete_aufs": _complete_aufs,
    "complete_image": _complete_image,
    "lay": _lay,
    "fill": _fill,
    "pack": _pack,
    "pack_whole": _pack_whole,
    "compare": _compare,
    "recipe": _recipe,
    "remake": _remake,
}


def _say(out: TextIO, message: dict[str, object]) -> None:
    out.write(json.dumps(message) + "\n")
    out.flush()


def main() -> None:
    """Serve stdin until it ends. The arguments are the limits: entries, bytes, and memory in bytes."""
    set_parent_death_signal(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-c goes to the whole foreground group; the daemon ends us
    os.umask(0)
    limits = Limits(entries=int(sys.argv[1]), bytes=int(sys.argv[2]))
    bound_memory(int(sys.argv[3]))
    for line in sys.stdin:
        _say(sys.stdout, run_job(json.loads(line), limits, sys.stdout))
