"""kill, delete."""

import contextlib
import os
import select
import signal
from typing import TYPE_CHECKING

from corral.kernel import process
from corral.runtime import groups, life, state
from corral.runtime.context import Context
from corral.runtime.errors import CommandError, sentence
from corral.runtime.flags import SWITCH, Flags, Options
from corral.runtime.state import Place, Record

if TYPE_CHECKING:
    from corral.oci.spec import Spec

KILL_FLAGS: Flags = {"all,a": SWITCH, "regex,r": SWITCH}
DELETE_FLAGS: Flags = {"force,f": SWITCH, "regex,r": SWITCH}
_DIE_S = 10.0


def parse_signal(text: str) -> int:
    """A signal by number, 0 included, or name, with or without SIG, RTMIN+N and RTMAX-N included."""
    if text.isascii() and text.isdigit():
        number = int(text)
        if number < signal.NSIG:
            return number
    name = text.upper().removeprefix("SIG")
    for known, base, sign in (("RTMIN", signal.SIGRTMIN, "+"), ("RTMAX", signal.SIGRTMAX, "-")):
        left, sign_is_there, offset = name.partition(sign)
        if left == known and sign_is_there and offset.isascii() and offset.isdigit():
            number = base + int(sign + offset)
            if signal.SIGRTMIN <= number <= signal.SIGRTMAX:
                return number
    if name.isalnum() and (found := getattr(signal, f"SIG{name}", None)) is not None:
        return int(found)
    raise CommandError(f"unknown signal {text!r}")


def kill(context: Context, options: Options, arguments: list[str]) -> int:
    """Send a signal to init or, with --all, to every process."""
    number = parse_signal(arguments[1] if len(arguments) > 1 else "TERM")
    for container_id in _named(context, options, arguments[0]):
        _kill(context, container_id, number, everybody=options.on("all"))
    return 0


def _named(context: Context, options: Options, name: str) -> list[str]:
    """The container of this id or, with --regex, as crun has it, all in whose ids something matches."""
    if not options.on("regex"):
        return [name]
    import re

    try:
        return [container_id for container_id in state.ids(context.root) if re.search(name, container_id)]
    except re.error as e:
        raise CommandError(f"--regex: {name!r}: {e}") from None


def _kill(context: Context, container_id: str, number: int, *, everybody: bool) -> None:
    # Not locked: a pidfd can't hit another process, and whoever hangs in a locked command must be killable.
    with state.opened(context.root, container_id, lock=None) as place:
        record = place.record()
        group = life.cgroup_of(record)
        alive = life.init_lives(record)
        # Without a PID namespace of its own nobody else ends what init leaves behind.
        if everybody or (number == signal.SIGKILL and not record.own_pids):
            if group is not None and (alive or group.pids()):
                group.kill(number)
                return
            if everybody and not alive:
                return
        pidfd = life.open_init(record)
        try:
            process.send_signal(pidfd, number)
        except ProcessLookupError:
            raise CommandError("container not running") from None
        finally:
            os.close(pidfd)
        if number == signal.SIGKILL and group is not None and group.is_frozen():
            group.thaw()  # who is frozen can't die


def delete(context: Context, options: Options, arguments: list[str]) -> int:
    """Remove what a stopped container left; with --force end it first, and do not mind if there is none."""
    for container_id in _named(context, options, arguments[0]):
        _remove(context, container_id, force=options.on("force"))
    return 0


def _remove(context: Context, container_id: str, *, force: bool) -> None:
    try:
        with state.opened(context.root, container_id, patience_s=_DIE_S if force else state.PROBE_S) as place:
            try:
                record = place.record()
            except state.Unreadable:
                raise  # what it says nothing of may still run
            except CommandError:
                if not force:
                    raise
                place.remove()  # of a create that was killed at its very beginning
                return
            if not force:
                life.check("delete", place, record)
            take_down(context, place, record)
    except CommandError:
        if force and container_id not in state.ids(context.root):
            return
        raise


def take_down(context: Context, place: Place, record: Record, *, hooks: bool = True) -> None:
    """Leave nothing of a container that is locked; its record goes last, so that whatever fails can be tried again.

    hooks: run those of poststop. They find it gone, and nobody waiting for it.
    """
    _end(record)
    if record.cgroup:
        groups.remove_of(record) if record.cgroup_is_own else groups.remove_empty(record)
    spec = _spec_of(context, place) if record.poststop and hooks else None
    place.remove()
    place.unlock()
    if spec is not None:
        _run_poststop(context, spec, record)


def _spec_of(context: Context, place: Place) -> "Spec | None":
    try:
        return place.spec()
    except (OSError, ValueError) as e:  # which must not make it one that can't be deleted
        context.log.warning(f"its poststop hooks are not run: its specification can't be read: {e}")
        return None


def undo(context: Context, place: Place, record: Record, *, hooks: bool = True) -> None:
    """take_down() by who made the container, if nobody else did it meanwhile. What goes wrong is a warning."""
    try:
        if place.lock():
            take_down(context, place, record, hooks=hooks)
    except (OSError, CommandError) as e:
        reason = sentence(e) if isinstance(e, OSError) else str(e)
        context.log.warning(f"container {record.id} is left to be deleted by force: {reason}")


def _run_poststop(context: Context, spec: "Spec", record: Record) -> None:
    """Run the hooks of a container that is no more. What they do wrong is a warning."""
    from corral.oci import hooks
    from corral.oci.state import State

    for warning in hooks.run_poststop(spec.hooks, State(record.id, record.bundle, record.annotations)):
        context.log.warning(warning)


def _end(record: Record) -> None:
    """Kill init and wait until it is dead."""
    try:
        pidfd = life.open_init(record)
    except CommandError:
        return
    try:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(pidfd, signal.SIGKILL)
        if (group := life.cgroup_of(record)) is not None and group.is_frozen():
            group.thaw()
        if not select.select([pidfd], [], [], _DIE_S)[0]:
            raise CommandError("container init still running")
    finally:
        os.close(pidfd)
