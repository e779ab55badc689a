"""Published ports as a user types them."""

import contextlib
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


def shown(box: Corrald, name: str) -> list[tuple[int, int]]:
    """The container's ports, each with the host's."""
    lines = ok(box, "port", name).splitlines()
    return [(int(line.split("/")[0]), int(line.rpartition(":")[2])) for line in lines]


def free_range(length: int) -> range:
    while True:
        first = free_port()
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for number in range(first, first + length):
                stack.enter_context(socket.create_server(("", number)))
            return range(first, first + length)


def test_of_a_range_for_one_port_the_first_that_is_free_is_taken(box: Corrald, name: str) -> None:
    first, second, third = free_range(3)
    asked, names = f"{first}-{third}:80", [f"{name}-{index}" for index in range(3)]
    with socket.create_server(("", second)):
        ok(box, "run", "-d", "--name", names[0], "-p", asked, "busybox", "sh", "-c", SERVE)
        ok(box, "run", "-d", "--name", names[1], "-p", asked, "busybox", "sh", "-c", SERVE)
        refused = box.corral("run", "-d", "--name", names[2], "-p", asked, "busybox", "true")
        assert (refused.returncode, b"are all in use" in refused.stderr) == (125, True)
        assert [shown(box, each) for each in names[:2]] == [[(80, first)], [(80, third)]]
        assert fetch(third) == "served\n"
    ok(box, "rm", "-f", *names)


def test_of_a_range_another_port_is_taken_where_the_one_before_is_not_free_any_more(box: Corrald, name: str) -> None:
    first, second, third = free_range(3)
    asked = f"{first}-{third}"
    ok(box, "run", "-d", "--name", name, "-p", f"{asked}:80", "-p", f"{second}:81", "busybox", "sleep", "600")
    assert shown(box, name) == [(80, first), (81, second)]
    ok(box, "restart", "-t", "0", name)
    assert shown(box, name) == [(80, first), (81, second)]
    ok(box, "stop", "-t", "0", name)
    with socket.create_server(("", first)):
        ok(box, "start", name)
    assert shown(box, name) == [(80, third), (81, second)]
    ok(box, "port", "rm", name, f"{asked}:80")
    ok(box, "port", "add", name, f"{asked}:82")
    ok(box, "port", "add", name, f"{asked}:82")
    assert shown(box, name) == [(81, second), (82, first)]
    ok(box, "stop", "-t", "0", name)
    ok(box, "port", "add", name, f"{asked}:83")
    ok(box, "start", name)
    assert shown(box, name) == [(81, second), (82, first), (83, third)]
    ok(box, "rm", "-f", name)


def test_ranges_that_are_none_are_refused(box: Corrald, name: str) -> None:
    for asked in ("8005-8000:80", "8000-70000:80", "8000-8005:80-81", "8000-8005:"):
        refused = box.corral("run", "--name", name, "-p", asked, "busybox", "true")
        assert (refused.returncode, b"is not understood" in refused.stderr) == (125, True)
