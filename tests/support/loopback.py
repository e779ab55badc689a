"""What is served at [::1] of a lab's host by published ports, and callers of it."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from corral.kernel.netns import in_namespace
from support.netlab import Lab, tcp_call
from support.sweep import proxies

LOOPBACK = "::1"


def refused(lab: Lab, number: int = 8080) -> bool:
    with pytest.raises(OSError, match=r"refused|reset") as caught:
        lab.on_host(lambda: socket.create_connection((LOOPBACK, number), 3).close())
    return isinstance(caught.value, ConnectionRefusedError)


def answers(lab: Lab, number: int = 8080) -> bool:
    with contextlib.suppress(OSError):
        return bool(tcp_call(lab.host, LOOPBACK, number))
    return False


def is_free(lab: Lab, own: str, number: int = 8080, kind: int = socket.SOCK_STREAM) -> bool:
    """To a program as forbearing as can be."""

    def bind() -> bool:
        with socket.socket(socket.AF_INET6 if ":" in own else socket.AF_INET, kind) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                one.bind((own, number))
                if kind == socket.SOCK_STREAM:
                    one.listen()
                return True
            return False

    return lab.on_host(bind)


@contextlib.contextmanager
def served(where: str | Path, own: str, talk: Callable[[socket.socket], None], number: int = 7) -> Iterator[None]:
    """Each connection has a thread."""
    family = socket.AF_INET6 if ":" in own else socket.AF_INET
    listener = in_namespace(Path(where), lambda: socket.create_server((own, number), family=family, backlog=512))

    def one(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            talk(connection)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=one, args=(listener.accept()[0],), daemon=True).start()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


def echo(connection: socket.socket) -> None:
    while data := connection.recv(1 << 16):
        connection.sendall(data)


def counts(connection: socket.socket) -> None:
    """How many bytes came, told after their end."""
    total = 0
    while data := connection.recv(1 << 20):
        total += len(data)
    connection.sendall(str(total).encode())


def call(lab: Lab, number: int = 8080) -> socket.socket:
    return lab.on_host(lambda: socket.create_connection((LOOPBACK, number), 10))


def goes_on(caller: socket.socket) -> bool:
    try:
        caller.sendall(b"?")
        return caller.recv(1) == b"?"
    except OSError:
        return False


@contextlib.contextmanager
def udp_echo(where: str | Path, own: str, number: int = 7) -> Iterator[None]:
    """Answers each datagram with where it came from."""

    def bound() -> socket.socket:
        made = socket.socket(socket.AF_INET6 if ":" in own else socket.AF_INET, socket.SOCK_DGRAM)
        made.bind((own, number))
        made.settimeout(0.1)
        return made

    server, ended = in_namespace(Path(where), bound), threading.Event()

    def answer() -> None:
        while not ended.is_set():
            with contextlib.suppress(TimeoutError):
                data, source = server.recvfrom(1 << 16)
                server.sendto(f"{source[0]} {source[1]} {len(data)}".encode(), source)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(5)
        server.close()


def datagrams(lab: Lab, number: int = 8080) -> socket.socket:
    def connected() -> socket.socket:
        made = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        made.settimeout(2)
        made.connect((LOOPBACK, number))
        return made

    return lab.on_host(connected)


def asked(caller: socket.socket, data: bytes = b"?") -> list[str]:
    caller.send(data)
    return caller.recv(100).decode().split()


def the_proxy(lab: Lab) -> int:
    [pid] = proxies(lab.place.state)
    return pid


def answers_echo(lab: Lab, number: int = 8080) -> bool:
    with contextlib.suppress(OSError), call(lab, number) as caller:
        return goes_on(caller)
    return False
