"""Ports of a container that exists, published and withdrawn as a user types it, by connections to them."""

import json
import socket
from collections.abc import Callable

import pytest
from support.cli import ok
from support.corrald import Corrald
from support.netlab import eventually
from support.registry import free_port

SERVE = "echo served > /tmp/f; while :; do nc -l -p 80 < /tmp/f; done"


def refused(box: Corrald, *args: str) -> str:
    result = box.corral(*args)
    assert result.returncode == 1, (args, result.stdout)
    return result.stderr.decode()


def serves(number: int, host: str = "127.0.0.1") -> bool:
    try:
        with socket.create_connection((host, number), 2) as connection:
            connection.shutdown(socket.SHUT_WR)
            return connection.recv(100) == b"served\n"
    except OSError:
        return False


def fetched(number: int) -> Callable[[], bool]:
    return lambda: serves(number)


def start(box: Corrald, name: str, *options: str) -> None:
    ok(box, "run", "-d", "--name", name, *options, "busybox", "sh", "-c", SERVE)


def shown(box: Corrald, name: str) -> list[str]:
    return ok(box, "port", name).splitlines()


def pid(box: Corrald, name: str) -> int:
    return int(json.loads(ok(box, "inspect", name))[0]["pid"])


def test_a_port_is_published_and_withdrawn_while_the_container_runs(box: Corrald, name: str) -> None:
    number = free_port()
    start(box, name)
    before = pid(box, name)
    assert ok(box, "port", "add", name, f"{number}:80") == f"80/tcp -> 0.0.0.0:{number}\n"
    assert eventually(fetched(number))
    assert f"0.0.0.0:{number}->80/tcp" in ok(box, "ps", "--filter", f"name={name}")
    [facts] = json.loads(ok(box, "inspect", name))
    assert [int(port["host_port"]) for port in facts["config"]["network"]["ports"]] == [number]
    ok(box, "port", "rm", name, "80")
    assert shown(box, name) == []
    assert not serves(number)
    with socket.create_server(("", number)):  # it is free for others
        pass
    assert pid(box, name) == before


def test_ports_are_served_at_the_hosts_ipv6_loopback_too(box: Corrald, name: str) -> None:
    number, alone = free_port(), free_port()
    start(box, name, "-p", f"{number}:80")
    assert eventually(lambda: serves(number, "::1"))
    ok(box, "port", "add", name, f"[::1]:{alone}:80")
    assert eventually(lambda: serves(alone, "::1"))
    assert not serves(alone)
    ok(box, "port", "rm", name, f"[::1]:{alone}:80")
    assert not serves(alone, "::1")
    with socket.create_server(("::1", number + 1), family=socket.AF_INET6) as taken:
        wanted = f"{taken.getsockname()[1]}:80"
        assert "is in use by another program" in refused(box, "port", "add", name, wanted)
    ok(box, "restart", "-t", "0", name)
    assert eventually(lambda: serves(number, "::1"))
    ok(box, "stop", "-t", "0", name)
    assert not serves(number, "::1")
    assert is_free("::1", number)


def is_free(address: str, number: int) -> bool:
    try:
        socket.create_server((address, number), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def test_one_that_is_published_already_is_no_error_and_one_that_is_not_is_named(box: Corrald, name: str) -> None:
    number = free_port()
    start(box, name, "-p", f"{number}:80")
    assert ok(box, "port", "add", name, f"{number}:80") == f"80/tcp -> 0.0.0.0:{number}\n"
    assert "does not publish port 81/udp" in refused(box, "port", "rm", name, "80", "81/udp")
    assert shown(box, name) == [f"80/tcp -> 0.0.0.0:{number}"]


def test_a_conflict_is_found_before_anything_changes(box: Corrald, name: str) -> None:
    mine, others, theirs = free_port(), f"{name}-other", free_port()
    start(box, name, "-p", f"{mine}:80")
    start(box, others, "-p", f"{theirs}:80")
    try:
        before = ok(box, "inspect", name)
        assert "is published by container" in refused(box, "port", "add", name, "81", f"{theirs}:82")
        assert "leads to port 80 of" in refused(box, "port", "add", name, "81", f"{mine}:82")
        with socket.create_server(("", 0)) as taken:
            number = taken.getsockname()[1]
            assert "is in use by another program" in refused(box, "port", "add", name, "81", f"{number}:82")
        assert ok(box, "inspect", name) == before
    finally:
        ok(box, "rm", "-f", others)


@pytest.mark.parametrize("mode", ["host", "none"])
def test_a_container_without_a_network_of_its_own_publishes_nothing(box: Corrald, name: str, mode: str) -> None:
    start(box, name, "--network", mode)
    assert "is in no network of its own" in refused(box, "port", "add", name, "80")


def test_changes_are_kept_over_a_restart_of_the_container(box: Corrald, name: str) -> None:
    gone, new = free_port(), free_port()
    start(box, name, "-p", f"{gone}:81")
    ok(box, "port", "add", name, f"{new}:80", "82")
    ok(box, "port", "rm", name, f"{gone}:81")
    chosen = shown(box, name)
    assert len(chosen) == 2
    ok(box, "restart", "-t", "0", name)
    assert shown(box, name) == chosen
    assert eventually(fetched(new))


def test_changes_of_a_stopped_container_come_with_its_next_start(box: Corrald, name: str) -> None:
    gone, new = free_port(), free_port()
    start(box, name, "-p", f"{gone}:81")
    ok(box, "stop", "-t", "0", name)
    assert ok(box, "port", "add", name, f"{new}:80") == ""
    ok(box, "port", "rm", name, "81")
    ok(box, "start", name)
    assert shown(box, name) == [f"80/tcp -> 0.0.0.0:{new}"]
    assert eventually(fetched(new))


def test_changes_outlive_a_daemon_that_is_killed(box: Corrald, name: str) -> None:
    gone, new = free_port(), free_port()
    start(box, name, "-p", f"{gone}:80")
    ok(box, "port", "add", name, f"{new}:80")
    ok(box, "port", "rm", name, f"{gone}:80")
    box.kill9()
    assert eventually(fetched(new))
    box.start()
    assert shown(box, name) == [f"80/tcp -> 0.0.0.0:{new}"]
    assert eventually(fetched(new))
    assert not serves(gone)


def test_an_exposed_port_can_be_withdrawn_for_good(box: Corrald, name: str) -> None:
    ok(box, "run", "-d", "--name", f"{name}-base", "busybox", "true")
    image = f"exposed-{name}"
    ok(box, "commit", "--change", "EXPOSE 80 53/udp", f"{name}-base", image)
    ok(box, "rm", "-f", f"{name}-base")
    ok(box, "run", "-d", "--name", name, "-P", image, "sh", "-c", SERVE)
    ok(box, "port", "rm", name, "53/udp")
    [line] = shown(box, name)
    ok(box, "restart", "-t", "0", name)
    assert shown(box, name) == [line]
    ok(box, "rm", "-f", name)
    ok(box, "image", "rm", image)


def test_of_two_ports_that_lead_alike_the_named_one_goes(box: Corrald, name: str) -> None:
    number = free_port()
    start(box, name, "-p", "80", "-p", f"{number}:80")
    [left] = [line for line in shown(box, name) if not line.endswith(f":{number}")]
    ok(box, "port", "rm", name, f"{number}:80")
    assert shown(box, name) == [left]
    ok(box, "port", "add", name, f"{number}:80")
    ok(box, "restart", "-t", "0", name)
    assert sorted(shown(box, name)) == sorted([left, f"80/tcp -> 0.0.0.0:{number}"])
