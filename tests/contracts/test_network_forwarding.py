"""Hosts whose iptables drops what it does not know: networks get through by rules of ours there, and only by those.

The host here is a namespace of the lab: no rule of the machine is touched.
"""

import asyncio
import errno
import fcntl
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from support.corrald import COMMAND
from support.netlab import (
    HOST,
    OUTSIDE,
    TABLE,
    Calls,
    Lab,
    address,
    command,
    eventually,
    reaches,
    tcp_call,
    tcp_server,
)
from support.requirements import needs

from corral.api.network.v1 import network_pb2 as pb
from corral.kernel.nftables import Nftables
from corral.network import forwarding
from corral.network.nfnetlink import IPV4, Chain, Nfnetlink
from corral.network.restoring import LOOK_S, RETRY_S
from corral.rpc.errors import CorralError

pytestmark = needs("root", "netns", "nft", "nsenter", "ip", "iptables")
RULE = f"-A FORWARD -m mark --mark {forwarding.mark(TABLE):#x} -j ACCEPT"
WITHIN_S = 2.0


@pytest.fixture
async def net(lab: Lab) -> AsyncIterator[Calls]:
    async with lab.calls() as calls:
        yield calls
        await calls.clear()
        iptables(lab, "-P FORWARD ACCEPT", "-F", "-X")


def iptables(lab: Lab, *rules: str, program: str = "iptables") -> None:
    for rule in rules:
        command(lab.host, *_program(lab, program), *rule.split())


def filters(lab: Lab, program: str = "iptables") -> list[str]:
    return command(lab.host, *_program(lab, program), "-S").splitlines()


def _program(lab: Lab, program: str) -> Sequence[str]:
    """The old one's lock is not the machine's."""
    return "env", f"XTABLES_LOCKFILE={lab.place.directory / 'xtables.lock'}", program


def forward(lab: Lab) -> list[str]:
    return [rule for rule in filters(lab) if rule.startswith("-A FORWARD")]


def last_forward(lab: Lab) -> str:
    """Where those before it cannot be read as text."""
    return command(lab.host, "sh", "-c", "iptables -S FORWARD | tail -n 1 | cat -v").strip()


def port(host: int = 8080) -> pb.PortMapping:
    return pb.PortMapping(container_port=7, host_port=host)


async def a_network(net: Calls) -> pb.Endpoint:
    await net.create("one", "10.231.64.0/24")
    return await net.attach("a", "one", ports=[port()])


def works(lab: Lab, endpoint: pb.Endpoint, within_s: float = WITHIN_S) -> bool:
    """Whether the container gets out, and others get to its published port."""
    with tcp_server(endpoint.netns_path, address(endpoint)):
        return reaches(endpoint.netns_path, OUTSIDE, within_s=within_s) and answers(lab)


def answers(lab: Lab) -> bool:
    try:
        return tcp_call(lab.outside, HOST, 8080) == OUTSIDE
    except OSError:
        return False


def dropped(lab: Lab, endpoint: pb.Endpoint, target: str, *, by: Path | None = None) -> bool:
    """Whether an echo to the target is dropped on this host: it comes to the forward hook, and to nothing behind it.

    by: who sends it, if not the container.
    """
    hook = "{ type filter hook forward priority %s; }"
    one = f"ip daddr {target} icmp type echo-request counter"
    command(
        lab.host,
        "nft",
        f"add table ip seen; add chain ip seen before {hook % -10}; add chain ip seen after {hook % 10};"
        f"add rule ip seen before {one}; add rule ip seen after {one}",
    )
    try:
        reached = reaches(by or endpoint.netns_path, target, within_s=0.4)
        eventually(lambda: _counted(lab, "before"))
        return not reached and _counted(lab, "before") > 0 and _counted(lab, "after") == 0
    finally:
        command(lab.host, "nft", "delete", "table", "ip", "seen")


def _counted(lab: Lab, chain: str) -> int:
    return int(command(lab.host, "nft", "list", "chain", "ip", "seen", chain).split("packets ")[1].split()[0])


async def told(net: Calls, where: str) -> pb.ExplainedStep:
    steps = (await net.endpoints.Explain(pb.ExplainRequest(endpoint_id="a", destination=OUTSIDE))).steps
    [step] = [step for step in steps if step.where == where]
    return step


