"""`corral network` and the networks of containers, by packets between them."""

import json
from pathlib import Path

from support.cli import ok
from support.corrald import Corrald
from support.netlab import command
from support.requirements import needs


def address(box: Corrald, name: str) -> str:
    endpoint = json.loads(ok(box, "inspect", name))[0]["endpoint"]
    return str(endpoint["interfaces"][0]["ipv4_address"]).split("/")[0]


def reaches(box: Corrald, caller: str, target: str) -> bool:
    return box.corral("exec", caller, "ping", "-c", "1", "-w", "3", target).returncode == 0


def test_two_containers_reach_each_other_and_their_gateway(box: Corrald, name: str) -> None:
    ok(box, "run", "-d", "--name", name, "busybox", "sleep", "100")
    ok(box, "run", "-d", "--name", f"{name}-b", "busybox", "sleep", "100")
    try:
        assert address(box, name) != address(box, f"{name}-b")
        assert reaches(box, name, address(box, f"{name}-b"))
        gateway = ok(box, "exec", name, "sh", "-c", "ip route | sed -n 's/default via \\([^ ]*\\).*/\\1/p'").strip()
        assert reaches(box, name, gateway)
    finally:
        ok(box, "rm", "-f", f"{name}-b")


def test_none_has_a_loopback_only(box: Corrald) -> None:
    out = ok(
        box, "run", "--rm", "--network", "none", "busybox", "sh", "-c", "ls /sys/class/net; ping -c 1 127.0.0.1 >&2"
    )
    assert out == "lo\n"


def test_host_is_the_hosts_own(box: Corrald) -> None:
    inside = ok(box, "run", "--rm", "--network", "host", "busybox", "readlink", "/proc/self/ns/net")
    assert inside.strip() == str(Path("/proc/self/ns/net").readlink())


def test_a_container_can_share_anothers_network(box: Corrald, name: str) -> None:
    ok(box, "run", "-d", "--name", name, "busybox", "sleep", "100")
    script = "ip -4 addr show eth0"
    shared = ok(box, "run", "--rm", "--network", f"container:{name}", "busybox", "sh", "-c", script)
    assert address(box, name) in shared


def test_hosts_resolv_conf_and_hostname_are_the_containers(box: Corrald, name: str) -> None:
    ok(
        box,
        "run",
        "-d",
        "--name",
        name,
        "-h",
        "ranch",
        "--add-host",
        "db:10.9.8.7",
        "--dns",
        "9.9.9.9",
        "busybox",
        "sleep",
        "100",
    )
    hosts = ok(box, "exec", name, "cat", "/etc/hosts")
    assert f"{address(box, name)}\tranch" in hosts
    assert "10.9.8.7\tdb" in hosts
    assert "nameserver 9.9.9.9" in ok(box, "exec", name, "cat", "/etc/resolv.conf")
    assert ok(box, "exec", name, "cat", "/etc/hostname") == "ranch\n"


def test_a_network_of_ones_own(box: Corrald, name: str) -> None:
    subnet = "{}.{}.150".format(*box.place.network)
    ok(box, "network", "create", "--subnet", f"{subnet}.0/29", name)
    try:
        found = json.loads(ok(box, "network", "inspect", name))[0]
        assert found["subnets"][0]["gateway"] == f"{subnet}.1"
        assert name in ok(box, "network", "ls")
        ok(box, "run", "-d", "--name", name, "--network", name, "busybox", "sleep", "100")
        assert address(box, name).startswith(f"{subnet}.")
        failed = box.corral("network", "rm", name)
        assert failed.returncode == 1
        assert b"use" in failed.stderr
    finally:
        ok(box, "rm", "-f", name)
        ok(box, "network", "rm", name)


def test_a_full_network_refuses_the_next_and_keeps_the_others(box: Corrald, name: str) -> None:
    subnet = "{}.{}.151.0/30".format(*box.place.network)
    ok(box, "network", "create", "--subnet", subnet, name)
    try:
        ok(box, "run", "-d", "--name", name, "--network", name, "busybox", "sleep", "100")
        failed = box.corral("run", "--rm", "--network", name, "busybox", "true")
        assert failed.returncode == 125
        assert subnet.encode() in failed.stderr
        ok(box, "exec", name, "true")
    finally:
        ok(box, "rm", "-f", name)
        ok(box, "network", "rm", name)


