"""exec."""

import contextlib
import fcntl
import os
import time
from dataclasses import replace

from corral.kernel import process as processes
from corral.kernel.cgroup import Cgroup, detect
from corral.oci.attendance import ProcessHandle
from corral.oci.container import Container
from corral.oci.decode import encode
from corral.oci.json_text import loads
from corral.oci.program import warnings_of
from corral.oci.spec import Capabilities, Process, Spec
from corral.runtime import foreground, handover, life, state
from corral.runtime.context import Context
from corral.runtime.errors import EXEC_CODE, CommandError
from corral.runtime.flags import MANY, SWITCH, VALUE, Flags, Options
from corral.runtime.sealing import ensure_sealed
from corral.runtime.state import Record, Status

EXEC_FLAGS: Flags = {
    "console-socket": VALUE,
    "cwd": VALUE,
    "env,e": MANY,
    "tty,t": SWITCH,
    "user,u": VALUE,
    "additional-gids,g": MANY,
    "process,p": VALUE,
    "detach,d": SWITCH,
    "pid-file": VALUE,
    "pidfd-socket": VALUE,
    "process-label": VALUE,
    "apparmor": VALUE,
    "no-new-privs": SWITCH,
    "cap,c": MANY,
    "preserve-fds": VALUE,
    "cgroup": MANY,
    "ignore-paused": SWITCH,
}
_LOOK_S = 0.02


def execute(context: Context, options: Options, arguments: list[str]) -> int:
    """Run one more process in a container; its exit code, or with --detach 0 once its program runs."""
    ensure_sealed()
    kept = handover.kept_fds(options)
    detach = options.on("detach")
    if options.on("ignore-paused"):
        _wait_until_thawed(context, arguments[0])
    # Any number of them at a time, but none while the container is being started or deleted.
    with state.opened(context.root, arguments[0], lock=fcntl.LOCK_SH) as place:
        record, spec = place.record(), place.spec()
        life.check("exec", place, record)
        group = life.cgroup_of(record)
        wanted = handover.with_listen_fds(_process(spec, options, arguments[1:]))
        handover.check_terminal(wanted, options, detached=detach)
        for warning in warnings_of(wanted):
            context.log.warning(warning)
        signals = -1 if detach else foreground.hold_signals()
        handle = _run(record, spec, wanted, options, kept, group)
        _report(handle, options)
    if detach:
        return 0
    return foreground.stay(handle, signals)


def _run(
    record: Record, spec: Spec, wanted: Process, options: Options, kept: tuple[int, ...], group: Cgroup | None
) -> ProcessHandle:
    try:
        container = Container.adopt(
            spec, pid=record.pid, start_time=record.start_time, container_id=record.id, bundle=record.bundle
        )
    except ProcessLookupError:
        raise CommandError("cannot exec in a stopped container", EXEC_CODE) from None
    if record.user_manager:
        from corral.runtime import units

        units.come_near(record)
    paths = _within(group.directories if group is not None else (), options.texts("cgroup"))
    user = None if options.has("process") else _looked_up(options.text("user"))
    asked = any(options.texts("cgroup"))
    return container.exec(
        wanted, user=user, stdio=handover.own_stdio(wanted, options, kept), cgroup_paths=paths, exact_cgroup=asked
    )


def _wait_until_thawed(context: Context, container_id: str) -> None:
    """A process set up in a frozen cgroup would stop in the middle: it begins once the container runs again.

    Nothing is locked meanwhile, or nobody could resume it.
    """
    with state.opened(context.root, container_id, lock=None) as place:
        while life.status_of(place, place.record()) is Status.PAUSED:
            time.sleep(_LOOK_S)


def _within(paths: tuple[str, ...], wanted: list[str]) -> tuple[str, ...]:
    """The directories of the container's cgroup, or of one below it that is there already.

    `CONTROLLER[,...]:PATH` is one in those hierarchies of v1, as with runc.
    """
    for each in wanted:
        controllers, colon, below = each.rpartition(":")
        if ".." in below.split("/"):
            raise CommandError(f"--cgroup: bad sub cgroup path {below!r}: `..` components are not allowed")
        of = {_directory_of(name, paths) for name in controllers.split(",")} if colon else {*paths}
        paths = tuple([f"{path}/{below.lstrip('/')}".rstrip("/") if path in of else path for path in paths])
    for path in paths if wanted else ():
        if not os.access(path, os.F_OK):
            raise CommandError(f"--cgroup: error adding pid to cgroup {path}: no such file or directory")
    return paths


def _directory_of(controller: str, paths: tuple[str, ...]) -> str:
    """The container's cgroup in the v1 hierarchy of a controller."""
    hierarchy = detect().of(controller)
    if hierarchy is not None and hierarchy.version == 1:
        for path in paths:
            if path.startswith(f"{hierarchy.mount_point}/"):
                return path
    raise CommandError(f"--cgroup: unknown controller {controller!r}")


def _process(spec: Spec, options: Options, words: list[str]) -> Process:
    """The process that is asked for: a whole object, or the container's own with other arguments."""
    if options.has("process"):
        with open(options.text("process"), encoding="utf-8") as file:
            return Process.from_json(loads(file.read()))
    assert spec.process is not None
    if not words:
        raise CommandError("process args cannot be empty", EXEC_CODE)
    process = replace(
        spec.process,
        args=tuple(words),
        terminal=options.on("tty"),
        cwd=options.text("cwd") or spec.process.cwd,
        env=(*spec.process.env, *options.texts("env")),
        apparmor_profile=options.text("apparmor") or spec.process.apparmor_profile,
        selinux_label=options.text("process-label") or spec.process.selinux_label,
    )
    if options.has("no-new-privs"):
        process = replace(process, no_new_privileges=options.on("no-new-privs"))
    if names := options.texts("cap"):
        process = replace(process, capabilities=_with_capabilities(process.capabilities or Capabilities(), names))
    if options.has("additional-gids"):
        groups = (*process.user.additional_gids, *map(_group, options.texts("additional-gids")))
        process = replace(process, user=replace(process.user, additional_gids=groups))
    if (number := options.text("user")) and _looked_up(number) is None:
        process = replace(process, user=replace(process.user, uid=int(number)))
    _check(process)
    return process


def _looked_up(user: str) -> str | None:
    """What to look up in the container. A uid alone is none: the groups stay what they are, as with runc."""
    return None if not user or (user.isascii() and user.isdigit()) else user


def _check(process: Process) -> None:
    """What came from flags is as good as what comes from a file."""
    Process.from_json(encode(process))


def _with_capabilities(own: Capabilities, names: list[str]) -> Capabilities:
    def more(held: tuple[str, ...]) -> tuple[str, ...]:
        return (*held, *(name for name in names if name not in held))

    with_more = replace(own, bounding=more(own.bounding), effective=more(own.effective), permitted=more(own.permitted))
    # As with runc: what is not inheritable can't be ambient, and none becomes inheritable here (CVE-2022-29162).
    return replace(with_more, ambient=more(own.ambient)) if own.inheritable else with_more


def _group(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise CommandError(f"--additional-gids: {text!r} is not a number")
    return int(text)


def _report(handle: ProcessHandle, options: Options) -> None:
    """Tell the caller of the process; who can't be told must not find it running."""
    with contextlib.ExitStack() as undo:
        undo.callback(_kill, handle)
        handover.tell_of(handle, options)
        undo.pop_all()


def _kill(handle: ProcessHandle) -> None:
    with contextlib.suppress(ProcessLookupError):
        processes.send_signal(handle.pidfd, 9)
