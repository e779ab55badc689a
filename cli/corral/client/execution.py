"""What goes in and comes out of a process. `attach_requests` has an asyncio and a plain form.

The command loads this whenever it runs something: see corral.rpc.address for why there is no dataclass.
"""

from collections.abc import AsyncIterator, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from corral.api.engine.v1 import engine_pb2
from corral.api.tasks.v1 import tasks_pb2
from corral.api.types.v1 import types_pb2


class Attachment(NamedTuple):
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
    start: bool = False
    forget: bool = False

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
            start=self.start,
            forget=self.forget,
        )
        return tasks_pb2.AttachRequest(header=header)


def exec_request(
    container: str,
    args: Sequence[str],
    *,
    env: Sequence[str] = (),
    working_dir: str = "",
    user: str = "",
    terminal: bool = False,
    stdin: bool = False,
    privileged: bool = False,
    console_size: tuple[int, int] | None = None,
) -> engine_pb2.ExecContainerRequest:
    """A further process. Fields as in corral.engine.v1.ExecContainerRequest; console_size is columns and lines."""
    size = None if console_size is None else types_pb2.WindowSize(width=console_size[0], height=console_size[1])
    return engine_pb2.ExecContainerRequest(
        container=container,
        args=args,
        env=env,
        working_dir=working_dir,
        user=user,
        terminal=terminal,
        stdin=stdin,
        privileged=privileged,
        console_size=size,
    )


class Execution(NamedTuple):
    """A process to be made, attached to and run in one call. Streams as in corral.engine.v1.ExecRunHeader."""

    process: engine_pb2.ExecContainerRequest
    stdout: bool = True
    stderr: bool = True
    lossless: bool = True

    def first_request(self) -> engine_pb2.ExecRunRequest:
        """The message that opens the stream."""
        header = engine_pb2.ExecRunHeader(
            process=self.process, stdout=self.stdout, stderr=self.stderr, lossless=self.lossless
        )
        return engine_pb2.ExecRunRequest(header=header)


class ExecResult(NamedTuple):
    """A process that has ended."""

    code: int
    stdout: bytes
    stderr: bytes
    exit: types_pb2.ExitStatus


class Collected:
    """A process's output, put together from an attached stream."""

    def __init__(self) -> None:
        self._stdout: list[bytes] = []
        self._stderr: list[bytes] = []
        self._exit = types_pb2.ExitStatus()

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


if TYPE_CHECKING:

    class Opening[Request](Protocol):
        """What a conversation begins with: an Attachment or an Execution."""

        def first_request(self) -> Request: ...


async def async_attach_requests[Request](
    opening: "Opening[Request]", requests: AsyncIterator[Request] | None
) -> AsyncIterator[Request]:
    """The opening message, then what the caller sends."""
    yield opening.first_request()
    if requests is not None:
        async for request in requests:
            yield request


def attach_requests[Request](opening: "Opening[Request]", requests: Iterator[Request] | None) -> Iterator[Request]:
    """The opening message, then what the caller sends."""
    yield opening.first_request()
    if requests is not None:
        yield from requests
