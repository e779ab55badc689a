"""Rows, bundles and shims compared while the leaf runs."""

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from corral.kernel.process import start_time
from corral.rpc.blocking import run_blocking
from corral.rpc.checking import Found
from corral.rpc.errors import Unavailable
from corral.tasks.bundle import Bundles
from corral.tasks.identity import Identity
from corral.tasks.live import Task
from corral.tasks.model import TaskKey
from corral.tasks.recovery import Recovery
from corral.tasks.registry import Registry
from corral.tasks.spawning import UNDO_S, undo

KILL_S = 10.0


class Checker:
    """See the module."""

    def __init__(self, registry: Registry, bundles: Bundles, recovery: Recovery, state: Path) -> None:
        self._registry = registry
        self._bundles = bundles
        self._recovery = recovery
        self._shims = f"{state}/shim/"

    async def look(self) -> Sequence[Found]:
        """Bundles and shims without a row, and rows that are not as the world is."""
        bundles = await run_blocking(self._bundles.found)
        shims = await run_blocking(_shims_below, self._shims)
        strays = {key for key in bundles if key not in self._registry}
        found = [self._stray_bundle(key) for key in sorted(strays, key=str)]
        found += [
            self._stray_shim(identity, key)
            for identity, key in shims
            if key not in self._registry and key not in strays
        ]
        for task in self._registry.of(None):
            if task.settled.is_set() and not task.init.ended.is_set():
                found += await self._alive(task)
        return found

    async def _alive(self, task: Task) -> list[Found]:
        subject = f"task {task.row.key.namespace}/{task.row.key.id}"
        if task.shim is None:
            remedy = "repair finds out how its container ended, and ends what is left of it"
            return [Found(subject, "has no shim", remedy, partial(self._recovery.settle_again, task))]
        if not await run_blocking(task.bundle.exists):
            return [Found(subject, "has lost its bundle", "stop the container, and start it again")]
        return []

    def _stray_bundle(self, key: TaskKey) -> Found:
        return Found(
            f"bundle {key.namespace}/{key.id}",
            "belongs to no task",
            "repair ends what runs in it and removes it",
            partial(self._remove_bundle, key),
        )

    async def _remove_bundle(self, key: TaskKey) -> None:
        async with self._registry.alone(key):
            if key not in self._registry:
                await undo(self._bundles.of(key), timeout_s=UNDO_S)

    def _stray_shim(self, identity: Identity, key: TaskKey) -> Found:
        return Found(
            f"shim {identity.pid}",
            f"belongs to task {key.namespace}/{key.id}, which is gone",
            "repair kills it",
            partial(self._kill, identity, key),
        )

    async def _kill(self, identity: Identity, key: TaskKey) -> None:
        async with self._registry.alone(key):
            if key not in self._registry and not await identity.kill(within_s=KILL_S):
                raise Unavailable(f"process {identity.pid} cannot be killed; it is in the kernel", reason="UNKILLABLE")


def _shims_below(prefix: str) -> list[tuple[Identity, TaskKey]]:
    """Each shim that has a file of a bundle open, with the task of that. Blocking."""
    found = []
    for directory in Path("/proc").iterdir():
        if not directory.name.isdigit():
            continue
        with suppress(OSError, ValueError):  # it has ended meanwhile
            if b"corral.shim" not in (directory / "cmdline").read_bytes():
                continue
            files = (str(fd.readlink()) for fd in (directory / "fd").iterdir())
            path = next((file for file in files if file.startswith(prefix)), None)
            if path is not None:
                namespace, task_id = path.removeprefix(prefix).split("/")[:2]
                pid = int(directory.name)
                found.append((Identity(pid, start_time(pid)), TaskKey(namespace, task_id)))
    return found
