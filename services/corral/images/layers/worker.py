"""The process that unpacks layers: JSON lines in, JSON lines out, one job after the other, until its input ends.

    in   {"op": "apply", "blob": PATH, "target": DIR, "bottom": BOOL, "diff_id": "sha256:…" or ""}
         {"op": "complete", "layer": DIR, "below": [DIR, …], "implicit": […], "links": [[…], …]}
    out  {"progress": BYTES of the blob read}…, then {"ok": {…}} or {"error": KIND, "errno": N, "message": SENTENCE}
         KIND: "bad" (the data), "os" (the machine), "bug"

Unpacking 100,000 files is Python code all the way; in a thread it would hold up every RPC of the daemon.
"""

import hashlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from corral.images.layers.apply import Applied, Applier, Limits
from corral.images.layers.below import complete
from corral.images.layers.compression import CHUNK_BYTES, decompressed
from corral.images.layers.errors import BadLayer
from corral.images.layers.stream import ByteStream, prefetched
from corral.images.layers.tar import TarReader
from corral.images.layers.tree import Tree
from corral.kernel.process import set_parent_death_signal

PROGRESS_BYTES = 4 << 20


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


def unpack(
    blob: Blob, target: Path, *, bottom: bool, diff_id: str, limits: Limits, report: TextIO
) -> dict[str, object]:
    """Apply the layer in `blob` to the empty directory `target`, and prove its diff id if one is given."""
    digest = hashlib.sha256()

    def hashed() -> Iterator[bytes]:
        for chunk in decompressed(blob.chunks()):
            digest.update(chunk)
            yield chunk

    stream = ByteStream(prefetched(hashed()))
    reported = 0

    def on_entry() -> None:
        nonlocal reported
        if blob.done - reported >= PROGRESS_BYTES:
            reported = blob.done
            _say(report, {"progress": reported})

    with Tree(target) as tree:
        applied = Applier(tree, bottom=bottom, limits=limits).apply(TarReader(stream, needs_end=not diff_id), on_entry)
        stream.drain()
    found = f"sha256:{digest.hexdigest()}"
    if diff_id and found != diff_id:
        raise BadLayer(f"its content is {found}, but the image's config says {diff_id}")
    return {**_as_json(applied), "diff_id": found}


def _as_json(applied: Applied) -> dict[str, object]:
    return {
        "size_bytes": applied.size_bytes,
        "inodes": applied.inodes,
        "implicit": applied.implicit,
        "links": applied.links,
    }


def run_job(job: dict[str, object], limits: Limits, report: TextIO) -> dict[str, object]:
    """The answer to one job."""
    try:
        if job["op"] == "apply":
            answer = unpack(
                Blob(str(job["blob"])),
                Path(str(job["target"])),
                bottom=bool(job["bottom"]),
                diff_id=str(job["diff_id"]),
                limits=limits,
                report=report,
            )
        else:
            answer = {"size_bytes": _complete(job)}
    except BadLayer as e:
        return {"error": "bad", "errno": 0, "message": str(e)}
    except OSError as e:
        return {"error": "os", "errno": e.errno or 0, "message": e.strerror or str(e)}
    except Exception as e:  # noqa: BLE001  whatever it is, the daemon must hear of it
        return {"error": "bug", "errno": 0, "message": f"{type(e).__name__}: {e}"}
    return {"ok": answer}


def _complete(job: dict[str, object]) -> int:
    below, implicit, links = job["below"], job["implicit"], job["links"]
    assert isinstance(below, list)
    assert isinstance(implicit, list)
    assert isinstance(links, list)
    return complete(Path(str(job["layer"])), [Path(path) for path in below], implicit, [(a, b) for a, b in links])


def _say(out: TextIO, message: dict[str, object]) -> None:
    out.write(json.dumps(message) + "\n")
    out.flush()


def main() -> None:
    """Serve stdin until it ends. The arguments are the limits: entries, bytes."""
    set_parent_death_signal(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-c goes to the whole foreground group; the daemon ends us
    os.umask(0)
    limits = Limits(entries=int(sys.argv[1]), bytes=int(sys.argv[2]))
    for line in sys.stdin:
        _say(sys.stdout, run_job(json.loads(line), limits, sys.stdout))
