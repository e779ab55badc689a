"""HTTP, the only place that knows its library. aiohttp is imported when the first pull or push makes a session.

Redirects are followed by rules of our own. What identifies the caller goes to the host that was asked and to no other;
from https there is no way back to http; a body goes nowhere else unless its sender says that it may.
"""

import os
import re
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

from corral.images.registry.endpoints import is_loopback
from corral.images.registry.errors import CannotConnect, Interrupted, Trouble, Untrusted

if TYPE_CHECKING:
    import aiohttp

CONNECT_S = 15.0
SILENCE_S = 60.0
MAX_REDIRECTS = 10
BUFFER_BYTES = 256 << 10
USER_AGENT = "corral"

_NUMBER = re.compile(r"[0-9]{1,19}")
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_NEXT = re.compile(r'<([^>]*)>\s*;[^,]*\brel="?next"?')
_KEEPING_THE_METHOD = frozenset({307, 308})

# A body that is made anew each time it is sent.
type Body = Callable[[], AsyncIterator[bytes]]


@dataclass(frozen=True, slots=True)
class Call:
    """One request. `secret` headers are for the origin of `url` alone."""

    method: str
    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    secret: Mapping[str, str] = field(default_factory=dict, repr=False)
    body: bytes | Body | None = field(default=None, repr=False)
    body_bytes: int = 0  # of a Body
    body_may_move: bool = False  # to another origin, by a redirect
    connect_s: float = CONNECT_S


class Reply:
    """An answer whose body is read as it comes. Read it, or close() it."""

    def __init__(self, response: "aiohttp.ClientResponse", url: str) -> None:
        self._response = response
        self.status = response.status
        self.headers: Mapping[str, str] = response.headers
        self.url = url

    def all(self, header: str) -> list[str]:
        """Every header of that name."""
        return self._response.headers.getall(header, [])

    @property
    def next_page(self) -> str:
        """Where a list goes on; empty at its end. Source: RFC 8288; distribution-spec "Listing Tags"."""
        match = _NEXT.search(self.headers.get("Link", ""))
        return urljoin(self.url, match[1]) if match else ""

    async def read(self, max_bytes: int) -> bytes:
        """The body, but at most max_bytes + 1 of it. Raises Interrupted."""
        pieces: list[bytes] = []
        size = 0
        try:
            async for piece in self.pieces():
                pieces.append(piece)
                size += len(piece)
                if size > max_bytes:
                    break
        finally:
            self.close()
        return b"".join(pieces)[: max_bytes + 1]

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it arrives. Raises Interrupted."""
        with _translated(self.url):
            async for piece in self._response.content.iter_any():
                yield piece

    def close(self) -> None:
        """Give the connection back if the body was read, else end it."""
        if self._response.content.at_eof():
            self._response.release()
        else:
            self._response.close()


class Http:
    """The connections of all pulls and pushes."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def request(self, call: Call, tls: ssl.SSLContext) -> Reply:
        """Send it, and follow where the answer leads. Raises Trouble."""
        url, method, body, start = call.url, call.method, call.body, origin(call.url)
        for _ in range(MAX_REDIRECTS):
            secret = call.secret if origin(url) == start else {}
            reply = await self._send(method, url, {**call.headers, **secret}, body, call, tls)
            location = reply.headers.get("Location")
            if reply.status not in _REDIRECTS or location is None:
                return reply
            reply.close()
            url = _followed(url, location)
            if reply.status not in _KEEPING_THE_METHOD and method not in ("GET", "HEAD"):
                method, body = "GET", None
            if body is not None and origin(url) != start and not call.body_may_move:
                raise Untrusted(f"{shown(call.url)} sends what is meant for it on to another host, {shown(url)}")
        raise Untrusted(f"{shown(call.url)} redirects more than {MAX_REDIRECTS} times")

    async def _send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes | Body | None,
        call: Call,
        tls: ssl.SSLContext,
    ) -> Reply:
        import aiohttp
        from yarl import URL

        if callable(body):
            headers = {**headers, "Content-Length": str(call.body_bytes)}
        with _translated(url):
            response = await self._opened().request(
                method,
                URL(url, encoded=True),
                headers=headers,
                data=body() if callable(body) else body,
                ssl=tls,
                allow_redirects=False,
                proxy=proxy_for(url),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=call.connect_s, sock_read=SILENCE_S),
            )
        return Reply(response, url)

    def _opened(self) -> "aiohttp.ClientSession":
        """Without cookies, decoding and credentials from files: bytes are hashed as they are sent."""
        if self._session is None:
            import aiohttp

            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                trust_env=False,
                read_bufsize=BUFFER_BYTES,
                headers={"User-Agent": USER_AGENT, "Accept-Encoding": "identity"},
            )
        return self._session


