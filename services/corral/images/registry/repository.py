"""A repository of a registry, behind all the hosts that may have it.

A host that fails is left for the next one; when none is left, those that may do better later are asked again after a
while.
"""

import asyncio
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from corral.images.digest import Digest, digest_of, is_digest
from corral.images.holdings import Document, is_foreign
from corral.images.model import INDEXES, MANIFESTS, MAX_MANIFEST_BYTES, Descriptor
from corral.images.reference import Reference
from corral.images.registry import backoff
from corral.images.registry.auth import repository_scope
from corral.images.registry.credentials import Credentials
from corral.images.registry.endpoints import Capability, endpoints
from corral.images.registry.errors import About, CannotConnect, Refused, Trouble, Untrusted, explained
from corral.images.registry.host import Host, Request
from corral.images.registry.http import Http, Reply, number, origin, shown
from corral.rpc.blocking import run_blocking
from corral.rpc.errors import CorralError, FailedPrecondition, NotFound

ACCEPT = ", ".join((*sorted(MANIFESTS), *sorted(INDEXES), "*/*;q=0.5"))
CONNECT_ATTEMPTS = 2
MAX_STREAMS = 6
MAX_URLS = 4
"""Of a layer, that are asked: each takes its time."""
_NO_SUCH_METHOD = frozenset({405, 501})
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/(?:[0-9]+|\*)")

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class BlobStream:
    """Bytes of a blob from `start` on; `is_whole` when the host took no notice of the range."""

    reply: Reply
    host: Host
    start: int
    is_whole: bool


class _AllFailed(Exception):
    """Each host, and what was wrong."""

    def __init__(self, problems: Sequence[tuple[Host, Trouble]]) -> None:
        super().__init__("; ".join(str(e) for _, e in problems))
        self.problems = problems


async def open_repository(
    http: Http, certs: Path, reference: Reference, credentials: Credentials, *, insecure: bool
) -> "Repository":
    """Raises FailedPrecondition for settings that are wrong."""
    found = await run_blocking(lambda: endpoints(certs, reference.domain, insecure=insecure))
    return Repository([Host(http, endpoint, credentials) for endpoint in found], reference)