async def test_a_network_gets_through_a_policy_of_drop_and_leaves_the_chain_as_it_was(lab: Lab, net: Calls) -> None:
    iptables(lab, "-P FORWARD DROP", "-N DOCKER-USER", "-A FORWARD -j DOCKER-USER", "-A DOCKER-USER -j RETURN")
    before = filters(lab)
    a = await a_network(net)
    assert works(lab, a)
    step = await told(net, "chain ip filter FORWARD")
    assert (step.verdict, "corral's mark" in step.says) == (pb.ExplainedStep.VERDICT_PASSES, True)
    assert forward(lab)[-1] == RULE
    await net.detach("a")
    await net.remove("one")
    assert filters(lab) == before


async def test_a_policy_that_changes_under_a_running_container_is_followed_both_ways(lab: Lab, net: Calls) -> None:
    a = await a_network(net)
    assert works(lab, a)
    assert RULE not in filters(lab)
    for _ in range(2):
        iptables(lab, "-P FORWARD DROP")
        assert eventually(lambda: RULE in forward(lab), within_s=WITHIN_S)
        assert works(lab, a)
        iptables(lab, "-P FORWARD ACCEPT")
        assert eventually(lambda: RULE not in filters(lab), within_s=WITHIN_S)


@pytest.mark.parametrize("deletion", ["-F", "-F FORWARD", RULE.replace("-A", "-D", 1)])
async def test_rules_that_others_flushed_are_back(lab: Lab, net: Calls, deletion: str) -> None:
    iptables(lab, "-P FORWARD DROP")
    a = await a_network(net)
    before = filters(lab)
    iptables(lab, deletion)
    assert eventually(lambda: filters(lab) == before, within_s=WITHIN_S)
    assert works(lab, a)


async def test_what_others_decide_in_the_chain_is_decided_before_us(lab: Lab, net: Calls) -> None:
    iptables(lab, "-P FORWARD DROP")
    a = await a_network(net)
    assert works(lab, a)
    iptables(lab, f"-A FORWARD -d {OUTSIDE} -j DROP")
    assert eventually(lambda: forward(lab)[-1] == RULE, within_s=WITHIN_S)
    assert len(forward(lab)) == 2
    assert dropped(lab, a, OUTSIDE)
    step = await told(net, "chain ip filter FORWARD")
    assert (step.verdict, step.says) == (pb.ExplainedStep.VERDICT_MAY_DROP, "it has rules that drop or reject")


async def test_a_packet_that_others_marked_is_left_to_them_and_none_leaves_with_our_mark(lab: Lab, net: Calls) -> None:
    iptables(lab, "-P FORWARD DROP")
    a = await a_network(net)
    mark = f"{forwarding.mark(TABLE):#x}"
    marked = "-t mangle -A POSTROUTING -m mark --mark"
    iptables(lab, f"{marked} {mark} -j ACCEPT", "-t mangle -A FORWARD -d 203.0.113.7 -j MARK --set-mark 1")
    try:
        assert works(lab, a)
        counted = command(lab.host, "iptables", "-t", "mangle", "-nvL", "POSTROUTING").splitlines()[-1].split()
        assert (counted[0], counted[-1]) == ("0", mark)
        assert dropped(lab, a, "203.0.113.7")
        iptables(lab, "-t mangle -F FORWARD", f"-t mangle -A PREROUTING -j MARK --set-mark {mark}")
        command(lab.outside, "ip", "route", "add", "10.231.64.0/24", "via", HOST)
        assert dropped(lab, a, address(a), by=lab.outside)
    finally:
        command(lab.outside, "ip", "route", "flush", "10.231.64.0/24")
        iptables(lab, "-t mangle -F")


async def test_a_bridge_of_another_engine_that_relies_on_the_policy_is_left_to_it(lab: Lab, net: Calls) -> None:
    iptables(lab, "-P FORWARD DROP")
    a = await a_network(net)
    command(lab.host, "ip", "link", "add", "strangers0", "type", "bridge")
    try:
        command(lab.host, "ip", "address", "add", "198.51.100.1/24", "dev", "strangers0")
        command(lab.host, "ip", "link", "set", "strangers0", "up")
        command(lab.host, "ip", "neighbour", "add", "198.51.100.2", "lladdr", "02:00:00:00:00:02", "dev", "strangers0")
        assert dropped(lab, a, "198.51.100.2")
        steps = (await net.endpoints.Explain(pb.ExplainRequest(endpoint_id="a", destination="198.51.100.2"))).steps
        [step] = [step for step in steps if step.where == "chain ip filter FORWARD"]
        assert "who gets to strangers0 is another's to say" in step.says
    finally:
        command(lab.host, "ip", "link", "delete", "strangers0")


