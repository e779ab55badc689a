"""What config.json says about namespaces is checked before anything is made; the JSON path begins each sentence."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.oci.confinement import check_confinement, check_ranges
from corral.oci.spec import IdMapping, Spec


def spec(*kinds: str, paths: dict[str, str] | None = None, user: object = None, mounts: object = (), **linux) -> Spec:
    namespaces = [{"type": kind, "path": (paths or {}).get(kind, "")} for kind in ("mount", *kinds)]
    return Spec.from_json(
        {
            "ociVersion": "1.2.0",
            "process": {"cwd": "/", "args": ["x"], "user": user or {}},
            "mounts": list(mounts),
            "linux": {"namespaces": namespaces, **linux},
        }
    )


def mapping(*ranges: tuple[int, int, int]) -> list[dict[str, int]]:
    return [{"containerID": inside, "hostID": outside, "size": count} for inside, outside, count in ranges]


RANGE = mapping((0, 100000, 65536))
BOTH = {"uidMappings": RANGE, "gidMappings": RANGE}


class TestUserNamespaces:
    def test_a_new_one_with_both_mappings_is_fine(self):
        check_confinement(spec("user", **BOTH, user={"uid": 65535, "gid": 1, "additionalGids": [3]}))

    def test_a_joined_one_needs_none(self):
        check_confinement(spec("user", paths={"user": "/proc/1/ns/user"}))

    @pytest.mark.parametrize(
        ("linux", "match"),
        [
            ({}, r"^linux\.uidMappings: missing"),
            ({"uidMappings": RANGE}, r"^linux\.gidMappings: missing"),
            ({"uidMappings": mapping((1, 100000, 10)), "gidMappings": RANGE}, r"^linux\.uidMappings: maps no id to 0"),
            (
                {"uidMappings": RANGE, "gidMappings": mapping((0, 1, 0))},
                r"^linux\.gidMappings\[0\]\.size: must not be 0",
            ),
        ],
    )
    def test_mappings_that_can_not_be_are_refused(self, linux, match):
        with pytest.raises(ValueError, match=match):
            check_confinement(spec("user", **linux))

    @pytest.mark.parametrize("name", ["uidMappings", "gidMappings"])
    def test_mappings_without_one_are_refused(self, name):
        with pytest.raises(ValueError, match=rf"^linux\.{name}: the container has no user namespace"):
            check_confinement(spec(**{name: RANGE}))

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"user": {"uid": 65536}}, r"^process\.user\.uid: 65536 is not mapped"),
            ({"user": {"gid": 65536}}, r"^process\.user\.gid: 65536 is not mapped"),
            ({"user": {"additionalGids": [1, 70000]}}, r"^process\.user\.additionalGids\[1\]: 70000"),
            ({"mounts": [{"destination": "/d", "options": ["gid=70000"]}]}, r"^mounts\[0\]\.options: gid=70000"),
            ({"mounts": [{"destination": "/d", "options": ["uid=70000"]}]}, r"^mounts\[0\]\.options: uid=70000"),
        ],
    )
    def test_ids_that_are_not_mapped_are_refused(self, changes, match):
        with pytest.raises(ValueError, match=match):
            check_confinement(spec("user", **BOTH, **changes))


class TestRanges:
    @pytest.mark.parametrize(
        ("ranges", "match"),
        [
            ([(0, 1000, 10), (9, 2000, 1)], r"^x\[1\]\.containerID: 9 is mapped twice"),
            ([(0, 1000, 10), (10, 1009, 1)], r"^x\[1\]\.hostID: 1009 is mapped twice"),
            ([(10, 1009, 1), (0, 1000, 10)], r"^x\[0\]\.hostID: 1009 is mapped twice"),
            ([(2**32 - 2, 0, 2)], r"^x\[0\]\.containerID: .* the last id"),
            ([(0, 2**32 - 2, 2)], r"^x\[0\]\.hostID: .* the last id"),
            ([(i, i + 1000, 1) for i in range(341)], r"^x: the kernel takes at most 340"),
        ],
    )
    def test_what_the_kernel_refuses_is_refused_by_name(self, ranges, match):
        with pytest.raises(ValueError, match=match):
            check_ranges([IdMapping(*each) for each in ranges], "x")

    @given(st.lists(st.tuples(*[st.integers(0, 2**32 - 1)] * 3), max_size=5))
    def test_what_is_taken_never_overlaps(self, ranges):
        mappings = [IdMapping(*each) for each in ranges]
        try:
            check_ranges(mappings, "x")
        except ValueError:
            return
        for name in ("container_id", "host_id"):
            spans = sorted((getattr(each, name), getattr(each, name) + each.size) for each in mappings)
            assert all(first[1] <= second[0] for first, second in pairwise(spans))


class TestTimeOffsets:
    def test_of_a_new_time_namespace_are_fine(self):
        check_confinement(spec("time", timeOffsets={"monotonic": {"secs": -5}, "boottime": {"nanosecs": 7}}))

    @pytest.mark.parametrize("changes", [{}, {"paths": {"time": "/proc/1/ns/time"}}])
    def test_of_no_new_one_are_refused(self, changes):
        kinds = ("time",) if changes else ()
        with pytest.raises(ValueError, match=r"^linux\.timeOffsets: the container has no new time namespace"):
            check_confinement(spec(*kinds, timeOffsets={"monotonic": {"secs": 1}}, **changes))

    def test_of_another_clock_are_refused(self):
        with pytest.raises(ValueError, match=r"^linux\.timeOffsets\.realtime: there is no such clock"):
            check_confinement(spec("time", timeOffsets={"realtime": {"secs": 1}}))

    def test_of_more_than_a_second_in_nanoseconds_are_refused(self):
        with pytest.raises(ValueError, match=r"^linux\.timeOffsets\.monotonic\.nanosecs: 1000000000"):
            spec("time", timeOffsets={"monotonic": {"nanosecs": 10**9}})


class TestNetDevices:
    def test_with_a_network_of_its_own_are_fine(self):
        check_confinement(
            spec("network", netDevices={"eth1": {}, "eth2": {"name": "net%d"}, "eth3": {"name": "net%d"}})
        )

    def test_without_are_refused(self):
        with pytest.raises(ValueError, match=r"^linux\.netDevices: the container shares the host's network"):
            check_confinement(spec(netDevices={"eth1": {}}))

    @pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "a:b", "%d", "eth\t", "sixteen-letters-"])
    def test_of_a_name_that_can_not_be_are_refused(self, name):
        with pytest.raises(ValueError, match=r"^linux\.netDevices\..*: not the name"):
            check_confinement(spec("network", netDevices={name: {}}))

    @pytest.mark.parametrize("name", ["..", "a/b", "a%", "%d%d", "%s", "a b", "sixteen-letters-"])
    def test_of_a_new_name_that_can_not_be_are_refused(self, name):
        with pytest.raises(ValueError, match=r"^linux\.netDevices\.eth1\.name: .* is not the name"):
            check_confinement(spec("network", netDevices={"eth1": {"name": name}}))

    def test_of_one_new_name_are_refused(self):
        with pytest.raises(ValueError, match=r"^linux\.netDevices\.eth2\.name: 'same' is given twice"):
            check_confinement(spec("network", netDevices={"eth1": {"name": "same"}, "eth2": {"name": "same"}}))
