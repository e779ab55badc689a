"""A client at the socket of corral.rpc.brief that may do what no client of gRPC's does."""

import socket
from pathlib import Path
from typing import Self

from corral.rpc.address import beside
from corral.rpc.frames import DATA, HEADERS, PREFACE, SETTINGS, frame
from corral.rpc.hpack import encode

PATIENCE_S = 30


class Peer:
    """Who speaks HTTP/2 as it likes, and hears only what it asks for."""

    def __init__(self, path: Path, service: str, *settings: tuple[int, int]) -> None:
        self._service = service
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(PATIENCE_S)
        self._socket.connect(beside(str(path)))
        given = b"".join(number.to_bytes(2) + value.to_bytes(4) for number, value in settings)
        self.say(PREFACE + frame(SETTINGS, 0, 0, given))
        self._stream = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def say(self, data: bytes) -> None:
        self._socket.sendall(data)

    def say_what_is_taken(self, data: bytes, most: int) -> int:
        """Over and over, until nobody has taken any for a second; how much was."""
        self._socket.settimeout(1)
        said = 0
        while said < most:
            try:
                said += self._socket.send(data)
            except TimeoutError:
                break
        return said

    def ask(self, name: str, request: bytes, *more: tuple[bytes, bytes]) -> int:
        """The number of its stream."""
        self._stream += 2
        fields = encode([(b":method", b"POST"), (b":path", f"/{self._service}/{name}".encode()), *more])
        body = b"\0" + len(request).to_bytes(4) + request
        self.say(frame(HEADERS, 4, self._stream, fields) + frame(DATA, 1, self._stream, body))
        return self._stream

    def hear(self, *kinds: int) -> tuple[int, bytes]:
        """Stream and payload of the next frame of these kinds."""
        while True:
            head = self._exactly(9)
            payload = self._exactly(int.from_bytes(head[:3]))
            if head[3] in kinds:
                return int.from_bytes(head[5:]), payload

    def _exactly(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            more = self._socket.recv(length - len(data))
            assert more, "it hung up"
            data += more
        return data
