"""Others delete what is ours while endpoints are attached: it is there again within two seconds, by packets.

The host here is a namespace of the lab: no rule or link of the machine is touched.
"""

import asyncio
import contextlib
import json
import signal
from collections.abc import Callable, Iterator

import pytest
from support.netlab import (
    BRIDGE,
    GATEWAY,
    HOST,
    OUTSIDE,
    TABLE,
    Calls,
    Lab,
    address,
    command,
    eventually,
    port,
    reaches,
    tcp_call,
    tcp_server,
)
from support.requirements import needs

from corral.api.network.v1 import network_pb2 as pb
from corral.network.restoring import RETRY_S
from corral.rpc.errors import CorralError

pytestmark = needs("root", "netns", "nft", "nsenter", "ip")
WITHIN_S = 2.0
STRANGERS = "add table ip strangers; add chain ip strangers c { type filter hook input priority 0; }"


def answers(lab: Lab, number: int = 8080) -> Callable[[], bool]:
    def call() -> bool:
        try:
            return tcp_call(lab.outside, HOST, number) == OUTSIDE
        except OSError:
            return False

    return call


@contextlib.contextmanager
def stopped(lab: Lab) -> Iterator[None]:
    """The daemon sees nothing of it before all is done."""
    processes = lab.corrald.processes.values()
    for one in processes:
        one.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for one in processes:
            one.send_signal(signal.SIGCONT)


async def test_ports_work_again_after_a_flush_of_the_whole_ruleset(lab: Lab, net: Calls) -> None:
    a = await net.attach("a", ports=[port()])
    with tcp_server(a.netns_path, address(a)):
        assert answers(lab)()
        before = lab.ruleset()
        for _ in range(3):
            command(lab.host, "nft", "flush", "ruleset")
            assert eventually(lambda: lab.ruleset() == before, within_s=WITHIN_S)
            assert answers(lab)()
            assert reaches(a.netns_path, OUTSIDE)


@pytest.mark.parametrize(
    "deletion",
    [
        f"delete table inet {TABLE}",
        f"flush table inet {TABLE}",
        f"flush chain inet {TABLE} prerouting",
        f"flush map inet {TABLE} any4",
    ],
)
async def test_ports_work_again_after_a_part_of_our_table_was_deleted(lab: Lab, net: Calls, deletion: str) -> None:
    a = await net.attach("a", ports=[port()])
    with tcp_server(a.netns_path, address(a)):
        before = lab.ruleset()
        command(lab.host, "nft", *deletion.split())
        assert eventually(lambda: lab.ruleset() == before, within_s=WITHIN_S)
        assert answers(lab)()


async def test_rules_of_others_are_neither_restored_nor_touched(lab: Lab, net: Calls) -> None:
    await net.attach("a", ports=[port()])
    before = lab.ruleset()
    command(lab.host, "nft", STRANGERS)
    try:
        command(lab.host, "nft", "delete", "chain", "ip", "strangers", "c")
        command(lab.host, "nft", "delete", "table", "inet", TABLE)
        assert eventually(lambda: before in lab.ruleset().replace("table ip strangers {\n}\n", ""), within_s=WITHIN_S)
        assert "table ip strangers {\n}\n" in lab.ruleset()
    finally:
        command(lab.host, "nft", "delete", "table", "ip", "strangers")


async def test_our_own_changes_are_not_taken_for_those_of_others(lab: Lab, net: Calls) -> None:
    restored = lab.corrald.log().count("network.restored")
    await net.create("one")
    await net.attach("a", "one", ports=[port()])
    await net.endpoints.Unpublish(pb.UnpublishRequest(endpoint_id="a", ports=[port()]))
    await net.detach("a")
    await net.remove("one")
    await asyncio.sleep(1)
    assert lab.corrald.log().count("network.restored") == restored
    assert lab.settled()


async def test_ports_that_come_while_the_table_is_gone_are_there_with_the_others(lab: Lab, net: Calls) -> None:
    a = await net.attach("a", ports=[port()])
    with tcp_server(a.netns_path, address(a)):
        command(lab.host, "nft", "flush", "ruleset")
        await net.endpoints.Publish(pb.PublishRequest(endpoint_id="a", ports=[port(7, 8081)]))
        assert answers(lab)()
        assert answers(lab, 8081)()


async def test_a_port_that_is_being_withdrawn_is_not_there_again_with_the_table(lab: Lab) -> None:
    lab.corrald.stop()
    lab.corrald.start(environment={"CORRAL_FAILPOINTS": "network.withdraw.after_rules=error@1"})
    async with lab.calls() as net:
        await net.attach("a", ports=[port(), port(7, 8081)])
        with pytest.raises(CorralError):  # between its rule and its row
            await net.endpoints.Unpublish(pb.UnpublishRequest(endpoint_id="a", ports=[port()]))
        command(lab.host, "nft", "flush", "ruleset")
        assert eventually(lambda: "8081" in lab.ruleset(), within_s=WITHIN_S)
        assert "8080" not in lab.ruleset()
        await net.detach("a")
    lab.corrald.restart()


