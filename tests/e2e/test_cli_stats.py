"""corral stats: what containers use, as a table, as JSON, and by docker's templates."""

import json
import time
from collections.abc import Iterator

import pytest
from support.cli import ok
from support.corrald import Corrald
from support.engine_fixtures import loaded
from support.requirements import needs

__all__ = ["loaded"]
pytestmark = needs("root", "overlayfs", "busybox")


@pytest.fixture(scope="module")
def talker(loaded: Corrald) -> Iterator[Corrald]:
    """A container that has sent a file of 300 KB to another one, both still there."""
    serve = "sleep 1000 | nc -l -p 7 >/dev/null; sleep 1000"  # nc ends with what it reads
    ok(loaded, "run", "-d", "--name", "listener", "busybox", "sh", "-c", serve)
    address = ok(loaded, "inspect", "-f", "{{.NetworkSettings.IPAddress}}", "listener").strip()
    say = f"until head -c 300000 /dev/zero | nc {address} 7; do sleep 0.1; done; echo said; sleep 1000"
    ok(loaded, "run", "-d", "-m", "64m", "--name", "talker", "busybox", "sh", "-c", say)
    deadline = time.monotonic() + 30
    while "said" not in ok(loaded, "logs", "talker"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield loaded
    ok(loaded, "rm", "-f", "talker", "listener")


def interfaces(box: Corrald, name: str) -> list[dict[str, object]]:
    found = json.loads(ok(box, "stats", "--no-stream", "--format", "json", name))["interfaces"]
    assert isinstance(found, list)
    return found


def test_what_went_through_the_interfaces_is_counted_as_the_container_sees_it(talker: Corrald) -> None:
    [sent], [received] = interfaces(talker, "talker"), interfaces(talker, "listener")
    assert (sent["name"], received["name"]) == ("eth0", "eth0")
    assert 300_000 < int(str(sent["tx_bytes"])) < 400_000 > int(str(sent["rx_bytes"]))
    assert 300_000 < int(str(received["rx_bytes"])) < 400_000
    inside = ok(talker, "exec", "talker", "sh", "-c", "cat /sys/class/net/eth0/statistics/tx_packets")
    assert int(str(sent["tx_packets"])) <= int(inside)


def test_every_further_network_is_counted_by_itself(talker: Corrald) -> None:
    net = "stats-net"
    ok(talker, "network", "create", "--subnet", "{}.{}.152.0/24".format(*talker.place.network), net)
    ok(talker, "network", "connect", net, "listener")
    try:
        assert [each["name"] for each in interfaces(talker, "listener")] == ["eth0", "eth1"]
    finally:
        ok(talker, "network", "disconnect", net, "listener")
        ok(talker, "network", "rm", net)


@pytest.mark.parametrize("mode", ["none", "host", "container:talker"])
def test_interfaces_that_are_not_its_own_are_not_counted(talker: Corrald, mode: str) -> None:
    name = f"stats-{mode.partition(':')[0]}"
    ok(talker, "run", "-d", "--network", mode, "--name", name, "busybox", "sleep", "1000")
    try:
        reading = json.loads(ok(talker, "stats", "--no-stream", "--format", "json", name))
        assert not reading.get("interfaces")
    finally:
        ok(talker, "rm", "-f", name)


def test_the_table_has_dockers_columns_and_templates_dockers_names(talker: Corrald) -> None:
    headings, row, *_ = ok(talker, "stats", "--no-stream", "talker").splitlines()
    for heading in ("CPU %", "MEM USAGE / LIMIT", "MEM %", "NET I/O", "BLOCK I/O", "PIDS"):
        assert heading in headings
    assert "talker" in row
    form = "{{.Name}}|{{.CPUPerc}}|{{.MemUsage}}|{{.MemPerc}}|{{.NetIO}}|{{.BlockIO}}|{{.PIDs}}"
    name, cpu, memory, share, net, block, pids = ok(
        talker, "stats", "--no-stream", "--format", form, "talker"
    ).strip().split("|")  # fmt: skip
    assert name == "talker"
    assert cpu.endswith("%")
    assert share.endswith("%")
    assert memory.endswith("/ 64MiB")
    assert net.count("kB") == 2
    assert " / " in block
    assert int(pids) in (1, 2)  # some shells become their last command
