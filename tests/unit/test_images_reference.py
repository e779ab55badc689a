"""Names of images. Source of the cases: distribution/reference, reference_test.go and normalize_test.go."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.images.digest import Digest
from corral.images.reference import parse_reference
from corral.rpc.errors import InvalidArgument

DIGEST = "sha256:" + "ab" * 32


@pytest.mark.parametrize(
    ("written", "full", "familiar"),
    [
        ("busybox", "docker.io/library/busybox:latest", "busybox:latest"),
        ("busybox:1.36", "docker.io/library/busybox:1.36", "busybox:1.36"),
        ("library/busybox", "docker.io/library/busybox:latest", "busybox:latest"),
        ("docker.io/busybox", "docker.io/library/busybox:latest", "busybox:latest"),
        ("index.docker.io/library/busybox", "docker.io/library/busybox:latest", "busybox:latest"),
        ("alice/app", "docker.io/alice/app:latest", "alice/app:latest"),
        ("docker.io/library/a/b", "docker.io/library/a/b:latest", "library/a/b:latest"),
        ("localhost/app", "localhost/app:latest", "localhost/app:latest"),
        ("localhost:5000/app", "localhost:5000/app:latest", "localhost:5000/app:latest"),
        ("127.0.0.1:5000/a/b:c", "127.0.0.1:5000/a/b:c", "127.0.0.1:5000/a/b:c"),
        ("[2001:db8::1]:5000/repo", "[2001:db8::1]:5000/repo:latest", "[2001:db8::1]:5000/repo:latest"),
        ("Upper/app", "Upper/app:latest", "Upper/app:latest"),
        ("ghcr.io/a-b/c__d/e.f:v_1.2-3", "ghcr.io/a-b/c__d/e.f:v_1.2-3", "ghcr.io/a-b/c__d/e.f:v_1.2-3"),
        (f"busybox@{DIGEST}", f"docker.io/library/busybox@{DIGEST}", f"busybox@{DIGEST}"),
        (f"ghcr.io/a/b:c@{DIGEST}", f"ghcr.io/a/b:c@{DIGEST}", f"ghcr.io/a/b:c@{DIGEST}"),
        ("a---b", "docker.io/library/a---b:latest", "a---b:latest"),
    ],
)
def test_a_name_gets_its_defaults_and_loses_them_again(written: str, full: str, familiar: str) -> None:
    reference = parse_reference(written)
    assert str(reference) == full
    assert reference.familiar == familiar
    assert parse_reference(full) == reference
    assert parse_reference(familiar) == reference


@pytest.mark.parametrize(
    ("written", "why"),
    [
        ("", "empty"),
        (":tag", "empty"),
        ("Busybox", "lower case"),
        ("alice/App", "lower case"),
        ("a//b", "separated"),
        ("-a", "separated"),
        ("a.", "separated"),
        ("a___b", "separated"),
        ("a..b", "separated"),
        ("../../etc/passwd", "not a host name"),
        ("a/../b", "separated"),
        ("a b", "separated"),
        ("a\nb", "separated"),
        ("a:", "tag"),
        ("a:-x", "tag"),
        ("a:" + "x" * 129, "tag"),
        ("a@sha256:abc", "64 hex"),
        ("a@md5:" + "0" * 32, "64 hex"),
        ("a" * 300, "longer than 255"),
        ("ab" * 32, "image id"),
        ("exa mple.com/a", "not a host name"),
        ("host:port/a", "not a host name"),
    ],
)
def test_what_is_no_name_is_refused_with_the_reason(written: str, why: str) -> None:
    with pytest.raises(InvalidArgument, match="is not an image name") as caught:
        parse_reference(written)
    assert why in caught.value.message


def test_with_a_digest_no_tag_is_assumed() -> None:
    reference = parse_reference(f"busybox@{DIGEST}")
    assert reference.tag == ""
    assert reference.digest == Digest(DIGEST)


@given(st.text(max_size=300))
def test_any_text_is_a_name_or_refused(text: str) -> None:
    try:
        reference = parse_reference(text)
    except InvalidArgument:
        return
    assert parse_reference(str(reference)) == reference
    assert parse_reference(reference.familiar) == reference
    assert ".." not in str(reference).split("/")
