"""What the registry client knows without asking anybody: challenges, hosts.toml, back-off, ranges."""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.registry import write_hosts

from corral.images.digest import digest_of
from corral.images.partials import Partials, merged
from corral.images.registry.backoff import LONGEST_S, delay_s, retry_after_s
from corral.images.registry.challenge import parse_challenges
from corral.images.registry.credentials import Credentials
from corral.images.registry.download import PART_BYTES, parts
from corral.images.registry.endpoints import Capability, endpoints, own_endpoints
from corral.images.registry.http import number, origin, proxy_for, shown
from corral.rpc.errors import FailedPrecondition

REALM = 'realm="https://auth.example/token"'


@pytest.mark.parametrize(
    ("header", "found"),
    [
        (f'Bearer {REALM},service="s",scope="repository:a/b:pull,push"',
         [("bearer", {"realm": "https://auth.example/token", "service": "s", "scope": "repository:a/b:pull,push"})]),
        ('BEARER Realm = "x" , SERVICE=y', [("bearer", {"realm": "x", "service": "y"})]),
        ("Basic realm=\"a \\\"quoted\\\" one\"", [("basic", {"realm": 'a "quoted" one'})]),
        ('Negotiate, Basic realm="x"', [("negotiate", {}), ("basic", {"realm": "x"})]),
        ("Negotiate YWJj==, Basic realm=x", [("negotiate", {}), ("basic", {"realm": "x"})]),
        ('Basic realm="x", Bearer realm="y",service="z"',
         [("basic", {"realm": "x"}), ("bearer", {"realm": "y", "service": "z"})]),
        (", ,Basic realm=x,,", [("basic", {"realm": "x"})]),
        ("", []),
        ("Basic", [("basic", {})]),
        ('Bearer realm="unclosed', [("bearer", {}), ("realm", {})]),
        ("@@@", []),
    ],
)  # fmt: skip
def test_challenges_are_read_by_the_grammar(header: str, found: list[tuple[str, dict[str, str]]]) -> None:
    assert [(c.scheme, dict(c.parameters)) for c in parse_challenges([header])] == found


@given(st.text(max_size=200))
def test_no_header_breaks_the_reading_of_challenges(header: str) -> None:
    parse_challenges([header])


def test_a_wait_is_longer_after_each_failure_but_never_endless() -> None:
    assert all(0.1 < delay_s(1) <= 0.4 for _ in range(50))
    assert all(LONGEST_S / 2 <= delay_s(50) <= LONGEST_S for _ in range(50))
    assert len({delay_s(3) for _ in range(10)}) > 1


