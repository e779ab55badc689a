"""What passes between a command and the process it makes: descriptors go in, and word of the process comes out."""

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from corral.oci.spec import Process
from corral.oci.stdio import Stdio
from corral.runtime.errors import CommandError
from corral.runtime.flags import Options

if TYPE_CHECKING:
    from corral.oci.attendance import ProcessHandle

_FIRST_KEPT = 3


def check_terminal(process: Process, options: Options, *, detached: bool) -> None:
    """A pty's master must go somewhere: to the socket, or to this process if it stays."""
    socket = options.has("console-socket")
    if process.terminal and detached and not socket:
        raise CommandError("cannot allocate a terminal without --console-socket, unless this command stays with it")
    if socket and not process.terminal:
        raise CommandError("--console-socket is given, but the process has no terminal")


def _listen_fds() -> int:
    """How many sockets systemd gave to this command. Source: sd_listen_fds(3); podman names pid 1."""
    number = os.environ.get("LISTEN_FDS", "")
    given = os.environ.get("LISTEN_PID", "") in ("", "1", str(os.getpid()))
    return int(number) if given and number.isascii() and number.isdecimal() else 0


def kept_fds(options: Options) -> tuple[int, ...]:
    """The fds that --preserve-fds and systemd's $LISTEN_FDS name. Called before anything was opened."""
    count = options.number("preserve-fds") + _listen_fds()
    if count < 0:
        raise CommandError(f"--preserve-fds: {options.text('preserve-fds')} is negative")
    kept = tuple(range(_FIRST_KEPT, _FIRST_KEPT + count))
    for fd in kept:
        try:
            os.set_inheritable(fd, True)
        except OSError:
            raise CommandError(f"--preserve-fds: descriptor {fd} is not open") from None
    return kept


def with_listen_fds(process: Process) -> Process:
    """Tell the process of the sockets it is given."""
    listening = _listen_fds()
    if not listening:
        return process
    return replace(process, env=(*process.env, f"LISTEN_FDS={listening}", "LISTEN_PID=1"))


def own_stdio(process: Process, options: Options, kept: tuple[int, ...]) -> Stdio:
    """This command's own 0, 1 and 2, for a process without a terminal."""
    if not process.terminal:
        return Stdio(0, 1, 2, kept)
    return Stdio(kept=kept, newlines=not options.has("console-socket") and not os.isatty(1))


def tell_of(handle: "ProcessHandle", options: Options) -> None:
    """Give a client the terminal's pty, a pidfd and the pid, in this order, as far as it wants them."""
    if handle.console is not None and options.has("console-socket"):
        from corral.runtime.terminal import send_descriptor

        send_descriptor(options.text("console-socket"), handle.console, b"/dev/ptmx")
        os.close(handle.console)
        handle.console = None
    if options.has("pidfd-socket"):
        from corral.runtime.terminal import send_descriptor

        send_descriptor(options.text("pidfd-socket"), handle.pidfd, b"pidfd")
    if options.has("pid-file"):
        _write_pid_file(options.text("pid-file"), handle.pid)


def _write_pid_file(path: str, pid: int) -> None:
    """Write a pid as a whole: who watches for the file must not read half of it.

    Others may write to the directory: what they put there is replaced, and never followed.
    """
    directory, name = os.path.split(path)
    temporary = os.path.join(directory, f".{name}.{os.urandom(8).hex()}")  # noqa: PTH118 - a string, as the flag gave it
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except OSError as e:
        raise OSError(e.errno, f"--pid-file: {e.strerror}", path) from e
    try:
        with open(fd, "w", encoding="ascii") as file:
            file.write(str(pid))
        os.replace(temporary, path)  # noqa: PTH105 - likewise
    except BaseException:
        os.unlink(temporary)  # noqa: PTH108 - likewise
        raise
