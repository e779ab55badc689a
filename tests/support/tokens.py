"""A token server as registries have one: it knows users and what they may do, and signs what it grants.

Source: distribution, docs/spec/auth/{token,oauth,jwt}.md.
"""

import base64
import json
import secrets
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from support.registry import run

SERVICE = "corral-tests"
ISSUER = "corral-tokens"


@dataclass(frozen=True, slots=True)
class Asked:
    """A request for a token."""

    method: str
    scopes: tuple[str, ...]
    user: str
    fields: Mapping[str, Sequence[str]]


@dataclass
class TokenServer:
    """users: name to password; rights: name (or "" for anybody) and repository to actions."""

    directory: Path
    users: dict[str, str] = field(default_factory=dict)
    rights: dict[tuple[str, str], set[str]] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    life_s: int = 300
    only_post: bool = False
    only_get: bool = False
    identities: dict[str, str] = field(default_factory=dict)
    """Identity tokens, and whose they are."""
    port: int = 0

    @property
    def realm(self) -> str:
        return f"http://127.0.0.1:{self.port}/token"

    @property
    def certificate(self) -> Path:
        return self.directory / "signer.crt"

    def registry_auth(self) -> dict[str, object]:
        """The section of a registry that believes in this server."""
        token = {"realm": self.realm, "service": SERVICE, "issuer": ISSUER, "rootcertbundle": str(self.certificate)}
        return {"token": token}

    def make_key(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        key = self.directory / "signer.key"
        run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=signer",
             "-keyout", key, "-out", self.certificate])  # fmt: skip

    def token(self, user: str, scopes: Sequence[str]) -> str:
        """What the user may of it, signed."""
        now = int(time.time())
        access = [grant for scope in scopes if (grant := self._grant(user, scope))]
        claims = {"iss": ISSUER, "sub": user, "aud": SERVICE, "exp": now + self.life_s, "nbf": now - 10, "iat": now,
                  "jti": secrets.token_hex(8), "access": access}  # fmt: skip
        lines = self.certificate.read_text("ascii").splitlines()
        header = {"typ": "JWT", "alg": "RS256", "x5c": ["".join(lines[1:-1])]}
        body = f"{_packed(header)}.{_packed(claims)}"
        sign = ["openssl", "dgst", "-sha256", "-sign", str(self.directory / "signer.key")]
        signature = subprocess.run(sign, input=body.encode(), capture_output=True, check=True).stdout
        return f"{body}.{_base64(signature)}"

    def _grant(self, user: str, scope: str) -> dict[str, object] | None:
        kind, name, actions = scope.split(":")
        allowed = self.rights.get((user, name), set()) | self.rights.get(("", name), set())
        granted = [action for action in actions.split(",") if action in allowed]
        return {"type": kind, "name": name, "actions": granted} if granted else None


def _packed(document: Mapping[str, object]) -> str:
    return _base64(json.dumps(document).encode())


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


class _Handler(BaseHTTPRequestHandler):
    server: "_Server"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def do_GET(self) -> None:
        tokens = self.server.tokens
        fields = parse_qs(urlsplit(self.path).query)
        scopes = [scope for text in fields.get("scope", []) for scope in text.split()]
        kind, _, encoded = self.headers.get("Authorization", "").partition(" ")
        user, _, password = base64.b64decode(encoded).decode().partition(":") if kind == "Basic" else ("", "", "")
        tokens.asked.append(Asked("GET", tuple(scopes), user, fields))
        if tokens.only_post:
            self._answer(405, {})
        elif user and tokens.users.get(user) != password:
            self._answer(401, {"details": "incorrect username or password"})
        else:
            answer: dict[str, object] = {"token": tokens.token(user, scopes), "expires_in": tokens.life_s}
            if user and fields.get("offline_token") == ["true"]:
                answer["refresh_token"] = self._identity(user)
            self._answer(200, answer)

    def do_POST(self) -> None:
        tokens = self.server.tokens
        fields = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        scopes = [scope for text in fields.get("scope", []) for scope in text.split()]
        user = self._user_of(fields)
        tokens.asked.append(Asked("POST", tuple(scopes), user, fields))
        if tokens.only_get:
            self._answer(404, {})
        elif not user or fields.get("service") != [SERVICE]:
            self._answer(401, {"error": "invalid_grant"})
        else:
            self._answer(200, {"access_token": tokens.token(user, scopes), "expires_in": tokens.life_s})

    def _user_of(self, fields: Mapping[str, Sequence[str]]) -> str:
        tokens = self.server.tokens
        if fields.get("grant_type") == ["refresh_token"]:
            return tokens.identities.get(fields["refresh_token"][0], "")
        user = fields.get("username", [""])[0]
        return user if tokens.users.get(user) == fields.get("password", [""])[0] else ""

    def _identity(self, user: str) -> str:
        identity = secrets.token_hex(16)
        self.server.tokens.identities[identity] = user
        return identity

    def _answer(self, status: int, document: Mapping[str, object]) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, tokens: TokenServer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.tokens = tokens


@contextmanager
def token_server(directory: Path) -> Iterator[TokenServer]:
    """Served within the block."""
    tokens = TokenServer(directory)
    tokens.make_key()
    server = _Server(tokens)
    tokens.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield tokens
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
