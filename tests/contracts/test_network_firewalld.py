"""Hosts with firewalld: networks get through by its own zones, and it has the last word. By packets."""

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from support import firewalld
from support.firewalld import Firewalld
from support.netlab import HOST, OUTSIDE, Calls, Lab, address, command, eventually, reaches, tcp_call, tcp_server
from support.requirements import needs

from corral.api.network.v1 import network_pb2 as pb

pytestmark = needs("root", "netns", "nft", "nsenter", "ip", "dbus-daemon", "firewalld")
WITHIN_S = 3.0


@pytest.fixture(scope="module")
def made() -> Iterator[tuple[Lab, Firewalld]]:
    with (
        Lab() as lab,
        tempfile.TemporaryDirectory(prefix="corral-") as directory,
        firewalld.running(lab.host, Path(directory) / "firewalld") as wall,
    ):
        lab.corrald.stop()
        lab.corrald.start(environment={"DBUS_SYSTEM_BUS_ADDRESS": wall.bus})
        yield lab, wall


@pytest.fixture
def lab(made: tuple[Lab, Firewalld]) -> Lab:
    return made[0]


@pytest.fixture
def wall(made: tuple[Lab, Firewalld]) -> Firewalld:
    return made[1]


@pytest.fixture
async def net(lab: Lab) -> AsyncIterator[Calls]:
    async with lab.calls() as calls:
        yield calls
        for name in await calls.ids():
            await calls.detach(name)
        for name in await calls.network_names():
            if name not in ("bridge", "host", "none"):
                await calls.remove(name)


async def a_network(net: Calls, subnet: str = "10.231.64.0/24") -> tuple[pb.Endpoint, str]:
    """Connections that are tracked pass: who is to be kept from it needs an address that had none."""
    await net.create("one", subnet)
    made = await net.attach("a", "one", ports=[pb.PortMapping(container_port=7, host_port=8080)])
    return made, (await net.network("one")).interface


def works(lab: Lab, endpoint: pb.Endpoint) -> bool:
    """Whether the container gets out, and others get to its published port."""
    with tcp_server(endpoint.netns_path, address(endpoint)):
        return reaches(endpoint.netns_path, OUTSIDE) and tcp_call(lab.outside, HOST, 8080) == OUTSIDE


async def told(net: Calls) -> pb.ExplainedStep:
    steps = (await net.endpoints.Explain(pb.ExplainRequest(endpoint_id="a", destination=OUTSIDE))).steps
    [step] = [step for step in steps if step.where == "chain inet firewalld filter_FORWARD"]
    return step


async def test_a_network_is_trusted_as_long_as_it_is_there(lab: Lab, net: Calls, wall: Firewalld) -> None:
    a, bridge = await a_network(net)
    assert wall.zone_of(bridge) == "trusted"
    assert works(lab, a)
    assert (await told(net)).verdict == pb.ExplainedStep.VERDICT_PASSES
    await net.detach("a")
    await net.remove("one")
    assert wall.zone_of(bridge) == ""
    assert bridge not in command(lab.host, "nft", "list", "table", "inet", "firewalld")


async def test_a_reload_forgets_it_and_it_is_asked_for_again(lab: Lab, net: Calls, wall: Firewalld) -> None:
    a, bridge = await a_network(net)
    wall.client("--reload")
    assert eventually(lambda: wall.zone_of(bridge) == "trusted", within_s=WITHIN_S)
    assert works(lab, a)


async def test_a_zone_that_an_admin_chose_stays(lab: Lab, net: Calls, wall: Firewalld) -> None:
    a, bridge = await a_network(net, "10.231.67.0/24")
    wall.client("--zone=drop", f"--change-interface={bridge}")
    await net.create("another", "10.231.65.0/24")
    assert wall.zone_of(bridge) == "drop"
    assert not reaches(a.netns_path, OUTSIDE, within_s=0.4)
    step = await told(net)
    assert step.verdict == pb.ExplainedStep.VERDICT_MAY_DROP
    assert f"--add-interface={bridge}" in step.says
    await net.detach("a")
    await net.remove("one")
    assert wall.zone_of(bridge) == "drop"
    wall.client("--zone=drop", f"--remove-interface={bridge}")


async def test_an_internal_network_is_in_no_zone(net: Calls, wall: Firewalld) -> None:
    await net.create("inside", "10.231.66.0/24", internal=True)
    assert wall.zone_of((await net.network("inside")).interface) == ""


async def test_a_bus_that_does_not_answer_keeps_no_network_from_being_made(lab: Lab, net: Calls) -> None:
    lab.corrald.stop()
    lab.corrald.start(environment={"DBUS_SYSTEM_BUS_ADDRESS": "unix:path=/nowhere"})
    async with lab.calls() as calls:
        a, _ = await a_network(calls, "10.231.68.0/24")
        assert not reaches(a.netns_path, OUTSIDE, within_s=0.4)
    assert "network.not_admitted" in lab.corrald.log()