def test_retry_after_is_seconds_or_a_date() -> None:
    assert retry_after_s("7") == 7
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert 25 < (retry_after_s(soon) or 0) <= 30
    assert retry_after_s("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert retry_after_s("soon") is None
    assert retry_after_s(None) is None


@pytest.mark.parametrize(
    "header",
    [
        "²",
        "7²",
        "\N{ARABIC-INDIC DIGIT SEVEN}",
        "9" * 5000,
        "-1",
        "+1",
        "1_0",
        "",
        f"Wed, 21 Oct {'9' * 30} 07:28:00 GMT",
    ],
)
def test_what_is_no_number_of_http_breaks_nothing(header: str) -> None:
    assert number(header) is None
    assert retry_after_s(header) is None


def test_a_number_of_http_is_read() -> None:
    assert (number("0"), number(" 12 "), number(None)) == (0, 12, None)


@pytest.mark.parametrize(
    ("ranges", "found"),
    [
        ([], []),
        ([(0, 4), (4, 8)], [(0, 8)]),
        ([(8, 9), (0, 4), (2, 6)], [(0, 6), (8, 9)]),
        ([(3, 3)], []),
    ],
)
def test_ranges_are_put_together(ranges: list[tuple[int, int]], found: list[tuple[int, int]]) -> None:
    assert merged(ranges) == found


def test_parts_are_made_one_by_one_and_are_all_of_it() -> None:
    first = next(parts([(5, (1 << 63) - 1)]))
    assert (first.start, first.end) == (5, 5 + PART_BYTES)
    assert [(p.start, p.end) for p in parts([(0, 3), (7, 9)])] == [(0, 3), (7, 9)]
    made = [(p.start, p.end) for p in parts([(0, 1), (9, 9 + 2 * PART_BYTES + 1)])]
    assert made == [
        (0, 1),
        (9, 9 + PART_BYTES),
        (9 + PART_BYTES, 9 + 2 * PART_BYTES),
        (9 + 2 * PART_BYTES, 10 + 2 * PART_BYTES),
    ]


def test_a_partial_blob_that_goes_while_others_are_collected_is_nobodys_trouble(tmp_path: Path) -> None:
    partials = Partials(tmp_path, keep_s=0.0)
    gone, there = (tmp_path / "partial" / f"{byte * 32}.data" for byte in ("ab", "cd"))
    gone.symlink_to("gone")  # it is listed, and there is nothing behind the name
    there.write_bytes(b"x")
    removed, reclaimed = partials.collect(grace=False)
    assert (removed, reclaimed > 0) == ([f"sha256:{'cd' * 32}"], True)
    assert not there.exists()


async def test_a_partial_blob_that_is_open_is_not_collected(tmp_path: Path) -> None:
    partials = Partials(tmp_path, keep_s=0.0)
    async with partials.opened("default", digest_of(b"x"), 1) as partial:
        assert partials.collect(grace=False) == ([], 0)
        assert partial.path.exists()
    assert partials.collect(grace=False)[0] == [digest_of(b"x")]
    assert not partial.path.exists()


def bases(certs: Path, domain: str, **options: bool) -> list[str]:
    return [endpoint.base for endpoint in endpoints(certs, domain, **options)]


def test_without_settings_a_registry_is_reached_by_its_name(tmp_path: Path) -> None:
    assert bases(tmp_path, "docker.io") == ["https://registry-1.docker.io/v2"]
    assert bases(tmp_path, "ghcr.io") == ["https://ghcr.io/v2"]
    assert bases(tmp_path / "none", "r.example:5000") == ["https://r.example:5000/v2"]


def test_plain_http_is_tried_only_on_loopback_or_by_request(tmp_path: Path) -> None:
    for host in ("localhost:5000", "127.0.0.1:5000", "127.9.9.9", "[::1]:5000"):
        assert bases(tmp_path, host) == [f"https://{host}/v2", f"http://{host}/v2"]
    assert bases(tmp_path, "localhost:80") == ["http://localhost:80/v2"]
    assert bases(tmp_path, "localhost.example") == ["https://localhost.example/v2"]
    assert bases(tmp_path, "r.example", insecure=True) == ["https://r.example/v2", "http://r.example/v2"]
    assert endpoints(tmp_path, "r.example", insecure=True)[0].tls.skip_verify
    assert not endpoints(tmp_path, "r.example")[0].tls.skip_verify


def test_hosts_are_asked_in_the_order_of_the_file_and_the_server_last(tmp_path: Path) -> None:
    where = write_hosts(tmp_path, "docker.io", """
server = "https://registry-1.docker.io"
[host."https://z.example"]
  capabilities = ["pull"]
  ca = "z.crt"
  client = [["a.crt", "a.key"], ["b.pem", ""]]
  dial_timeout = "1500ms"
  [host."https://z.example".header]
    x-one = "1"
    x-two = ["2", "3"]
[host."http://a.example:81/cache"]
  dial_timeout = "1m1.5s"
  skip_verify = true
[host."https://c.example/registry"]
  override_path = true
""")  # fmt: skip
    first, second, third, last = endpoints(tmp_path, "docker.io")
    assert first.base == "https://z.example/v2"
    assert first.capabilities == {Capability.PULL}
    assert first.tls.ca == (where / "z.crt",)
    assert first.tls.client == ((where / "a.crt", where / "a.key"), (where / "b.pem", None))
    assert first.headers == (("x-one", "1"), ("x-two", "2"), ("x-two", "3"))
    assert first.connect_s == 1.5
    assert (first.is_registry, first.mirror_of) == (False, "docker.io")
    assert (second.base, second.tls.skip_verify) == ("http://a.example:81/cache/v2", True)
    assert second.connect_s == 61.5
    assert third.base == "https://c.example/registry"
    assert (last.base, last.is_registry, last.mirror_of) == ("https://registry-1.docker.io/v2", True, "")


def test_a_host_that_is_the_registry_itself_is_no_mirror(tmp_path: Path) -> None:
    write_hosts(tmp_path, "r.example:5000", '[host."http://r.example:5000"]\n')
    first, last = endpoints(tmp_path, "r.example:5000")
    assert (first.base, first.is_registry) == ("http://r.example:5000/v2", True)
    assert last.base == "https://r.example:5000/v2"


@pytest.mark.parametrize("directory", ["r.example_5000_", "r.example:5000", "_default"])
def test_the_directory_of_a_registry_is_found(tmp_path: Path, directory: str) -> None:
    write_hosts(tmp_path, directory, 'server = "http://elsewhere.example"\n')
    assert bases(tmp_path, "r.example:5000") == ["http://elsewhere.example/v2"]


def test_the_server_of_all_registries_is_a_mirror_to_those_that_it_is_not(tmp_path: Path) -> None:
    """Else it would get what each of them is logged in with, and no word of whose content is wanted."""
    text = 'server = "https://cache.example"\n[host."http://cache.example"]\n'
    write_hosts(tmp_path, "_default", text)
    for domain in ("r.example", "docker.io"):
        assert {(e.is_registry, e.mirror_of) for e in endpoints(tmp_path, domain)} == {(False, domain)}
    assert {(e.is_registry, e.mirror_of) for e in endpoints(tmp_path, "cache.example")} == {(True, "")}
    write_hosts(tmp_path, "_default", 'server = "https://registry-1.docker.io"\n')
    assert endpoints(tmp_path, "docker.io")[0].is_registry
    assert not endpoints(tmp_path, "ghcr.io")[0].is_registry
    write_hosts(tmp_path, "r.example", text)
    assert {(e.is_registry, e.mirror_of) for e in endpoints(tmp_path, "r.example")} == {(True, "")}


def test_what_stands_at_the_top_of_the_file_is_the_servers(tmp_path: Path) -> None:
    write_hosts(tmp_path, "r.example", 'skip_verify = true\ncapabilities = ["pull", "resolve"]\n[header]\nx-a = "1"\n')
    [only] = endpoints(tmp_path, "r.example")
    assert only.base == "https://r.example/v2"
    assert only.tls.skip_verify
    assert only.capabilities == {Capability.PULL, Capability.RESOLVE}
    assert only.headers == (("x-a", "1"),)


def test_files_as_docker_has_them(tmp_path: Path) -> None:
    directory = tmp_path / "r.example"
    directory.mkdir()
    for name in ("ca.crt", "client.cert", "client.key"):
        (directory / name).touch()
    [only] = endpoints(tmp_path, "r.example")
    assert only.tls.ca == (directory / "ca.crt",)
    assert only.tls.client == ((directory / "client.cert", directory / "client.key"),)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("server = 1", "server"),
        ("=", "hosts.toml"),
        ('server = "ftp://x"', "server"),
        ('server = "https://user:pw@x"', "server"),
        ('[host."https://x"]\ncapabilities = ["fly"]', "capabilities"),
        ('[host."https://x"]\nskip_verify = "yes"', "skip_verify"),
        ('[host."https://x"]\nclient = [["a", "b", "c"]]', "client"),
        ('[host."https://x"]\nca = 3', "ca"),
        ('[host."https://x"]\ndial_timeout = "soon"', "dial_timeout"),
        ('[host."https://x"]\ndial_timeout = "1m and 30s"', "dial_timeout"),
        ('[host."https://x".header]\n"a b" = "c"', "header"),
        ('[host."https://x".header]\na = "c\\r\\nd: e"', "header"),
    ],
)
def test_settings_that_are_wrong_are_refused_by_file_and_key(tmp_path: Path, text: str, key: str) -> None:
    write_hosts(tmp_path, "r.example", text)
    with pytest.raises(FailedPrecondition, match=key) as caught:
        endpoints(tmp_path, "r.example")
    assert "hosts.toml" in str(caught.value)