def test_a_subnet_that_overlaps_a_host_route_is_refused_by_name(box: Corrald, name: str) -> None:
    ok(box, "run", "--rm", "busybox", "true")  # the default bridge is a route of the host
    taken = json.loads(ok(box, "network", "inspect", "bridge"))[0]["subnets"][0]["cidr"]
    failed = box.corral("network", "create", "--subnet", taken, name)
    assert failed.returncode == 1
    assert taken.encode() in failed.stderr
    assert name not in ok(box, "network", "ls")
    for bad in ("10.222.9.0/33", "not-a-subnet", "10.222.9.1/24", "127.0.0.0/24"):
        failed = box.corral("network", "create", "--subnet", bad, name)
        assert failed.returncode == 1, bad
        assert failed.stderr.count(b"\n") == 1


def test_the_default_network_stays(box: Corrald) -> None:
    failed = box.corral("network", "rm", "bridge")
    assert failed.returncode == 1
    assert b"bridge" in failed.stderr


def networks(box: Corrald, name: str) -> list[str]:
    return [each["network"] for each in json.loads(ok(box, "inspect", name))[0]["endpoint"].get("interfaces", [])]


def test_a_running_container_comes_into_a_network_and_goes_again(box: Corrald, name: str) -> None:
    first, second = box.place.network
    net, other = f"{name}-net", f"{name}-other"
    ok(box, "network", "create", "--subnet", f"{first}.{second}.144.0/24", net)
    try:
        ok(box, "run", "-d", "--name", other, "--network", net, "busybox", "sleep", "100")
        ok(box, "run", "-d", "--name", name, "busybox", "sleep", "100")
        assert not reaches(box, name, address(box, other))
        ok(box, "network", "connect", "--alias", "nick", net, name)
        ok(box, "network", "connect", "--alias", "nick", net, name)
        assert networks(box, name) == ["bridge", net]
        assert reaches(box, name, other)
        assert reaches(box, other, "nick")
        assert reaches(box, other, name)
        ok(box, "restart", "-t", "0", name)
        assert networks(box, name) == ["bridge", net]
        assert reaches(box, other, "nick")
        ok(box, "network", "disconnect", "bridge", name)
        assert networks(box, name) == [net]
        ok(box, "restart", "-t", "0", name)
        assert networks(box, name) == [net]
        ok(box, "network", "disconnect", net, name)
        assert networks(box, name) == []
        again = box.corral("network", "disconnect", net, name)
        assert again.returncode == 1
        assert f"container {name} is not in network '{net}'" in again.stderr.decode()
    finally:
        box.corral("rm", "-f", other, name)
        ok(box, "network", "rm", net)


def test_a_container_that_does_not_run_is_in_the_network_with_its_next_start(box: Corrald, name: str) -> None:
    first, second = box.place.network
    net = f"{name}-net"
    ok(box, "network", "create", "--subnet", f"{first}.{second}.145.0/24", net)
    try:
        ok(box, "create", "--name", name, "--network", "none", "busybox", "sh", "-c", "ls /sys/class/net")
        ok(box, "network", "connect", "--ip", f"{first}.{second}.145.77", net, name)
        assert ok(box, "start", "-a", name).split() == ["eth0", "lo"]
        assert address(box, name) == f"{first}.{second}.145.77"
        ok(box, "network", "disconnect", net, name)
        assert ok(box, "start", "-a", name).split() == ["lo"]
    finally:
        box.corral("rm", "-f", name)
        ok(box, "network", "rm", net)


