"""Subnets, gateways and hardware addresses: what is taken, what is refused, what is chosen."""

from ipaddress import IPv4Network, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.network import subnets
from corral.network.ipam import Subnet
from corral.rpc.errors import FailedPrecondition, InvalidArgument, ResourceExhausted

NETWORKS = st.builds(
    lambda number, length: IPv4Network((number >> (32 - length) << (32 - length), length)),
    st.integers(0x0A000000, 0x0A03FFFF),
    st.integers(16, 30),
)


@given(st.lists(NETWORKS, max_size=30), st.integers(20, 28))
def test_a_chosen_subnet_overlaps_nothing_and_is_the_first_such(taken: list[IPv4Network], length: int) -> None:
    owners: dict[Subnet, str] = dict.fromkeys(taken, "x")
    everything = list(IPv4Network("10.0.0.0/14").subnets(new_prefix=length))[:4096]
    expected = next((one for one in everything if not any(one.overlaps(other) for other in taken)), None)
    try:
        chosen = subnets.choose(["10.0.0.0/14"], length, owners)
    except ResourceExhausted:
        assert expected is None
    else:
        assert expected is None or chosen == expected
        assert subnets.overlapping(chosen, owners) is None


def test_a_pool_smaller_than_the_prefix_is_taken_as_a_whole() -> None:
    assert str(subnets.choose(["10.1.0.0/28"], 24, {})) == "10.1.0.0/28"
    assert str(subnets.choose(["10.1.0.0/16"], 0, {})) == "10.1.0.0/16"


def test_pools_are_used_in_order() -> None:
    taken: dict[Subnet, str] = {ip_network("10.1.0.0/25"): "x"}
    assert str(subnets.choose(["10.1.0.0/24", "10.2.0.0/24"], 24, taken)) == "10.2.0.0/24"
    with pytest.raises(ResourceExhausted, match="pools"):
        subnets.choose(["10.1.0.0/24"], 24, taken)


def test_versions_never_overlap() -> None:
    assert subnets.overlapping(ip_network("10.0.0.0/8"), {ip_network("fd00::/8"): "x"}) is None


def test_an_overlap_is_named() -> None:
    with pytest.raises(FailedPrecondition, match=r"10\.0\.1\.0/24 overlaps the moon \(10\.0\.0\.0/16\)") as refused:
        subnets.refuse_overlap(ip_network("10.0.1.0/24"), {ip_network("10.0.0.0/16"): "the moon"})
    assert refused.value.reason == "SUBNET_OVERLAPS"


def test_a_range_has_the_first_address_as_gateway_unless_told() -> None:
    assert str(subnets.make_range("10.0.0.0/24").gateway) == "10.0.0.1"
    assert str(subnets.make_range("10.0.0.0/24", gateway="10.0.0.9").gateway) == "10.0.0.9"
    assert str(subnets.make_range("fd00::/64").gateway) == "fd00::1"


@pytest.mark.parametrize(
    "text", ["", "10.0.0.0", "10.0.0.1/24", "10.0.0/24", "x/24", "10.0.0.0/33", "fe80::/64", "::1/128"]
)
def test_what_is_no_subnet_for_a_network_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        subnets.make_range(text)


@pytest.mark.parametrize(
    "mac", ["01:00:5e:00:00:01", "ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00", "2:0:0:0:0:1", "", "02:00:00:00:00"]
)
def test_macs_that_no_host_may_have_are_refused(mac: str) -> None:
    with pytest.raises(InvalidArgument):
        subnets.parse_mac(mac)


def test_macs_are_written_in_one_way() -> None:
    assert subnets.parse_mac("02-AB-cd-00-00-01") == "02:ab:cd:00:00:01"


@given(st.ip_addresses(v=4), st.ip_addresses(v=4))
def test_a_mac_follows_from_the_address_and_differs_with_it(one: object, two: object) -> None:
    first, second = subnets.mac_of(ip_address(str(one))), subnets.mac_of(ip_address(str(two)))
    assert subnets.parse_mac(first) == first
    assert (first == second) == (one == two)


@pytest.mark.parametrize("name", ["lo", "", "a" * 16, "a b", "../x", "-x", "all", "default", "a:1"])
def test_names_that_no_interface_can_have_are_refused(name: str) -> None:
    with pytest.raises(InvalidArgument):
        subnets.check_interface_name(name)
