"""A proxy between a client and a server: slows down what the server sends, counts it, and cuts connections."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

CHUNK = 32 << 10


class Throttle:
    """Bytes per second for all connections together; 0: as fast as it goes."""

    def __init__(self, target: int, bytes_per_s: int) -> None:
        self.bytes_per_s = bytes_per_s
        self.sent = 0
        """Bytes of the server's that were handed to clients."""
        self._target = target
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._due = 0.0
        self._stopped = False

    @property
    def port(self) -> int:
        port: int = self._listening.getsockname()[1]
        return port

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def cut(self) -> None:
        """End every connection, now and in the middle."""
        with self._lock:
            doomed = list(self._sockets)
        for each in doomed:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def serve(self) -> None:
        while not self._stopped:
            try:
                client, _ = self._listening.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                continue
            # Little is on its way at any time: what the client has not read was not sent.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, CHUNK)
            with self._lock:
                self._sockets |= {client, server}
            for source, sink, count in ((client, server, False), (server, client, True)):
                threading.Thread(target=self._pass, args=(source, sink, count), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, count: bool) -> None:
        with suppress(OSError):
            while data := source.recv(CHUNK):
                if count:
                    self._wait(len(data))
                sink.sendall(data)
        for each in (source, sink):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        with self._lock:
            self._sockets -= {source, sink}

    def _wait(self, size: int) -> None:
        with self._lock:
            self.sent += size
            now = time.monotonic()
            self._due = max(self._due, now) + (size / self.bytes_per_s if self.bytes_per_s else 0)
            delay = self._due - now
        if delay > 0:
            time.sleep(delay)

    def stop(self) -> None:
        self._stopped = True
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self.cut()


@contextmanager
def throttled(target: int, bytes_per_s: int = 0) -> Iterator[Throttle]:
    """In front of 127.0.0.1:target."""
    throttle = Throttle(target, bytes_per_s)
    thread = threading.Thread(target=throttle.serve, daemon=True)
    thread.start()
    try:
        yield throttle
    finally:
        throttle.stop()
        thread.join()
