"""Looking up users in files that somebody else wrote."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.oci.errors import SETUP, ExecFailed
from corral.oci.users import MAX_GROUPS, MAX_ID, Account, Group, Identity, parse_group, parse_id, parse_passwd, resolve

PASSWD = b"root:x:0:0:root:/root:/bin/sh\nbob:x:1000:1001::/home/bob:/bin/sh\n1234:x:0:0::/:\n"
GROUP = b"root:x:0:\nbob:x:1001:\nwheel:x:10:root,bob\ncrew:x:2000:alice, bob\n99:x:0:\n"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0),
        ("007", 7),
        ("4294967294", MAX_ID),
        ("4294967295", None),
        ("4294967296", None),
        ("99999999999999999999", None),
        ("-1", None),
        ("+1", None),
        ("0x0", None),
        ("1e3", None),
        (" 1", None),
        ("1_0", None),
        ("", None),
        ("٣", None),
        ("²", None),
    ],
)
def test_ids_are_decimal_digits_in_range(text, number):
    assert parse_id(text) == number


def test_lines_of_passwd():
    assert list(parse_passwd(PASSWD))[:2] == [
        Account("root", 0, 0, "/root"),
        Account("bob", 1000, 1001, "/home/bob"),
    ]


@pytest.mark.parametrize(
    "line",
    [
        b"evil:x:0x0:0::/:",
        b"evil:x::0::/:",
        b"evil:x:-0:0::/:",
        b"evil:x:4294967296:0::/:",
        b"evil:x:1:0",
        b"#evil:x:1:1::/:",
        b":x:1:1::/:",
        b"evil\0:x:1:1::/:",
        b"+evil",
        b"",
    ],
)
def test_a_line_that_is_not_right_counts_as_absent(line):
    assert list(parse_passwd(line)) == []


def test_lines_of_group():
    assert list(parse_group(GROUP))[2] == Group("wheel", 10, ("root", "bob"))
    assert list(parse_group(b"a:x:1:b,,c,")) == [Group("a", 1, ("b", "c"))]


@pytest.mark.parametrize(
    ("user", "identity"),
    [
        ("root", Identity(0, 0, (0, 10), "/root")),
        ("bob", Identity(1000, 1001, (1001, 10), "/home/bob")),
        ("1000", Identity(1000, 1001, (1001, 10), "/home/bob")),
        ("bob:crew", Identity(1000, 2000, (2000,), "/home/bob")),
        ("bob:5", Identity(1000, 5, (5,), "/home/bob")),
        ("77", Identity(77, 0, (0,), "/")),
        ("77:88", Identity(77, 88, (88,), "/")),
        ("1234", Identity(1234, 0, (0,), "/")),
        ("77:99", Identity(77, 99, (99,), "/")),
    ],
)
def test_a_user_string_stands_for(user, identity):
    assert resolve(user, PASSWD, GROUP) == identity


@pytest.mark.parametrize(
    "user",
    ["", ":", ":0", "bob:", "nobody", "bob:none", "0x0", "-1", "4294967295", "0:4294967295", "bob:0x0", "bob:1:2"],
)
def test_a_user_string_that_stands_for_nobody_is_refused(user):
    with pytest.raises(ExecFailed) as failed:
        resolve(user, PASSWD, GROUP)
    assert failed.value.kind == SETUP
    assert "user" in failed.value.message or "group" in failed.value.message


def test_memberships_are_all_had_or_refused():
    many = [b"g%d:x:%d:bob\n" % (i, i) for i in range(1, MAX_GROUPS + 2)]
    assert len(resolve("bob", PASSWD, b"".join(many[:-1])).groups) == MAX_GROUPS
    with pytest.raises(ExecFailed, match="user bob is in more groups than a process can have"):
        resolve("bob", PASSWD, b"".join(many))


@given(st.text(), st.binary(), st.binary())
def test_anything_gives_an_identity_or_a_sentence(user, passwd, group):
    with contextlib.suppress(ExecFailed):
        identity = resolve(user, passwd, group)
        assert 0 <= identity.uid <= MAX_ID
        assert 0 <= identity.gid <= MAX_ID


@given(st.binary(), st.binary())
def test_no_file_makes_a_number_somebody_else(passwd, group):
    assert resolve("1000", passwd, group).uid == 1000
