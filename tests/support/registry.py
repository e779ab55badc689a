"""Debian's docker-registry, started by tests on a loopback port: plain or with TLS, open, with htpasswd or tokens."""

import base64
import ctypes
import json
import secrets
import shutil
import socket
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

START_S = 20.0


@dataclass(frozen=True, slots=True)
class Authority:
    """A CA of the tests' own, and a certificate that it has given to 127.0.0.1 and localhost."""

    ca: Path
    certificate: Path
    key: Path

    @classmethod
    def make(cls, directory: Path) -> "Authority":
        """By openssl, with keys that are quick to make, and with no more extensions than people take care of."""
        (directory / "trusted").mkdir(parents=True)
        made = cls(directory / "trusted" / "ca.crt", directory / "server.crt", directory / "server.key")
        ca_key = directory / "ca.key"
        new = [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            "2",
        ]
        run([*new, "-subj", "/CN=corral test CA", "-keyout", ca_key, "-out", made.ca])
        names = "subjectAltName=IP:127.0.0.1,DNS:localhost"
        by = ["-CA", made.ca, "-CAkey", ca_key, "-addext", names, "-addext", "basicConstraints=critical,CA:false"]
        run([*new, *by, "-subj", "/CN=127.0.0.1", "-keyout", made.key, "-out", made.certificate])
        return made


def run(command: list[object], **options: object) -> subprocess.CompletedProcess[str]:
    """Raises AssertionError with what the program said."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    answer: subprocess.CompletedProcess[str] = done
    return answer


def htpasswd(user: str, password: str) -> str:
    """A line with bcrypt, the only hash that docker-registry takes; by the crypt(3) of the system."""
    libcrypt = ctypes.CDLL("libcrypt.so.1")
    libcrypt.crypt.restype = ctypes.c_char_p
    salt = "".join(secrets.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(21)) + "e"
    hashed: bytes = libcrypt.crypt(password.encode(), f"$2b$05${salt}".encode())
    return f"{user}:{hashed.decode()}\n"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Registry:
    """Runs within `running`."""

    directory: Path
    port: int
    authority: Authority | None = None
    credentials: tuple[str, str] | None = None

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def storage(self) -> Path:
        return self.directory / "storage"

    def request(
        self, method: str, path: str, headers: Mapping[str, str] | None = None, data: bytes | None = None
    ) -> tuple[Mapping[str, str], bytes]:
        """Ask it, as the test itself. Raises urllib.error.HTTPError."""
        scheme = "https" if self.authority else "http"
        url = f"{scheme}://{self.host}/v2/{path}"
        request = urllib.request.Request(url, data, dict(headers or {}), method=method)
        if self.credentials:
            pair = base64.b64encode(":".join(self.credentials).encode()).decode()
            request.add_header("Authorization", f"Basic {pair}")
        context = ssl.create_default_context(cafile=str(self.authority.ca)) if self.authority else None
        if context is not None:
            context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        with urllib.request.urlopen(request, context=context, timeout=30) as answer:
            return dict(answer.headers), answer.read()

    def digest(self, name: str, tag: str) -> str:
        """What a tag points at."""
        accept = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json,"
        accept += " application/vnd.docker.distribution.manifest.v2+json,"
        accept += " application/vnd.docker.distribution.manifest.list.v2+json"
        headers, _ = self.request("HEAD", f"{name}/manifests/{tag}", {"Accept": accept})
        return {key.lower(): value for key, value in headers.items()}["docker-content-digest"]

    def tags(self, name: str) -> list[str]:
        _, body = self.request("GET", f"{name}/tags/list")
        return json.loads(body)["tags"] or []

    def log(self) -> str:
        return (self.directory / "registry.log").read_text("utf-8", "replace")


@contextmanager
def running(
    directory: Path,
    *,
    authority: Authority | None = None,
    credentials: tuple[str, str] | None = None,
    auth: Mapping[str, object] | None = None,
    more: Mapping[str, object] | None = None,
) -> Iterator[Registry]:
    """A registry with its storage in `directory`. credentials: by htpasswd. auth: another section of its settings."""
    directory.mkdir(parents=True, exist_ok=True)
    registry = Registry(directory, free_port(), authority, credentials)
    http: dict[str, object] = {"addr": registry.host, "secret": "corral"}
    if authority:
        http["tls"] = {"certificate": str(authority.certificate), "key": str(authority.key)}
    settings: dict[str, object] = {
        "version": 0.1,
        "log": {"level": "info"},
        "storage": {"filesystem": {"rootdirectory": str(registry.storage)}, "delete": {"enabled": True}},
        "http": http,
        **(more or {}),
    }
    if credentials:
        (directory / "htpasswd").write_text(htpasswd(*credentials))
        settings["auth"] = {"htpasswd": {"realm": "corral", "path": str(directory / "htpasswd")}}
    if auth:
        settings["auth"] = auth
    (directory / "config.yml").write_text(json.dumps(settings))  # JSON is YAML
    with (directory / "registry.log").open("ab") as log:
        process = subprocess.Popen(
            ["docker-registry", "serve", str(directory / "config.yml")],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        _await(registry, process)
        yield registry
    finally:
        process.kill()
        process.wait()


def _await(registry: Registry, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", registry.port), timeout=1).close()
            return
        except OSError:
            assert process.poll() is None, registry.log()
            assert time.monotonic() < deadline, registry.log()
            time.sleep(0.02)


def write_hosts(certs: Path, domain: str, text: str) -> Path:
    """certs.d/<domain>/hosts.toml."""
    directory = certs / domain
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "hosts.toml").write_text(text)
    return directory


def skopeo(*words: object) -> str:
    """What it prints."""
    return run(["skopeo", *words]).stdout


@contextmanager
def podman(directory: Path) -> Iterator[list[str]]:
    """A podman with a root of its own, as the beginning of a command."""
    directory.mkdir(parents=True, exist_ok=True)
    policy = directory / "policy.json"
    policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
    command = [
        "podman", "--root", str(directory / "root"), "--runroot", str(directory / "run"),
        "--tmpdir", str(directory / "tmp"), "--storage-driver", "vfs", "--cgroup-manager", "cgroupfs",
    ]  # fmt: skip
    try:
        yield command
    finally:
        subprocess.run([*command, "system", "reset", "--force"], capture_output=True, check=False)
        shutil.rmtree(directory, ignore_errors=True)
