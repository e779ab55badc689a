"""The settings, and which of them is for a repository.

    [[images.policy]]
    pattern = "registry.example/team"       # this repository and all below it
    keys = ["/etc/corral/keys/team.pub"]    # one of them must have signed what is pulled
    signed_prefix = "upstream.example/team" # where it is a copy, signed under its first name

    [[images.policy]]
    pattern = "*"                           # all that no other pattern is for
    type = "reject"

The longest pattern that fits counts, whatever their order. Where there are rules at all, one must be for all the rest.
Source: containers-policy.json(5): the types, what a scope covers, that there must be a default, signedPrefix.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from corral.images.reference import DEFAULT_DOMAIN, LEGACY_DOMAIN, parse_reference
from corral.rpc.errors import InvalidArgument

EVERYTHING = "*"
BELOW = "/*"
HOSTS_BELOW = "*."


class Kind(StrEnum):
    ACCEPT = "insecureAcceptAnything"
    REJECT = "reject"
    SIGNED = "sigstoreSigned"

    @classmethod
    def _missing_(cls, value: object) -> "Kind":
        raise ValueError(f"{value!r} is none of {', '.join(cls)}")


@dataclass(frozen=True, slots=True)
class Rule:
    """One entry of the settings. `keys` are public keys in PEM form: ECDSA, RSA or Ed25519.

    signed_prefix: what stands in signatures for the pattern, where images were copied here from there.
    """

    pattern: str = ""
    type: Kind = Kind.SIGNED
    keys: tuple[Path, ...] = ()
    signed_prefix: str = ""

    def __post_init__(self) -> None:
        """Raises ValueError."""
        _check_pattern(self.pattern)
        if self.type is Kind.SIGNED and not self.keys:
            raise ValueError(
                f"the policy for {self.pattern} names no keys: give keys = [FILE, …], or type = {Kind.ACCEPT.value!r}"
                f" or {Kind.REJECT.value!r}"
            )
        if self.type is not Kind.SIGNED and self.keys:
            raise ValueError(f"the policy for {self.pattern} has keys, which the type {self.type.value!r} does not use")
        if self.signed_prefix:
            _check_pattern(self.signed_prefix)
            if self.type is not Kind.SIGNED or EVERYTHING in self.pattern.removesuffix(BELOW) + self.signed_prefix:
                raise ValueError(
                    f"the policy for {self.pattern} has signed_prefix, which is for keys, and without {EVERYTHING!r}"
                )

    def signed_name(self, repository: str) -> str:
        """The name that a repository which the rule is for has in signatures."""
        if not self.signed_prefix:
            return repository
        return self.signed_prefix + repository[len(self.pattern.removesuffix(BELOW)) :]


def check(rules: Sequence[Rule]) -> None:
    """Raises ValueError if they leave anything open."""
    patterns = [rule.pattern.lower() for rule in rules]
    for pattern in patterns:
        if patterns.count(pattern) > 1:
            raise ValueError(f"there is more than one policy for {pattern}")
    if rules and EVERYTHING not in patterns:
        raise ValueError(f"no policy is for all other repositories: add one with the pattern {EVERYTHING!r}")


def rule_for(rules: Sequence[Rule], repository: str) -> Rule:
    """The one that counts for a full name, "docker.io/library/busybox"; for "", which is no name, the one for all.

    Registries are the same in capitals, as their hosts are.
    """
    fitting = [rule for rule in rules if _fits(rule.pattern.lower(), repository.lower())]
    return max(fitting, key=lambda rule: (not rule.pattern.startswith(EVERYTHING), len(rule.pattern)))


def _fits(pattern: str, repository: str) -> bool:
    if pattern == EVERYTHING:
        return True
    if pattern.startswith(HOSTS_BELOW):
        host = repository.partition("/")[0].rpartition(":")
        return (host[0] if host[1] and host[2].isdigit() else host[2]).endswith(pattern[1:])
    if pattern.endswith(BELOW):
        return repository.startswith(pattern.removesuffix(EVERYTHING))
    return repository == pattern or repository.startswith(f"{pattern}/")


def _check_pattern(pattern: str) -> None:
    if pattern == EVERYTHING:
        return
    if not pattern:
        raise ValueError(f"a policy has no pattern: give a registry, a repository, or {EVERYTHING!r} for all others")
    name = pattern.removesuffix(BELOW)
    if pattern.startswith(HOSTS_BELOW) and "/" not in pattern:
        name = pattern.replace(EVERYTHING, "any", 1)
    whole = f"{name}/a/b"  # so that nothing is filled in
    try:
        is_understood = parse_reference(whole).repository == whole
    except InvalidArgument:
        is_understood = False
    if not is_understood:
        instead = DEFAULT_DOMAIN if name.split("/")[0] == LEGACY_DOMAIN else f"{DEFAULT_DOMAIN}/library/busybox"
        raise ValueError(
            f"the policy's pattern {pattern!r} is not understood: give a registry, or a whole name such as {instead},"
            f" without a tag; behind it may be {BELOW}, before a registry {HOSTS_BELOW}; or {EVERYTHING} for all others"
        )