async def test_a_bridge_that_the_default_route_leaves_by_is_none_of_another_engine(lab: Lab, net: Calls) -> None:
    iptables(lab, "-P FORWARD DROP")
    command(lab.host, "ip", "link", "add", "br0", "type", "bridge")
    try:
        command(lab.host, "ip", "address", "flush", "dev", "uplink")
        command(lab.host, "ip", "link", "set", "uplink", "master", "br0")
        command(lab.host, "ip", "address", "add", f"{HOST}/24", "dev", "br0")
        command(lab.host, "ip", "link", "set", "br0", "up")
        command(lab.host, "ip", "route", "add", "default", "via", OUTSIDE)
        assert works(lab, await a_network(net))
    finally:
        command(lab.host, "ip", "link", "delete", "br0")
        command(lab.host, "ip", "address", "add", f"{HOST}/24", "dev", "uplink")
        command(lab.host, "ip", "route", "add", "default", "via", OUTSIDE)


async def test_a_rule_of_others_that_comes_while_ours_is_moved_is_not_deleted(lab: Lab) -> None:
    """What had the handle of ours is theirs by then; the kernel is told which generation of the rules was read."""
    iptables(lab, "-P FORWARD DROP")

    def race() -> None:
        nfnetlink, own = Nfnetlink(), forwarding.mark("another")
        try:
            nfnetlink.replace(IPV4, "filter", "FORWARD", chain_of(nfnetlink), [], own)
            found = chain_of(nfnetlink)
            restore = "*filter\n:FORWARD DROP\n-A FORWARD -s 192.0.2.1 -j DROP\n-A FORWARD -s 192.0.2.2 -j DROP\nCOMMIT"
            command(lab.host, "sh", "-c", f"echo '{restore}' | iptables-restore")
            with pytest.raises(OSError, match="nf_tables") as failure:
                nfnetlink.replace(IPV4, "filter", "FORWARD", found, found.rules, own)
            assert failure.value.errno == errno.ERESTART
            assert len(chain_of(nfnetlink).rules) == 2
        finally:
            nfnetlink.close()

    lab.on_host(race)
    iptables(lab, "-P FORWARD ACCEPT", "-F")


def chain_of(nfnetlink: Nfnetlink) -> Chain:
    found = nfnetlink.chain(IPV4, "filter", "FORWARD")
    assert found is not None
    return found


async def test_what_the_kernel_refused_is_tried_again_and_told_once(lab: Lab, net: Calls) -> None:
    """It does while another program owns the table; of the end of that nobody is told."""
    told_before = lab.corrald.log().count("network.not_admitted")
    with lab.on_host(Nftables) as owner:
        forward_chain = {"family": "ip", "table": "filter", "name": "FORWARD", "type": "filter", "hook": "forward"}
        iptables(lab, "-P FORWARD DROP")
        command(lab.host, "nft", "delete", "table", "ip", "filter")
        owner.run(
            [
                {"add": {"table": {"family": "ip", "name": "filter", "flags": ["owner", "persist"]}}},
                {"add": {"chain": {**forward_chain, "prio": 0, "policy": "drop"}}},
            ]
        )
        a = await a_network(net)
        assert dropped(lab, a, OUTSIDE)
        await net.create("another", "10.231.66.0/24")
        assert lab.corrald.log().count("network.not_admitted") == told_before + 1
    try:
        assert eventually(lambda: RULE in forward(lab), within_s=2 * RETRY_S + WITHIN_S)
        assert works(lab, a)
    finally:
        command(lab.host, "nft", "delete", "table", "ip", "filter")


async def test_the_rule_stays_while_there_is_a_network_and_those_of_others_stay(lab: Lab, net: Calls) -> None:
    iptables(lab, "-P FORWARD DROP")
    await a_network(net)
    before = filters(lab)
    await net.create("inside", "10.231.65.0/24", internal=True)
    assert filters(lab) == before
    await net.remove("inside")
    assert filters(lab) == before


async def test_ipv6_has_its_own_policy(lab: Lab, net: Calls) -> None:
    iptables(lab, "-P FORWARD DROP", program="ip6tables")
    try:
        await a_network(net)
        assert RULE in filters(lab, "ip6tables")
        assert RULE not in filters(lab)
        await net.clear()
        assert RULE not in filters(lab, "ip6tables")
    finally:
        iptables(lab, "-P FORWARD ACCEPT", program="ip6tables")


