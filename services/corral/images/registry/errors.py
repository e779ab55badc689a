"""What can go wrong on the way to a registry, and the sentences for it."""

import json
from dataclasses import dataclass

from corral.rpc.errors import (
    CorralError,
    FailedPrecondition,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)

MAX_TOLD = 200
MAX_ERROR_BYTES = 64 << 10


class Trouble(Exception):
    """A host could not serve a request; perhaps another can, or the same one later."""


class CannotConnect(Trouble):
    """No connection came about: nothing was asked."""

    def __init__(self, where: str, why: str, *, is_tls: bool = False) -> None:
        super().__init__(f"{where}: {why}")
        self.is_tls = is_tls


class Interrupted(Trouble):
    """The connection ended in the middle."""

    def __init__(self, where: str, why: str) -> None:
        super().__init__(f"{where}: {why}")


class Untrusted(Trouble):
    """What the host answered may not be followed."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A status that is none of those hoped for, with what the registry says about it."""

    status: int
    codes: tuple[str, ...] = ()
    message: str = ""
    retry_after_s: float | None = None


class Refused(Trouble):
    """The host answered, but not with what was asked for."""

    def __init__(self, where: str, answer: Answer) -> None:
        super().__init__(f"{where}: HTTP {answer.status}{f' ({answer.message})' if answer.message else ''}")
        self.answer = answer
        self.status = answer.status

    @property
    def is_passing(self) -> bool:
        """Whether the same request may succeed later."""
        return self.status in (408, 425, 429) or self.status >= 500


def parse_answer(status: int, body: bytes, retry_after_s: float | None) -> Answer:
    """What a registry says is shown to people, so it is cut and made printable.

    Source: distribution-spec "Error Codes".
    """
    codes, messages = [], []
    try:
        for error in json.loads(body)["errors"]:
            codes.append(str(error.get("code", "")))
            messages.append(str(error.get("message", "")))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass  # a proxy's page, say
    text = "; ".join(dict.fromkeys(m for m in messages if m))
    printable = "".join(c if c.isprintable() else " " for c in text)
    return Answer(status, tuple(codes), printable[:MAX_TOLD], retry_after_s)


@dataclass(frozen=True, slots=True)
class About:
    """What a request was for, in words: "image busybox:latest", and of which registry."""

    what: str
    registry: str


def explained(trouble: Trouble, about: About) -> CorralError:
    """The error for the user: what was wanted, what went wrong, what helps."""
    facts = {"registry": about.registry}
    if isinstance(trouble, Refused):
        return _refusal(trouble.answer, about, facts)
    if isinstance(trouble, Untrusted):
        return FailedPrecondition(
            f"cannot go on with {about.what}: {trouble}", reason="REGISTRY_UNTRUSTED", metadata=facts
        )
    if isinstance(trouble, CannotConnect) and trouble.is_tls:
        return Unavailable(
            f"cannot reach registry {about.registry} for {about.what} ({trouble}): name its CA in hosts.toml,"
            " or say --insecure if you mean it",
            reason="REGISTRY_UNTRUSTED",
            metadata=facts,
        )
    return Unavailable(
        f"cannot reach registry {about.registry} for {about.what} ({trouble}): check its name and the network,"
        " and try again",
        reason="REGISTRY_UNREACHABLE",
        metadata=facts,
    )


def _refusal(answer: Answer, about: About, facts: dict[str, str]) -> CorralError:
    said = f" ({answer.message})" if answer.message else ""
    registry, what = about.registry, about.what
    if answer.status in (401, 403):
        sentence = f"registry {registry} denies {what}{said}: check the name, or log in with `corral login {registry}`"
        return PermissionDenied(sentence, reason="REGISTRY_DENIED", metadata=facts)
    if answer.status == 404:
        sentence = (
            f"registry {registry} has no {what}{said}: check name and tag; for a private one, `corral login {registry}`"
        )
        return NotFound(sentence, reason="NOT_IN_REGISTRY", metadata=facts)
    if answer.status == 429:
        when = f"in {answer.retry_after_s:.0f} s" if answer.retry_after_s else "later"
        sentence = f"registry {registry} takes no more requests for {what} now{said}: try again {when}, or log in"
        return ResourceExhausted(sentence, reason="TOO_MANY_REQUESTS", metadata=facts)
    if answer.status >= 500:
        sentence = f"registry {registry} failed over {what} (HTTP {answer.status}){said}: try again later"
        return Unavailable(sentence, reason="REGISTRY_FAILED", metadata=facts)
    sentence = f"registry {registry} refuses {what} (HTTP {answer.status}){said}"
    return FailedPrecondition(sentence, reason="REGISTRY_REFUSED", metadata=facts)
