"""Between the runtime and the process it sets up: one SOCK_SEQPACKET socket pair, close-on-exec on both ends.

    child -> parent   {"ready": true} + the pty master, if there is one            set-up is done
    child -> parent   {"ready": true, "successor": true} + the same                another process goes on from there
    child -> parent   its PID, or what clone(2) failed with, in eight bytes        which one
    child -> parent   {"entered": true}, {"born": PID}                             see corral.oci.passage
    child -> parent   {"devices": […]}                                             see corral.oci.net_devices
    parent -> child   in JSON, what answers these, in as many messages as it takes; a line end is the end of it
    child -> parent   {"hooks": true}                                              before ready: run the runtime's
    parent -> child   b"start"                                                     that was done
    child -> parent   {"listener": true} + an fd                                   before ready: for a seccomp listener
    child -> parent   {"sighting": [UID, GID, [GID…], HOME, LOOK…]}                before ready, of an exec: who it is
    child -> parent   {"error": KIND, "errno": N, "message": "…"}                  it, or exec, failed; the child exits
    parent -> child   b"start"                                                     execute the program
    child -> parent   end of file without a message                                the program was executed

End of file at the child's side: the runtime is gone, and the child exits.

A successor may be in the hands of the container it was born into, and have its word before its predecessor's last. So
the kernel tells who sends a message (SO_PASSCRED): even CAP_SYS_ADMIN lets nobody pass for a process outside of his PID
namespace. What anybody says but the process that is to speak is taken for no more than a sentence, whatever it is.
"""

import _socket as socket  # the part in C, which has all that is used here and takes a tenth of the time to load
import array
import contextlib
import os
from collections.abc import Callable
from typing import Any, NoReturn, cast

from corral.oci.errors import EXEC_DENIED, EXEC_NOT_FOUND, SETUP, ExecFailed
from corral.oci.json_text import dumps, loads
from corral.oci.users import Identity, Sighting

_MAX_MESSAGE = 32768
_MAX_TEXT = 2048
"""Characters of a sentence: the container has a say in it, and in JSON each may take six bytes."""
LOOK_S = 0.05
"""The child is looked after this often while nothing is heard of it."""
_MAX_ERRNO = 4096
_NUMBER = 8
START = b"start"
_ANSWERED = b"\n"
_INT = array.array("i").itemsize
_SENDER_AND_ONE_FD = socket.CMSG_SPACE(3 * _INT) + socket.CMSG_LEN(_INT)
"""Not CMSG_SPACE, whose padding has room for another one. What finds none the kernel closes."""


def make_pair() -> tuple["ParentEnd", "ChildEnd"]:
    """Both ends of a new channel."""
    parent, child = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return ParentEnd(parent), ChildEnd(child)


class EndedEarly(Exception):
    """The child ended without a word: killed, most likely."""


class ChildError(OSError):
    """What the child could not have of the host; whatever errno it tells, it is no class that stands for that."""


