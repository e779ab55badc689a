"""Every snapshot driver, each where it feels at home, for the suites that ask the same of all."""

import io
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from corral.images.drivers import DRIVERS, make_driver
from corral.images.layers.apply import Limits
from corral.images.layers.errors import BadLayer
from corral.images.layers.worker import run_job
from corral.images.snapshotter import NOTHING_MISSING, Snapshotter, TreeId
from corral.kernel.device_mapper import why_none
from support.file_systems import FileSystems, lacking_file_system
from support.images import Entry, layer


def _runs_here(name: str) -> bool:
    """Few kernels of containers have a device mapper: `make test-vm` has one."""
    return name != "btrfs" and (name != "devicemapper" or not why_none("thin-pool"))


# A driver, and the file system that its directory lies on; "" is the one that tests have theirs on.
CASES = (
    *((name, "") for name in DRIVERS if _runs_here(name)),
    ("native", "btrfs"),
    ("native", "xfs"),
    ("btrfs", "btrfs"),
)


def case_id(case: tuple[str, str]) -> str:
    return "-on-".join(filter(None, case))


def place_for(case: tuple[str, str], directory: Path, file_systems: FileSystems) -> Path:
    """A directory for the driver; skips the test where this machine cannot run it."""
    name, kind = case
    if kind and (reason := lacking_file_system(kind)):
        pytest.skip(reason)
    place = file_systems.place(kind) if kind else directory
    if reason := make_driver(name, place, work_here).check():
        pytest.skip(f"{name}: {reason}")
    return place


def driver_at(name: str, root: Path) -> Snapshotter:
    """The driver itself, whose heavy jobs are done by this process."""
    return make_driver(name, root, work_here)


def unpack_here(driver: Snapshotter, tree: TreeId, *entries: Entry) -> None:
    """Stage a tree and unpack a layer with these entries into it, as the bottom one."""
    target = driver.stage(tree)
    _unpack(driver, target, entries)
    driver.build(tree, (), NOTHING_MISSING)


def _unpack(driver: Snapshotter, target: Path, entries: Sequence[Entry]) -> None:
    with tempfile.NamedTemporaryFile() as blob:
        blob.write(layer(entries))
        blob.flush()
        job = {"op": "apply", "blob": blob.name, "target": str(target), "form": driver.form}
        work_here({**job, "bottom": True, "diff_id": ""})


def work_here(job: Mapping[str, object]) -> dict[str, Any]:
    """As the daemon has its worker processes do it."""
    umask = os.umask(0)
    try:
        answer = run_job(job, Limits(), io.StringIO())
    finally:
        os.umask(umask)
    if "ok" in answer:
        return answer["ok"]  # type: ignore[no-any-return, return-value]
    if answer["error"] == "os":
        raise OSError(answer["errno"], answer["message"])
    raise BadLayer(str(answer["message"]))
