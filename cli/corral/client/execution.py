"""What goes in and comes out of an attached process. `attach_requests` has an asyncio and a plain form."""

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

from corral.api.tasks.v1 import tasks_pb2
from corral.api.types.v1 import types_pb2


@dataclass(frozen=True, slots=True)
class Attachment:
    """Which streams of which process. Fields as in corral.tasks.v1.AttachHeader."""

    container: str
    exec_id: str = ""
    stdin: bool = False
    stdout: bool = False
    stderr: bool = False
    lossless: bool = False
    replay: bool = False
    resumable: bool = False
    resume: str = ""

    def first_request(self) -> tasks_pb2.AttachRequest:
        """The message that opens the stream."""
        header = tasks_pb2.AttachHeader(
            id=self.container,
            exec_id=self.exec_id,
            stdin=self.stdin,
            stdout=self.stdout,
            stderr=self.stderr,
            lossless=self.lossless,
            replay=self.replay,
            resumable=self.resumable,
            resume=self.resume,
        )
        return tasks_pb2.AttachRequest(header=header)


@dataclass(frozen=True, slots=True)
class ExecResult:
    """A process that has ended."""

    code: int
    stdout: bytes
    stderr: bytes
    exit: types_pb2.ExitStatus


@dataclass(slots=True)
class Collected:
    """A process's output, put together from an attached stream."""

    _stdout: list[bytes] = field(default_factory=list)
    _stderr: list[bytes] = field(default_factory=list)
    _exit: types_pb2.ExitStatus = field(default_factory=types_pb2.ExitStatus)

    def add(self, part: tasks_pb2.AttachResponse) -> None:
        """Takes the next message of the stream."""
        match part.WhichOneof("part"):
            case "stdout":
                self._stdout.append(part.stdout)
            case "stderr":
                self._stderr.append(part.stderr)
            case "exited":
                self._exit = part.exited

    def result(self) -> ExecResult:
        """All of it, once the stream has ended."""
        return ExecResult(self._exit.code, b"".join(self._stdout), b"".join(self._stderr), self._exit)


async def async_attach_requests(
    attachment: Attachment, requests: AsyncIterator[tasks_pb2.AttachRequest] | None
) -> AsyncIterator[tasks_pb2.AttachRequest]:
    """The opening message, then what the caller sends."""
    yield attachment.first_request()
    if requests is not None:
        async for request in requests:
            yield request


def attach_requests(
    attachment: Attachment, requests: Iterator[tasks_pb2.AttachRequest] | None
) -> Iterator[tasks_pb2.AttachRequest]:
    """The opening message, then what the caller sends."""
    yield attachment.first_request()
    if requests is not None:
        yield from requests
