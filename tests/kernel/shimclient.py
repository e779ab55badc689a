"""A small synchronous client of the zygote and the shim, for tests: real processes over real sockets."""

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self, cast

import corral.shim
from corral.shim.wire import Channel

type Message = dict[str, object]

TIMEOUT_S = 20.0


class RequestError(Exception):
    """The error reply of a zygote or shim."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind, self.message = kind, message


class Peer:
    """Sends requests and waits for their replies; events are kept until asked for."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(TIMEOUT_S)
        self.sock, self.channel = sock, Channel(sock)
        self.inbox: deque[Message] = deque()
        self.events: deque[Message] = deque()
        self.last_id = 0
        self.hello: Message = {}

    def receive(self) -> Message:
        while not self.inbox:
            self.inbox.extend(self.channel.receive())
        return self.inbox.popleft()

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        self.channel.send(message, fds)

    def call(self, op: str, fds: Sequence[int] = (), **fields: object) -> dict[str, object]:
        """The reply's content; RequestError for an error reply, EOFError when the peer ended."""
        self.last_id += 1
        self.send({"id": self.last_id, "op": op, **fields}, fds)
        while True:
            message = self.receive()
            if "event" in message:
                self.events.append(message)
                continue
            assert message["id"] == self.last_id, message
            if "error" in message:
                error = message["error"]
                assert isinstance(error, dict)
                raise RequestError(error["kind"], error["message"])
            reply = message["ok"]
            assert isinstance(reply, dict)
            return reply

    def event(self) -> Message:
        """The next event."""
        while not self.events:
            message = self.receive()
            assert "event" in message, message
            self.events.append(message)
        return self.events.popleft()

    def at_end(self) -> bool:
        """Whether the peer hung up; waits for it."""
        try:
            self.receive()
        except EOFError:
            return True
        return False

    def close(self) -> None:
        self.channel.close()


