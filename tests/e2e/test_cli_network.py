"""`corral network` and the networks of containers, by packets between them."""

import json
from pathlib import Path

from support.corrald import Corrald


def ok(box: Corrald, *args: str) -> str:
    result = box.corral(*args)
    assert result.returncode == 0, (args, result.stderr.decode(), box.log())
    return result.stdout.decode()


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
    ok(box, "network", "create", "--subnet", "10.222.7.0/29", name)
    try:
        found = json.loads(ok(box, "network", "inspect", name))[0]
        assert found["subnets"][0]["gateway"] == "10.222.7.1"
        assert name in ok(box, "network", "ls")
        ok(box, "run", "-d", "--name", name, "--network", name, "busybox", "sleep", "100")
        assert address(box, name).startswith("10.222.7.")
        failed = box.corral("network", "rm", name)
        assert failed.returncode == 1
        assert b"use" in failed.stderr
    finally:
        ok(box, "rm", "-f", name)
        ok(box, "network", "rm", name)


def test_a_full_network_refuses_the_next_and_keeps_the_others(box: Corrald, name: str) -> None:
    ok(box, "network", "create", "--subnet", "10.222.8.0/30", name)
    try:
        ok(box, "run", "-d", "--name", name, "--network", name, "busybox", "sleep", "100")
        failed = box.corral("run", "--rm", "--network", name, "busybox", "true")
        assert failed.returncode == 125
        assert b"10.222.8.0/30" in failed.stderr
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
