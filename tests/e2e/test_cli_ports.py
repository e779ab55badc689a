"""Published ports as a user types them."""

import json
import socket
import time

import pytest
from support.cli import ok
from support.corrald import Corrald
from support.registry import free_port

SERVE = "echo served > /tmp/f; while :; do nc -l -p 80 < /tmp/f; done"


def fetch(number: int, within_s: float = 10.0) -> str:
    """What the server says; its listener is there for one caller at a time."""
    deadline = time.monotonic() + within_s
    while True:
        try:
            with socket.create_connection(("127.0.0.1", number), 2) as connection:
                connection.shutdown(socket.SHUT_WR)
                if data := connection.recv(100):
                    return data.decode()
        except OSError:
            pass
        assert time.monotonic() < deadline, f"nobody serves on {number}"
        time.sleep(0.05)


def test_a_published_port_serves_and_is_shown(box: Corrald, name: str) -> None:
    number = free_port()
    ok(box, "run", "-d", "--name", name, "-p", f"{number}:80", "busybox", "sh", "-c", SERVE)
    assert fetch(number) == "served\n"
    assert ok(box, "port", name) == f"80/tcp -> 0.0.0.0:{number}\n"
    assert ok(box, "port", name, "80") == f"0.0.0.0:{number}\n"
    assert box.corral("port", name, "81").returncode == 1
    assert f"0.0.0.0:{number}->80/tcp" in ok(box, "ps", "--filter", f"name={name}")
    [shown] = json.loads(ok(box, "inspect", name))
    assert int(shown["endpoint"]["ports"][0]["host_port"]) == number


def test_a_port_is_free_while_its_container_is_stopped_and_comes_back_with_it(box: Corrald, name: str) -> None:
    number, other = free_port(), f"{name}-other"
    ok(box, "run", "-d", "--name", name, "-p", f"127.0.0.1:{number}:80", "busybox", "sh", "-c", SERVE)
    taken = box.corral("run", "-d", "--name", other, "-p", f"{number}:80", "busybox", "true")
    assert taken.returncode == 125
    assert b"is published by container" in taken.stderr
    ok(box, "stop", "-t", "0", name)
    with socket.create_server(("", number)):
        pass
    ok(box, "run", "-d", "--name", other, "-p", f"{number}:80", "busybox", "sh", "-c", SERVE)
    try:
        assert fetch(number) == "served\n"
        refused = box.corral("start", name)
        assert refused.returncode == 1
        assert b"choose another one" in refused.stderr
    finally:
        ok(box, "rm", "-f", other)
    ok(box, "start", name)
    assert fetch(number) == "served\n"


@pytest.mark.parametrize("how", ["restart", "kill9"])
def test_ports_outlive_the_daemon(box: Corrald, name: str, how: str) -> None:
    number = free_port()
    ok(box, "run", "-d", "--name", name, "-p", f"{number}:80", "busybox", "sh", "-c", SERVE)
    if how == "kill9":
        box.kill9()
        assert fetch(number) == "served\n"
        box.start()
    else:
        box.restart()
    assert fetch(number) == "served\n"
    ok(box, "rm", "-f", name)
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", number), 2)


def test_every_exposed_port_gets_one_of_the_host(box: Corrald, name: str) -> None:
    ok(box, "run", "-d", "--name", f"{name}-base", "busybox", "true")
    image = f"exposed-{name}"
    ok(box, "commit", "--change", "EXPOSE 80 53/udp", f"{name}-base", image)
    ok(box, "rm", "-f", f"{name}-base")
    ok(box, "run", "-d", "--name", name, "-P", image, "sh", "-c", SERVE)
    shown = dict(line.split(" -> ") for line in ok(box, "port", name).splitlines())
    assert shown.keys() == {"80/tcp", "53/udp"}
    assert fetch(int(shown["80/tcp"].rpartition(":")[2])) == "served\n"
    ok(box, "rm", "-f", name)
    ok(box, "image", "rm", image)


def test_a_port_that_nobody_named_is_another_one_where_it_was_taken_meanwhile(box: Corrald, name: str) -> None:
    ok(box, "run", "-d", "--name", name, "-p", "80", "busybox", "sh", "-c", SERVE)
    number = int(ok(box, "port", name, "80").rpartition(":")[2])
    ok(box, "stop", "-t", "0", name)
    with socket.create_server(("", number)):
        ok(box, "start", name)
    other = int(ok(box, "port", name, "80").rpartition(":")[2])
    assert other != number
    assert fetch(other) == "served\n"


def test_a_stop_while_it_restarts_frees_its_ports(box: Corrald, name: str) -> None:
    number = free_port()
    ok(box, "run", "-d", "--name", name, "--restart", "always", "-p", f"{number}:80", "busybox", "false")
    time.sleep(1)
    ok(box, "stop", name)
    deadline = time.monotonic() + 5
    while box.corral("run", "--rm", "-p", f"{number}:80", "busybox", "true").returncode:
        assert time.monotonic() < deadline
        time.sleep(0.1)
