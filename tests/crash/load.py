"""The load under which a crash test kills: each worker leads one kind of life of containers, again and again."""

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from corral.api.tasks.v1 import tasks_pb2
from corral.api.types.v1 import types_pb2
from corral.client.execution import Attachment, Collected
from corral.rpc.errors import CorralError, FailedPrecondition, NotFound, Unavailable
from crash.tally import Fault
from crash.worker import Worker, streams_of

PAD = "." * 60
EXECS = 8
LATE_S = 20.0


@dataclass(frozen=True, slots=True)
class Text:
    """Numbered lines on stdout and stderr, a pause after every so many, and an exit code."""

    lines: int
    code: int
    every: int = 20
    pause_s: float = 0.05

    @property
    def args(self) -> Sequence[str]:
        pause = f"[ $((i % {self.every})) -ne 0 ] || sleep {self.pause_s}"
        loop = f'i=0; while [ $i -lt {self.lines} ]; do echo "o $i {PAD}"; echo "e $i {PAD}" >&2; i=$((i+1)); {pause}'
        return ("sh", "-c", f"{loop}; done; exit {self.code}")

    @property
    def stdout(self) -> bytes:
        return self._stream("o")

    @property
    def stderr(self) -> bytes:
        return self._stream("e")

    def _stream(self, letter: str) -> bytes:
        return "".join(f"{letter} {i} {PAD}\n" for i in range(self.lines)).encode()


class Lives(Worker):
    """Created, started, waited for, deleted."""

    kind = "life"

    def live(self, name: str) -> None:
        code = self.random.randrange(256)
        nap = self.random.choice(["", "", "sleep 0.05; ", "sleep 0.3; "])
        self.create(name, ["sh", "-c", f"{nap}exit {code}"], network="none" if self.number % 2 else "bridge")
        self.begin(name)
        self.check_code(name, self.wait(name), code)
        self.remove(name)


class Talks(Worker):
    """Writes lines, all of which are in its log."""

    kind = "talk"

    def text(self) -> Text:
        return Text(self.random.randrange(50, 400), self.random.randrange(256))

    def live(self, name: str) -> None:
        text = self.text()
        self.create(name, text.args)
        self.begin(name)
        self.look(name, text)
        self.finish(name, text)

    def look(self, name: str, text: Text) -> None:
        """Whatever is to be done while it runs."""

    def finish(self, name: str, text: Text) -> None:
        status = self.wait(name)
        if self.check_code(name, status, text.code):
            self.check_log(name, status, stdout=text.stdout, stderr=text.stderr)
        self.remove(name)


class Followed(Talks):
    """Its log is followed while it is written."""

    kind = "followed"

    def look(self, name: str, text: Text) -> None:
        follow = self.client.containers.logs
        stdout, stderr = self.persist("follow", name, lambda: streams_of(follow(name, follow=True)))
        status = self.wait(name)
        if self.check_code(name, status, text.code) and not status.reason:
            self.check_output(f"followed log of {name}, stdout", text.stdout, stdout)
            self.check_output(f"followed log of {name}, stderr", text.stderr, stderr)


class Attached(Talks):
    """A client is attached from before its first byte, and gets all, unless the service that it talks to dies."""

    kind = "attached"

    def live(self, name: str) -> None:
        text = self.text()
        self.create(name, text.args)
        self.doing, self.since = f"attach {name}", (began := time.monotonic())
        collected = Collected()
        try:
            for part in self.client.containers.attach(Attachment(name, stdout=True, stderr=True, lossless=True)):
                self.since = time.monotonic()
                if part.HasField("attached"):
                    self.begin(name)
                collected.add(part)
        except Unavailable:
            self.tally.add("attached clients broken off")
            if not self.is_begun(name):
                self.begin(name)
        else:
            result = collected.result()
            if self.check_code(name, result.exit, text.code) and not result.exit.reason:
                self.check_attached(f"attached to {name}, stdout", name, began, text.stdout, result.stdout)
                self.check_attached(f"attached to {name}, stderr", name, began, text.stderr, result.stderr)
        self.finish(name, text)