def test_secrets_are_in_no_representation() -> None:
    credentials = Credentials("user", "hunter2", "identity", "token")
    assert not any(word in repr(credentials) for word in ("hunter2", "identity", "token'"))


def test_an_address_is_shown_without_what_may_be_secret() -> None:
    assert shown("https://user:pw@r.example:5/a/b?X-Amz-Signature=abc#f") == "https://r.example:5/a/b"


@pytest.mark.parametrize(
    ("host", "is_proxied"),
    [
        ("localhost:5000", False),
        ("127.0.0.1:5000", False),
        ("[::1]:5000", False),
        ("10.1.2.3:5000", False),
        ("10.2.0.1", True),
        ("[fd00::7]:5000", False),
        ("192.0.2.1", False),
        ("192.0.2.2", True),
        ("registry.corp.example:5000", False),
        ("r.example", True),
    ],
)
def test_a_proxy_is_used_as_go_uses_it(host: str, is_proxied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    monkeypatch.setenv("no_proxy", "10.1.0.0/16, fd00::/8,192.0.2.1,.corp.example,")
    assert proxy_for(f"http://{host}/v2/") == ("http://proxy.example:3128" if is_proxied else None)


def test_without_a_proxy_none_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("https_proxy", raising=False)
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    assert proxy_for("https://r.example/v2/") is None


def test_origins_differ_by_scheme_host_and_port() -> None:
    assert origin("https://A.example/x") == origin("https://a.example:443/y")
    assert origin("https://a.example") != origin("http://a.example")
    assert origin("https://a.example") != origin("https://a.example:444")


def test_insecure_falls_back_to_plain_http_with_certificates_of_docker_s_form_too(tmp_path: Path) -> None:
    (tmp_path / "r.example").mkdir()
    (tmp_path / "r.example" / "ca.crt").write_text("")
    found = endpoints(tmp_path, "r.example", insecure=True)
    assert [e.base for e in found] == ["https://r.example/v2", "http://r.example/v2"]
    assert [e.base for e in endpoints(tmp_path, "r.example")] == ["https://r.example/v2"]


def test_a_server_before_all_registries_is_none_that_one_logs_in_to(tmp_path: Path) -> None:
    write_hosts(tmp_path, "_default", 'server = "https://cache.example"\n')
    assert [e.base for e in own_endpoints(tmp_path, "r.example")] == ["https://r.example/v2"]
    assert [e.base for e in own_endpoints(tmp_path, "cache.example")] == ["https://cache.example/v2"]
    assert [(e.base, e.is_registry) for e in endpoints(tmp_path, "r.example")] == [("https://cache.example/v2", False)]
