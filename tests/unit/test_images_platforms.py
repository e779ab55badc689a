"""Which manifest of an index is taken."""

import pytest

from corral.images.digest import digest_of
from corral.images.model import OCI_MANIFEST, Descriptor, Platform
from corral.images.platforms import choose, matches


def offered(*platforms: str) -> list[Descriptor]:
    made = []
    for text in platforms:
        parts = text.split("/")
        platform = Platform(parts[0], parts[1], parts[2] if len(parts) > 2 else "")
        made.append(Descriptor(OCI_MANIFEST, digest_of(text.encode()), 1, platform=platform))
    return made


@pytest.mark.parametrize(
    ("wanted", "among", "taken"),
    [
        ("linux/amd64", ["linux/arm64", "linux/amd64"], "linux/amd64"),
        ("linux/arm64/v8", ["linux/arm64"], "linux/arm64"),
        ("linux/arm/v7", ["linux/arm/v5", "linux/arm/v7", "linux/arm/v6"], "linux/arm/v7"),
        ("linux/arm/v6", ["linux/arm/v5", "linux/arm/v7", "linux/arm/v6"], "linux/arm/v6"),
        ("linux/amd64", ["unknown/unknown", "windows/amd64"], None),
        ("linux/amd64", ["linux/amd64/v3", "linux/amd64/v1"], "linux/amd64/v1"),
        ("linux/amd64/v3", ["linux/amd64", "linux/amd64/v4", "linux/amd64/v2"], "linux/amd64/v2"),
        ("linux/amd64", ["linux/386", "linux/amd64"], "linux/amd64"),
        ("linux/amd64", ["linux/386"], "linux/386"),
        ("linux/386", ["linux/amd64"], None),
        ("linux/arm64", ["linux/arm/v6", "linux/arm/v7"], "linux/arm/v7"),
        ("linux/arm64/v9.2", ["linux/arm64/v9.4", "linux/arm64/v9", "linux/arm64/v8"], "linux/arm64/v9"),
        ("linux/arm/v7", ["linux/arm/v8"], None),
        ("linux/arm/v8", ["linux/armhf", "linux/arm/6"], "linux/armhf"),
        ("linux/x86_64", ["linux/aarch64", "linux/amd64"], "linux/amd64"),
        ("linux/aarch64", ["linux/arm64/v8", "linux/amd64"], "linux/arm64/v8"),
        ("linux/amd64/new", ["linux/amd64/v2", "linux/amd64/new"], "linux/amd64/new"),
    ],
)
def test_the_best_that_runs_is_taken(wanted: str, among: list[str], taken: str | None) -> None:
    parts = wanted.split("/")
    found = choose(offered(*among), Platform(*parts))
    assert (str(found.platform) if found else None) == taken


def test_a_single_manifest_without_a_platform_is_taken() -> None:
    only = Descriptor(OCI_MANIFEST, digest_of(b"x"), 1)
    assert choose([only], Platform("linux", "amd64")) is only


def test_an_unknown_variant_does_not_match_another() -> None:
    assert not matches(Platform("linux", "amd64", "v2"), Platform("linux", "amd64", "v3"))
    assert matches(Platform("linux", "amd64", "v2"), Platform("linux", "amd64"))