async def test_a_bridge_that_was_deleted_is_made_again_with_its_ports_and_its_resolver(lab: Lab, net: Calls) -> None:
    await net.create("one", "10.231.64.0/24")
    bridge = (await net.network("one")).interface
    a, b = await net.attach("a", "one", ports=[port()]), await net.attach("b", "one")
    with tcp_server(a.netns_path, address(a)):
        command(lab.host, "ip", "link", "delete", bridge)
        assert eventually(lambda: reaches(a.netns_path, address(b), within_s=0.2), within_s=WITHIN_S)
        assert eventually(lambda: reaches(a.netns_path, OUTSIDE, within_s=0.2), within_s=WITHIN_S)
        assert answers(lab)()
        assert tcp_call(lab.host, "127.0.0.1", 8080)
        sockets = command(lab.host, "ss", "-Huln")
        assert f"10.231.64.1%{bridge}:53" in sockets


async def test_a_bridge_that_cannot_be_made_keeps_no_other_from_it_and_is_tried_again(lab: Lab, net: Calls) -> None:
    await net.create("one", "10.231.64.0/24", interface="crltone")
    await net.create("two", "10.231.65.0/24", interface="crlttwo")
    a, b = await net.attach("a", "one"), await net.attach("b", "two")
    batch = lab.place.directory / "batch"
    batch.write_text("link delete crltone\nlink add crltone type veth peer name stranger\nlink delete crlttwo\n")
    with stopped(lab):  # or the first is there again before its name is taken
        command(lab.host, "ip", "-batch", str(batch))
    assert eventually(lambda: reaches(b.netns_path, OUTSIDE, within_s=0.2), within_s=WITHIN_S)
    assert not reaches(a.netns_path, OUTSIDE, within_s=0.2)
    command(lab.host, "ip", "link", "set", "crltone", "name", "another")  # of which nobody is told
    assert eventually(lambda: reaches(a.netns_path, OUTSIDE, within_s=0.2), within_s=RETRY_S + WITHIN_S)
    command(lab.host, "ip", "link", "delete", "another")


async def test_an_address_of_a_bridge_that_was_deleted_is_back(lab: Lab, net: Calls) -> None:
    a = await net.attach("a")
    command(lab.host, "ip", "address", "flush", "dev", BRIDGE)
    assert eventually(lambda: reaches(a.netns_path, GATEWAY, within_s=0.2), within_s=WITHIN_S)


async def test_a_pair_that_is_made_again_is_as_it_was(lab: Lab, net: Calls) -> None:
    a = await net.attach("a", ports=[port()], sysctls={"net.ipv4.conf.eth0.arp_ignore": "3"})
    end = a.interfaces[0].host_name
    command(lab.host, "ip", "link", "delete", end)
    assert eventually(lambda: reaches(a.netns_path, OUTSIDE, within_s=0.2), within_s=WITHIN_S)
    assert command(a.netns_path, "sysctl", "-n", "net.ipv4.conf.eth0.arp_ignore").strip() == "3"
    [link] = json.loads(command(lab.host, "ip", "-j", "-d", "link", "show", end))
    assert link["linkinfo"]["info_slave_data"]["hairpin"]


async def test_a_pair_whose_making_again_was_cut_short_is_whole_after_the_next_start(lab: Lab) -> None:
    lab.corrald.stop()
    lab.corrald.start(environment={"CORRAL_FAILPOINTS": "network.connect.after_plug=kill@1"})
    async with lab.calls() as net:
        a = await net.attach("a")
        before = lab.links()
        command(lab.host, "ip", "link", "delete", a.interfaces[0].host_name)
        assert eventually(lambda: any(name.endswith("~") for name in lab.links()))
    lab.corrald.kill9()
    lab.corrald.start()
    async with lab.calls() as net:
        assert eventually(lambda: reaches(a.netns_path, OUTSIDE, within_s=0.2))
        assert lab.links() == before
        await net.detach("a")


async def test_a_pair_whose_end_on_the_host_was_deleted_is_made_again(lab: Lab, net: Calls) -> None:
    a, b = await net.attach("a"), await net.attach("b")
    command(lab.host, "ip", "link", "delete", a.interfaces[0].host_name)
    assert eventually(lambda: reaches(b.netns_path, address(a), within_s=0.2), within_s=WITHIN_S)
    assert eventually(lambda: reaches(a.netns_path, OUTSIDE, within_s=0.2), within_s=WITHIN_S)
    assert lab.veths() == {a.interfaces[0].host_name, b.interfaces[0].host_name}


async def test_a_link_of_others_may_have_a_name_of_any_bytes(lab: Lab, net: Calls) -> None:
    a = await net.attach("a")
    lame = "n=$(printf 'x\\377'); ip link add $n type bridge && ip address add 192.0.2.1/24 dev $n && ip link delete $n"
    command(lab.host, "sh", "-c", f"{lame}; ip link delete {a.interfaces[0].host_name}")
    assert eventually(lambda: a.interfaces[0].host_name in lab.links(), within_s=WITHIN_S)
    assert "UnicodeDecodeError" not in lab.corrald.log()


async def test_a_network_that_was_removed_stays_so(lab: Lab, net: Calls) -> None:
    await net.create("one")
    bridge = (await net.network("one")).interface
    await net.attach("a", "one")
    await net.detach("a")
    await net.remove("one")
    await asyncio.sleep(0.5)
    assert bridge not in lab.bridges()
