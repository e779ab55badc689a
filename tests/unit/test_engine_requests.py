"""What the engine asks of the leaves for one container."""

import pytest

from corral.api.engine.v1.engine_pb2 import ContainerConfig, NetworkConfig
from corral.api.network.v1.network_pb2 import AttachRequest, NetworkAttachment, PortMapping
from corral.api.tasks.v1.tasks_pb2 import LogOptions
from corral.api.types.v1.types_pb2 import CpuResources, DeviceRule, MemoryResources, Resources
from corral.engine import requests
from corral.engine.devices import GrantedDevice, rules
from corral.engine.records import ContainerRecord, Status
from corral.oci.spec import Device, DeviceType
from corral.rpc.errors import InvalidArgument

ID = "0123456789abcdef" * 4


def record(config: ContainerConfig) -> ContainerRecord:
    return ContainerRecord("ns", ID, "web", Status.CREATING, config, created_ns=1)


def network(mode: str = "", **fields: object) -> AttachRequest:
    config = ContainerConfig(network=NetworkConfig(mode=mode, **fields))  # type: ignore[arg-type]
    return requests.network(
        config, "default", ID, name="web", host_hostname="thehost", exposed=["80/tcp", "53/udp", "443"]
    )


@pytest.mark.parametrize(
    ("mode", "kind", "networks"),
    [
        ("", AttachRequest.MODE_NETWORKS, ["bridge"]),
        ("bridge", AttachRequest.MODE_NETWORKS, ["bridge"]),
        ("backend", AttachRequest.MODE_NETWORKS, ["backend"]),
        ("none", AttachRequest.MODE_NONE, []),
        ("host", AttachRequest.MODE_HOST, []),
        ("container:abc", AttachRequest.MODE_CONTAINER, []),
        ("ns:/run/netns/x", AttachRequest.MODE_PATH, []),
    ],
)
def test_network_modes(mode: str, kind: int, networks: list[str]) -> None:
    request = network(mode)
    assert request.mode == kind
    assert [attachment.network for attachment in request.networks] == networks
    assert request.hostname == ID[:12]


def test_what_a_network_mode_names_reaches_the_leaf() -> None:
    assert network("container:abc").container_endpoint == "abc"
    assert network("ns:/run/netns/x").netns_path == "/run/netns/x"


def test_the_first_attachment_is_for_the_network_of_the_mode() -> None:
    request = network(
        "backend", attachments=[NetworkAttachment(ipv4_address="10.0.0.9"), NetworkAttachment(network="b")]
    )
    assert [(a.network, a.ipv4_address) for a in request.networks] == [("backend", "10.0.0.9"), ("b", "")]


def test_publish_all_adds_the_images_ports_that_are_not_published_already() -> None:
    request = network(publish_all=True, ports=[PortMapping(container_port=80, host_port=8080)])
    assert [(p.container_port, p.protocol, p.host_port) for p in request.ports] == [
        (80, "", 8080),
        (53, "udp", 0),
        (443, "tcp", 0),
    ]
    with pytest.raises(InvalidArgument, match="no port"):
        requests.network(
            ContainerConfig(network=NetworkConfig(publish_all=True)),
            "n",
            ID,
            name="web",
            host_hostname="",
            exposed=["http"],
        )


def test_in_the_hosts_uts_namespace_the_network_files_name_the_host() -> None:
    config = ContainerConfig(uts_mode="host")
    assert requests.network(config, "n", ID, name="web", host_hostname="thehost").hostname == "thehost"


def test_a_memory_limit_alone_also_limits_swap_to_twice_as_much() -> None:
    resources = Resources(memory=MemoryResources(limit_bytes=100))
    assert requests.with_default_swap(resources).memory.swap_bytes == 200
    assert not resources.memory.HasField("swap_bytes")


@pytest.mark.parametrize(
    "resources",
    [
        Resources(),
        Resources(cpu=CpuResources(shares=2)),
        Resources(memory=MemoryResources(limit_bytes=-1)),
        Resources(memory=MemoryResources(limit_bytes=100, swap_bytes=-1)),
        Resources(memory=MemoryResources(limit_bytes=100, swap_bytes=150)),
    ],
)
def test_swap_that_was_asked_for_or_no_memory_limit_changes_nothing(resources: Resources) -> None:
    assert requests.with_default_swap(resources) is resources


def test_the_device_cgroup_denies_all_but_the_harmless_and_the_granted() -> None:
    granted = GrantedDevice(Device("/dev/fuse", DeviceType.CHAR, 10, 229), "rw")
    found = rules([granted], privileged=False)
    assert found[0] == DeviceRule(allow=False, type="a", access="rwm")
    assert found[-1] == DeviceRule(allow=True, type="c", major=10, minor=229, access="rw")
    assert DeviceRule(allow=True, type="c", major=1, minor=3, access="rwm") in found
    assert not any(rule.allow and rule.type == "b" and rule.access != "m" for rule in found)
    assert list(rules([], privileged=True)) == [DeviceRule(allow=True, type="a", access="rwm")]


def test_rules_that_were_asked_for_are_taken_as_they_are() -> None:
    own = DeviceRule(allow=True, type="a", access="rwm")
    config = ContainerConfig(resources=Resources(devices=[own]))
    request = requests.cgroup(config, rules([], privileged=False), "n", ID, swap_default=True)
    assert list(request.resources.devices) == [own]


def test_the_log_is_kept_outside_the_task_unless_the_caller_says_where() -> None:
    def log_of(config: ContainerConfig) -> str:
        request = requests.task(record(config), spec=b"", rootfs=(), log_path="/engine/log")
        return request.log.path

    assert log_of(ContainerConfig()) == "/engine/log"
    assert log_of(ContainerConfig(log=LogOptions(path="/pods/log"))) == "/pods/log"
    assert not log_of(ContainerConfig(log=LogOptions(driver=LogOptions.DRIVER_NONE)))


def test_all_that_leaves_keep_for_a_container_says_whose_it_is() -> None:
    config = ContainerConfig(image="busybox")
    made = (
        requests.snapshot(config, "ns", ID),
        requests.cgroup(config, (), "ns", ID, swap_default=True),
        requests.network(config, "ns", ID, name="web", host_hostname=""),
        requests.task(record(config), spec=b"", rootfs=(), log_path="/x"),
    )
    for request in made:
        assert request.labels["corral.owner"] == "engine"
        assert (request.labels["corral.namespace"], request.labels["corral.container"]) == ("ns", ID)