class Repository:
    """For one pull or push; downloads that others have come to share may use it for longer."""

    def __init__(self, hosts: Sequence[Host], reference: Reference) -> None:
        self._hosts = list(hosts)
        self.reference = reference
        self.path = reference.path
        # By the address that they are for.
        self._strangers: dict[str, Host] = {}
        # Connections that bring content, of all blobs together.
        self.streams = asyncio.Semaphore(MAX_STREAMS)

    # Asking

    async def first[T](
        self, capability: Capability, attempt: Callable[[Host], Awaitable[T]], what: str, *, patient: bool = True
    ) -> T:
        """What the first host gives that can. Raises the error for the user."""
        failures = 0
        while True:
            try:
                return await self._round(capability, attempt)
            except _AllFailed as e:
                failures += 1
                wait = _pause_s(e.problems, failures) if patient else None
                if wait is None:
                    raise self._verdict(e.problems, what) from e
            await asyncio.sleep(wait)

    async def _round[T](self, capability: Capability, attempt: Callable[[Host], Awaitable[T]]) -> T:
        """Every host once, those that have failed least first. Raises _AllFailed."""
        problems: list[tuple[Host, Trouble]] = []
        for host in sorted(self._able(capability), key=lambda host: host.failures):
            try:
                return await attempt(host)
            except Trouble as e:
                problems.append((host, e))
                if not isinstance(e, Refused) or e.is_passing:
                    host.failures += 1
                if not _was_to_be_expected(host, e):
                    log.info("images.registry_failed", host=host.endpoint.authority, error=str(e))
        raise _AllFailed(problems)

    def _able(self, capability: Capability) -> list[Host]:
        return [host for host in self._hosts if capability in host.endpoint.capabilities]

    def distrust(self, hosts: Collection[Host]) -> bool:
        """Ask others for content first. Whether there are no others that have not failed yet."""
        for host in hosts:
            host.failures += 1
        return all(host.failures for host in self._able(Capability.PULL))

    def _verdict(self, problems: Sequence[tuple[Host, Trouble]], what: str) -> CorralError:
        """The registry's own answer counts, and of several of its addresses the one that did answer."""
        if not problems:
            return FailedPrecondition(
                f"no host of registry {self.reference.domain} is there for {what}: see its hosts.toml"
            )
        ranked = sorted(problems, key=lambda p: (p[0].endpoint.is_registry, not isinstance(p[1], CannotConnect)))
        return self.explained(ranked[-1][1], what)

    def explained(self, trouble: Trouble, what: str) -> CorralError:
        """The error for the user."""
        return explained(trouble, About(what, self.reference.domain))

    # Manifests

    async def resolve(self, name: str) -> Descriptor | None:
        """What a tag points at, without fetching it; None where hosts do not say. Raises NotFound and the like."""

        async def attempt(host: Host) -> Descriptor | None:
            reply = await host.ask(self._manifest_request("HEAD", name, expect=(200, *_NO_SUCH_METHOD)))
            reply.close()
            if reply.status != 200:
                return None
            digest = reply.headers.get("Docker-Content-Digest", "")
            size = number(reply.headers.get("Content-Length"))
            if not is_digest(digest) or size is None:
                return None
            return Descriptor(_media_type(reply), Digest(digest), size)

        return await self.first(Capability.RESOLVE, attempt, self._image(name))

    async def manifest(self, name: str, expected: Descriptor | None = None) -> Document:
        """A manifest by tag or digest, proven where its digest is known beforehand."""
        capability = Capability.PULL if is_digest(name) else Capability.RESOLVE

        async def attempt(host: Host) -> Document:
            reply = await host.ask(self._manifest_request("GET", name))
            data = await reply.read(MAX_MANIFEST_BYTES)
            return await run_blocking(_proven, reply, data, name, expected, host)

        return await self.first(capability, attempt, self._image(name))

    async def put_manifest(self, document: Document, name: str) -> bool:
        """Store a manifest or index under a tag or its digest. Raises the error for the user.

        Whether the registry has taken note of its subject. Source: distribution-spec "Pushing Manifests with Subject".
        """
        descriptor = document.descriptor
        scopes = (repository_scope(self.path, "pull", "push"),)
        headers = {"Content-Type": descriptor.media_type}

        async def attempt(host: Host) -> bool:
            path = f"{self.path}/manifests/{name}"
            reply = await host.ask(Request("PUT", path, scopes, headers, (200, 201, 202), document.data))
            reply.close()
            said = reply.headers.get("Docker-Content-Digest", "")
            if is_digest(said) and said != digest_of(document.data, said):
                where = host.endpoint.authority
                raise Untrusted(f"{where} stored the manifest as {said} instead of {descriptor.digest}")
            return "OCI-Subject" in reply.headers

        return await self.first(Capability.PUSH, attempt, self._image(name))

    async def settled(self) -> "Repository":
        """The same behind the one host that takes pushes and answers: an upload is one host's. Raises for the user."""

        async def attempt(host: Host) -> Host:
            reply = await host.ask(Request("GET", "", (repository_scope(self.path, "pull", "push"),)))
            reply.close()
            return host

        return Repository([await self.first(Capability.PUSH, attempt, f"repository {self.path}")], self.reference)

    def _manifest_request(self, method: str, name: str, *, expect: Collection[int] = (200,)) -> Request:
        return Request(method, f"{self.path}/manifests/{name}", self.pulling, {"Accept": ACCEPT}, expect)

    def _image(self, name: str) -> str:
        return f"image {self.reference.familiar_repository}{'@' if is_digest(name) else ':'}{name}"

    @property
    def pulling(self) -> Sequence[str]:
        return (repository_scope(self.path, "pull"),)

    # Blobs

    async def open_blob(self, descriptor: Descriptor, start: int = 0, end: int = 0) -> BlobStream:
        """The blob from `start` to `end` (0: its end), as a stream that is to be read.

        What registries may not pass on is where its descriptor says.
        """

        async def attempt(host: Host) -> BlobStream:
            return await _opened(host, f"{self.path}/blobs/{descriptor.digest}", self.pulling, descriptor, start, end)

        try:
            return await self.first(Capability.PULL, attempt, f"blob {descriptor.digest}")
        except NotFound:
            if (stream := await self.elsewhere(descriptor, start, end)) is None:
                raise
            return stream

    async def elsewhere(self, descriptor: Descriptor, start: int, end: int) -> BlobStream | None:
        """The first that answers, of a layer that is not for registries. Source: image-spec descriptor.md "urls"."""
        if not is_foreign(descriptor):
            return None
        registry_is_near = any(host.endpoint.is_registry and is_near(host.endpoint.base) for host in self._hosts)
        for url in descriptor.urls[:MAX_URLS]:
            if is_near(url) and not registry_is_near:
                log.info("images.url_refused", digest=descriptor.digest, url=shown(url))
                continue
            try:
                if url not in self._strangers:
                    self._strangers[url] = self._hosts[0].stranger(url)
                return await _opened(self._strangers[url], url, (), descriptor, start, end)
            except (Trouble, ValueError) as e:
                log.info("images.url_failed", digest=descriptor.digest, error=str(e))
        return None

    async def small_blob(self, descriptor: Descriptor, max_bytes: int) -> bytes:
        """A whole blob that is kept in memory, proven."""

        async def attempt(host: Host) -> bytes:
            reply = await host.ask(Request("GET", f"{self.path}/blobs/{descriptor.digest}", self.pulling))
            data = await reply.read(max_bytes)
            if digest_of(data, descriptor.digest) != descriptor.digest or len(data) != descriptor.size_bytes:
                raise Untrusted(f"{host.endpoint.authority} gave something else for blob {descriptor.digest}")
            return data

        return await self.first(Capability.PULL, attempt, f"blob {descriptor.digest}")