def test_a_stopped_container_leaves_a_network_at_once(box: Corrald, name: str) -> None:
    first, second = box.place.network
    nets = [f"{name}-{letter}" for letter in "ab"]
    for number, net in enumerate(nets):
        ok(box, "network", "create", "--subnet", f"{first}.{second}.{155 + number}.0/24", net)
    try:
        ok(box, "run", "-d", "--name", name, "--network", nets[0], "--network", nets[1], "busybox", "sleep", "100")
        ok(box, "stop", "-t", "0", name)
        ok(box, "network", "disconnect", nets[0], name)
        assert networks(box, name) == [nets[1]]
        ok(box, "network", "rm", nets[0])
        ok(box, "network", "disconnect", nets[1], name)
        ok(box, "network", "connect", "--ip", f"{first}.{second}.156.77", nets[1], name)
        ok(box, "start", name)
        assert address(box, name) == f"{first}.{second}.156.77"
    finally:
        box.corral("rm", "-f", name)
        box.corral("network", "rm", nets[0])
        ok(box, "network", "rm", nets[1])


def test_what_has_no_network_of_its_own_comes_into_none(box: Corrald, name: str) -> None:
    ok(box, "run", "-d", "--name", name, "--network", "host", "busybox", "sleep", "100")
    refused = box.corral("network", "connect", "bridge", name)
    assert refused.returncode == 1
    assert "has no network of its own (host)" in refused.stderr.decode()
    missing = box.corral("network", "connect", "nowhere", name)
    assert missing.returncode == 1


def test_a_container_begins_in_several_networks_with_names_of_its_own(box: Corrald, name: str) -> None:
    first, second = box.place.network
    nets = [f"{name}-{letter}" for letter in "ab"]
    for number, net in enumerate(nets):
        ok(box, "network", "create", "--subnet", f"{first}.{second}.{146 + number}.0/24", net)
    other = f"{name}-other"
    try:
        own = f"{first}.{second}.147.99"
        ok(
            box, "run", "-d", "--name", name, "--network", nets[0], "--network", f"name={nets[1]},alias=db,ip={own}",
            "--network-alias", "web", "--mac-address", "02:42:ac:11:00:99", "busybox", "sleep", "100",
        )  # fmt: skip
        assert networks(box, name) == nets
        assert "02:42:ac:11:00:99" in ok(box, "exec", name, "cat", "/sys/class/net/eth0/address")
        ok(box, "run", "-d", "--name", other, "--network", nets[1], "busybox", "sleep", "100")
        assert own in ok(box, "exec", other, "ping", "-c", "1", "-w", "3", "db")
        assert not reaches(box, other, "web")
    finally:
        box.corral("rm", "-f", name, other)
        for net in nets:
            ok(box, "network", "rm", net)


def test_a_network_that_was_removed_meanwhile_is_let_go_of(box: Corrald, name: str) -> None:
    first, second = box.place.network
    net = f"{name}-net"
    ok(box, "run", "--name", name, "busybox", "true")
    ok(box, "network", "create", "--subnet", f"{first}.{second}.148.0/24", net)
    try:
        ok(box, "network", "connect", net, name)
    finally:
        ok(box, "network", "rm", net)  # unused, as what has ended is attached by its next start
    assert box.corral("start", name).returncode == 1
    ok(box, "network", "disconnect", net, name)
    ok(box, "start", "-a", name)


def test_an_interface_that_the_container_took_down_holds_up_nothing(box: Corrald, name: str) -> None:
    first, second = box.place.network
    net = f"{name}-net"
    ok(box, "network", "create", "--subnet", f"{first}.{second}.149.0/24", net)
    try:
        ok(box, "run", "-d", "--name", name, "--network", net, "--cap-add", "NET_ADMIN", "busybox", "sleep", "100")
        ok(box, "network", "connect", "bridge", name)
        ok(box, "exec", name, "ip", "link", "set", "eth1", "down")
        ok(box, "network", "disconnect", net, name)
        assert networks(box, name) == ["bridge"]
        ok(box, "network", "connect", net, name)
    finally:
        box.corral("rm", "-f", name)
        ok(box, "network", "rm", net)


def test_a_network_is_made_with_dockers_options(box: Corrald, name: str) -> None:
    ok(box, "network", "create", "--ipv6", "--icc=false", "-o", "com.docker.network.driver.mtu=1300", name)
    try:
        [made] = json.loads(ok(box, "network", "inspect", name))
        assert made["mtu"] == 1300
        assert [":" in subnet["cidr"] for subnet in made["subnets"]] == [False, True]
        ok(box, "run", "-d", "--name", name, "--network", name, "busybox", "sleep", "100")
        ok(box, "run", "-d", "--name", f"{name}-b", "--network", name, "busybox", "sleep", "100")
        assert not reaches(box, name, address(box, f"{name}-b"))
    finally:
        box.corral("rm", "-f", name, f"{name}-b")
        ok(box, "network", "rm", name)


