"""create, run."""

from corral.kernel import process
from corral.runtime import foreground, handover, making
from corral.runtime.context import Context
from corral.runtime.flags import SWITCH, Flags, Options
from corral.runtime.making import BUNDLE_FLAGS, Bundle, Way
from corral.runtime.sealing import sealed_unless_left

CREATE_FLAGS: Flags = BUNDLE_FLAGS
RUN_FLAGS: Flags = {**BUNDLE_FLAGS, "detach,d": SWITCH, "keep": SWITCH, "no-subreaper": SWITCH}


def create(context: Context, options: Options, arguments: list[str]) -> int:
    """Make a container whose init waits for start, as a child of whoever adopts it."""
    kept = handover.kept_fds(options)
    bundle = Bundle(options)
    by_stone = sealed_unless_left(bundle.spec)
    handover.check_terminal(bundle.process, options, detached=True)
    stdio = handover.own_stdio(bundle.process, options, kept)
    way = Way(stdio, with_gate=True, by_stone=by_stone)
    with making.made(context, bundle, options, arguments[0], way) as made:
        handover.tell_of(made.container.init, options)
        made.container.leave_at_gate()
    return 0


def run(context: Context, options: Options, arguments: list[str]) -> int:
    """create and start, and unless --detach is given: stay, pass signals on, and delete it in the end."""
    kept = handover.kept_fds(options)
    bundle = Bundle(options)
    by_stone = sealed_unless_left(bundle.spec)
    detach = options.on("detach")
    handover.check_terminal(bundle.process, options, detached=detach)
    signals = -1
    if not detach:
        signals = foreground.hold_signals()
        if not options.on("no-subreaper"):
            process.set_child_subreaper()
    stdio = handover.own_stdio(bundle.process, options, kept)
    way = Way(stdio, with_gate=False, by_stone=by_stone)
    with making.made(context, bundle, options, arguments[0], way) as made:
        handover.tell_of(made.container.init, options)
        made.start()
        if detach:
            return 0
        try:
            return foreground.stay(made.container.init, signals)
        finally:
            if not options.on("keep"):
                made.take_down()
