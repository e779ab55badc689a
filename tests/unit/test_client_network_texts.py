"""Rates and routes of networks as people type them."""

import pytest

from corral.api.network.v1 import network_pb2
from corral.client.network_options import attachment, network_config, port, rate_bps


@pytest.mark.parametrize(
    ("text", "bits"),
    [("100", 100), ("64k", 64_000), ("100m", 100_000_000), ("1.5G", 1_500_000_000), ("8mbit", 8_000_000)],
)
def test_rates_are_bits_per_second_in_powers_of_a_thousand(text: str, bits: int) -> None:
    assert rate_bps(text) == bits


@pytest.mark.parametrize("text", ["", "fast", "-1m", "10t", "10m/"])
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not understood"):
        rate_bps(text)


def test_a_network_has_rates_and_routes_of_its_own() -> None:
    made = attachment("name=web,rate=100m/20m,route=10.9.0.0/16@10.1.0.1,route=fd09::/64@fd01::1")
    assert made == network_pb2.NetworkAttachment(
        network="web",
        receive_bps=100_000_000,
        send_bps=20_000_000,
        routes=[
            network_pb2.Route(destination="10.9.0.0/16", gateway="10.1.0.1"),
            network_pb2.Route(destination="fd09::/64", gateway="fd01::1"),
        ],
    )


def test_net_rate_is_for_every_network() -> None:
    made = network_config({"network": ["one", "two"], "net_rate": "1m"})
    assert made is not None
    assert [(each.network, each.receive_bps, each.send_bps) for each in made.attachments] == [
        ("one", 1_000_000, 1_000_000),
        ("two", 1_000_000, 1_000_000),
    ]


def test_net_rate_alone_is_for_the_default_network() -> None:
    made = network_config({"net_rate": "0/1m"})
    assert made is not None
    assert [(each.network, each.receive_bps, each.send_bps) for each in made.attachments] == [("", 0, 1_000_000)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("80", [("", 0, 80, "tcp")]),
        ("0:80", [("", 0, 80, "tcp")]),
        ("127.0.0.1:0:80/udp", [("127.0.0.1", 0, 80, "udp")]),
        ("127.0.0.1::80", [("127.0.0.1", 0, 80, "tcp")]),
        ("[::1]:8080:80", [("::1", 8080, 80, "tcp")]),
        ("8080-8081:80-81", [("", 8080, 80, "tcp"), ("", 8081, 81, "tcp")]),
        ("0:80-81", [("", 0, 80, "tcp"), ("", 0, 81, "tcp")]),
    ],
)
def test_a_published_port(text: str, expected: list[tuple[str, int, int, str]]) -> None:
    found = [(one.host_ip, one.host_port, one.container_port, one.protocol) for one in port(text)]
    assert found == expected


def test_one_port_of_a_container_has_the_first_that_is_free_of_many() -> None:
    (found,) = port("127.0.0.1:8000-8010:80/udp")
    assert (found.host_port, found.host_port_last, found.container_port, found.protocol) == (8000, 8010, 80, "udp")


@pytest.mark.parametrize("text", ["", "0", "80:0", "8080-8082:80-81", "8081-8080:80", "65536:80", "a:80", "80/icmp"])
def test_what_is_no_published_port_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="give \\[IP:\\]"):
        port(text)
