"""config.json with corral's own seccomp profile is read as any other, but for the time that it takes."""

import json
import re
from dataclasses import replace

import pytest

from corral.oci import decode, defaults
from corral.oci.decode import encode
from corral.oci.rehearsal import Typical
from corral.oci.spec import Action, Linux, Mount, Process, Seccomp, SeccompSyscall, Spec
from corral.oci.usual import _MARK, spec_of, usual_profile

PROFILE = defaults.seccomp(defaults.CAPABILITIES)
FILE = Mount("/etc/hosts", "bind", "/hosts", ("rbind",))
OTHER = Seccomp(Action.ERRNO, 1, (), syscalls=(SeccompSyscall(("read",), Action.ALLOW),))


def spec(seccomp: Seccomp | None, **members: str) -> Spec:
    return Spec(
        "1.3.0",
        process=Process("/", args=("true",)),
        linux=Linux(seccomp=seccomp, cgroups_path="/x"),
        annotations=members,
    )


def with_mounts(*mounts: Mount) -> Spec:
    return replace(spec(PROFILE), mounts=mounts)


def text_of(document: object) -> str:
    return json.dumps(document, separators=(",", ":"))


def test_its_own_profile_is_the_one_that_is_known() -> None:
    read = spec_of(text_of(spec(PROFILE).to_json()))
    assert read == spec(PROFILE)
    assert read.linux.seccomp is usual_profile()[1]


def test_the_mounts_that_all_have_are_those_that_are_known() -> None:
    wanted = with_mounts(*defaults.MOUNTS, FILE)
    read = spec_of(text_of(wanted.to_json()))
    assert read == wanted
    assert all(mount is known for mount, known in zip(read.mounts, defaults.MOUNTS, strict=False))
    assert spec_of(text_of(with_mounts(*defaults.MOUNTS).to_json())).mounts == defaults.MOUNTS


@pytest.mark.parametrize("mounts", [(), (FILE,), defaults.MOUNTS[:-1], (FILE, *defaults.MOUNTS)])
def test_other_mounts_are_read(mounts: tuple[Mount, ...]) -> None:
    assert spec_of(text_of(with_mounts(*mounts).to_json())) == with_mounts(*mounts)


@pytest.mark.parametrize("mounts", [None, [], [encode(FILE)], _MARK, [_MARK]])
def test_mounts_of_that_name_in_another_place_are_not_the_mounts(mounts: object) -> None:
    """Of an object that this version does not know, say."""
    text = text_of({"later": {"mounts": encode(defaults.MOUNTS)}, "mounts": mounts, **spec(PROFILE).to_json()})
    try:
        expected: object = Spec.from_json(json.loads(text))
    except ValueError as e:
        with pytest.raises(ValueError, match=re.escape(str(e))):
            spec_of(text)
    else:
        assert spec_of(text) == expected


def test_what_is_wrong_with_a_mount_behind_them_is_told_by_its_place() -> None:
    text = text_of(with_mounts(*defaults.MOUNTS, FILE).to_json()).replace('["rbind"]', '"rbind"')
    with pytest.raises(ValueError, match=rf"^mounts\[{len(defaults.MOUNTS)}\]\.options: must be an array"):
        spec_of(text)


@pytest.mark.parametrize("seccomp", [None, OTHER, replace(PROFILE, default_errno_ret=38)])
def test_any_other_profile_is_read(seccomp: Seccomp | None) -> None:
    assert spec_of(text_of(spec(seccomp).to_json())) == spec(seccomp)


def test_one_that_was_written_in_another_way_is_read() -> None:
    assert spec_of(json.dumps(spec(PROFILE).to_json(), indent=1)) == spec(PROFILE)


def test_a_member_of_that_name_in_another_place_is_not_the_profile() -> None:
    """Of an object that this version does not know, say: without linux.seccomp there is no filter."""
    document = spec(OTHER).to_json()
    assert isinstance(document, dict)
    elsewhere = {"later": {"seccomp": PROFILE_JSON}, **document}
    assert spec_of(text_of(elsewhere)) == spec(OTHER)
    assert spec_of(text_of({"later": {"seccomp": PROFILE_JSON}, **BARE})) == spec(None)


@pytest.mark.parametrize(
    "text",
    [
        '{"ociVersion":"1.3.0","later":{MEMBER},"linux":{"seccomp":null}}',
        '{"ociVersion":"1.3.0","linux":{"later":{MEMBER},"seccomp":null}}',
        '{"ociVersion":"1.3.0","linux":{MEMBER,"seccomp":null}}',
        '{"ociVersion":"1.3.0","linux":{MEMBER},"linux":{"seccomp":null}}',
        '{"ociVersion":"1.3.0","linux":{"seccomp":null,"x\\MEMBER}}',
    ],
)
def test_null_stays_null_wherever_else_the_profile_is(text: str) -> None:
    text = text.replace("MEMBER", usual_profile()[0])
    assert Spec.from_json(json.loads(text)).linux.seccomp is None
    assert spec_of(text).linux.seccomp is None


@pytest.mark.parametrize("mark", [str(_MARK), f"{_MARK}.0", "-7.316254809131e12"])
def test_who_knows_what_stands_for_it_meanwhile_is_refused_as_ever(mark: str) -> None:
    member, _ = usual_profile()
    with pytest.raises(ValueError, match=r"linux\.seccomp: must be an object"):
        spec_of(f'{{"ociVersion":"1.3.0","later":{{{member}}},"linux":{{"seccomp":{mark}}}}}')


def test_text_that_looks_like_it_is_text() -> None:
    member, _ = usual_profile()
    assert spec_of(text_of(spec(OTHER, note=member).to_json())) == spec(OTHER, note=member)
    assert spec_of(text_of(spec(PROFILE, note=member).to_json())) == spec(PROFILE, note=member)


def test_what_is_no_json_is_refused() -> None:
    member, _ = usual_profile()
    for text in ("", "{", f"{{{member}", f'{{"linux":{{{member}}}', "[]"):
        with pytest.raises(ValueError, match=r"."):
            spec_of(text)


def test_what_a_typical_one_takes_to_be_read_is_made_by_reading_it_once() -> None:
    typical = Typical()
    typical.read()
    made = decode._for_dataclass.cache_info().misses
    typical.plan()
    Spec.from_json(json.loads(text_of(spec(PROFILE).to_json())))
    assert decode._for_dataclass.cache_info().misses == made


PROFILE_JSON = decode.encode(PROFILE)
BARE = spec(None).to_json()
assert isinstance(BARE, dict)
