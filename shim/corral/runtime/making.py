"""From a bundle to a container whose init waits: what create and run share."""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from corral.kernel import namespaces
from corral.kernel.cgroup import Cgroup
from corral.oci import runtime
from corral.oci.gate import make_gate
from corral.oci.json_text import loads
from corral.oci.program import warnings_of
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

    @property
    def process(self) -> Process:
        """The container's own process, which the specification may do without, and we not."""
        if self.spec.process is None:
            raise CommandError("process: config.json has none")
        return self.spec.process

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
    """A container that this command has made, and that is locked until it is started."""

    def __init__(self, context: Context, place: Place, record: Record, container: Container) -> None:
        self._context, self._place, self._record, self.container = context, place, record, container

    def start(self) -> None:
        """Let init execute the program, and others deal with the container."""
        self.container.start(self._place.let_go)
        self._place.let_go()

    def take_down(self) -> None:
        """Leave nothing of it, unless somebody has deleted it."""
        _undo(self._context, self._place, self._record)


@contextlib.contextmanager
def made(
    context: Context, bundle: Bundle, options: Options, container_id: str, *, stdio: Stdio, with_gate: bool
) -> Iterator[Made]:
    """Make a container. If the block fails, it never was; or, if that fails too, its record is left for a delete."""
    state.check_id(container_id)
    record = bundle.new_record(container_id, systemd=context.systemd)
    with state.made(context.root, container_id) as place:
        begun = False
        try:
            with contextlib.ExitStack() as unless_settled:
                scope = _scope(context, record, bundle.spec, unless_settled) if context.systemd else None
                group = _make_cgroup(context, bundle, place, record, scope)
                begun = True
                container = _make_init(context, bundle, place, record, group, options, stdio, with_gate=with_gate)
                if scope is not None:
                    scope.settle()
                unless_settled.pop_all()
            _tell_of(container, options)
            yield Made(context, place, record, container)
        except BaseException:
            _undo(context, place, record, hooks=begun)
            raise


def _scope(context: Context, record: Record, spec: Spec, undo: contextlib.ExitStack) -> "Scope":
    from corral.runtime.units import Scope

    scope = Scope(context, record, spec)
    undo.callback(scope.close)
    return scope


def _make_cgroup(
    context: Context, bundle: Bundle, place: Place, record: Record, scope: "Scope | None"
) -> Cgroup | None:
    """The cgroup of a container, with the record written down before there is one, and after."""
    place.write(state.CONFIG, bundle.document)
    place.write(state.STATE, record.to_json())  # so that a forced delete finds what is left if this process is killed
    try:
        group = groups.make(context, bundle.spec.linux, record.cgroup) if scope is None else scope.start()
    except BaseException:
        record.cgroup = ""  # it may be somebody else's
        raise
    if group is not None:
        record.cgroup_is_own = True
    else:
        record.cgroup = ""
        if not record.own_pids:
            context.log.warning("with neither a cgroup nor a pid namespace of its own, it may outlive its init")
    place.write(state.STATE, record.to_json())
    return group


def _make_init(
    context: Context,
    bundle: Bundle,
    place: Place,
    record: Record,
    group: Cgroup | None,
    options: Options,
    stdio: Stdio,
    *,
    with_gate: bool,
) -> Container:
    context.log.debug(f"creating {record.id} in cgroup {record.cgroup or '(none)'}")
    for warning in warnings_of(bundle.process):
        context.log.warning(warning)
    with contextlib.ExitStack() as block:
        gate = block.enter_context(contextlib.closing(make_gate(place.gate))) if with_gate else None
        container = runtime.create(
            replace(bundle.spec, process=with_listen_fds(bundle.process)),
            bundle=bundle.path,
            cgroup_paths=group.directories if group is not None else (),
            stdio=stdio,
            new_keyring=not options.on("no-new-keyring"),
            gate=None if gate is None else gate.fileno(),
            container_id=record.id,
        )
    record.pid, record.start_time = container.init.pid, container.init.start_time
    place.write(state.STATE, record.to_json())
    return container


def _tell_of(container: Container, options: Options) -> None:
    if options.has("pidfd-socket"):
        from corral.runtime.terminal import send_descriptor

        send_descriptor(options.text("pidfd-socket"), container.init.pidfd, b"pidfd")
    if options.has("pid-file"):
        write_pid_file(options.text("pid-file"), container.init.pid)


def _undo(context: Context, place: Place, record: Record, *, hooks: bool = True) -> None:
    from corral.runtime.remove import undo

    undo(context, place, record, hooks=hooks)


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
