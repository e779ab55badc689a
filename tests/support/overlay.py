"""Mounts that a snapshotter describes, made and unmade by a test."""

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Protocol

from corral.kernel import mount
from corral.oci.parts import attach, located, located_options, make_parts
from corral.oci.spec import Mount
from corral.oci.trees import new

READ_ONLY = 1  # MOUNT_ATTR_RDONLY
SERVER_ENDS_S = 5.0


class Described(Protocol):
    """A mount as data, from a driver or from the wire."""

    @property
    def type(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def options(self) -> Sequence[str]: ...
    @property
    def parts(self) -> "Sequence[Described]": ...


@contextmanager
def mounted(mounts: Sequence[Described], target: Path) -> Iterator[Path]:
    """The tree, mounted at `target` as init would do it; unmounted at the end."""
    target.mkdir(exist_ok=True)
    others = _servers()
    done = 0
    try:
        for described in mounts:
            done += _attach(described, target)
        servers = _servers() - others
        yield target
    finally:
        for _ in range(done):
            mount.umount(target)
    for server in servers:
        _reap(server)


def _servers() -> set[int]:
    """Programs that serve a mount are this process's children, as they are a shim's."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        children: list[int] = []
        with suppress(OSError):  # a thread that has just ended
            children = [int(pid) for pid in (task / "children").read_text().split()]
        for pid in children:
            with suppress(FileNotFoundError):
                if Path(f"/proc/{pid}/comm").read_text().startswith("fuse-"):
                    found.add(pid)
    return found


def _reap(pid: int) -> None:
    """It ends with the mount, which a mount namespace that another program made meanwhile has a copy of."""
    deadline = time.monotonic() + SERVER_ENDS_S
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return
        time.sleep(0.01)


def _attach(described: Described, target: Path) -> int:
    """Returns how many mounts there are on target."""
    with ExitStack() as stack:
        parts = make_parts([Mount("", each.type, each.source, tuple(each.options)) for each in described.parts], stack)
        attach(parts, str(target))
        try:
            _attach_root(described, target, parts)
        except BaseException:
            for _ in parts:
                mount.umount(target)
            raise
    return len(parts) + 1


def _attach_root(described: Described, target: Path, parts: Sequence[int]) -> None:
    attributes = READ_ONLY if "ro" in described.options else 0
    if described.type == "bind":
        tree = mount.clone_tree(-100, located(described.source, parts))
        mount.set_attributes(tree, attr_set=attributes)
    else:
        options = [option for option in described.options if option not in ("ro", "rw")]
        tree = new(described.type, described.source, located_options(options, parts), attributes, str(target))
    where = os.open(target, os.O_PATH | os.O_DIRECTORY)
    try:
        mount.move_mount(tree, where)
    finally:
        os.close(where)
        os.close(tree)