@contextmanager
def _translated(url: str) -> Iterator[None]:
    """The library's errors as ours, in words that hold neither credentials nor queries."""
    try:
        yield
    except (Trouble, GeneratorExit):
        raise
    except Exception as e:
        problem = _problem(e, shown(url))
        if problem is None:
            raise
        raise problem from e


def _problem(e: Exception, where: str) -> Trouble | None:
    import aiohttp

    match e:
        case aiohttp.ClientConnectorCertificateError():
            why = getattr(e.certificate_error, "verify_message", "") or "it is not valid"
            return CannotConnect(where, f"its certificate is not trusted, {why}", is_tls=True)
        case aiohttp.ClientConnectorSSLError():
            return CannotConnect(where, "it does not speak TLS as it should", is_tls=True)
        case aiohttp.ClientConnectorDNSError():
            return CannotConnect(where, "the name cannot be resolved")
        case aiohttp.ConnectionTimeoutError():
            return CannotConnect(where, "it does not answer")
        case aiohttp.ClientConnectorError():
            return CannotConnect(where, _said(e.os_error))
        case TimeoutError():
            return Interrupted(where, "it went silent")
        case aiohttp.InvalidURL():
            return Untrusted(f"{where} is no address")
        case aiohttp.ClientError() | OSError():
            return Interrupted(where, _said(e) if isinstance(e, OSError) else "the connection broke")
    return None


def _said(e: OSError) -> str:
    """asyncio has its own words for some, with addresses in them."""
    return os.strerror(e.errno) if e.errno else e.strerror or "the connection broke"


def origin(url: str) -> tuple[str, str, int | None]:
    """What two addresses share that are the same to a stranger. Source: RFC 6454 section 4."""
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or {"https": 443, "http": 80}.get(parts.scheme)


def _followed(url: str, location: str) -> str:
    """Where a redirect leads. Raises Untrusted."""
    try:
        target = urljoin(url, location)
        _, host, _ = origin(target)
    except ValueError as e:
        raise Untrusted(f"{shown(url)} redirects to what is no address") from e
    scheme = urlsplit(target).scheme
    if scheme not in ("http", "https") or not host:
        raise Untrusted(f"{shown(url)} redirects to {shown(target)}, which is no address of the web")
    if urlsplit(url).scheme == "https" and scheme != "https":
        raise Untrusted(f"{shown(url)} redirects to {shown(target)}, which is not encrypted")
    return target


def shown(url: str) -> str:
    """The address without user, password, query and fragment, which may be secrets."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"[:300]


def number(header: str | None) -> int | None:
    """A header's whole number; None where there is none. Source: RFC 9110 section 8.6, digits of ASCII."""
    match = _NUMBER.fullmatch((header or "").strip())
    return int(match[0]) if match else None


def proxy_for(url: str) -> str | None:
    """By $HTTPS_PROXY, $HTTP_PROXY and $NO_PROXY, as every other program of the host.

    Source: Go, golang.org/x/net/http/httpproxy: never for this host itself; $NO_PROXY has networks, too.
    """
    from urllib.request import getproxies_environment, proxy_bypass

    parts = urlsplit(url)
    proxies = getproxies_environment()
    proxy = proxies.get(parts.scheme)
    if not proxy or is_loopback(parts.netloc) or _is_within(parts.hostname or "", proxies.get("no", "")):
        return None
    return None if proxy_bypass(parts.netloc) else proxy


def _is_within(host: str, networks: str) -> bool:
    """Whether the host is an address of one of them; other words among them do not matter."""
    with suppress(ValueError):
        address = ip_address(host)
        for word in networks.split(","):
            with suppress(ValueError):
                if address in ip_network(word.strip(), strict=False):
                    return True
    return False