def test_containers_of_a_macvlan_network_reach_one_another(box: Corrald, name: str) -> None:
    ok(box, "network", "create", "-d", "macvlan", name)
    try:
        ok(box, "run", "-d", "--name", name, "--network", name, "busybox", "sleep", "100")
        ok(box, "run", "-d", "--name", f"{name}-b", "busybox", "sleep", "100")
        ok(box, "network", "connect", name, f"{name}-b")
        assert reaches(box, f"{name}-b", address(box, name))
        ok(box, "restart", "-t", "0", name)
        assert reaches(box, f"{name}-b", address(box, name))
    finally:
        box.corral("rm", "-f", name, f"{name}-b")
        ok(box, "network", "rm", name)


def test_a_network_that_cannot_be_is_refused_in_one_sentence(box: Corrald, name: str) -> None:
    for arguments, why in (
        (("-d", "weave"), "there is no network driver 'weave': use bridge, macvlan, ipvlan"),
        (("-d", "macvlan", "-o", "parent=nowhere0"), "needs the link nowhere0 of this host"),
        (("-o", "encrypted=true"), "network driver bridge has no option 'encrypted'"),
    ):
        refused = box.corral("network", "create", *arguments, name)
        assert refused.returncode == 1
        assert why in refused.stderr.decode()
        assert len(refused.stderr.splitlines()) == 1


@needs("cni")
def test_a_network_of_cni_is_made_from_its_configuration(box: Corrald, name: str, tmp_path: Path) -> None:
    subnet = "{}.{}.130".format(*box.place.network)
    ranges = [[{"subnet": f"{subnet}.0/24", "gateway": f"{subnet}.1"}]]
    ipam = {"type": "host-local", "dataDir": str(tmp_path), "ranges": ranges}
    config = tmp_path / "net.conflist"
    config.write_text(json.dumps({"cniVersion": "1.0.0", "plugins": [{"type": "ptp", "ipam": ipam}]}))
    ok(box, "network", "create", "-d", "cni", "--cni-config", str(config), name)
    try:
        ok(box, "run", "-d", "--name", name, "--network", name, "busybox", "sleep", "100")
        assert address(box, name) == f"{subnet}.2"
        assert reaches(box, name, f"{subnet}.1")
        ok(box, "restart", "-t", "0", name)
        assert reaches(box, name, f"{subnet}.1")
    finally:
        box.corral("rm", "-f", name)
        ok(box, "network", "rm", name)
    assert list(tmp_path.glob(f"{name}/{subnet}*")) == []


@needs("cni")
def test_ports_that_plugins_publish_do_not_change_while_the_container_is_stopped(
    box: Corrald, name: str, tmp_path: Path
) -> None:
    subnet = "{}.{}.157".format(*box.place.network)
    ipam = {"type": "host-local", "dataDir": str(tmp_path), "ranges": [[{"subnet": f"{subnet}.0/24"}]]}
    portmap = {"type": "portmap", "capabilities": {"portMappings": True}}
    config = tmp_path / "net.conflist"
    config.write_text(json.dumps({"cniVersion": "1.0.0", "plugins": [{"type": "ptp", "ipam": ipam}, portmap]}))
    ok(box, "network", "create", "-d", "cni", "--cni-config", str(config), name)
    try:
        ok(box, "run", "-d", "--name", name, "--network", name, "busybox", "sleep", "100")
        ok(box, "stop", "-t", "0", name)
        refused = box.corral("port", "add", name, "80")
        assert refused.returncode == 1
        assert "publish them only when a container is made: make it anew" in refused.stderr.decode()
        ok(box, "start", name)
    finally:
        box.corral("rm", "-f", name)
        ok(box, "network", "rm", name)


