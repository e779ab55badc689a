"""Which platform an image is for, and which one this host wants.

Source: OCI image-spec image-index.md "platform"; the variants as containerd/platforms orders them.
"""

import os
from collections.abc import Sequence

from corral.images.model import Descriptor, Platform

# uname -m -> (architecture, variant)
_MACHINES = {
    "x86_64": ("amd64", ""),
    "aarch64": ("arm64", "v8"),
    "armv7l": ("arm", "v7"),
    "armv6l": ("arm", "v6"),
    "i686": ("386", ""),
    "ppc64le": ("ppc64le", ""),
    "s390x": ("s390x", ""),
    "riscv64": ("riscv64", ""),
}
# What an omitted variant means.
_DEFAULT_VARIANT = {"arm64": "v8", "arm": "v7"}


def host_platform() -> Platform:
    machine = os.uname().machine
    architecture, variant = _MACHINES.get(machine, (machine, ""))
    return Platform("linux", architecture, variant)


def normalized(platform: Platform) -> Platform:
    """The same platform with its omitted parts filled in."""
    variant = platform.variant or _DEFAULT_VARIANT.get(platform.architecture, "")
    return Platform(platform.os or "linux", platform.architecture, variant, platform.os_version, platform.os_features)


def matches(wanted: Platform, offered: Platform) -> bool:
    """Whether what was built for `offered` runs where `wanted` is asked for."""
    want, offer = normalized(wanted), normalized(offered)
    return (want.os, want.architecture) == (offer.os, offer.architecture) and _variant_runs(want, offer)


def _variant_runs(wanted: Platform, offered: Platform) -> bool:
    """ARM variants run older ones; the others must be equal, or not be given."""
    if wanted.architecture in _DEFAULT_VARIANT:
        return offered.variant <= wanted.variant
    return offered.variant in ("", wanted.variant)


def choose(manifests: Sequence[Descriptor], wanted: Platform) -> Descriptor | None:
    """The manifest for `wanted`: the newest variant that runs, the first of equals. None: there is no such."""
    fitting = [m for m in manifests if m.platform is not None and matches(wanted, m.platform)]
    if not fitting:
        return next((m for m in manifests if m.platform is None), None) if len(manifests) == 1 else None
    return max(fitting, key=lambda m: normalized(m.platform or Platform()).variant)
