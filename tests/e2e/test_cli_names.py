"""Containers of a network find one another by name."""

import time

from support.cli import ok
from support.corrald import Corrald


def found(box: Corrald, asker: str, name: str) -> bool:
    return box.corral("exec", asker, "ping", "-c1", "-W2", name).returncode == 0


def test_containers_of_a_network_are_known_by_their_names(box: Corrald, name: str) -> None:
    network, other, third = f"{name}-net", f"{name}-other", f"{name}-third"
    ok(box, "network", "create", network)
    try:
        for one in (name, other):
            ok(box, "run", "-d", "--name", one, "--network", network, "busybox", "sleep", "1000")
        assert found(box, other, name)
        assert found(box, name, other)
        assert not found(box, other, third)
        ok(box, "rename", name, third)
        assert found(box, other, third)
        assert not found(box, other, name)
        ok(box, "restart", "-t", "0", third)
        assert found(box, other, third)
        box.kill9()
        box.start()
        deadline = time.monotonic() + 5
        while not found(box, other, third):
            assert time.monotonic() < deadline
    finally:
        for one in (name, other, third):
            box.corral("rm", "-f", one)
        ok(box, "network", "rm", network)


def test_a_name_that_is_no_host_name_is_no_obstacle(box: Corrald, name: str) -> None:
    network, odd = f"{name}-net", f"{name}-"
    ok(box, "network", "create", network)
    try:
        assert ok(box, "run", "--rm", "--name", odd, "--network", network, "busybox", "echo", "up") == "up\n"
    finally:
        ok(box, "network", "rm", network)