class Fed(Worker):
    """Reads lines from a client and writes them to its log; the client's words may end early, but have no holes."""

    kind = "fed"

    def live(self, name: str) -> None:
        code = self.random.randrange(256)
        lines = [f"i {number} {PAD}\n".encode() for number in range(self.random.randrange(50, 300))]
        self.create(name, ["sh", "-c", f"cat; exit {code}"], stdin=True, stdin_once=True)
        collected = Collected()
        self.doing, self.since = f"feed {name}", (began := time.monotonic())
        try:
            attachment = Attachment(name, stdin=True, stdout=True, lossless=True)
            for part in self.client.containers.attach(attachment, self.feed(lines)):
                self.since = time.monotonic()
                if part.HasField("attached"):
                    self.begin(name)
                collected.add(part)
        except Unavailable:
            self.tally.add("attached clients broken off")
            self.check_beginning(name, b"".join(lines))
        else:
            result = collected.result()
            if self.check_code(name, result.exit, code):
                self.check_attached(f"through {name}", name, began, b"".join(lines), result.stdout)
                self.check_log(name, result.exit, stdout=b"".join(lines))
        self.remove(name)

    def feed(self, lines: Sequence[bytes]) -> Iterator[tasks_pb2.AttachRequest]:
        for i in range(0, len(lines), 20):
            time.sleep(0.05)
            yield tasks_pb2.AttachRequest(stdin=b"".join(lines[i : i + 20]))

    def check_beginning(self, name: str, text: bytes) -> None:
        stdout, _ = self.persist("logs", name, lambda: streams_of(self.client.containers.logs(name)))
        self.tally.add("bytes of output compared", len(stdout))
        if not text.startswith(stdout):
            self.tally.blame(Fault.MISSING, f"{name} was fed with holes", len(stdout))


class Execs(Worker):
    """Execs with known output and exit codes in a container that goes on."""

    kind = "exec"

    def live(self, name: str) -> None:
        self.create(name, ["sleep", "1000"])
        self.begin(name)
        for _ in range(EXECS):
            if not self.stop.is_set() and not self.one_exec(name):
                break
        self.remove(name)

    def one_exec(self, name: str) -> bool:
        """Whether the container lives on."""
        text = Text(self.random.choice((1, 5, 60)), self.random.randrange(256))
        began = time.monotonic()
        containers = self.client.containers
        try:
            made = self.persist("exec", name, lambda: containers.exec_create(name, text.args)).exec_id
        except FailedPrecondition as e:
            return self.ended(name, e)
        self.doing = f"attach {name} {made}"
        collected = Collected()
        try:
            for part in containers.attach(Attachment(name, made, stdout=True, stderr=True, lossless=True)):
                self.since = time.monotonic()
                if part.HasField("attached"):
                    containers.exec_start(name, made)
                collected.add(part)
        except (Unavailable, FailedPrecondition):
            self.tally.add("attached clients broken off")
            whole = False
        else:
            whole = True
        status = self.exec_exit(name, made)
        what = f"exec {made} of {name}"
        if self.check_exec_code(name, what, status, text.code, began) and whole:
            result = collected.result()
            self.check_attached(f"{what}, stdout", name, began, text.stdout, result.stdout)
            self.check_attached(f"{what}, stderr", name, began, text.stderr, result.stderr)
        self.tally.add("execs")
        return True

    def exec_exit(self, name: str, exec_id: str) -> types_pb2.ExitStatus:
        """Started if it was not yet, and waited for."""
        with suppress(FailedPrecondition, NotFound):  # it was, or it has ended since
            self.persist("exec start", name, lambda: self.client.containers.exec_start(name, exec_id))
        return self.persist("exec wait", name, lambda: self.client.containers.exec_wait(name, exec_id, remove=False))

    def check_exec_code(self, name: str, what: str, status: types_pb2.ExitStatus, code: int, began: float) -> bool:
        if status.known and status.code == code:
            return True
        if not status.known and status.reason and (why := self.excuses.for_unknown_exec(name, began)):
            self.tally.add(f"execs whose exit code is unknown, as told ({why})")
            self.tally.note(f"{what}: {status.reason}")
            return False
        told = f"{status.code} (known={status.known}: {status.reason})"
        self.tally.blame(Fault.WRONG_CODE, f"{what}: exit code {code} came out as {told}")
        return False

    def ended(self, name: str, error: CorralError) -> bool:
        """A container of execs ends only by its shim, its zygote and its daemon being killed at once: never."""
        status = self.persist("get", name, lambda: self.client.containers.get(name)).exit
        self.tally.blame(Fault.LOST, f"{name} has ended with {status.code} ({status.reason}): {error}")
        return False


class Terminals(Worker):
    """Writes lines to a terminal, which outlives shims."""

    kind = "terminal"

    def live(self, name: str) -> None:
        text = Text(self.random.randrange(50, 200), self.random.randrange(256))
        args = (*text.args[:2], text.args[2].replace(">&2", ""))
        both = "".join(f"o {i} {PAD}\r\ne {i} {PAD}\r\n" for i in range(text.lines)).encode()
        self.create(name, args, terminal=True, stdin=True)
        self.begin(name)
        status = self.wait(name)
        if self.check_code(name, status, text.code):
            self.check_log(name, status, stdout=both)
        self.remove(name)


LOAD: tuple[type[Worker], ...] = (
    *(Lives,) * 6,
    *(Talks,) * 3,
    *(Execs,) * 5,
    *(Attached,) * 2,
    *(Fed,) * 2,
    Followed,
    Terminals,
)
