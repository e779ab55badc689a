"""Which platform an image is for, and which one this host wants.

Source: OCI image-spec image-index.md "platform"; names and order as containerd/platforms has them (Normalize, Only).
"""

import os
import re
from collections.abc import Sequence
from dataclasses import replace

from corral.images.model import INDEXES, Descriptor, Platform

# uname -m -> architecture and variant
_MACHINES = {
    "armv8l": ("arm", "v8"),
    "armv7l": ("arm", "v7"),
    "armv6l": ("arm", "v6"),
    "i586": ("386", ""),
    "i686": ("386", ""),
    "loongarch64": ("loong64", ""),
}
# Other names for architectures, and the variant that some of them mean.
_ALIASES = {
    "x86_64": ("amd64", ""),
    "x86-64": ("amd64", ""),
    "aarch64": ("arm64", ""),
    "i386": ("386", ""),
    "armhf": ("arm", "v7"),
    "armel": ("arm", "v6"),
}
# What an omitted variant means. Of these architectures each variant runs those before it.
_DEFAULT_VARIANT = {"amd64": "v1", "arm64": "v8", "arm": "v7"}
# What else such a processor runs, where there is nothing of its own.
_OLDER = {"amd64": ("386", ""), "arm64": ("arm", "v8")}
_VARIANT = re.compile(r"v?([0-9]{1,4})(?:\.([0-9]{1,4}))?")


def host_platform() -> Platform:
    machine = os.uname().machine
    architecture, variant = _MACHINES.get(machine) or _ALIASES.get(machine, (machine, ""))
    return Platform("linux", architecture, variant)


def normalized(platform: Platform) -> Platform:
    """The same platform by its usual names, with its omitted parts filled in."""
    architecture, variant = _ALIASES.get(platform.architecture.lower(), (platform.architecture, ""))
    variant = platform.variant or variant or _DEFAULT_VARIANT.get(architecture, "")
    if architecture in _DEFAULT_VARIANT and variant[0].isdigit():
        variant = f"v{variant}"
    return replace(platform, os=platform.os or "linux", architecture=architecture, variant=variant)


def matches(wanted: Platform, offered: Platform) -> bool:
    """Whether what was built for `offered` runs where `wanted` is asked for."""
    return _rank(wanted, offered) is not None


def _rank(wanted: Platform, offered: Platform) -> tuple[bool, int, int] | None:
    """How well it runs there, more being better; None: not at all."""
    want, offer = normalized(wanted), normalized(offered)
    if want.os != offer.os:
        return None
    is_own = want.architecture == offer.architecture
    if not is_own:
        architecture, variant = _OLDER.get(want.architecture, ("", ""))
        want = replace(want, architecture=architecture, variant=variant)
    if want.architecture != offer.architecture:
        return None
    if want.architecture not in _DEFAULT_VARIANT:
        return (is_own, 0, 0) if offer.variant in ("", want.variant) else None
    number = _number(offer.variant)
    runs = number is not None and number <= (_number(want.variant) or (0, 0))
    return (is_own, *(number or (0, 0))) if runs or offer.variant == want.variant else None


def _number(variant: str) -> tuple[int, int] | None:
    """v8.2 -> 8, 2. Of what is no number nothing is known."""
    match = _VARIANT.fullmatch(variant)
    return (int(match[1]), int(match[2] or 0)) if match else None


def choose(manifests: Sequence[Descriptor], wanted: Platform) -> Descriptor | None:
    """The manifest for `wanted`: the newest variant that runs, the first of equals. None: there is no such."""
    return next(iter(choices(manifests, wanted)), None)


def choices(manifests: Sequence[Descriptor], wanted: Platform) -> list[Descriptor]:
    """What to look at for `wanted`, best first: the best of those that say that they run, or else those that say
    nothing, if they are indexes or alone."""
    ranked = [(rank, m) for m in manifests if m.platform and (rank := _rank(wanted, m.platform)) is not None]
    if ranked:
        return [max(ranked, key=lambda ranking: ranking[0])[1]]
    return [m for m in manifests if m.platform is None and (len(manifests) == 1 or m.media_type in INDEXES)]
