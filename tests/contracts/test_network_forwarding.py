"""Hosts whose iptables drops what it does not know: networks get through by rules of ours there, and only by those.

The host here is a namespace of the lab: no rule of the machine is touched.
"""

from collections.abc import AsyncIterator, Iterator

import pytest
from support.netlab import HOST, OUTSIDE, Calls, Lab, address, command, eventually, reaches, tcp_call, tcp_server
from support.requirements import needs

from corral.api.network.v1 import network_pb2 as pb
from corral.kernel import iptables_legacy
from corral.rpc.errors import CorralError

pytestmark = needs("root", "netns", "nft", "nsenter", "ip", "iptables")
CHAIN = "corraltest-FORWARD"
WITHIN_S = 2.0


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab() as made:
        yield made


@pytest.fixture
async def net(lab: Lab) -> AsyncIterator[Calls]:
    async with lab.calls() as calls:
        yield calls
        await detach_all(calls)
        iptables(lab, "-P FORWARD ACCEPT", "-F", "-X")


async def detach_all(net: Calls) -> None:
    for name in await net.ids():
        await net.detach(name)
    for name in await net.network_names():
        if name not in ("bridge", "host", "none"):
            await net.remove(name)


def iptables(lab: Lab, *rules: str, program: str = "iptables") -> None:
    for rule in rules:
        command(lab.host, program, *rule.split())


def filters(lab: Lab, program: str = "iptables") -> list[str]:
    return command(lab.host, program, "-S").splitlines()


def forward(lab: Lab) -> list[str]:
    return [rule for rule in filters(lab) if rule.startswith("-A FORWARD")]


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
    assert (step.verdict, CHAIN in step.says) == (pb.ExplainedStep.VERDICT_PASSES, True)
    assert forward(lab)[-1].endswith(f"-j {CHAIN}")
    await net.detach("a")
    await net.remove("one")
    assert filters(lab) == before


async def test_a_policy_that_changes_under_a_running_container_is_followed_both_ways(lab: Lab, net: Calls) -> None:
    a = await a_network(net)
    assert works(lab, a)
    assert not any(CHAIN in rule for rule in filters(lab))
    for _ in range(2):
        iptables(lab, "-P FORWARD DROP")
        assert eventually(lambda: any(CHAIN in rule for rule in forward(lab)), within_s=WITHIN_S)
        assert works(lab, a)
        iptables(lab, "-P FORWARD ACCEPT")
        assert eventually(lambda: not any(CHAIN in rule for rule in filters(lab)), within_s=WITHIN_S)


@pytest.mark.parametrize("deletion", ["-F", "-F FORWARD", f"-F {CHAIN}"])
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
    assert eventually(lambda: forward(lab)[-1].endswith(f"-j {CHAIN}"), within_s=WITHIN_S)
    assert len(forward(lab)) == 2
    assert not reaches(a.netns_path, OUTSIDE, within_s=0.4)
    step = await told(net, "chain ip filter FORWARD")
    assert (step.verdict, step.says) == (pb.ExplainedStep.VERDICT_MAY_DROP, "it has rules that drop or reject")


async def test_nobody_else_gets_through_because_of_us(lab: Lab, net: Calls) -> None:
    """Of what comes in only answers, and packets for published ports: so says our own table."""
    iptables(lab, "-P FORWARD DROP")
    a = await a_network(net)
    command(lab.outside, "ip", "route", "add", "10.231.64.0/24", "via", HOST)
    try:
        assert works(lab, a)
        assert not reaches(lab.outside, address(a), within_s=0.4)
    finally:
        command(lab.outside, "ip", "route", "delete", "10.231.64.0/24")
    rules = [rule for rule in filters(lab) if rule.startswith(f"-A {CHAIN}")]
    bridge = (await net.network("one")).interface
    assert rules == [f"-A {CHAIN} -i {bridge} -j ACCEPT", f"-A {CHAIN} -o {bridge} -j ACCEPT"]


async def test_who_docker_leaves_to_the_policy_is_left_to_it(lab: Lab, net: Calls) -> None:
    """Its bridges, that is, here played by the uplink; its chain is empty, as none of its ports is published."""
    iptables(lab, "-P FORWARD DROP", "-N DOCKER", "-A FORWARD -o uplink -j DOCKER")
    await net.create("one", "10.231.71.0/24")
    a = await net.attach("a", "one")
    assert forward(lab)[-1].endswith(f"-j {CHAIN}")
    assert not reaches(a.netns_path, OUTSIDE, within_s=0.4)
    assert "who gets to uplink is docker's to say" in (await told(net, "chain ip filter FORWARD")).says
    iptables(lab, "-F FORWARD")
    assert eventually(lambda: reaches(a.netns_path, OUTSIDE, within_s=0.2), within_s=WITHIN_S)