class Zygote:
    """A running zygote."""

    def __init__(self, env: dict[str, str] | None = None, *, source: str | None = None) -> None:
        ours, theirs = socket.socketpair()
        source = source or str(Path(next(iter(corral.shim.__path__))).parents[1])
        code = f"import sys; sys.path.insert(0, {source!r}); from corral.shim.zygote import main; main()"
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self.pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-I", "-S", "-c", code],
            {**os.environ, **(env or {})},
            file_actions=[
                (os.POSIX_SPAWN_DUP2, theirs.fileno(), 3),
                (os.POSIX_SPAWN_DUP2, self.stderr.fileno(), 2),
            ],
        )
        theirs.close()
        self.peer = Peer(ours)
        self._reaped = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End it at once, if it has not ended: after a test that failed it would stay for who wants what it keeps."""
        self.peer.close()
        self.stderr.close()
        if not self._reaped:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def wait(self) -> None:
        """Until it has ended."""
        wait_gone(self.pid)
        os.waitpid(self.pid, 0)
        self._reaped = True

    def spawn(self, bundle: Path, container: str = "c1", namespace: str = "default") -> dict[str, object]:
        with listen(bundle) as listener:
            return self.peer.call(
                "spawn", [listener.fileno()], bundle=str(bundle), namespace=namespace, container=container
            )

    def stand_by(self) -> tuple[int, socket.socket]:
        """A shim that stands by: its pid, and the connection to it."""
        ours, theirs = socket.socketpair()
        with theirs:
            pid = self.peer.call("stand_by", [theirs.fileno()])["pid"]
        assert isinstance(pid, int)
        return pid, ours

    def errors(self) -> str:
        self.stderr.seek(0)
        return self.stderr.read().decode()

    def close(self) -> None:
        """End it as a dying daemon does: its end of the socket closes."""
        self.peer.close()
        self.stderr.close()
        os.waitpid(self.pid, 0)
        self._reaped = True


BUSYBOX = shutil.which("busybox") or "/bin/busybox"
NAMESPACES = ("mount", "pid", "ipc", "uts", "network")
_PROC = {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]}
_DEV = {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]}
_PTS = {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["newinstance", "ptmxmode=0666"]}


def make_root(directory: Path) -> Path:
    """A root file system of nothing but busybox."""
    root = directory / "root"
    for name in ("bin", "proc", "dev", "tmp", "etc"):
        (root / name).mkdir(parents=True)
    (root / "tmp").chmod(0o1777)
    shutil.copy(BUSYBOX, root / "bin/busybox")
    subprocess.run(["chroot", root, "/bin/busybox", "--install", "-s", "/bin"], check=True)
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/tmp:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\nuser:x:1000:\n")
    return root


def config(
    root: Path, *args: str, terminal: bool = False, namespaces: Sequence[str] = NAMESPACES, **more: object
) -> Message:
    """A config.json that runs args in the root."""
    return {
        "ociVersion": "1.2.0",
        "root": {"path": str(root)},
        "process": process(*args, terminal=terminal, **more),
        "mounts": [_PROC, _DEV, _PTS],
        "linux": {"namespaces": [{"type": name} for name in namespaces]},
    }


def process(*args: str, terminal: bool = False, **more: object) -> Message:
    """An OCI process object."""
    return {"cwd": "/", "args": list(args), "env": ["PATH=/bin"], "terminal": terminal, **more}


def listen(bundle: Path) -> socket.socket:
    directory = os.open(bundle, os.O_PATH | os.O_DIRECTORY)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(f"/proc/self/fd/{directory}/socket")
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    finally:
        os.close(directory)
    return listener


def connect(bundle: Path, hello: Message | None = None) -> Peer:
    """A connection after the hello."""
    directory = os.open(bundle, os.O_PATH | os.O_DIRECTORY)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(f"/proc/self/fd/{directory}/socket")
    except OSError:
        sock.close()
        raise
    finally:
        os.close(directory)
    return greeted(sock, hello)


def greeted(sock: socket.socket, hello: Message | None = None) -> Peer:
    """The same over a connection that there is."""
    peer = Peer(sock)
    try:
        peer.send(hello or {"v": 1, "client": "tests"})
        peer.hello = peer.receive()
    except BaseException:
        peer.close()
        raise
    return peer


@contextlib.contextmanager
def run_directory() -> Iterator[Path]:
    """A short directory: below it are sockets and FIFOs."""
    directory = Path(tempfile.mkdtemp(prefix="corral-", dir="/tmp"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def read_to_end(fd: int, timeout_s: float = TIMEOUT_S) -> bytes:
    """All bytes until EOF; the fd is closed."""
    data = b""
    try:
        while True:
            if not select.select([fd], [], [], timeout_s)[0]:
                raise TimeoutError(f"no EOF within {timeout_s} s, after {data[-200:]!r}")
            chunk = os.read(fd, 1 << 20)
            if not chunk:
                return data
            data += chunk
    finally:
        os.close(fd)


def read_until(fd: int, wanted: bytes, timeout_s: float = TIMEOUT_S) -> bytes:
    """Bytes up to and including the wanted ones (more may have been read)."""
    data = b""
    while wanted not in data:
        if not select.select([fd], [], [], timeout_s)[0]:
            raise TimeoutError(f"no {wanted!r} within {timeout_s} s, only {data!r}")
        chunk = os.read(fd, 65536)
        if not chunk:
            raise EOFError(f"no {wanted!r}, only {data!r}")
        data += chunk
    return data


def wait_gone(pid: int, timeout_s: float = TIMEOUT_S) -> None:
    """Wait until no process has this pid (or only a zombie of somebody else's)."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] in (b"Z", b"X"):
                return
        except (FileNotFoundError, ProcessLookupError):
            return
        time.sleep(0.005)
    raise TimeoutError(f"process {pid} is still there")


class Shim:
    """A spawned shim with its bundle, and one connection to it."""

    def __init__(
        self, zygote: Zygote, directory: Path, name: str, content: Message, *, standing_by: bool = False
    ) -> None:
        self.name, self.bundle = name, directory / name
        self.bundle.mkdir()
        self.log = directory / f"{name}.log"
        (self.bundle / "config.json").write_text(json.dumps(content))
        self.pid, self.peer = self._stood_by(zygote) if standing_by else self._spawned(zygote)
        self.call = self.peer.call

    def _spawned(self, zygote: Zygote) -> tuple[int, Peer]:
        spawned = zygote.spawn(self.bundle, container=self.name)
        assert isinstance(spawned["pid"], int)
        return spawned["pid"], connect(self.bundle)

    def _stood_by(self, zygote: Zygote) -> tuple[int, Peer]:
        pid, sock = zygote.stand_by()
        peer = greeted(sock)
        with listen(self.bundle) as listener:
            order = {"bundle": str(self.bundle), "namespace": "default", "container": self.name}
            assert peer.call("take", [listener.fileno()], **order) == {}
        return pid, peer

    def create(self, *, driver: str = "json-file", **options: object) -> int:
        """Create the container and return the pid of its init."""
        log = {"driver": driver, "path": str(self.log)}
        pid = self.call("create", **{"log": log, **options})["pid"]
        assert isinstance(pid, int)
        return pid

    def start(self, exec_id: str = "") -> dict[str, object]:
        return self.call("start", exec=exec_id)

    def exec(self, exec_id: str, *args: str, stdin: bool = False, user: str | None = None, **more: object) -> None:
        """Register an exec; more are members of its process."""
        self.call("exec", exec=exec_id, process=process(*args, **more), stdin=stdin, user=user)  # type: ignore[arg-type]

    def run_exec(self, *args: str, **more: object) -> bytes:
        """The output (both streams) of an exec that ends by itself."""
        exec_id = f"run{self.peer.last_id}"
        self.exec(exec_id, *args, **more)  # type: ignore[arg-type]
        out, err = self.attach("stdout", "stderr", exec_id=exec_id, lossless=True)
        self.start(exec_id)
        return read_to_end(out) + read_to_end(err)

    def attach(self, *names: str, exec_id: str = "", **options: object) -> list[int]:
        """Our ends of pipes for the streams named."""
        theirs, ours = [], []
        for name in names:
            reader, writer = os.pipe2(os.O_CLOEXEC)
            theirs.append(reader if name == "stdin" else writer)
            ours.append(writer if name == "stdin" else reader)
        try:
            self.call("attach", theirs, exec=exec_id, **dict.fromkeys(names, True), **options)
        except BaseException:
            for fd in ours:
                os.close(fd)
            raise
        finally:
            for fd in theirs:
                os.close(fd)
        return ours

    def state(self) -> dict[str, object]:
        return self.call("state")

    def wait_state(self, wanted: str, exec_id: str = "") -> dict[str, object]:
        """Poll until the container, or an exec, is in a state."""
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            state = self.state()
            execs = state["execs"]
            assert isinstance(execs, dict)
            found = execs.get(exec_id, {}) if exec_id else state
            if found.get("state") == wanted:
                assert isinstance(found, dict)
                return found
            time.sleep(0.005)
        raise TimeoutError(f"never {wanted}: {state}")

    def log_entries(self) -> list[tuple[str, str]]:
        """(stream, text) of each line of the json-file log."""
        lines = [json.loads(line) for line in self.log.read_bytes().splitlines()]
        return [(line["stream"], line["log"]) for line in lines]

    def exit_file(self) -> dict[str, object]:
        content = json.loads((self.bundle / "exit.json").read_text())
        assert isinstance(content, dict)
        return content

    def wait(self) -> dict[str, object]:
        """The exit of the container, after the shim ended by itself."""
        wait_gone(self.pid)
        return self.exit_file()

    def reports(self) -> str:
        """What the shim noted in its own log: nothing, if all is well."""
        path = self.bundle / "shim.log"
        return path.read_text() if path.exists() else ""

    def close(self) -> None:
        """Whatever state it is in, end it and its container."""
        with contextlib.suppress(OSError, EOFError):
            peer = connect(self.bundle)
            with contextlib.suppress(EOFError):
                peer.call("delete")
            peer.close()
        self.peer.close()
        try:
            wait_gone(self.pid, 10)
        except TimeoutError:
            os.kill(self.pid, signal.SIGKILL)
            raise
        finally:
            shutil.rmtree(
                self.bundle, ignore_errors=True
            )  # the zygote keeps what a killed shim has left until nobody can want it


class Workshop:
    """A zygote, a root file system, and the shims made with them; all gone at the end."""

    def __init__(self, env: dict[str, str] | None = None, *, source: str | None = None) -> None:
        self._stack = contextlib.ExitStack()
        self.directory = self._stack.enter_context(run_directory())
        self.root = make_root(self.directory)
        self.zygote = Zygote(env, source=source)
        self._stack.callback(self.zygote.close)
        self._count = 0

    def spawn(
        self,
        *args: str,
        terminal: bool = False,
        namespaces: Sequence[str] = NAMESPACES,
        seccomp: Message | None = None,
        standing_by: bool = False,
        **more: object,
    ) -> Shim:
        """A shim whose container is to run args; nothing is created yet. More are members of its process."""
        self._count += 1
        content = config(self.root, *args, terminal=terminal, namespaces=namespaces, **more)
        if seccomp is not None:
            content["linux"] = {**cast(Message, content["linux"]), "seccomp": seccomp}
        shim = Shim(self.zygote, self.directory, f"c{self._count}", content, standing_by=standing_by)
        self._stack.callback(shim.close)
        return shim

    def run(self, *args: str, terminal: bool = False, **options: object) -> Shim:
        """A started container; options are those of create."""
        shim = self.spawn(*args, terminal=terminal)
        shim.create(**options)  # type: ignore[arg-type]
        shim.start()
        return shim

    def close(self) -> None:
        self._stack.close()


@contextlib.contextmanager
def workshop(env: dict[str, str] | None = None, *, source: str | None = None) -> Iterator[Workshop]:
    """A workshop that is closed at the end. source: where corral.shim is taken from, if not from here."""
    made = Workshop(env, source=source)
    try:
        yield made
    finally:
        made.close()
