"""Ports in a config and in an endpoint, compared."""

import pytest

from corral.api.engine.v1.engine_pb2 import ContainerConfig, NetworkConfig
from corral.api.network.v1.network_pb2 import Endpoint, PortMapping
from corral.engine import port_mappings, requests
from corral.engine.records import ContainerRecord, Status
from corral.rpc.errors import AlreadyExists, InvalidArgument


def port(container: int, host: int = 0, ip: str = "", protocol: str = "tcp") -> PortMapping:
    return PortMapping(container_port=container, host_port=host, host_ip=ip, protocol=protocol)


def record(asked: list[PortMapping], published: list[PortMapping], *, publish_all: bool = False) -> ContainerRecord:
    return ContainerRecord(
        namespace="default",
        id="a" * 64,
        name="web",
        config=ContainerConfig(network=NetworkConfig(ports=asked, publish_all=publish_all)),
        image_id="",
        created_ns=0,
        status=Status.RUNNING,
        endpoint=Endpoint(ports=published),
    )


def test_a_chosen_number_agrees_with_a_config_that_names_none() -> None:
    assert port_mappings.agree(record([port(80)], [port(80, 4000)]))


def test_addresses_are_compared_and_not_their_texts() -> None:
    assert port_mappings.agree(record([port(80, 1, "::0001")], [port(80, 1, "::1")]))


def test_what_an_engine_had_begun_to_change_is_found() -> None:
    begun = record([port(80, 1), port(81)], [port(80, 1), port(82, 2)])
    assert port_mappings.missing(begun) == [port(81)]
    assert port_mappings.superfluous(begun) == [port(82, 2)]
    again = requests.network_again(begun, host_hostname="h")
    assert list(again.ports) == [port(80, 1), port(81)]


def test_what_the_image_exposes_is_asked_for_by_publish_all() -> None:
    assert port_mappings.agree(record([], [port(80, 4000)], publish_all=True))


def test_publish_all_is_spelled_out_when_ports_change() -> None:
    before = record([port(53, 53, protocol="udp")], [port(53, 53, protocol="udp"), port(80, 4000)], publish_all=True)
    after = port_mappings.with_ports(before, before.endpoint.ports if before.endpoint else ()).network
    assert not after.publish_all
    assert list(after.ports) == [port(53, 53, protocol="udp"), port(80)]


@pytest.mark.parametrize("bad", [port(0), port(70000), port(80, 70000), port(80, protocol="icmp"), port(80, 1, "host")])
def test_what_is_no_port_is_refused(bad: PortMapping) -> None:
    with pytest.raises(InvalidArgument):
        port_mappings.checked([bad])


@pytest.mark.parametrize("other", [port(81, 1), port(81, 1, "127.0.0.1"), port(81, 1, "0.0.0.0")])
def test_a_port_of_the_host_leads_to_one_of_the_container(other: PortMapping) -> None:
    with pytest.raises(AlreadyExists, match="leads to port 80"):
        port_mappings.refuse_taken("web", [port(80, 1)], [other])


def test_two_addresses_of_the_host_have_a_port_each() -> None:
    port_mappings.refuse_taken("web", [port(80, 1, "127.0.0.1")], [port(81, 1, "127.0.0.2"), port(82, 1, "::1")])


def test_a_port_that_nobody_chose_is_not_taken_for_the_one_that_goes() -> None:
    before = record([port(80), port(80, 8080)], [port(80, 49153), port(80, 8080)])
    config = port_mappings.with_ports(before, [port(80, 49153)])
    after = record(list(config.network.ports), [port(80, 49153), port(80, 8080)])
    assert port_mappings.superfluous(after) == [port(80, 8080)]
    assert port_mappings.missing(after) == []


def test_a_port_of_a_range_agrees_with_it_and_is_named_by_it_ever_after() -> None:
    asked = PortMapping(container_port=80, host_port=8000, host_port_last=8010, protocol="tcp")
    within = record([asked], [port(80, 8003)])
    assert port_mappings.agree(within)
    assert list(port_mappings.with_ports(within, [port(80, 8003)]).network.ports) == [asked]
    assert not port_mappings.agree(record([asked], [port(80, 8011)]))
    again = requests.network_again(within, host_hostname="h", other_ports=True)
    assert [(one.host_port, one.host_port_last) for one in again.ports] == [(8000, 8010)]
    assert [one.host_port for one in requests.network_again(within, host_hostname="h").ports] == [8003]


@pytest.mark.parametrize(("first", "last"), [(0, 8010), (8010, 8000), (8000, 65536)])
def test_a_range_that_is_none_is_refused(first: int, last: int) -> None:
    with pytest.raises(InvalidArgument, match="are no range"):
        port_mappings.checked([PortMapping(container_port=80, host_port=first, host_port_last=last)])
