"""Who we are to a registry: basic credentials, or tokens that another server gives for them.

    registry  401, WWW-Authenticate: Bearer realm=…, service=…
    realm     GET with basic credentials, or POST with an identity token  ->  a token for a scope, and how long it lasts
    registry  the request again, Authorization: Bearer <token>

Everything here lives as long as one pull or push. Nothing of it is written down or logged.
Source: distribution, docs/spec/auth/{token,oauth,scope}.md.
"""

import asyncio
import json
import ssl
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlencode, urlsplit, urlunsplit

from corral.images.registry.backoff import retry_after_s
from corral.images.registry.challenge import Challenge
from corral.images.registry.credentials import ANONYMOUS, Credentials
from corral.images.registry.endpoints import Endpoint
from corral.images.registry.errors import MAX_ERROR_BYTES, Refused, Untrusted, parse_answer
from corral.images.registry.http import Call, Http, shown

CLIENT_ID = "corral"
MAX_TOKEN_BYTES = 1 << 20
LEAST_LIFE_S = 60.0  # "tokens should never be returned with less than 60 seconds to live"
MARGIN = 0.1  # of its life, before whose end a token is not used any more
# Who does not know POST says so in many ways: see containerd's and docker's own experience.
_NO_SUCH_METHOD = frozenset({400, 401, 404, 405})


@dataclass(frozen=True, slots=True)
class Token:
    value: str = field(repr=False)
    until: float  # of time.monotonic()
    refresh: str = field(default="", repr=False)


def repository_scope(path: str, *actions: str) -> str:
    return f"repository:{path}:{','.join(actions)}"


def joined_scopes(scopes: Iterable[str]) -> str:
    """The same rights, each resource once. Source: distribution, docs/spec/auth/scope.md."""
    resources: dict[str, list[str]] = {}
    for scope in scopes:
        resource, _, actions = scope.rpartition(":")
        known = resources.setdefault(resource, [])
        known += [action for action in actions.split(",") if action not in known]
    return " ".join(f"{resource}:{','.join(actions)}" for resource, actions in resources.items())