class ChildEnd:
    """The end of the process that is set up."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def fileno(self) -> int:
        """For the list of fds to keep."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close it, in the parent."""
        self._socket.close()

    def send_ready(self, console: int | None, *, successor: bool = False) -> None:
        """Say that the set-up is done, and whether another one goes on from here, and hand over the pty master."""
        ancillary = []
        if console is not None:
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [console]))]
        message = b'{"ready":true,"successor":true}' if successor else b'{"ready":true}'
        self._socket.sendmsg([message], ancillary)

    def send_number(self, number: int) -> None:
        """Say which one, say."""
        self._socket.send(number.to_bytes(_NUMBER, "little", signed=True))

    def send(self, member: str, value: object = True) -> None:
        """Say one thing, which receive() waits for."""
        self._socket.send(dumps({member: value}).encode())

    def receive_answer(self) -> object:
        """What answers it; None if the runtime is gone."""
        answer = b""
        while not answer.endswith(_ANSWERED):
            if not (part := self._socket.recv(_MAX_MESSAGE)):
                return None
            answer += part
        return loads(answer)

    def send_hooks(self) -> None:
        """Say that it is time for the runtime's hooks."""
        self._socket.send(b'{"hooks":true}')

    def send_listener(self, fd: int) -> None:
        """Hand over the descriptor by which a listener is to answer calls of the child."""
        self._socket.sendmsg([b'{"listener":true}'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])

    def send_sighting(self, sighting: Sighting) -> None:
        """Say who this is, and what told so. What is too long is not worth it."""
        who = sighting.identity
        message = dumps({"sighting": [who.uid, who.gid, who.groups, who.home, *sighting.looks]}).encode()
        if len(message) <= _MAX_TEXT:
            self._socket.send(message)

    def send_error(self, error: BaseException) -> None:
        """Say why it went wrong."""
        self._socket.send(error_message(error))

    def wait_for_start(self) -> bool:
        """False if the runtime is gone."""
        return self._socket.recv(len(START)) == START

    def is_deserted(self) -> bool:
        """Whether the runtime is gone, who has nothing more to say."""
        try:
            self._socket.recv(1, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        return True


def error_message(error: BaseException) -> bytes:
    """What the child says if this went wrong."""
    message: dict[str, str | int]
    if isinstance(error, ExecFailed):
        message = {"error": error.kind, "message": error.message}
    elif isinstance(error, OSError):
        message = {"error": SETUP, "errno": error.errno or 0, "message": _os_error_text(error)}
    else:
        message = {"error": SETUP, "message": f"{type(error).__name__}: {error}"}
    text = str(message["message"])
    message["message"] = text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}…"
    return dumps(message).encode()


def _os_error_text(error: OSError) -> str:
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    text = error.strerror or str(error)
    return f"{text}: {' -> '.join(names)}" if names else text


