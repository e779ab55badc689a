"""From a bundle to a container whose init waits: what create and run share."""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from corral.kernel import namespaces, process
from corral.oci import runtime
from corral.oci.gate import make_gate
from corral.oci.json_text import loads
from corral.oci.runtime import Container, Stdio
from corral.oci.spec import Process, Spec
from corral.runtime import groups, state
from corral.runtime.context import Context
from corral.runtime.errors import CommandError
from corral.runtime.flags import SWITCH, VALUE, Flags, Options
from corral.runtime.state import Place, Record

if TYPE_CHECKING:
    from corral.runtime.units import Scope

BUNDLE_FLAGS: Flags = {
    "bundle,b": VALUE,
    "console-socket": VALUE,
    "pid-file": VALUE,
    "pidfd-socket": VALUE,
    "preserve-fds": VALUE,
    "no-pivot": SWITCH,  # for a root on a ramdisk: ours is a mount of its own, so pivot_root does there too
    "no-new-keyring": SWITCH,
}
_FIRST_KEPT = 3


class Bundle:
    """A bundle directory and its specification."""

    def __init__(self, path: str) -> None:
        """Read it. Raises CommandError if there is none, ValueError for what is wrong in it."""
        self.path = os.path.realpath(path or ".")
        try:
            with open(f"{self.path}/config.json", encoding="utf-8") as file:
                self.document = loads(file.read())
        except (FileNotFoundError, NotADirectoryError):
            raise CommandError(f"JSON specification file {self.path}/config.json not found") from None
        except ValueError as e:
            raise CommandError(f"{self.path}/config.json: {e}") from None
        self.spec = Spec.from_json(self.document)

    def new_record(self, container_id: str, *, systemd: bool = False) -> Record:
        """The record of a container that does not exist yet; its cgroup is left out if it is for systemd to make."""
        now = time.time_ns()
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now // 10**9))
        root = self.spec.root.path if self.spec.root is not None else ""
        return Record(
            id=container_id,
            bundle=self.path,
            rootfs=os.path.normpath(f"{self.path}/{root}" if not root.startswith("/") else root),
            created=f"{seconds}.{now % 10**9:09d}Z",
            owner=os.geteuid(),
            annotations=dict(self.spec.annotations),
            cgroup="" if systemd else groups.path_of(self.spec.linux, container_id),
            poststop=self.spec.hooks is not None and bool(self.spec.hooks.poststop),
            own_pids=any(each.type is namespaces.Kind.PID and not each.path for each in self.spec.linux.namespaces),
        )


class Made:
    """A container that was just made, its state still locked."""

    def __init__(self, place: Place, record: Record, container: Container) -> None:
        self.place, self.record, self.container = place, record, container


@contextlib.contextmanager
def made(
    context: Context, bundle: Bundle, options: Options, container_id: str, *, stdio: Stdio, with_gate: bool
) -> Iterator[Made]:
    """Make a container. If the block fails, it never was; its init is then the block's to reap."""
    state.check_id(container_id)
    spec = bundle.spec
    if spec.process is None:
        raise CommandError("process: config.json has none")
    spec = replace(spec, process=with_listen_fds(spec.process))
    record = bundle.new_record(container_id, systemd=context.systemd)
    with state.made(context.root, container_id) as place, contextlib.ExitStack() as undo:
        scope = _scope(context, record, spec, undo) if context.systemd else None
        # Written before there is anything, so that a forced delete finds what a killed create left.
        place.write(state.STATE, record.to_json())
        place.write(state.CONFIG, bundle.document)
        group = groups.make(context, spec.linux, record.cgroup) if scope is None else scope.start()
        if record.poststop:
            undo.callback(_run_poststop, context, spec, record)
        if group is None:
            record.cgroup = ""
            if not record.own_pids:
                context.log.warning("with neither a cgroup nor a pid namespace of its own, it may outlive its init")
        else:
            undo.callback(groups.remove_of, record)
            record.cgroup_is_own = True
            place.write(state.STATE, record.to_json())
        with contextlib.ExitStack() as block:
            gate = block.enter_context(contextlib.closing(make_gate(place.gate))) if with_gate else None
            context.log.debug(f"creating {container_id} in cgroup {record.cgroup or '(none)'}")
            container = runtime.create(
                spec,
                bundle=bundle.path,
                cgroup_paths=group.directories if group is not None else (),
                stdio=stdio,
                new_keyring=not options.on("no-new-keyring"),
                gate=None if gate is None else gate.fileno(),
                container_id=container_id,
            )
        undo.callback(_end, container)
        if scope is not None:
            scope.settle()
        record.pid, record.start_time = container.init.pid, container.init.start_time
        place.write(state.STATE, record.to_json())
        if options.has("pidfd-socket"):
            from corral.runtime.terminal import send_descriptor

            send_descriptor(options.text("pidfd-socket"), container.init.pidfd, b"pidfd")
        if options.has("pid-file"):
            write_pid_file(options.text("pid-file"), record.pid)
        yield Made(place, record, container)
        undo.pop_all()