@needs("iptables-legacy")
async def test_who_docker_leaves_to_the_policy_of_the_old_iptables_is_left_to_it(lab: Lab, net: Calls) -> None:
    old = "iptables-legacy"
    iptables(lab, "-P FORWARD DROP", "-N DOCKER", "-A FORWARD -o uplink -j DOCKER", program=old)
    try:
        await net.create("one", "10.231.72.0/24")
        a = await net.attach("a", "one")
        assert f"-A {CHAIN} -o uplink -j RETURN" in filters(lab, old)
        assert "who gets to uplink is docker's to say" in (await told(net, "chain iptables-legacy filter FORWARD")).says
        assert not reaches(a.netns_path, OUTSIDE, within_s=0.4)
    finally:
        iptables(lab, "-P FORWARD ACCEPT", "-F", "-X", program=old)


async def test_the_rules_of_a_network_go_with_it_and_those_of_others_stay(lab: Lab, net: Calls) -> None:
    iptables(lab, "-P FORWARD DROP")
    await a_network(net)
    before = filters(lab)
    await net.create("inside", "10.231.65.0/24", internal=True)
    bridge = (await net.network("inside")).interface
    assert f"-A {CHAIN} -i {bridge} -o {bridge} -j ACCEPT" in filters(lab)
    await net.remove("inside")
    assert filters(lab) == before


async def test_ipv6_has_its_own_policy(lab: Lab, net: Calls) -> None:
    iptables(lab, "-P FORWARD DROP", program="ip6tables")
    try:
        await a_network(net)
        assert any(CHAIN in rule for rule in filters(lab, "ip6tables"))
        assert not any(CHAIN in rule for rule in filters(lab))
        await detach_all(net)
        assert not any(CHAIN in rule for rule in filters(lab, "ip6tables"))
    finally:
        iptables(lab, "-P FORWARD ACCEPT", program="ip6tables")


async def test_a_chain_of_ufw_is_left_to_it(lab: Lab, net: Calls) -> None:
    ufw = ("-N ufw-before-forward", "-A FORWARD -j ufw-before-forward")
    iptables(lab, "-P FORWARD DROP")
    a = await a_network(net)
    iptables(lab, *ufw)
    assert eventually(lambda: not any(CHAIN in rule for rule in filters(lab)), within_s=WITHIN_S)
    assert not reaches(a.netns_path, OUTSIDE, within_s=0.4)
    assert "ufw route allow in on" in (await told(net, "chain ip filter FORWARD")).says


@needs("iptables-legacy")
async def test_the_old_iptables_is_followed_when_a_network_is_made_and_when_it_goes(lab: Lab, net: Calls) -> None:
    old = "iptables-legacy"
    iptables(
        lab, "-P FORWARD DROP", "-N strangers", "-A FORWARD -p tcp -m multiport --dports 1,2 -j strangers", program=old
    )
    before = filters(lab, old)
    try:
        a = await a_network(net)
        assert works(lab, a)
        step = await told(net, "chain iptables-legacy filter FORWARD")
        assert (step.verdict, CHAIN in step.says) == (pb.ExplainedStep.VERDICT_PASSES, True)
        await net.create("inside", "10.231.65.0/24", internal=True)
        bridge = (await net.network("inside")).interface
        assert f"-A {CHAIN} -i {bridge} -o {bridge} -j ACCEPT" in filters(lab, old)
        iptables(lab, f"-A FORWARD -d {OUTSIDE} -j DROP", program=old)
        assert (await told(net, "chain iptables-legacy filter FORWARD")).verdict == pb.ExplainedStep.VERDICT_MAY_DROP
        iptables(lab, f"-D FORWARD -d {OUTSIDE} -j DROP", program=old)
        await detach_all(net)
        assert filters(lab, old) == before
    finally:
        iptables(lab, "-P FORWARD ACCEPT", "-F", "-X", program=old)


@needs("iptables-legacy")
async def test_an_old_iptables_that_somebody_locked_keeps_no_network_from_being_made(lab: Lab, net: Calls) -> None:
    old = "iptables-legacy"
    iptables(lab, "-P FORWARD DROP", program=old)
    try:
        with iptables_legacy.locked():
            a = await a_network(net)
            assert not reaches(a.netns_path, OUTSIDE, within_s=0.4)
        assert "another program holds" in lab.corrald.log()
        await net.create("another", "10.231.66.0/24")
        assert works(lab, a)
    finally:
        iptables(lab, "-P FORWARD ACCEPT", "-F", "-X", program=old)


# From here on the daemon has been restarted, and by that has its default network, too, for good.


async def test_after_a_kill_the_next_start_knows_what_it_added(lab: Lab, net: Calls) -> None:
    before = filters(lab)
    iptables(lab, "-P FORWARD DROP")
    a = await a_network(net)
    lab.corrald.kill9()
    iptables(lab, "-F FORWARD")
    lab.corrald.start()
    async with lab.calls() as calls:
        assert eventually(lambda: any(CHAIN in rule for rule in forward(lab)))
        assert works(lab, a)
        await detach_all(calls)
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
            assert not works(lab, a, within_s=0.4)
            assert not answers(lab)
            step = await told(calls, "chain ip filter FORWARD")
            assert step.verdict == pb.ExplainedStep.VERDICT_MAY_DROP
            assert 'forward = "accept"' in step.says
            await detach_all(calls)
        assert filters(lab) == before
    finally:
        lab.corrald.stop()
        lab.corrald.settings["network"] = settings
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