class ParentEnd:
    """The runtime's end. Where it waits, it asks `patience` every LOOK_S, which raises to give up."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        end.settimeout(LOOK_S)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)

    def fileno(self) -> int:
        """For who hands it on."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close it; a child that waits for start then exits."""
        self._socket.close()

    def receive(self, pid: int, member: str, patience: Callable[[], None]) -> object:
        """Wait for one thing that process pid says, and nothing else: what it is. Raises as receive_ready() does."""
        data, sender = self._receive_alone(patience)
        if not data:
            raise EndedEarly
        message = _parse(data)
        if "error" in message:
            _raise(message)
        if sender != pid or member not in message:
            raise _nonsense()
        return message[member]

    def send_answer(self, value: object, patience: Callable[[], None]) -> None:
        """Answer it. Raises BrokenPipeError if the child is gone."""
        answer = dumps(value).encode() + _ANSWERED
        for begin in range(0, len(answer), _MAX_MESSAGE):
            self._send(answer[begin : begin + _MAX_MESSAGE], patience)

    def _send(self, data: bytes, patience: Callable[[], None]) -> None:
        while True:
            try:
                self._socket.send(data, socket.MSG_NOSIGNAL)
            except TimeoutError:  # it has not read yet what was sent before
                patience()
            else:
                return

    def receive_ready(
        self,
        pid: int,
        patience: Callable[[], None],
        pass_listener: Callable[[int], None] | None = None,
        run_hooks: Callable[[], None] | None = None,
        note: Callable[[Sighting], None] | None = None,
    ) -> tuple[int | None, bool]:
        """Wait for process pid's word that the set-up is done: the pty master, or None; and if it has a successor.

        pass_listener gets the fd for a seccomp listener, and run_hooks is called, when it is time; note gets who an
        exec has found itself to be. Raises what they do, or what the child reported: ExecFailed, or the ChildError of
        a host that can't do it; or EndedEarly.
        """
        while True:
            data, fd, sender = self._receive(patience)
            with contextlib.ExitStack() as unused:
                if fd is not None:
                    unused.callback(os.close, fd)
                if not data:
                    raise EndedEarly
                message = _parse(data)
                if "error" in message:
                    _raise(message)
                if sender != pid:
                    raise _nonsense()
                if "listener" in message and pass_listener is not None and fd is not None:
                    pass_listener(fd)
                elif "hooks" in message and run_hooks is not None:
                    run_hooks()
                    self.send_start()
                elif "sighting" in message and note is not None:
                    note(_sighting(message["sighting"]))
                elif "ready" in message:
                    unused.pop_all()
                    return fd, message.get("successor") is True
                else:
                    raise _nonsense()

    def send_start(self) -> None:
        """Let the child execute its program. Raises BrokenPipeError if it is gone."""
        self._socket.send(START, socket.MSG_NOSIGNAL)

    def wait_for_exec(self, patience: Callable[[], None]) -> None:
        """Return when the program was executed; raise ExecFailed if it can't be."""
        data, _ = self._receive_alone(patience)
        if data:
            _raise(_parse(data))

    def receive_number(self, pid: int, patience: Callable[[], None]) -> int:
        """A number that process pid says; anybody may say a negative one. Raises as receive() does."""
        data, sender = self._receive_alone(patience)
        if not data:
            raise EndedEarly
        if len(data) != _NUMBER:
            _raise(_parse(data))
        number = int.from_bytes(data, "little", signed=True)
        if number >= 0 and sender != pid:
            raise _nonsense()
        return number

    def receive_successor(self, pid: int, patience: Callable[[], None]) -> int:
        """The pid of who goes on in the place of process pid. Raises as receive() does, or why there is nobody."""
        number = self.receive_number(pid, patience)
        if number <= 0:
            reason = os.strerror(-number) if -number < _MAX_ERRNO else "nobody"
            _raise({"errno": -number, "message": f"{reason}: clone"})
        return number

    def _receive_alone(self, patience: Callable[[], None]) -> tuple[bytes, int]:
        """A message and its sender; what descriptor came with it is closed."""
        data, fd, sender = self._receive(patience)
        if fd is not None:
            os.close(fd)
        return data, sender

    def _receive(self, patience: Callable[[], None]) -> tuple[bytes, int | None, int]:
        """A message, the descriptor that came with it, and the pid of its sender."""
        while True:
            try:
                data, ancillary, _, _ = self._socket.recvmsg(_MAX_MESSAGE, _SENDER_AND_ONE_FD, socket.MSG_CMSG_CLOEXEC)
            except TimeoutError:
                patience()
            else:
                fds, credentials = array.array("i"), array.array("i")
                for _, kind, payload in ancillary:
                    (fds if kind == socket.SCM_RIGHTS else credentials).frombytes(payload)
                if ancillary and not data:  # nobody's end, and which one could take for that
                    raise _nonsense()
                return data, fds[0] if fds else None, credentials[0] if credentials else 0


def _parse(data: bytes) -> dict[str, object]:
    try:
        message = loads(data)
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict):
        raise _nonsense()
    return message


def _sighting(said: object) -> Sighting:
    """As send_sighting() says it."""
    try:
        uid, gid, groups, home, *looks = cast(list[Any], said)
        return Sighting(Identity(uid, gid, tuple(groups), home), tuple(each and tuple(each) for each in looks))
    except (TypeError, ValueError) as e:
        raise _nonsense() from e


def _nonsense() -> ExecFailed:
    return ExecFailed(SETUP, "the process said what makes no sense during its set-up")


def _raise(message: dict[str, object]) -> NoReturn:
    """Raise what a message tells of. The message may be anybody's: it must not be able to raise anything else."""
    text = str(message.get("message", ""))[: _MAX_TEXT + 1].encode(errors="replace").decode()
    kind, code = message.get("error"), message.get("errno")
    if isinstance(code, int) and 0 < code < _MAX_ERRNO:
        raise ChildError(code, text)
    raise ExecFailed(kind if kind in (SETUP, EXEC_NOT_FOUND, EXEC_DENIED) else SETUP, text)
