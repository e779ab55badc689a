"""create, start, run."""

import os

from corral.kernel import process
from corral.oci.runtime import Container
from corral.runtime import foreground, life, making, state
from corral.runtime.context import Context
from corral.runtime.errors import CommandError
from corral.runtime.flags import SWITCH, Flags, Options
from corral.runtime.making import BUNDLE_FLAGS, Bundle
from corral.runtime.sealing import ensure_sealed

CREATE_FLAGS: Flags = BUNDLE_FLAGS
RUN_FLAGS: Flags = {**BUNDLE_FLAGS, "detach,d": SWITCH, "keep": SWITCH, "no-subreaper": SWITCH}


def create(context: Context, options: Options, arguments: list[str]) -> int:
    """Make a container whose init waits for start, as a child of whoever adopts it."""
    ensure_sealed()
    kept = making.kept_fds(options)
    bundle = Bundle(options.text("bundle"))
    making.check_terminal(bundle.process, options, detached=True)
    stdio = making.own_stdio(bundle.process, kept)
    with making.made(context, bundle, options, arguments[0], stdio=stdio, with_gate=True) as made:
        _hand_over_console(made.container, options)
        made.container.leave_at_gate()
    return 0


def start(context: Context, _options: Options, arguments: list[str]) -> int:
    """Let the init of a created container execute its program."""
    with state.opened(context.root, arguments[0]) as place:
        record = place.record()
        life.check("start", place, record)
        container = _at_its_gate(place, record)
        try:
            container.start(place.let_go)
        finally:
            place.remove_gate()
    return 0


def _at_its_gate(place: state.Place, record: state.Record) -> Container:
    try:
        return Container.adopt(
            place.spec(),
            pid=record.pid,
            start_time=record.start_time,
            gate=place.gate,
            container_id=record.id,
            bundle=record.bundle,
        )
    except ConnectionRefusedError:  # the start that let it through was killed before it could note that
        place.remove_gate()
        raise CommandError("cannot start an already running container") from None
    except ProcessLookupError:
        raise CommandError("cannot start a container that has stopped") from None


def run(context: Context, options: Options, arguments: list[str]) -> int:
    """create and start, and unless --detach is given: stay, pass signals on, and delete it in the end."""
    ensure_sealed()
    kept = making.kept_fds(options)
    bundle = Bundle(options.text("bundle"))
    detach = options.on("detach")
    making.check_terminal(bundle.process, options, detached=detach)
    signals = -1
    if not detach:
        signals = foreground.hold_signals()
        if not options.on("no-subreaper"):
            process.set_child_subreaper()
    stdio = making.own_stdio(bundle.process, kept)
    with making.made(context, bundle, options, arguments[0], stdio=stdio, with_gate=False) as made:
        _hand_over_console(made.container, options)
        made.start()
        if detach:
            return 0
        try:
            return foreground.stay(made.container.init, signals)
        finally:
            if not options.on("keep"):
                made.take_down()


def _hand_over_console(container: Container, options: Options) -> None:
    console = container.init.console
    if console is not None and options.has("console-socket"):
        from corral.runtime.terminal import send_descriptor

        send_descriptor(options.text("console-socket"), console, b"/dev/ptmx")
        os.close(console)
        container.init.console = None
