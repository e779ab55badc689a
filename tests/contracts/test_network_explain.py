"""What `network explain` says is what packets do: each verdict is checked by sending some."""

from pathlib import Path

import pytest
from support.netlab import BRIDGE, HOST, OUTSIDE, TABLE, Calls, Lab, address, command, reaches
from support.requirements import needs

from corral.api.network.v1 import network_pb2 as pb
from corral.kernel.netns import in_namespace
from corral.rpc.errors import FailedPrecondition, InvalidArgument

pytestmark = needs("root", "netns", "nft", "nsenter", "ip")
PASSES, MAY_DROP, DROPS = (
    pb.ExplainedStep.VERDICT_PASSES,
    pb.ExplainedStep.VERDICT_MAY_DROP,
    pb.ExplainedStep.VERDICT_DROPS,
)


async def explained(net: Calls, name: str, destination: str) -> list[pb.ExplainedStep]:
    request = pb.ExplainRequest(endpoint_id=name, destination=destination)
    return list((await net.endpoints.Explain(request)).steps)


async def why_not(net: Calls, endpoint: pb.Endpoint, destination: str) -> str:
    """What the last step says, which drops the packet; and none comes through."""
    *before, last = await explained(net, endpoint.id, destination)
    assert all(step.verdict != DROPS for step in before)
    assert last.verdict == DROPS, last
    assert not reaches(endpoint.netns_path, destination, within_s=0.4)
    return f"{last.where}: {last.says}"


async def test_a_way_that_is_open_is_told_to_its_end(net: Calls) -> None:
    a, b = await net.attach("a"), await net.attach("b")
    for destination in (OUTSIDE, address(b)):
        steps = await explained(net, "a", destination)
        assert {step.verdict for step in steps} == {PASSES}, steps
        assert reaches(a.netns_path, destination)
    [*_, host, rules] = await explained(net, "a", OUTSIDE)
    assert "forwards it to uplink" in host.says
    assert "masqueraded" in rules.says


async def test_a_host_that_does_not_forward_is_told_with_the_remedy(lab: Lab, net: Calls) -> None:
    a = await net.attach("a")
    forward = Path("/proc/sys/net/ipv4/ip_forward")
    in_namespace(lab.host, lambda: forward.write_text("0"))
    try:
        assert "sysctl -w net.ipv4.ip_forward=1" in await why_not(net, a, OUTSIDE)
    finally:
        in_namespace(lab.host, lambda: forward.write_text("1"))


async def test_networks_that_do_not_reach_each_other_are_told(net: Calls) -> None:
    await net.create("one", "10.231.90.0/24")
    await net.create("inside", "10.231.91.0/24", internal=True)
    a, b = await net.attach("a"), await net.attach("b", "one")
    assert "is in network one, which others do not reach" in await why_not(net, a, address(b))
    c = await net.attach("c", "inside")
    assert "no route" in await why_not(net, c, OUTSIDE)


async def test_an_internal_network_is_told_even_with_a_route_of_its_own(net: Calls) -> None:
    await net.create("inside", "10.231.91.0/24", internal=True)
    a = await net.attach("a", "inside")
    command(a.netns_path, "ip", "route", "add", "default", "via", "10.231.91.1")
    assert "network inside is internal" in await why_not(net, a, OUTSIDE)


async def test_containers_that_are_kept_apart_are_told(net: Calls) -> None:
    options = {"com.docker.network.bridge.enable_icc": "false"}
    await net.create("apart", "10.231.92.0/24", options=options)
    a, b = await net.attach("a", "apart"), await net.attach("b", "apart")
    assert "keeps its containers apart" in await why_not(net, a, address(b))