async def test_a_chain_of_ufw_is_left_to_it(lab: Lab, net: Calls) -> None:
    ufw = ("-N ufw-before-forward", "-A FORWARD -j ufw-before-forward")
    iptables(lab, "-P FORWARD DROP")
    a = await a_network(net)
    iptables(lab, *ufw)
    assert eventually(lambda: RULE not in filters(lab), within_s=WITHIN_S)
    assert dropped(lab, a, OUTSIDE)
    assert "ufw route allow in on" in (await told(net, "chain ip filter FORWARD")).says


@needs("iptables-legacy")
async def test_forward_of_the_old_iptables_gets_our_rule_while_it_drops(lab: Lab, net: Calls) -> None:
    old, where = "iptables-legacy", "chain iptables-legacy filter FORWARD"
    iptables(lab, "-P FORWARD DROP", "-N OTHERS", "-A FORWARD -i other -j OTHERS", program=old)
    before = filters(lab, old)
    try:
        a = await a_network(net)
        assert filters(lab, old) == [*before, RULE]
        assert works(lab, a)
        assert (await told(net, where)).verdict == pb.ExplainedStep.VERDICT_PASSES
        iptables(lab, "-P FORWARD ACCEPT", program=old)
        assert eventually(lambda: RULE not in filters(lab, old), within_s=LOOK_S + WITHIN_S)
        iptables(lab, "-P FORWARD DROP", program=old)
        assert eventually(lambda: filters(lab, old) == [*before, RULE], within_s=LOOK_S + WITHIN_S)
        await net.clear()
        assert filters(lab, old) == before
    finally:
        iptables(lab, "-P FORWARD ACCEPT", "-F", "-X", program=old)


