"""start."""

from corral.oci.container import Container
from corral.oci.errors import HOOK_FAILED, ExecFailed
from corral.runtime import life, state
from corral.runtime.context import Context
from corral.runtime.errors import CommandError
from corral.runtime.flags import Options


def start(context: Context, _options: Options, arguments: list[str]) -> int:
    """Let the init of a created container execute its program."""
    with state.opened(context.root, arguments[0]) as place:
        record = place.record()
        life.check("start", place, record)
        container = _at_its_gate(place, record)
        try:
            container.start(place.let_go)
        except ExecFailed as e:
            place.remove_gate()
            if e.message.startswith(HOOK_FAILED):  # runtime-spec runtime.md "Lifecycle", 7 and 9: on to 12, its end
                from corral.runtime.remove import undo

                undo(context, place, record)
            raise
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
