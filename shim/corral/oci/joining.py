"""The runtime's part in the birth of a process that joins a container (exec); corral.oci.join has the process's own."""

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

from corral.kernel import namespaces
from corral.kernel.namespaces import Kind
from corral.oci.attendance import ProcessHandle, await_ready, becomes_program, born, heeded
from corral.oci.cgroups import TAKES_NONE, Membership
from corral.oci.channel import ChildEnd, EndedEarly, ParentEnd
from corral.oci.join import run_joined
from corral.oci.program import Program, program_of
from corral.oci.spec import Process
from corral.oci.stdio import Stdio
from corral.oci.support import check_process
from corral.oci.users import Sighting

if TYPE_CHECKING:  # loaded for those who ask for it
    from corral.oci.allotment import Affinity
    from corral.oci.container import Container

SETUP_S = 10.0
"""Nothing is mounted here."""
_MAX_SIGHTINGS = 8


def begin(
    container: "Container",
    asked: Process,
    user: str | None,
    stdio: Stdio,
    cgroups: Sequence[str],
    *,
    exact_cgroup: bool,
    dies_with_runtime: bool,
    before_start: Callable[[ProcessHandle], None],
) -> ProcessHandle:
    """As Container.exec() says; ProcessLookupError if the container has ended."""
    linux, init = container.spec.linux, container.init
    asked, program = _program_of(container, asked, user, dies_with_runtime)
    affinity = _affinity(asked)
    kinds = {namespace.type for namespace in linux.namespaces}
    flags = namespaces.flags_of(kinds | {Kind.MOUNT})  # if it is not its own, it need not be ours
    who = program.user, program.uid, program.gid, program.groups, program.group_names
    if (sighting := container.sightings.pop(who, None)) is not None and affinity is None and Kind.MOUNT in kinds:
        from corral.oci import join_calls  # loaded by shims, which are who execs time and again

        if container.files is None:
            container.files = join_calls.Files()
        if container.files.of_use and join_calls.suits(program, linux.seccomp, stdio):
            handle = join_calls.begin(
                container.files,
                program,
                sighting,
                stdio,
                cgroups,
                init=init.pidfd,
                flags=flags,
                before_start=before_start,
            )
            if handle is not None:
                container.sightings[who] = sighting
                return handle
    if Kind.USER in kinds:
        from corral.oci.passage import give_stdio

        give_stdio(init.pid, stdio, pidfd=init.pidfd)

    def join(child: ChildEnd, membership: Membership) -> NoReturn:
        run_joined(
            program.inherited(),
            child,
            stdio,
            membership,
            init=init.pidfd,
            flags=flags,
            root_of=None if Kind.MOUNT in kinds else init.pid,
            terminal=_size_of_terminal(asked),
            affinity=affinity,
        )

    with contextlib.nullcontext() if affinity is None else affinity.children_begin():
        parent, pid, pidfd = _born_in(init, cgroups, join, exact=exact_cgroup)
    handle = await_ready(
        container,
        program.allotment,
        parent,
        pid,
        pidfd,
        SETUP_S,
        creating=False,
        note=lambda sighting: _note(container, who, sighting),
    )
    _execute(parent, handle, before_start)
    return handle


def _program_of(container: "Container", asked: Process, user: str | None, mortal: bool) -> tuple[Process, Program]:
    """What is asked, completed, and what that comes to: what was asked last is what will be asked next, most likely."""
    key = user, mortal, asked
    if container.latest is None or container.latest[0] != key:
        check_process(asked)
        whole = _completed(asked, container.spec.process)
        program = program_of(whole, container.spec.linux, user=user, dies_with_runtime=mortal)
        if (profile := container.spec.linux.seccomp) is not None and not (program.no_new_privs or program.passes):
            from corral.oci.seccomp import check_birth

            check_birth(profile)
        container.latest = key, whole, program
    return container.latest[1:]


def _note(container: "Container", who: object, sighting: Sighting) -> None:
    if len(container.sightings) >= _MAX_SIGHTINGS:
        container.sightings.clear()
    container.sightings[who] = sighting


def _completed(asked: Process, own: Process | None) -> Process:
    """A process object with what it does not say, but that of the container's own process does."""
    if own is None:
        return asked
    if asked.capabilities is None:
        asked = replace(asked, capabilities=own.capabilities)
    if asked.exec_cpu_affinity is None and own.exec_cpu_affinity is not None:
        asked = replace(asked, exec_cpu_affinity=own.exec_cpu_affinity)
    return asked


def _affinity(asked: Process) -> "Affinity | None":
    if asked.exec_cpu_affinity is None:
        return None
    from corral.oci.allotment import affinity_of

    return affinity_of(asked)


def _size_of_terminal(asked: Process) -> tuple[int, int] | None:
    """(0, 0) is no particular one."""
    if not asked.terminal:
        return None
    return (asked.console_size.width, asked.console_size.height) if asked.console_size else (0, 0)


def _born_in(
    init: ProcessHandle, cgroups: Sequence[str], live: Callable[[ChildEnd, Membership], NoReturn], *, exact: bool
) -> tuple[ParentEnd, int, int]:
    """As born(), in some cgroups; or, unless these are meant exactly, where init is below the one that takes nobody."""
    try:
        with contextlib.closing(Membership.open(cgroups)) as membership:
            return born(0, membership, lambda child: live(child, membership))
    except OSError as e:
        if exact or e.errno not in TAKES_NONE:
            raise
        if (nearby := Membership.beside(init.pid, init.pidfd, cgroups)) is None:
            raise
    with contextlib.closing(nearby) as membership:
        return born(0, membership, lambda child: live(child, membership))


def _execute(parent: ParentEnd, handle: ProcessHandle, before_start: Callable[[ProcessHandle], None]) -> None:
    """Have a process that is ready execute its program; if it can't, it is reaped."""
    with contextlib.ExitStack() as undo:
        if handle.console is not None:
            undo.callback(os.close, handle.console)
        with heeded(parent, handle.pidfd):
            before_start(handle)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it is gone: what follows finds out why
                parent.send_start()
            if not becomes_program(handle, parent.wait_for_exec, SETUP_S):
                raise EndedEarly
        undo.pop_all()
    parent.close()