@needs("iptables-legacy")
async def test_who_holds_the_lock_of_the_old_iptables_keeps_nothing_else_waiting(lab: Lab, net: Calls) -> None:
    old = "iptables-legacy"
    iptables(lab, "-P FORWARD DROP", program=old)
    try:
        with (lab.place.directory / "xtables.lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            began = time.monotonic()
            a = await a_network(net)
            assert time.monotonic() - began < 1
            assert dropped(lab, a, OUTSIDE)
        assert works(lab, a, within_s=RETRY_S + WITHIN_S)
    finally:
        iptables(lab, "-P FORWARD ACCEPT", "-F", program=old)


# From here on the daemon has been restarted, and by that has its default network, too, for good.


async def test_nobody_else_gets_through_because_of_us_also_where_our_own_table_is_gone(lab: Lab, net: Calls) -> None:
    iptables(lab, "-P FORWARD DROP")
    a = await a_network(net)
    command(lab.outside, "ip", "route", "add", "10.231.64.0/24", "via", HOST)
    try:
        assert works(lab, a)
        assert dropped(lab, a, address(a), by=lab.outside)
        lab.corrald.kill9()
        command(lab.host, "nft", "delete", "table", "inet", TABLE)
        assert forward(lab)[-1] == RULE
        assert dropped(lab, a, address(a), by=lab.outside)
        lab.corrald.start()
        assert eventually(lambda: works(lab, a))
    finally:
        command(lab.outside, "ip", "route", "delete", "10.231.64.0/24")


async def test_names_of_others_may_be_of_any_bytes(lab: Lab, net: Calls) -> None:
    """libnftables ends the process that it is in where it has to tell one that is not UTF-8 as JSON."""
    iptables(lab, "-P FORWARD DROP")
    a = await a_network(net)
    odd = "n=$(printf 'B\\374ro'); iptables -N $n; iptables -A FORWARD -j $n; iptables -A FORWARD -o $n -j ACCEPT"
    command(lab.host, "sh", "-c", odd)
    assert eventually(lambda: last_forward(lab) == RULE, within_s=WITHIN_S)
    assert works(lab, a)
    steps = (await net.endpoints.Explain(pb.ExplainRequest(endpoint_id="a", destination=OUTSIDE))).steps
    assert [step.verdict for step in steps if step.where == "others"] == [pb.ExplainedStep.VERDICT_MAY_DROP]
    lab.corrald.restart()
    async with lab.calls() as calls:
        await calls.create("two", "10.231.65.0/24")
        assert works(lab, a)


async def test_after_a_kill_the_next_start_knows_what_it_added(lab: Lab, net: Calls) -> None:
    before = filters(lab)
    iptables(lab, "-P FORWARD DROP")
    a = await a_network(net)
    lab.corrald.kill9()
    iptables(lab, "-F FORWARD")
    lab.corrald.start()
    async with lab.calls() as calls:
        assert eventually(lambda: RULE in forward(lab))
        assert works(lab, a)
        await calls.clear()
        iptables(lab, "-P FORWARD ACCEPT")
        assert eventually(lambda: filters(lab) == before, within_s=WITHIN_S)


async def test_with_leave_nothing_is_added_and_explain_says_what_drops(lab: Lab, net: Calls) -> None:
    iptables(lab, "-P FORWARD DROP")
    before = filters(lab)
    a = await a_network(net)
    lab.corrald.stop()
    settings = lab.corrald.settings["network"]
    lab.corrald.settings["network"] = {**settings, "forward": "leave"}
    try:
        lab.corrald.start()
        assert eventually(lambda: filters(lab) == before)
        async with lab.calls() as calls:
            await calls.endpoints.Get(pb.GetEndpointRequest(endpoint_id="a"))
            assert dropped(lab, a, OUTSIDE)
            assert not answers(lab)
            step = await told(calls, "chain ip filter FORWARD")
            assert step.verdict == pb.ExplainedStep.VERDICT_MAY_DROP
            assert 'forward = "accept"' in step.says
            await calls.clear()
        assert filters(lab) == before
    finally:
        lab.corrald.stop()
        lab.corrald.settings["network"] = settings
        lab.corrald.start()


def not_admitted(lab: Lab) -> list[str]:
    return [line for line in lab.corrald.log().splitlines() if "network.not_admitted" in line]


def put_libraries(directory: Path) -> None:
    """One is no library, the other one has none of the functions."""
    (directory / "libip4tc.so.2").write_text("none")
    (directory / "libip6tc.so.2").symlink_to(next(Path("/lib").glob("*/libm.so.6"), Path("/lib64/libm.so.6")))


@needs("iptables-legacy")
async def test_libraries_of_the_old_iptables_that_are_of_no_use_are_told_of_once_each(
    lab: Lab, net: Calls, tmp_path: Path
) -> None:
    put_libraries(tmp_path)
    for program in ("iptables-legacy", "ip6tables-legacy"):
        iptables(lab, "-P FORWARD ACCEPT", program=program)
    told_before = len(not_admitted(lab))
    lab.corrald.stop()
    # Executed, as the loader reads it once.
    lab.corrald.command = ("env", f"LD_LIBRARY_PATH={tmp_path}", *COMMAND)
    try:
        lab.corrald.start()
        await come_and_go(lab)
        await asyncio.sleep(LOOK_S + WITHIN_S)
        await come_and_go(lab)
        old, new = not_admitted(lab)[told_before:]
        assert "libip4tc.so.2 cannot be loaded" in old
        assert "libip6tc.so.2 is another one than that of iptables" in new
    finally:
        lab.corrald.stop()
        lab.corrald.command = COMMAND
        lab.corrald.start()


async def test_a_setting_that_is_none_is_refused_in_a_sentence(lab: Lab) -> None:
    lab.corrald.stop()
    settings = lab.corrald.settings["network"]
    lab.corrald.settings["network"] = {**settings, "forward": "perhaps"}
    try:
        with pytest.raises(RuntimeError):
            lab.corrald.start()
        assert "forward = 'perhaps' in [network] of the configuration: use 'accept' or 'leave'" in lab.corrald.log()
        assert "Traceback" not in lab.corrald.log()
    finally:
        lab.corrald.settings["network"] = settings
        lab.corrald.start()


async def come_and_go(lab: Lab) -> None:
    async with lab.calls() as calls:
        for _ in range(2):
            await calls.create("cut", "10.231.70.0/24", interface="crltcut")
            await calls.remove("cut")


@pytest.mark.parametrize(
    "failpoint", ["create.after_row", "build.after_bridge", "remove.after_row", "remove.after_bridge"]
)
async def test_a_network_that_a_kill_cut_short_leaves_no_rule_there(lab: Lab, net: Calls, failpoint: str) -> None:
    iptables(lab, "-P FORWARD DROP")
    lab.corrald.stop()
    lab.corrald.start(environment={"CORRAL_FAILPOINTS": f"network.{failpoint}=kill@2"})
    with pytest.raises(CorralError):
        await come_and_go(lab)
    lab.corrald.kill9()
    lab.corrald.start()
    assert eventually(lambda: "crltcut" not in lab.bridges() and not any("crltcut" in rule for rule in filters(lab)))
    await come_and_go(lab)
    assert not any("crltcut" in rule for rule in filters(lab))
