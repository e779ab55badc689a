"""A registry that does what a test says: small, in memory, and as wrong as it is told to be."""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ssl import SSLContext

from support.images import digest, image_config

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass(frozen=True, slots=True)
class Seen:
    """A request as it came."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes = b""


class Handler(BaseHTTPRequestHandler):
    """Serves manifests and blobs, unless the test's own `on` has answered."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        """headers: with _ for -."""
        self.send_response(status)
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        if "Content-Length" not in names:
            names["Content-Length"] = str(len(body))
        for name, value in names.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _serve(self) -> None:
        faulty = self.server.faulty
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        seen = Seen(self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, body)
        with faulty.lock:
            faulty.seen.append(seen)
        if not faulty.on(self, seen):
            self.content(seen)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = _serve  # noqa: N815

    def content(self, seen: Seen) -> None:
        """What a good registry would say."""
        faulty = self.server.faulty
        kind, _, name = seen.path.partition("?")[0].removeprefix("/v2/").partition("/")[2].rpartition("/")
        if kind.endswith("manifests") and name in faulty.manifests:
            media_type, data = faulty.manifests[name]
            self.answer(200, data, Content_Type=media_type, Docker_Content_Digest=digest(data))
        elif kind.endswith("blobs") and name in faulty.blobs:
            self.blob(faulty.blobs[name], seen)
        else:
            self.answer(404, b'{"errors": [{"code": "NAME_UNKNOWN", "message": "no such thing"}]}')

    def blob(self, data: bytes, seen: Seen) -> None:
        match = _RANGE.fullmatch(seen.headers.get("range", ""))
        if match is None:
            self.answer(200, data, Accept_Ranges="bytes")
            return
        start, end = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
        self.answer(206, data[start : end + 1], Content_Range=f"bytes {start}-{end}/{len(data)}")


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, faulty: "Faulty") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.faulty = faulty

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that goes away is no fault of the test


@dataclass
class Faulty:
    """One of them."""

    on: Callable[[Handler, Seen], bool] = lambda _handler, _seen: False
    manifests: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    port: int = 0

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def of(self, part: str, method: str = "GET") -> list[Seen]:
        """The requests whose path holds `part`."""
        with self.lock:
            return [seen for seen in self.seen if part in seen.path and seen.method == method]

    def add_image(self, tag: str, layers: Sequence[bytes], **config: object) -> str:
        """An image of uncompressed layers; returns the digest of its manifest."""
        return self.add(tag, OCI_MANIFEST, manifest_of(self, layers, image_config(layers, **config)))

    def add(self, tag: str, media_type: str, data: bytes) -> str:
        for name in (tag, digest(data)):
            self.manifests[name] = (media_type, data)
        return digest(data)


def manifest_of(faulty: Faulty, layers: Sequence[bytes], config: bytes) -> bytes:
    """The manifest; what it refers to is put there."""
    for data in (config, *layers):
        faulty.blobs[digest(data)] = data
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": described(OCI_CONFIG, config),
        "layers": [described(OCI_LAYER, data) for data in layers],
    }
    return json.dumps(document).encode()


def described(media_type: str, data: bytes, **more: object) -> dict[str, object]:
    return {"mediaType": media_type, "digest": f"sha256:{hashlib.sha256(data).hexdigest()}", "size": len(data), **more}


@contextmanager
def faulty_registry(
    on: Callable[[Handler, Seen], bool] | None = None, tls: SSLContext | None = None
) -> Iterator[Faulty]:
    """Served within the block."""
    faulty = Faulty()
    if on is not None:
        faulty.on = on
    server = Server(faulty)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    faulty.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield faulty
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
