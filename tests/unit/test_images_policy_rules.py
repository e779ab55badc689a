"""Which rule of a policy is for which repository, and which rules are none."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.daemon import config
from corral.images.config import ImagesConfig
from corral.images.policy.gate import Gate
from corral.images.policy.payload import parse_payload
from corral.images.policy.rules import Kind, Rule, check, rule_for
from corral.rpc.errors import InvalidArgument

PATTERNS = (
    "*", "*.example", "*.team.example", "registry.example", "registry.example:5000", "registry.example/team",
    "registry.example/team/*", "registry.example/team/app", "docker.io", "docker.io/library/busybox",
    "localhost:5000/a",
)  # fmt: skip


@pytest.mark.parametrize(
    ("repository", "pattern"),
    [
        ("registry.example/team/app", "registry.example/team/app"),
        ("registry.example/team/app/part", "registry.example/team/app"),
        ("registry.example/team/apple", "registry.example/team/*"),
        ("registry.example/team", "registry.example/team"),
        ("registry.example/teams", "registry.example"),
        ("registry.example:5000/teams", "registry.example:5000"),
        ("other.example/a", "*.example"),
        ("a.team.example:443/a", "*.team.example"),
        ("A.Team.Example/a", "*.team.example"),
        ("team.example/a", "*.example"),
        ("Registry.Example/team/app", "registry.example/team/app"),
        ("example/a", "*"),
        ("evilexample/a", "*"),
        ("docker.io/library/busybox", "docker.io/library/busybox"),
        ("docker.io/library/busybox2", "docker.io"),
        ("docker.io.evil/library/busybox", "*"),
        ("localhost:5000/a/b", "localhost:5000/a"),
        ("localhost:5000/b", "*"),
        ("", "*"),
    ],
)
def test_the_longest_pattern_that_fits_counts(repository: str, pattern: str) -> None:
    rules = [Rule(each, Kind.REJECT) for each in PATTERNS]
    for some in (rules, rules[::-1]):
        assert rule_for(some, repository).pattern == pattern


@pytest.mark.parametrize(
    "pattern",
    ["", "busybox", "library/busybox", "index.docker.io/library", "registry.example/app:1", "registry.example/*/app",
"registry.example/", "**", "*/app", "*.example/app", "registry.*", "https://registry.example",
     "registry.example/app@sha256:" + "0" * 64, "registry.example/te*", "../etc", "registry.example/a b"],
)  # fmt: skip
def test_patterns_that_would_not_do_what_they_seem_to_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="pattern"):
        Rule(pattern, Kind.REJECT)


def test_a_copy_has_its_first_name_in_signatures() -> None:
    key = (Path("x"),)
    rule = Rule("a.example/copies", keys=key, signed_prefix="b.example/team")
    assert rule.signed_name("a.example/copies/app") == "b.example/team/app"
    assert rule.signed_name("a.example/copies") == "b.example/team"
    below = Rule("a.example/copies/*", keys=key, signed_prefix="b.example")
    assert below.signed_name("a.example/copies/app/x") == "b.example/app/x"
    assert Rule("a.example", keys=key).signed_name("a.example/app") == "a.example/app"


def test_rules_that_leave_anything_open_are_refused() -> None:
    with pytest.raises(ValueError, match="names no keys"):
        Rule("*")
    with pytest.raises(ValueError, match="does not use"):
        Rule("*", Kind.REJECT, (Path("x"),))
    for pattern, prefix in (("*", "a.example"), ("*.example", "a.example"), ("a.example", "*"), ("a.example", "a.*")):
        with pytest.raises(ValueError, match=r"signed_prefix|pattern"):
            Rule(pattern, keys=(Path("x"),), signed_prefix=prefix)
    with pytest.raises(ValueError, match="all other repositories"):
        check([Rule("a.example", Kind.REJECT)])
    with pytest.raises(ValueError, match="more than one"):
        check([Rule("*", Kind.REJECT), Rule("*", Kind.ACCEPT)])
    check([])
    assert Gate([]).is_open


def test_the_library_for_signatures_is_not_loaded_without_keys() -> None:
    program = (
        "import sys, corral.images.service, corral.images.registry.pull, corral.images.registry.signatures\n"
        "from corral.images.policy.gate import Gate\n"
        "Gate([])\n"
        "sys.exit('cryptography' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def settings(text: str) -> ImagesConfig:
    table = tomllib.loads(text)["images"]
    made: ImagesConfig = config.build(ImagesConfig, {"root": "/x", "state": "/x", **table}, "images")
    return made


def test_a_policy_is_read_from_the_settings() -> None:
    found = settings("""
        [[images.policy]]
        pattern = "registry.example/team"
        keys = ["/etc/corral/team.pub"]
        [[images.policy]]
        pattern = "*"
        type = "reject"
    """)
    team = Rule("registry.example/team", Kind.SIGNED, (Path("/etc/corral/team.pub"),))
    assert found.policy == (team, Rule("*", Kind.REJECT))


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('type = "accept"', r"\[images\] policy\[0\]\.type|insecureAcceptAnything, reject"),
        ('key = "x"', r"\[images\.policy\[0\]\] has no setting 'key': keys\?|has no setting 'key'"),
        ('keys = "x"', "must be a list"),
        ("", "names no keys"),
        ('type = "reject"\n[[images.policy]]\ntype = "reject"', r"\[images\.policy\[1\]\]: a policy has no pattern"),
    ],
)
def test_a_policy_that_is_none_is_refused_by_name(line: str, why: str) -> None:
    with pytest.raises(InvalidArgument, match=why):
        settings(f'[[images.policy]]\npattern = "*"\n{line}\n')


@given(st.binary(max_size=300))
def test_no_payload_breaks_its_reading(data: bytes) -> None:
    with pytest.raises(InvalidArgument):
        parse_payload(data)