@pytest.mark.parametrize("family", ["ip", "inet"])
async def test_a_chain_of_others_that_drops_is_named(lab: Lab, net: Calls, family: str) -> None:
    a = await net.attach("a")
    chain = "{ type filter hook forward priority 0; policy drop; }"
    command(lab.host, "nft", f"add table {family} strangers; add chain {family} strangers FORWARD {chain}")
    try:
        steps = await explained(net, "a", OUTSIDE)
        [blamed] = [step for step in steps if step.verdict == MAY_DROP]
        assert blamed.where == f"chain {family} strangers FORWARD"
        assert "its policy is drop" in blamed.says
        assert not reaches(a.netns_path, OUTSIDE, within_s=0.4)
    finally:
        command(lab.host, "nft", "delete", "table", family, "strangers")


async def test_rules_of_others_that_drop_behind_a_jump_are_found(lab: Lab, net: Calls) -> None:
    await net.attach("a")
    rules = (
        "add table ip strangers; add chain ip strangers deep; add rule ip strangers deep ip daddr 203.0.113.9 drop;"
        "add chain ip strangers c { type filter hook forward priority 0; }; add rule ip strangers c jump deep;"
        "add chain ip strangers other { type filter hook forward priority 5; }"
    )
    command(lab.host, "nft", rules)
    try:
        steps = {step.where: step.verdict for step in await explained(net, "a", OUTSIDE)}
        assert steps["chain ip strangers c"] == MAY_DROP
        assert steps["chain ip strangers other"] == PASSES
    finally:
        command(lab.host, "nft", "delete", "table", "ip", "strangers")


async def test_what_keeps_a_container_from_the_host_itself_is_told(lab: Lab, net: Calls) -> None:
    a = await net.attach("a")
    gateway = a.interfaces[0].ipv4_gateway
    assert {step.verdict for step in await explained(net, "a", gateway)} == {PASSES}
    rules = (
        "add table ip filter; add chain ip filter INPUT { type filter hook input priority 0; policy drop; };"
        "add chain ip filter ufw-before-input; add rule ip filter INPUT counter jump ufw-before-input"
    )
    command(lab.host, "nft", rules)
    try:
        for destination in (gateway, HOST):
            [step] = [one for one in await explained(net, "a", destination) if one.where.startswith("chain")]
            assert (step.where, step.verdict) == ("chain ip filter INPUT", MAY_DROP)
            assert f"ufw allow in on {BRIDGE}" in step.says
            assert not reaches(a.netns_path, destination, within_s=0.4)
        assert all("INPUT" not in one.where for one in await explained(net, "a", OUTSIDE))
    finally:
        command(lab.host, "nft", "delete", "table", "ip", "filter")


async def test_a_zone_of_firewalld_that_accepts_is_seen_and_else_one_is_told_of(lab: Lab, net: Calls) -> None:
    """Its table, here made as it makes it."""
    a = await net.attach("a")
    table = (
        "add table inet firewalld; add chain inet firewalld filter_FORWARD_POLICIES;"
        "add chain inet firewalld filter_FORWARD { type filter hook forward priority 10; };"
        "add rule inet firewalld filter_FORWARD ct state established,related accept;"
        "add rule inet firewalld filter_FORWARD jump filter_FORWARD_POLICIES;"
        "add rule inet firewalld filter_FORWARD reject with icmpx admin-prohibited"
    )
    command(lab.host, "nft", table)
    try:
        [step] = [one for one in await explained(net, "a", OUTSIDE) if one.where.startswith("chain")]
        assert step.verdict == MAY_DROP
        assert f"firewall-cmd --zone=trusted --add-interface={BRIDGE}" in step.says
        assert not reaches(a.netns_path, OUTSIDE, within_s=0.4)
        command(lab.host, "nft", f'insert rule inet firewalld filter_FORWARD_POLICIES iifname "{BRIDGE}" accept')
        [step] = [one for one in await explained(net, "a", OUTSIDE) if one.where.startswith("chain")]
        assert step.verdict == PASSES
        assert reaches(a.netns_path, OUTSIDE)
    finally:
        command(lab.host, "nft", "delete", "table", "inet", "firewalld")