def is_near(url: str) -> bool:
    """Whether it is an address of this host or its link, where a stranger's words must not make us ask.

    By what it says alone: a name may lead there too, as a redirect may. "localhost" is such by RFC 6761 section 6.3.
    """
    try:
        name = origin(url)[1].rstrip(".")
        if name == "localhost" or name.endswith(".localhost"):
            return True
        address = _address(name)
    except (ValueError, OSError):
        return False
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_link_local or address.is_unspecified


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """What getaddrinfo(3) takes as one: 127.1 too, as inet_aton(3) has it. Raises ValueError, OSError."""
    return ipaddress.ip_address(name) if ":" in name else ipaddress.IPv4Address(socket.inet_aton(name))


def _was_to_be_expected(host: Host, e: Trouble) -> bool:
    """Of a host that is tried with TLS only in case it has any."""
    return isinstance(e, CannotConnect) and e.is_tls and host.endpoint.tls.skip_verify


def _pause_s(problems: Sequence[tuple[Host, Trouble]], failures: int) -> float | None:
    """How long to wait before all are asked again; None if there is no use: the registry itself has answered, say."""
    if any(isinstance(e, Refused) and not e.is_passing and host.endpoint.is_registry for host, e in problems):
        return None
    passing = [e for _, e in problems if not isinstance(e, Untrusted) and (not isinstance(e, Refused) or e.is_passing)]
    attempts = CONNECT_ATTEMPTS if all(isinstance(e, CannotConnect) for e in passing) else backoff.ATTEMPTS
    if not passing or failures >= attempts:
        return None
    told = [e.answer.retry_after_s for e in passing if isinstance(e, Refused) and e.answer.retry_after_s is not None]
    if not told:
        return backoff.delay_s(failures)
    wait = min(told) + backoff.delay_s(1)
    return wait if min(told) <= backoff.PATIENCE_S else None


def _media_type(reply: Reply) -> str:
    """Only if it says anything: what matters is in the document."""
    media_type = reply.headers.get("Content-Type", "").partition(";")[0].strip()
    return media_type if media_type in MANIFESTS | INDEXES else ""


def _proven(reply: Reply, data: bytes, name: str, expected: Descriptor | None, host: Host) -> Document:
    """Raises Untrusted, so that another host is asked, or InvalidArgument where no other can do better."""
    where = f"{host.endpoint.authority} gave a manifest"
    if len(data) > MAX_MANIFEST_BYTES:
        raise Untrusted(f"{where} of more than {MAX_MANIFEST_BYTES >> 20} MiB")
    said = reply.headers.get("Docker-Content-Digest", "")
    promised = [word for word in (expected.digest if expected else "", name, said) if is_digest(word)]
    for wanted in promised:
        if (found := digest_of(data, wanted)) != wanted:
            raise Untrusted(f"{where} with the digest {found} instead of {wanted}")
    digest = digest_of(data, *promised[:1])
    if expected is None and not data.lstrip().startswith((b"{", b"[")):
        raise Untrusted(f"{where} that is none, {reply.headers.get('Content-Type', '')[:80]!r}: a proxy's page perhaps")
    if expected is not None and expected.size_bytes != len(data):
        raise Untrusted(f"{where} of {len(data)} bytes instead of {expected.size_bytes}")
    media_type = (expected.media_type if expected else "") or _media_type(reply)
    return Document(Descriptor(media_type, digest, len(data)), data)


async def _opened(
    host: Host, path: str, scopes: Sequence[str], descriptor: Descriptor, start: int, end: int
) -> BlobStream:
    """A host that takes no ranges, and says so, is asked for the whole. Raises Trouble."""
    last = (end or descriptor.size_bytes) - 1
    whole = Request("GET", path, scopes)
    part = Request("GET", path, scopes, {"Range": f"bytes={start}-{last}"}, (200, 206, 416))
    reply = await host.ask(whole if (start, last) == (0, descriptor.size_bytes - 1) else part)
    if reply.status == 416:
        reply.close()
        reply = await host.ask(whole)
    try:
        return _stream(reply, host, descriptor, start)
    except BaseException:
        reply.close()
        raise


def _stream(reply: Reply, host: Host, descriptor: Descriptor, start: int) -> BlobStream:
    """Raises Untrusted if the answer does not begin where it should, or is not as long as it should be."""
    length = number(reply.headers.get("Content-Length"))
    if reply.status == 206:
        match = _CONTENT_RANGE.match(reply.headers.get("Content-Range", ""))
        if match is None or int(match[1]) != start:
            raise Untrusted(
                f"{host.endpoint.authority} gave another part of blob {descriptor.digest} than was asked for"
            )
        return BlobStream(reply, host, start, is_whole=False)
    if length not in (None, descriptor.size_bytes):
        where = host.endpoint.authority
        raise Untrusted(f"{where} has {length} bytes of blob {descriptor.digest} instead of {descriptor.size_bytes}")
    return BlobStream(reply, host, 0, is_whole=True)
