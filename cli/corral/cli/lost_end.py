"""How a process ended whose daemon was gone by then, or went meanwhile."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from corral.api.tasks.v1 import tasks_pb2
from corral.api.types.v1 import types_pb2
from corral.client.execution import Attachment
from corral.rpc.errors import NotFound

if TYPE_CHECKING:
    from corral.client.sync import Client
    from corral.client.transport import Exchange

_REMOVED = "container.removed"


class LostEnd:
    """Of one process, since a time. It may be long over: then the journal tells, whatever runs in its place by now."""

    def __init__(self, client: "Client", process: Attachment, since_ns: int) -> None:
        self._client = client
        self._process = Attachment(process.container, process.exec_id, resumable=True)
        self._since_ns = since_ns
        self._is_removed = False

    def ask(
        self, on_call: "Callable[[Exchange[tasks_pb2.AttachResponse]], object]", on_reached: Callable[[], object]
    ) -> types_pb2.ExitStatus | None:
        """Waits for it; None if that was cut short. on_call is given what can be cancelled. on_reached is called once
        a daemon has said that it goes on.

        Raises Unavailable; NotFound if nobody will ever know.
        """
        if (status := self._told()) is not None:
            return status
        answers = self._client.containers.attach(self._process)
        on_call(answers)
        try:
            for part in answers:
                if part.HasField("exited"):
                    return part.exited
                if part.HasField("attached"):
                    # Perhaps to what runs in its place since the journal was read.
                    if (status := self._told()) is not None:
                        return status
                    on_reached()
        except NotFound:
            status = self._told()
            if status is None and self._is_removed:
                raise
            return status
        return None

    def _told(self) -> types_pb2.ExitStatus | None:
        """By the journal, so far."""
        ended = "task.exec.exited" if self._process.exec_id else "task.exited"
        request = types_pb2.EventsRequest(
            subjects=[self._process.container], topics=[ended, "container.died", _REMOVED], no_follow=True
        )
        request.since.FromNanoseconds(self._since_ns)
        for answer in self._client.system.events(request):
            for event in answer.events:
                if event.topic == _REMOVED:
                    self._is_removed = True
                elif event.time.ToNanoseconds() >= self._since_ns and self._is_about_it(event):
                    return _status(event)
        return None

    def _is_about_it(self, event: types_pb2.Event) -> bool:
        if not self._process.exec_id:
            return True
        return "exec_id" in event.payload and event.payload["exec_id"] == self._process.exec_id


def _status(event: types_pb2.Event) -> types_pb2.ExitStatus:
    """Of task.exited and task.exec.exited, or container.died, which alone tells of one that is lost."""
    facts = event.payload
    return types_pb2.ExitStatus(
        code=_number(event, "code") or _number(event, "exit_code"),
        signal=_number(event, "signal"),
        oom_killed=bool(_number(event, "oom") or _number(event, "oom_killed")),
        timed_out=bool(_number(event, "timed_out")),
        known="known" not in facts or bool(facts["known"]),
        reason=str(facts["reason"] or "") if "reason" in facts else "",
        exited_at=event.time,
    )


def _number(event: types_pb2.Event, name: str) -> int:
    value = event.payload[name] if name in event.payload else None  # noqa: SIM401 - it has no get()
    return int(value) if isinstance(value, float | int) else 0
