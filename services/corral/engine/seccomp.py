"""Seccomp profiles: corral's own, none, or a caller's in docker's or OCI's JSON. Pure.

Docker's format has conditions (`includes`, `excludes`: capabilities, architectures, kernel version) and an `archMap`;
both are worked out here, so that the spec holds OCI's plain form. Source: moby profiles/seccomp/seccomp_linux.go.
"""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache

from corral.oci.decode import decode
from corral.oci.spec import Seccomp
from corral.rpc.errors import InvalidArgument

UNCONFINED = "unconfined"
_SCMP_ARCH = {
    "x86_64": ("amd64", "SCMP_ARCH_X86_64"),
    "aarch64": ("arm64", "SCMP_ARCH_AARCH64"),
    "armv7l": ("arm", "SCMP_ARCH_ARM"),
    "riscv64": ("riscv64", "SCMP_ARCH_RISCV64"),
    "s390x": ("s390x", "SCMP_ARCH_S390X"),
    "ppc64le": ("ppc64le", "SCMP_ARCH_PPC64LE"),
}


@dataclass(frozen=True, slots=True)
class Host:
    """What a profile's conditions ask about: `uname -m`, the kernel's version, the container's capabilities."""

    machine: str
    kernel: tuple[int, int]
    capabilities: frozenset[str]


@lru_cache(maxsize=32)
def parse_profile(text: str, host: Host) -> Seccomp:
    """A profile of docker's or OCI's format for this host. Raises InvalidArgument that says what is wrong where."""
    try:
        profile = json.loads(text)
    except ValueError as e:
        raise InvalidArgument(f"the seccomp profile is no JSON: {e}", reason="BAD_SECCOMP") from e
    if not isinstance(profile, dict):
        raise InvalidArgument("the seccomp profile is no JSON object", reason="BAD_SECCOMP")
    try:
        plain = dict(profile)
        plain["syscalls"] = _rules(profile, host)
        plain["architectures"] = _architectures(profile, host)
        plain.pop("archMap", None)
        return decode(Seccomp, plain, "seccomp")
    except (ValueError, TypeError, AttributeError, KeyError) as e:
        raise InvalidArgument(f"the seccomp profile is malformed: {e}", reason="BAD_SECCOMP") from e


def _rules(profile: Mapping[str, object], host: Host) -> list[dict[str, object]]:
    rules = profile.get("syscalls", [])
    if not isinstance(rules, list):
        raise ValueError("syscalls is no list")
    return [_plain(rule) for rule in rules if _applies(rule, host)]


def _plain(rule: Mapping[str, object]) -> dict[str, object]:
    names = rule.get("names") or ([rule["name"]] if rule.get("name") else [])
    kept = {key: rule[key] for key in ("action", "args", "errnoRet") if rule.get(key) is not None}
    return {"names": names, **kept}


def _applies(rule: Mapping[str, object], host: Host) -> bool:
    if not isinstance(rule, dict):
        raise ValueError(f"a rule is no object: {rule!r:.80}")
    excludes = rule.get("excludes") or {}
    includes = rule.get("includes") or {}
    return not (_any_holds(excludes, host)) and _all_hold(includes, host)


def _any_holds(conditions: Mapping[str, object], host: Host) -> bool:
    caps, arches = _words(conditions, "caps"), _words(conditions, "arches")
    minimum = conditions.get("minKernel")
    return (
        bool(host.capabilities & set(caps))
        or _architecture(host)[0] in arches
        or (bool(minimum) and host.kernel >= _version(str(minimum)))
    )


def _all_hold(conditions: Mapping[str, object], host: Host) -> bool:
    caps, arches = _words(conditions, "caps"), _words(conditions, "arches")
    minimum = conditions.get("minKernel")
    return (
        host.capabilities >= set(caps)
        and (not arches or _architecture(host)[0] in arches)
        and (not minimum or host.kernel >= _version(str(minimum)))
    )


def _words(conditions: Mapping[str, object], key: str) -> Collection[str]:
    value = conditions.get(key) or []
    if not isinstance(value, list):
        raise ValueError(f"{key} is no list")
    return [str(word) for word in value]


def _version(text: str) -> tuple[int, int]:
    match = re.match(r"(\d+)\.(\d+)", text)
    if match is None:
        raise ValueError(f"{text!r} is no kernel version")
    return int(match[1]), int(match[2])


def kernel_version(release: str) -> tuple[int, int]:
    """ "6.18.5-amd64" as (6, 18); (0, 0) for what cannot be read."""
    try:
        return _version(release)
    except ValueError:
        return 0, 0


def _architecture(host: Host) -> tuple[str, str]:
    return _SCMP_ARCH.get(host.machine, (host.machine, ""))


def _architectures(profile: Mapping[str, object], host: Host) -> list[str]:
    given = _words(profile, "architectures")
    if given:
        return list(given)
    own = _architecture(host)[1]
    arch_map = profile.get("archMap") or []
    if not isinstance(arch_map, list):
        raise ValueError("archMap is no list")
    for entry in arch_map:
        if entry.get("architecture") == own:
            return [own, *_words(entry, "subArchitectures")]
    return []