@pytest.mark.parametrize(
    ("rule", "verdict"),
    [
        ("ip saddr vmap { 192.0.2.1 : accept, 192.0.2.2 : drop }", MAY_DROP),
        ("ip saddr vmap @named", MAY_DROP),
        ("tcp dport vmap { 80 : jump deep }", MAY_DROP),
        ("ip saddr vmap { 192.0.2.1 : accept, 192.0.2.2 : return }", PASSES),
    ],
)
async def test_verdicts_in_maps_are_seen(lab: Lab, net: Calls, rule: str, verdict: "pb.ExplainedStep.Verdict") -> None:
    await net.attach("a")
    rules = (
        "add table ip strangers; add chain ip strangers deep; add rule ip strangers deep drop;"
        "add map ip strangers named { type ipv4_addr : verdict; elements = { 192.0.2.9 : drop }; };"
        f"add chain ip strangers c {{ type filter hook forward priority 0; }}; add rule ip strangers c {rule}"
    )
    command(lab.host, "nft", rules)
    try:
        steps = {step.where: step.verdict for step in await explained(net, "a", OUTSIDE)}
        assert steps["chain ip strangers c"] == verdict
    finally:
        command(lab.host, "nft", "delete", "table", "ip", "strangers")


@needs("iptables")
async def test_what_iptables_says_in_its_own_way_may_drop(lab: Lab, net: Calls) -> None:
    await net.attach("a")
    rule = ("FORWARD", "-d", "192.0.2.1", "-p", "tcp", "-m", "multiport", "--dports", "1,2")
    for target, verdict in (("ACCEPT", PASSES), ("REJECT", MAY_DROP)):
        command(lab.host, "iptables", "-A", *rule, "-j", target)
        try:
            steps = {step.where: step.verdict for step in await explained(net, "a", OUTSIDE)}
        finally:
            command(lab.host, "iptables", "-D", *rule, "-j", target)
        assert steps["chain ip filter FORWARD"] == verdict


async def test_a_route_of_the_host_that_takes_the_answers_away_is_told(lab: Lab, net: Calls) -> None:
    a = await net.attach("a")
    command(lab.host, "ip", "route", "add", f"{address(a)}/32", "dev", "uplink")
    try:
        assert f"leave by uplink instead of {BRIDGE}" in await why_not(net, a, OUTSIDE)
    finally:
        command(lab.host, "ip", "route", "delete", f"{address(a)}/32")


async def test_an_interface_that_is_down_and_a_host_without_a_route_are_told(lab: Lab, net: Calls) -> None:
    a = await net.attach("a")
    command(lab.host, "ip", "route", "delete", "default")
    try:
        assert "this host has no route" in await why_not(net, a, "198.51.100.1")
    finally:
        command(lab.host, "ip", "route", "add", "default", "via", OUTSIDE)
    command(a.netns_path, "ip", "link", "set", "eth0", "down")
    assert "interface eth0 is not there, or down" in await why_not(net, a, OUTSIDE)


async def test_the_host_and_the_container_itself_are_destinations(net: Calls) -> None:
    a = await net.attach("a")
    [*_, last] = await explained(net, "a", "10.231.0.1")
    assert (last.verdict, "is this host" in last.says) == (PASSES, True)
    [last] = await explained(net, "a", address(a))
    assert "the container itself" in last.says


async def test_nothing_is_changed_by_it(lab: Lab, net: Calls) -> None:
    await net.attach("a")
    before = lab.ruleset(), lab.links()
    await explained(net, "a", OUTSIDE)
    await explained(net, "a", "")
    assert (lab.ruleset(), lab.links()) == before
    assert TABLE in before[0]


async def test_what_has_no_network_of_its_own_is_refused(net: Calls) -> None:
    await net.attach("h", mode=pb.AttachRequest.MODE_HOST, networks=[])
    with pytest.raises(FailedPrecondition, match="no network of its own"):
        await explained(net, "h", OUTSIDE)
    await net.attach("a")
    with pytest.raises(InvalidArgument, match="is not an IP address"):
        await explained(net, "a", "example.org")
