"""One endpoint as it is spoken to: with its TLS, its headers and our authorization."""

import ssl
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlencode, urlsplit, urlunsplit

from corral.images.registry.auth import Authorizer
from corral.images.registry.backoff import retry_after_s
from corral.images.registry.challenge import parse_challenges
from corral.images.registry.credentials import ANONYMOUS, Credentials
from corral.images.registry.endpoints import Endpoint
from corral.images.registry.errors import MAX_ERROR_BYTES, Refused, Untrusted, parse_answer
from corral.images.registry.http import Body, Call, Http, Reply, origin, shown
from corral.images.registry.tls import make_context
from corral.rpc.blocking import run_blocking

MAX_CHALLENGES = 2  # the first of all, and one for a token that is over or lacks a scope


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of a host. `path` is below the API's; a whole address where the host itself gave it."""

    method: str
    path: str
    scopes: Sequence[str] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    expect: Collection[int] = (200,)
    body: bytes | Body | None = field(default=None, repr=False)
    body_bytes: int = 0


class Host:
    """For one pull or push."""

    def __init__(self, http: Http, endpoint: Endpoint, credentials: Credentials, *, offline: bool = False) -> None:
        self.endpoint = endpoint
        self.authorizer = Authorizer(http, endpoint, credentials, offline=offline)
        self.failures = 0
        self._http = http
        self._tls: ssl.SSLContext | None = None

    def stranger(self, url: str) -> "Host":
        """The host of an address that anybody may have written, who gets nothing of ours.

        Raises Untrusted for what is none.
        """
        scheme, name, _ = origin(url)
        if scheme not in ("http", "https") or not name:
            raise Untrusted(f"{shown(url)} is no address of the web")
        endpoint = Endpoint(f"{scheme}://{urlsplit(url).netloc.rpartition('@')[2]}", is_registry=False)
        return Host(self._http, endpoint, ANONYMOUS)

    async def ask(self, request: Request) -> Reply:
        """The answer, if its status is one that was hoped for. Raises Trouble, FailedPrecondition."""
        tls = await self._context()
        url = self._url(request.path)
        for _ in range(MAX_CHALLENGES + 1):
            call = await self._call(request, url, tls)
            reply = await self._http.request(call, tls)
            if reply.status in request.expect:
                return reply
            wait = retry_after_s(reply.headers.get("Retry-After"))
            problem = Refused(shown(reply.url), parse_answer(reply.status, await reply.read(MAX_ERROR_BYTES), wait))
            challenges = parse_challenges(reply.all("WWW-Authenticate"))
            used = call.secret.get("Authorization", "")
            if reply.status != 401 or not self.authorizer.heed(challenges, request.scopes, used):
                break
        raise problem

    async def _call(self, request: Request, url: str, tls: ssl.SSLContext) -> Call:
        """A host that names another one for an upload has signed that address; it gets no authorization of ours."""
        secret: dict[str, str] = {}
        if origin(url) == origin(self.endpoint.base):
            secret = _as_one(self.endpoint.headers) | await self.authorizer.header(request.scopes, tls)
        return Call(
            request.method,
            url,
            request.headers,
            secret,
            request.body,
            request.body_bytes,
            body_may_move=True,
            connect_s=self.endpoint.connect_s,
        )

    def _url(self, path: str) -> str:
        url = self._secured(path) if "://" in path else f"{self.endpoint.base}/{path}"
        if not self.endpoint.mirror_of:
            return url
        return f"{url}{'&' if '?' in url else '?'}{urlencode({'ns': self.endpoint.mirror_of})}"

    def _secured(self, url: str) -> str:
        """An address that the host gave, say for an upload. Behind a proxy many do not know that they speak TLS.

        Raises Untrusted if it leads an encrypted registry's client to another host in the clear.
        """
        base, parts = urlsplit(self.endpoint.base), urlsplit(url)
        if (base.scheme, parts.scheme) != ("https", "http"):
            return url
        if parts.hostname != base.hostname or parts.port not in (None, 80, base.port):
            raise Untrusted(f"{self.endpoint.authority} wants to be talked to at {shown(url)}, which is not encrypted")
        return urlunsplit(("https", base.netloc, *parts[2:]))

    async def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = await run_blocking(make_context, self.endpoint.tls)
        return self._tls


def _as_one(headers: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Several of one name as a list. Source: RFC 9110 section 5.3."""
    found: dict[str, str] = {}
    for name, value in headers:
        found[name] = f"{found[name]}, {value}" if name in found else value
    return found
