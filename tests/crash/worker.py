"""A client that does not give up: it repeats what a kill broke, until the daemon is back."""

import contextlib
import random
import threading
import time
from collections.abc import Callable, Sequence

from support.corrald import Corrald

from corral.api.engine.v1 import engine_pb2
from corral.api.tasks.v1 import tasks_pb2, tasks_pb2_grpc
from corral.api.types.v1 import types_pb2
from corral.client.sync import Client
from corral.rpc.errors import AlreadyExists, CorralError, NotFound, Unavailable
from crash.excuses import Excuses
from crash.tally import Fault, Tally, differences

END_IS_MISSING = "what it wrote last may be missing"
"""So ends the reason of an exit that nobody looked after."""
# A worker that makes no step for this long is stuck.
STUCK_S = 240
AGAIN_S = 0.05


class Worker(threading.Thread):
    """Lives a life again and again until told to stop; each is one container's."""

    kind = "life"

    def __init__(
        self, number: int, daemon: Corrald, tally: Tally, excuses: Excuses, stop: threading.Event, *, seed: int
    ) -> None:
        super().__init__(name=f"{self.kind}-{number}", daemon=True)
        self.number = number
        self.client: Client = daemon.client()
        self.tally, self.excuses, self.stop = tally, excuses, stop
        self.random = random.Random(seed * 1000 + number)
        self.doing = "nothing yet"
        self.since = time.monotonic()

    def run(self) -> None:
        lives = 0
        while not self.stop.is_set():
            lives += 1
            name = f"{self.name}-{lives}"
            try:
                self.live(name)
            except CorralError as e:
                self.tally.blame(Fault.LOST, f"{name}: {type(e).__name__}: {e} while {self.doing}")
            self.tally.add("containers")

    def live(self, name: str) -> None:
        raise NotImplementedError

    @property
    def is_stuck(self) -> bool:
        return not self.is_alive() or time.monotonic() - self.since > STUCK_S

    # Calls

    def persist[T](self, verb: str, name: str, call: Callable[[], T]) -> T:
        """Repeats a call until an answer comes that no kill broke."""
        self.doing, self.since = f"{verb} {name}", time.monotonic()
        while True:
            try:
                return call()
            except Unavailable:
                self.tally.add("calls broken and repeated")
                if time.monotonic() - self.since > STUCK_S:
                    raise
                time.sleep(AGAIN_S)

    def create(self, name: str, args: Sequence[str], **options: object) -> None:
        """A create that a kill broke is either done or undone: "taken" by ourselves is done."""
        options = {"network": "none", **options}
        create = self.client.containers.create
        try:
            self.persist("create", name, lambda: create("busybox", args, name=name, id=name, **options))  # type: ignore[arg-type]
        except AlreadyExists as e:
            self.tally.note(f"{name}: {e}")
            self.persist("get", name, lambda: self.client.containers.get(name))

    def begin(self, name: str) -> None:
        """Start it once: a start that a kill broke may be done, and to repeat it then would run it again."""
        self.doing, self.since = f"start {name}", time.monotonic()
        while True:
            try:
                self.client.containers.start(name)
            except Unavailable:
                self.tally.add("calls broken and repeated")
                if self.is_begun(name):
                    return
            else:
                return

    def is_begun(self, name: str) -> bool:
        """Whether it runs or has run; asked of tasks, as the engine's row tells of what is about to be."""

        def ask() -> bool:
            if self.client.containers.get(name).status == engine_pb2.STATUS_EXITED:
                return True
            leaf = self.client.leaf("tasks")
            stub = tasks_pb2_grpc.TasksStub(leaf.channel)
            try:
                task = leaf.unary(stub.Get, tasks_pb2.GetTaskRequest(id=name))
            except NotFound:
                return False
            return task.status != tasks_pb2.STATUS_CREATED

        return self.persist("ask for", name, ask)

    def wait(self, name: str) -> types_pb2.ExitStatus:
        return self.persist("wait", name, lambda: self.client.containers.wait(name))

    def remove(self, name: str) -> None:
        with contextlib.suppress(NotFound):  # a repeated delete whose first call succeeded
            self.persist("delete", name, lambda: self.client.containers.remove(name, force=True))

    # Verdicts

    def check_code(self, name: str, status: types_pb2.ExitStatus, code: int) -> bool:
        """Whether the exit code is known; if it is it must be this one, and unknown it may be only with an excuse."""
        if status.known and status.code == code:
            return True
        if not status.known and status.reason and (why := self.excuses.for_unknown_exit(name)):
            self.tally.add(f"containers whose exit code is unknown, as told ({why})")
            return False
        told = f"{status.code} (known={status.known}: {status.reason})"
        self.tally.blame(Fault.WRONG_CODE, f"{name}: exit code {code} came out as {told}")
        return status.known

    def check_output(self, what: str, expected: bytes, got: bytes) -> None:
        """Every byte is there once, in order."""
        self.tally.add("bytes of output compared", len(expected))
        missing, twice = differences(expected, got)
        if missing:
            there = f"there are {lines_named(got)}" if got else "nothing is there"
            self.tally.blame(Fault.MISSING, f"{what}: {missing} of {len(expected)} bytes; {there}", missing)
        if twice:
            self.tally.blame(Fault.TWICE, f"{what}: {twice} bytes", twice)

    def check_attached(self, what: str, name: str, since: float, expected: bytes, got: bytes) -> None:
        """The same for an attached client, who may miss some if a shim was killed that had read it; the log has it."""
        missing, twice = differences(expected, got)
        if missing and not twice and (why := self.excuses.for_missed_bytes(name, since)):
            self.tally.add(f"bytes that attached clients missed ({why})", missing)
            self.tally.note(f"{what}: {missing} of {len(expected)} bytes are missing")
        else:
            self.check_output(what, expected, got)

    def check_log(self, name: str, status: types_pb2.ExitStatus, *, stdout: bytes, stderr: bytes = b"") -> None:
        """What a container wrote is in its log; the end may be missing if it is said that it may, and for a reason."""
        found = self.persist("logs", name, lambda: streams_of(self.client.containers.logs(name)))
        if status.reason.endswith(END_IS_MISSING) and (why := self.excuses.for_missing_end(name)):
            missing = len(stdout) + len(stderr) - len(found[0]) - len(found[1])
            self.tally.add(f"bytes missing at the end of logs, as told ({why})", missing)
            stdout, stderr = stdout[: len(found[0])], stderr[: len(found[1])]
        told = f" (its exit: {status.reason})" if status.reason else ""
        self.check_output(f"log of {name}, stdout{told}", stdout, found[0])
        self.check_output(f"log of {name}, stderr{told}", stderr, found[1])


def streams_of(entries: object) -> tuple[bytes, bytes]:
    """Of a log: what went to stdout, and what to stderr."""
    streams: dict[int, list[bytes]] = {tasks_pb2.LogEntry.STREAM_STDOUT: [], tasks_pb2.LogEntry.STREAM_STDERR: []}
    for entry in entries:  # type: ignore[attr-defined]
        streams[entry.stream].append(entry.line)
    stdout, stderr = (b"".join(lines) for lines in streams.values())
    return stdout, stderr


def lines_named(data: bytes) -> str:
    """The first and the last line, for a sentence."""
    first, *_, last = [*data.splitlines()[:1], *data.splitlines()[-1:]]
    return f"{first[:20]!r} to {last[:20]!r}"