def _scope(context: Context, record: Record, spec: Spec, undo: contextlib.ExitStack) -> "Scope":
    from corral.runtime.units import Scope

    scope = Scope(context, record, spec)
    undo.callback(scope.close)
    return scope


def _run_poststop(context: Context, spec: Spec, record: Record) -> None:
    from corral.runtime.remove import run_poststop

    run_poststop(context, spec, record)


def _end(container: Container) -> None:
    """End an init that is not wanted any more, and wait for it."""
    container.close()
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(container.init.pidfd, 9)
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PIDFD, container.init.pidfd, os.WEXITED)


def check_terminal(process: Process, options: Options, *, detached: bool) -> None:
    """A pty's master must go somewhere: to the socket, or to this process if it stays."""
    socket = options.has("console-socket")
    if process.terminal and detached and not socket:
        raise CommandError("cannot allocate a terminal without --console-socket, unless this command stays with it")
    if socket and not process.terminal:
        raise CommandError("--console-socket is given, but the process has no terminal")


def _listen_fds() -> int:
    """How many sockets systemd gave to this command. Source: sd_listen_fds(3); podman names pid 1."""
    number = os.environ.get("LISTEN_FDS", "")
    given = os.environ.get("LISTEN_PID", "") in ("", "1", str(os.getpid()))
    return int(number) if given and number.isascii() and number.isdecimal() else 0


def kept_fds(options: Options) -> tuple[int, ...]:
    """The fds that --preserve-fds and systemd's $LISTEN_FDS name. Called before anything was opened."""
    count = options.number("preserve-fds") + _listen_fds()
    if count < 0:
        raise CommandError(f"--preserve-fds: {options.text('preserve-fds')} is negative")
    kept = tuple(range(_FIRST_KEPT, _FIRST_KEPT + count))
    for fd in kept:
        try:
            os.set_inheritable(fd, True)
        except OSError:
            raise CommandError(f"--preserve-fds: descriptor {fd} is not open") from None
    return kept


def with_listen_fds(process: Process) -> Process:
    """Tell the process of the sockets it is given."""
    listening = _listen_fds()
    if not listening:
        return process
    return replace(process, env=(*process.env, f"LISTEN_FDS={listening}", "LISTEN_PID=1"))


def own_stdio(process: Process, kept: tuple[int, ...]) -> Stdio:
    """This command's own 0, 1 and 2, for a process without a terminal."""
    return Stdio(kept=kept) if process.terminal else Stdio(0, 1, 2, kept)


def write_pid_file(path: str, pid: int) -> None:
    """Write a pid as a whole: who watches for the file must not read half of it.

    Others may write to the directory: what they put there is replaced, and never followed.
    """
    directory, name = os.path.split(path)
    temporary = os.path.join(directory, f".{name}.{os.urandom(8).hex()}")  # noqa: PTH118 - a string, as the flag gave it
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with open(fd, "w", encoding="ascii") as file:
            file.write(str(pid))
        os.replace(temporary, path)  # noqa: PTH105 - likewise
    except BaseException:
        os.unlink(temporary)  # noqa: PTH108 - likewise
        raise