class Authorizer:
    """For one endpoint."""

    def __init__(self, http: Http, endpoint: Endpoint, credentials: Credentials, *, offline: bool = False) -> None:
        """offline: ask for an identity token too, as a login does."""
        self._http = http
        self._endpoint = endpoint
        self._credentials = credentials if endpoint.is_registry else ANONYMOUS
        self._offline = offline
        self._is_basic = False
        self._bearer: Mapping[str, str] | None = None
        self._tokens: dict[str, Token] = {}
        # What the registry wants beside what is asked for: a mirror may have content under names of its own.
        self._demanded: dict[str, str] = {}
        self._lock = asyncio.Lock()

    @property
    def identity_token(self) -> str:
        """What the realm gave for the password."""
        return next((token.refresh for token in self._tokens.values() if token.refresh), "")

    async def header(self, scopes: Sequence[str], tls: ssl.SSLContext) -> dict[str, str]:
        """The Authorization header by what is known so far; none before the first challenge. Raises Trouble."""
        if self._credentials.registry_token:
            return {"Authorization": f"Bearer {self._credentials.registry_token}"}
        if self._is_basic:
            return {"Authorization": self._credentials.basic}
        if self._bearer is None:
            return {}
        token = await self._token(scopes, tls)
        return {"Authorization": f"Bearer {token.value}"}

    def heed(self, challenges: Sequence[Challenge], scopes: Sequence[str], used: str) -> bool:
        """Whether a request that was sent with the header `used` and met these challenges is worth another try."""
        known = {challenge.scheme: challenge.parameters for challenge in challenges}
        if self._credentials.registry_token:
            return False
        if "bearer" in known and known["bearer"].get("realm"):
            self._bearer, self._is_basic = known["bearer"], False
            key = " ".join(scopes)
            self._demanded[key] = known["bearer"].get("scope", "")
            if (token := self._tokens.get(key)) is not None and used == f"Bearer {token.value}":
                del self._tokens[key]
            return True
        if "basic" in known and self._credentials.username and used != self._credentials.basic:
            self._is_basic = True
            return True
        return False

    async def _token(self, scopes: Sequence[str], tls: ssl.SSLContext) -> Token:
        key = " ".join(scopes)
        async with self._lock:
            token = self._tokens.get(key)
            if token is None or token.until <= time.monotonic():
                scope = joined_scopes((*scopes, *self._demanded.get(key, "").split()))
                token = self._tokens[key] = await self._fetch(scope, tls)
            return token

    async def _fetch(self, scope: str, tls: ssl.SSLContext) -> Token:
        assert self._bearer is not None
        realm, service = self._bearer["realm"], self._bearer.get("service", "")
        self._check_realm(realm)
        if self._credentials.identity_token:
            form = {"grant_type": "refresh_token", "refresh_token": self._credentials.identity_token}
            return await self._post(realm, service, scope, form, tls)
        try:
            return await self._get(realm, service, scope, tls)
        except Refused as e:
            if e.status not in _NO_SUCH_METHOD or not self._credentials.username:
                raise
            form = {
                "grant_type": "password",
                "username": self._credentials.username,
                "password": self._credentials.password,
            }
            try:
                return await self._post(realm, service, scope, form, tls)
            except Refused:
                raise e from None

    def _check_realm(self, realm: str) -> None:
        """Credentials go where the registry says; but not in the clear if the registry itself is encrypted."""
        scheme = urlsplit(realm).scheme
        if scheme not in ("http", "https") or (scheme == "http" and self._endpoint.base.startswith("https:")):
            raise Untrusted(f"{shown(self._endpoint.base)} wants credentials sent to {shown(realm)}, unencrypted")

    async def _get(self, realm: str, service: str, scope: str, tls: ssl.SSLContext) -> Token:
        query = [("service", service)] if service else []
        query += [("scope", part) for part in scope.split()]
        if self._credentials.username:
            query.append(("account", self._credentials.username))
        if self._offline:
            query += [("offline_token", "true"), ("client_id", CLIENT_ID)]
        parts = urlsplit(realm)
        joined = "&".join(text for text in (parts.query, urlencode(query)) if text)
        secret = {"Authorization": self._credentials.basic} if self._credentials.username else {}
        return await self._ask(Call("GET", urlunsplit((*parts[:3], joined, "")), secret=secret), tls)

    async def _post(self, realm: str, service: str, scope: str, form: Mapping[str, str], tls: ssl.SSLContext) -> Token:
        fields = {**form, "service": service, "client_id": CLIENT_ID, "scope": scope}
        if self._offline:
            fields["access_type"] = "offline"
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        return await self._ask(Call("POST", realm, headers, body=urlencode(fields).encode()), tls)

    async def _ask(self, call: Call, tls: ssl.SSLContext) -> Token:
        asked = time.monotonic()
        reply = await self._http.request(call, tls)
        if reply.status != 200:
            wait = retry_after_s(reply.headers.get("Retry-After"))
            body = await reply.read(MAX_ERROR_BYTES)
            raise Refused(shown(call.url), parse_answer(reply.status, body, wait))
        return _parse_token(await reply.read(MAX_TOKEN_BYTES), asked, shown(call.url))


def _parse_token(body: bytes, asked: float, where: str) -> Token:
    try:
        document = json.loads(body)
        value = document.get("token") or document.get("access_token")
        life_s = max(float(document.get("expires_in") or 0), LEAST_LIFE_S)
        refresh = document.get("refresh_token") or ""
    except (ValueError, TypeError, AttributeError, RecursionError) as e:
        raise Untrusted(f"{where} gave no token that can be read") from e
    if not isinstance(value, str) or not value.isascii() or not value.isprintable() or not isinstance(refresh, str):
        raise Untrusted(f"{where} gave no token")
    return Token(value, asked + life_s * (1 - MARGIN), refresh)