def test_explain_tells_the_way_of_a_packet_in_a_table(box: Corrald, name: str) -> None:
    ok(box, "run", "-d", "--name", name, "busybox", "sleep", "100")
    ok(box, "run", "-d", "--name", f"{name}-b", "busybox", "sleep", "100")
    ok(box, "network", "create", name)
    try:
        told = ok(box, "network", "explain", name, f"{name}-b")
        assert "both are on it" in told
        ok(box, "network", "connect", name, f"{name}-b")
        ok(box, "network", "disconnect", "bridge", f"{name}-b")
        refused = box.corral("network", "explain", name, f"{name}-b")
        assert refused.returncode == 1
        assert f"is in network {name}, which others do not reach" in refused.stdout.decode()
    finally:
        box.corral("rm", "-f", name, f"{name}-b")
        ok(box, "network", "rm", name)


def test_rates_and_routes_are_asked_for_with_the_network(box: Corrald, name: str) -> None:
    subnet = "{}.{}.131".format(*box.place.network)
    ok(box, "network", "create", "--subnet", f"{subnet}.0/24", name)
    try:
        route = f"name={name},route=198.51.100.0/24@{subnet}.9"
        ok(box, "run", "-d", "--name", name, "--network", route, "--net-rate", "8m/4m", "busybox", "sleep", "100")
        assert f"198.51.100.0/24 via {subnet}.9" in ok(box, "exec", name, "ip", "route")
        [shown] = json.loads(ok(box, "inspect", name))
        [attachment] = shown["config"]["network"]["attachments"]
        assert (int(attachment["receive_bps"]), int(attachment["send_bps"])) == (8_000_000, 4_000_000)
        ok(box, "restart", "-t", "0", name)
        assert f"198.51.100.0/24 via {subnet}.9" in ok(box, "exec", name, "ip", "route")
        refused = box.corral("run", "--rm", "--net-rate", "fast", "busybox", "true")
        assert refused.returncode == 125
        assert b"rate 'fast' is not understood" in refused.stderr
    finally:
        box.corral("rm", "-f", name)
        ok(box, "network", "rm", name)


def rates(box: Corrald, name: str) -> list[str]:
    """What the host's end of its link may send to it, and what its own end may send: the words of tc."""
    [shown] = json.loads(ok(box, "inspect", name))
    [own] = shown["endpoint"]["interfaces"]
    ends = {own["host_name"]: "/proc/self/ns/net", own["name"]: f"/proc/{shown['pid']}/ns/net"}
    said = [command(where, "tc", "qdisc", "show", "dev", link) for link, where in ends.items()]
    return [one.partition(" rate ")[2].partition(" ")[0] for one in said]


@needs("tc", "nsenter")
def test_rates_of_a_container_are_changed_while_it_runs_and_kept(box: Corrald, name: str) -> None:
    ok(box, "run", "-d", "--name", name, "busybox", "sleep", "100")
    inside = ok(box, "exec", name, "ip", "-o", "link", "show", "eth0").split()[:2]
    ok(box, "update", "--net-rate", "8m/4m", name)
    assert rates(box, name) == ["8Mbit", "4Mbit"]
    assert ok(box, "exec", name, "ip", "-o", "link", "show", "eth0").split()[:2] == inside
    ok(box, "restart", "-t", "0", name)
    assert rates(box, name) == ["8Mbit", "4Mbit"]
    refused = box.corral("update", "--net-rate", "9", name)
    assert refused.returncode == 1
    assert b"a rate of 9 bits per second is not between" in refused.stderr
    ok(box, "update", "--net-rate", "0", name)
    assert rates(box, name) == ["", ""]


def test_rates_of_what_is_in_no_network_are_refused(box: Corrald, name: str) -> None:
    ok(box, "create", "--name", name, "--network", "none", "busybox", "true")
    refused = box.corral("update", "--net-rate", "8m", name)
    assert refused.returncode == 1
    assert b"is in no network: connect it to one" in refused.stderr


@needs("tc", "nsenter")
def test_rates_that_come_with_a_limit_that_is_refused_are_as_they_were(box: Corrald, name: str) -> None:
    ok(box, "run", "-d", "--name", name, "--net-rate", "8m", "busybox", "sleep", "100")
    refused = box.corral("update", "--net-rate", "4m", "--cpuset-cpus", "4000", name)
    assert refused.returncode == 1
    assert rates(box, name) == ["8Mbit", "8Mbit"]
