"""Names of images, as people write them and as they are stored.

    busybox                       docker.io/library/busybox:latest
    alice/app:1.2                 docker.io/alice/app:1.2
    localhost:5000/app@sha256:…   localhost:5000/app@sha256:…

Source: distribution/reference, reference.go (grammar) and normalize.go (defaults).
"""

import re
from dataclasses import dataclass
from functools import lru_cache

from corral.images.digest import Digest, is_digest
from corral.rpc.errors import InvalidArgument

DEFAULT_DOMAIN = "docker.io"
LEGACY_DOMAIN = "index.docker.io"
OFFICIAL = "library"
DEFAULT_TAG = "latest"
MAX_NAME_CHARS = 255

_LABEL = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_DOMAIN = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[a-fA-F0-9:]+\])(?::[0-9]+)?")
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_PATH = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_HEX64 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Reference:
    """A full name. A tag, a digest, or both; with both the digest decides."""

    domain: str
    path: str
    tag: str = ""
    digest: Digest | None = None

    @property
    def repository(self) -> str:
        return f"{self.domain}/{self.path}"

    @property
    def familiar_repository(self) -> str:
        """The repository as people write it: without what is the default."""
        if self.domain != DEFAULT_DOMAIN:
            return self.repository
        first, slash, rest = self.path.partition("/")
        return rest if slash and first == OFFICIAL and "/" not in rest else self.path

    @property
    def familiar(self) -> str:
        return self.familiar_repository + self._suffix

    @property
    def _suffix(self) -> str:
        return (f":{self.tag}" if self.tag else "") + (f"@{self.digest}" if self.digest else "")

    def __str__(self) -> str:
        return self.repository + self._suffix


@lru_cache(maxsize=256)
def parse_reference(text: str) -> Reference:
    """The full reference that `text` means, with domain, library/ and tag filled in.

    Raises InvalidArgument, saying what is wrong with it.
    """
    if _HEX64.fullmatch(text) or is_digest(text):
        raise _refusal(text, "this is an image id")
    rest, at, digest = text.partition("@")
    if at and not is_digest(digest):
        raise _refusal(text, "what follows '@' is not sha256:<64 hex digits>")
    rest, tag = _split_tag(rest)
    if tag is not None and _TAG.fullmatch(tag) is None:
        raise _refusal(
            text, "the tag may hold at most 128 letters, digits, '_', '.' and '-', and not begin with '.' or '-'"
        )
    domain, path = _split_domain(rest)
    _check_name(text, domain, path)
    found = Digest(digest) if at else None
    return Reference(domain, path, tag or ("" if found else DEFAULT_TAG), found)


def _split_tag(text: str) -> tuple[str, str | None]:
    """A colon after the last slash begins the tag; one before it a port."""
    head, colon, tag = text.rpartition(":")
    return (head, tag) if colon and "/" not in tag else (text, None)


def _split_domain(name: str) -> tuple[str, str]:
    first, slash, rest = name.partition("/")
    is_domain = bool(slash) and (any(c in first for c in ".:[") or first == "localhost" or first.lower() != first)
    domain, path = (first, rest) if is_domain else (DEFAULT_DOMAIN, name)
    if domain == LEGACY_DOMAIN:
        domain = DEFAULT_DOMAIN
    if domain == DEFAULT_DOMAIN and "/" not in path:
        path = f"{OFFICIAL}/{path}"
    return domain, path


def _check_name(text: str, domain: str, path: str) -> None:
    if path.removeprefix(f"{OFFICIAL}/") == "":
        raise _refusal(text, "the name is empty")
    if _DOMAIN.fullmatch(domain) is None:
        raise _refusal(text, f"{domain[:80]!r} is not a host name")
    if path.lower() != path:
        raise _refusal(text, f"write the repository in lower case, {path.lower()[:80]!r}")
    if _PATH.fullmatch(path) is None:
        raise _refusal(
            text,
            "a repository is made of lower-case letters and digits, separated by single '.', '_', '__', '/' or any '-'",
        )
    if len(domain) + 1 + len(path) > MAX_NAME_CHARS:
        raise _refusal(text, f"it is longer than {MAX_NAME_CHARS} characters")


def _refusal(text: str, why: str) -> InvalidArgument:
    return InvalidArgument(f"{text[:300]!r} is not an image name: {why}", reason="BAD_REFERENCE")
