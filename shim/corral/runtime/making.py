"""From a bundle to a container whose init waits: what create and run share."""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from corral.kernel.cgroup import Cgroup
from corral.kernel.namespaces import Kind
from corral.oci import plan, runtime
from corral.oci.container import Container
from corral.oci.gate import make_gate
from corral.oci.json_text import loads
from corral.oci.program import warnings_of
from corral.oci.spec import Process, Spec
from corral.oci.stdio import Stdio
from corral.runtime import groups, handover, state
from corral.runtime.context import Context
from corral.runtime.errors import CommandError
from corral.runtime.flags import SWITCH, VALUE, Flags, Options
from corral.runtime.state import Place, Record

if TYPE_CHECKING:
    from corral.runtime.units import Scope

BUNDLE_FLAGS: Flags = {
    "bundle,b": VALUE,
    "config,f": VALUE,  # as crun has it
    "console-socket": VALUE,
    "pid-file": VALUE,
    "pidfd-socket": VALUE,
    "preserve-fds": VALUE,
    "no-pivot": SWITCH,  # for a root on a ramdisk: ours is a mount of its own, so pivot_root does there too
    "no-new-keyring": SWITCH,
}


@dataclass(frozen=True, slots=True)
class Way:
    """How init comes to its program."""

    stdio: Stdio
    with_gate: bool
    """It waits for another command to start it."""
    by_stone: bool
    """See corral.oci.stepping_stone."""


class Bundle:
    """A bundle directory and its specification."""

    def __init__(self, options: Options) -> None:
        """Read those of --bundle and --config; a relative name of the latter counts from the bundle.

        Raises CommandError if there is none, ValueError for what is wrong in it.
        """
        self.path = os.path.realpath(options.text("bundle", "."))
        config = options.text("config", "config.json")
        config = config if config.startswith("/") else f"{self.path}/{config}"
        try:
            with open(config, encoding="utf-8") as file:
                self.document = loads(file.read())
        except (FileNotFoundError, NotADirectoryError):
            raise CommandError(f"JSON specification file {config} not found") from None
        except ValueError as e:
            raise CommandError(f"{config}: {e}") from None
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
            own_pids=Kind.PID in plan.created(self.spec),
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
def made(context: Context, bundle: Bundle, options: Options, container_id: str, way: Way) -> Iterator[Made]:
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
                container = _make_init(context, bundle, place, record, group, options, way)
                if scope is not None:
                    scope.settle()
                unless_settled.pop_all()
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
    except Exception:
        record.cgroup = ""  # it may be somebody else's; who interrupts us leaves one that is removed if it is empty
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
    way: Way,
) -> Container:
    context.log.debug(f"creating {record.id} in cgroup {record.cgroup or '(none)'}")
    for warning in warnings_of(bundle.process):
        context.log.warning(warning)
    if Kind.MOUNT in plan.joined(bundle.spec):
        context.log.warning("root and mounts are left out: the mount namespace that is joined has what its owner made")
    with contextlib.ExitStack() as block:
        gate = block.enter_context(contextlib.closing(make_gate(place.gate))) if way.with_gate else None
        container = runtime.create(
            replace(bundle.spec, process=handover.with_listen_fds(bundle.process)),
            bundle=bundle.path,
            cgroup_paths=group.directories if group is not None else (),
            stdio=way.stdio,
            new_keyring=not options.on("no-new-keyring"),
            gate=None if gate is None else gate.fileno(),
            container_id=record.id,
            by_stone=way.by_stone,
        )
    record.pid, record.start_time = container.init.pid, container.init.start_time
    place.write(state.STATE, record.to_json())
    return container


def _undo(context: Context, place: Place, record: Record, *, hooks: bool = True) -> None:
    from corral.runtime.remove import undo

    undo(context, place, record, hooks=hooks)
