"""What a terminal session sends, in order, over as many calls as it takes.

A call that ends because its daemon executes itself anew has delivered a part, and is told how much of it. The next call
begins with the rest.
"""

import threading
from collections import deque
from collections.abc import Iterator

from corral.api.tasks.v1 import tasks_pb2
from corral.rpc.errors import Unavailable

# At most this many chunks wait between stdin and the wire.
QUEUED_CHUNKS = 16
# What may be on its way, in the buffers of both sides, and is kept for a next call.
KEPT_BYTES = 16 << 20
# What is typed comes in single bytes, and a message takes some hundreds: less than this is kept with what follows.
JOINED_BYTES = 4096
_NOT_KEPT = ("resize", "take")
_REPEATED = ("detach", "end_of_stdin")


class Outbox:
    """Filled by one thread, emptied by the one of the latest call."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[tasks_pb2.AttachRequest] = deque()
        self._ended = False
        self._call = 0
        # Of stdin: how much was taken, and the last of it, each with its end. A detach and the end are kept likewise.
        self._taken_bytes = 0
        self._kept: deque[tuple[int, tasks_pb2.AttachRequest]] = deque()

    def put(self, request: tasks_pb2.AttachRequest) -> None:
        """To be sent; stdin once there is room."""
        with self._changed:
            if request.HasField("stdin"):
                self._changed.wait_for(lambda: self._ended or len(self._waiting) < QUEUED_CHUNKS)
            if not self._ended:
                self._waiting.append(request)
                self._changed.notify_all()

    def end(self) -> None:
        """There will be no more; harmless when repeated."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def requests(self) -> Iterator[tasks_pb2.AttachRequest]:
        """For one call, the latest; it ends where the next one begins."""
        with self._changed:
            call = self._call
        while (request := self._take(call)) is not None:
            yield request

    def _take(self, call: int) -> tasks_pb2.AttachRequest | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._ended or call != self._call)
            if call != self._call or not self._waiting:
                return None
            request = self._waiting.popleft()
            self._changed.notify_all()
            if request.WhichOneof("part") not in _NOT_KEPT:
                self._keep(request)
            return request

    def _keep(self, request: tasks_pb2.AttachRequest) -> None:
        self._taken_bytes += len(request.stdin)
        if request.stdin and self._kept and len(self._kept[-1][1].stdin) in range(1, JOINED_BYTES):
            request = tasks_pb2.AttachRequest(stdin=self._kept.pop()[1].stdin + request.stdin)
        self._kept.append((self._taken_bytes, request))
        while self._kept and self._kept[0][0] < self._taken_bytes - KEPT_BYTES:
            self._kept.popleft()

    def rewind(self, stdin_bytes: int) -> None:
        """The next call goes on after so many bytes of stdin; who wanted pipes asks again.

        Raises Unavailable if those bytes are not kept any more.
        """
        with self._changed:
            self._call += 1
            again: list[tasks_pb2.AttachRequest] = []
            at = stdin_bytes
            for end, request in self._kept:
                if request.WhichOneof("part") in _REPEATED:
                    again.append(request)
                elif end > stdin_bytes:
                    start = end - len(request.stdin)
                    if start > at:
                        break
                    again.append(tasks_pb2.AttachRequest(stdin=request.stdin[at - start :]))
                    at = end
            if at != self._taken_bytes:
                raise Unavailable(f"input was lost when corral was upgraded, after {at} bytes", reason="INPUT_LOST")
            self._kept.clear()
            self._taken_bytes = stdin_bytes
            self._waiting = deque(request for request in self._waiting if not request.HasField("take"))
            self._waiting.extendleft(reversed(again))
            self._changed.notify_all()
