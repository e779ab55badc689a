"""Options of a container in people's words, as messages."""

import os
from typing import Any

import pytest

from corral.api.engine.v1 import engine_pb2 as pb
from corral.api.network.v1.network_pb2 import NetworkAttachment
from corral.api.types.v1.types_pb2 import (
    CpuResources,
    HugetlbLimit,
    IoDeviceLimit,
    IoResources,
    MemoryResources,
    RdmaLimit,
    Resources,
)
from corral.client.network_options import network_config
from corral.client.options import container_config, update_request
from corral.client.resource_options import resources
from corral.engine.options import check
from corral.rpc.errors import InvalidArgument


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, None),
        ({"network": ""}, None),
        ({"network": "web"}, pb.NetworkConfig(mode="web")),
        ({"network": ["web"]}, pb.NetworkConfig(mode="web")),
        ({"network": "container:x=y"}, pb.NetworkConfig(mode="container:x=y")),
        (
            {"network": "web", "ip": "10.1.0.2", "network_aliases": ["db"]},
            pb.NetworkConfig(
                mode="web", attachments=[NetworkAttachment(network="web", ipv4_address="10.1.0.2", aliases=["db"])]
            ),
        ),
        ({"ip": "fd00::2"}, pb.NetworkConfig(attachments=[NetworkAttachment(ipv6_address="fd00::2")])),
        (
            {"network": ["name=web,alias=a,alias=b,ip=10.1.0.2,mac-address=02:00:00:00:00:01", "back"]},
            pb.NetworkConfig(
                mode="web",
                attachments=[
                    NetworkAttachment(
                        network="web", aliases=["a", "b"], ipv4_address="10.1.0.2", mac_address="02:00:00:00:00:01"
                    ),
                    NetworkAttachment(network="back"),
                ],
            ),
        ),
    ],
)
def test_networks(options: Any, wanted: pb.NetworkConfig | None) -> None:
    assert network_config(options) == wanted


@pytest.mark.parametrize("text", ["alias=a", "name=web,speed=10", "name=web,ip"])
def test_a_network_that_is_not_understood_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=text):
        network_config({"network": text})


@pytest.mark.parametrize("options", [{"network": ["none", "web"]}, {"network": "host", "ip": "10.1.0.2"}])
def test_modes_that_are_no_networks_stand_alone(options: Any) -> None:
    with pytest.raises(InvalidArgument, match="goes with no other network"):
        check(container_config("x", **options))


def test_resources() -> None:
    assert resources({}) is None
    assert resources({"cpu_period": 50_000, "cpu_quota": -1}) == Resources(
        cpu=CpuResources(period_us=50_000, quota_us=-1)
    )
    assert resources({"memory_swappiness": 0, "oom_kill_disable": True}) == Resources(
        memory=MemoryResources(swappiness=0, disable_oom_killer=True)
    )
    assert resources({"cgroup_conf": {"memory.high": "64M"}}) == Resources(unified={"memory.high": "64M"})
    limits = resources({"blkio_weight": 300, "device_read_bps": ["7:1:10m"], "device_write_iops": ["7:1:5", "7:2:6"]})
    assert limits == Resources(
        io=IoResources(
            weight=300,
            devices=[
                IoDeviceLimit(major=7, minor=1, read_bytes_per_s=10 << 20, write_ops_per_s=5),
                IoDeviceLimit(major=7, minor=2, write_ops_per_s=6),
            ],
        )
    )


def test_a_switch_that_is_off_is_a_value_and_one_that_is_not_given_is_none() -> None:
    assert resources({"cpu_idle": False, "cpu_burst": 0, "oom_group": False, "oom_kill_disable": False}) == Resources(
        cpu=CpuResources(idle=0, burst_us=0), memory=MemoryResources(oom_group=False, disable_oom_killer=False)
    )
    assert resources({"cpu_idle": True, "memory_high": "1m", "memory_min": "2k"}) == Resources(
        cpu=CpuResources(idle=1), memory=MemoryResources(high_bytes=1 << 20, min_bytes=2048)
    )


def test_a_size_is_exact_however_large_it_is() -> None:
    most = (1 << 63) - 1
    assert resources({"memory": str(most), "memory_swap": "1.5k"}) == Resources(
        memory=MemoryResources(limit_bytes=most, swap_bytes=1536)
    )


def test_write_access_to_its_cgroup_is_a_security_option() -> None:
    assert container_config("x", security=["writable-cgroups=true"]).writable_cgroups
    assert container_config("x", security=["writable-cgroups=false"]).HasField("writable_cgroups")
    with pytest.raises(ValueError, match="writable-cgroups=true"):
        container_config("x", security=["writable-cgroups=perhaps"])


def test_huge_pages_rdma_and_device_rules() -> None:
    assert resources({"hugetlb": ["2MB=64m"], "rdma": ["mlx5_0=hca_handle=2,hca_object=100"]}) == Resources(
        hugetlb=[HugetlbLimit(page_size="2MB", limit_bytes=64 << 20)],
        rdma={"mlx5_0": RdmaLimit(hca_handles=2, hca_objects=100)},
    )
    found = container_config("x", device_cgroup_rules=["c 42:* rmw", "b 8:1 r", "a *:* m"]).device_rules
    assert [(rule.type, rule.HasField("major"), rule.major, rule.HasField("minor"), rule.access) for rule in found] == [
        ("c", True, 42, False, "rmw"), ("b", True, 8, True, "r"), ("a", False, 0, False, "m"),
    ]  # fmt: skip
    assert all(rule.allow for rule in found)
    for text in ("c 42 rwm", "x 1:2 r", "c 1:2 x", ""):
        with pytest.raises(ValueError, match="give a, b or c"):
            container_config("x", device_cgroup_rules=[text])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hugetlb": ["2MB"]}, "2MB=64m"),
        ({"hugetlb": ["2MB=-1"]}, "hugetlb '2MB=-1' is not understood"),
        ({"hugetlb": ["2MB=lots"]}, "hugetlb '2MB=lots' is not understood"),
        ({"rdma": ["mlx5_0=handles=1"]}, "hca_handle=2"),
        ({"device_read_bps": ["/dev/sda"]}, "give DEVICE:NUMBER"),
        ({"device_read_iops": ["/dev/sda:1m"]}, "give DEVICE:NUMBER"),
        ({"device_read_bps": ["/dev/nowhere:1"]}, "/dev/nowhere: No such file"),
        ({"device_read_bps": [f"{os.devnull}:1"]}, "no block device"),
        ({"cpus": 1.0, "cpu_quota": 5}, "one or the other"),
        ({"cpus": 0.001}, "too little"),
    ],
)
def test_limits_that_make_no_sense_are_named(options: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        resources(options)


def test_a_score_of_zero_is_one() -> None:
    assert container_config("x", oom_score_adj=0).HasField("oom_score_adj")
    assert not container_config("x").HasField("oom_score_adj")


def test_what_an_update_names_not_stays() -> None:
    request = update_request("c", cpu_shares=5)
    assert request.resources == Resources(cpu=CpuResources(shares=5))
    assert not update_request("c", restart="no").HasField("resources")
