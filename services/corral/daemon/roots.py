"""Directories and locks of one process: nobody else may work on the same root, or listen at the same path."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from corral.rpc.address import Address, UnixAddress
from corral.rpc.errors import CorralError, FailedPrecondition, from_os_error
from corral.rpc.handover import Handover
from corral.store import Lock, LockHeld


@contextmanager
def claimed(
    roots: Mapping[str, Path], state: Path, addresses: Sequence[Address], handover: Handover
) -> Iterator[Mapping[str, int]]:
    """Make the directories and hold every lock while the block runs; yields the descriptors of the locks by path.

    What this process had locked before it executed itself anew it never lets go of.

    One lock per service directory, so that `corrald` and `corrald --service tasks` exclude each other too; one per
    socket, so that whoever finds a socket there knows that it is stale. Raises FailedPrecondition naming the holder.
    """
    held: dict[str, int] = {}

    def claim(path: Path, does: str, option: str) -> None:
        lock = locks.enter_context(_lock(path, does, option, handover.locks.get(str(path), -1)))
        held[str(path)] = lock.fileno()

    with ExitStack() as locks:
        try:
            for name, root in roots.items():
                _make_private(root)
                claim(root / "lock", f"works on {root}", f"--root (service {name})")
            # Anyone may pass through to a socket; its mode says who may connect.
            state.mkdir(0o711, parents=True, exist_ok=True)
            for address in addresses:
                if isinstance(address, UnixAddress):
                    path = address.path
                    claim(path.with_name(f"{path.name}.lock"), f"listens at {path}", "--address or --state")
                    if str(path) not in handover.waiting:
                        remove_stale_socket(path)
            # What the settings do not know any more: who waits there is served, and nobody comes any more.
            for path_text in handover.waiting.keys() - {str(a.path) for a in addresses if isinstance(a, UnixAddress)}:
                Path(path_text).unlink(missing_ok=True)
            for path_text in handover.locks.keys() - held.keys():
                os.close(handover.locks[path_text])
        except OSError as e:
            raise from_os_error(e, "cannot prepare the directories") from e
        yield held


def _make_private(root: Path) -> None:
    """Image files may be set-uid or world-readable: nobody but root may get at them from outside a container."""
    root.parent.mkdir(0o700, parents=True, exist_ok=True)
    root.mkdir(0o700, exist_ok=True)


def _lock(path: Path, does: str, option: str, inherited: int) -> Lock:
    try:
        return Lock(path, inherited=inherited)
    except LockHeld as e:
        raise already(does, e.holder, option) from e


def already(does: str, holder: int | None, option: str) -> CorralError:
    """What to tell someone who starts a second daemon."""
    who = f"another corrald (process {holder})" if holder else "another corrald"
    return FailedPrecondition(
        f"{who} {does}: stop that one first, or give this one a different {option}", reason="ALREADY_RUNNING"
    )


def remove_stale_socket(path: Path) -> None:
    """Unlink what a killed daemon left; the caller holds the lock. Raises FailedPrecondition if it is no socket."""
    if path.is_socket():
        path.unlink()
    elif path.exists():
        raise FailedPrecondition(f"{path} exists and is not a socket: remove it, or choose another --address")
