"""Prometheus' view of containers, scraped over HTTP from a real daemon."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families
from support.corrald import Corrald, running
from support.registry import free_port
from support.requirements import needs

from corral.engine.metrics import Exporter, Readings
from corral.rpc.errors import FailedPrecondition, InvalidArgument, Unavailable

pytestmark = needs("root", "overlayfs", "busybox", "netns")

SPIN = ["sh", "-c", "while :; do :; done"]


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def box(port: int, busybox_archive: Path) -> Iterator[Corrald]:
    with running(settings={"engine": {"metrics_address": f"127.0.0.1:{port}"}}) as daemon:
        for namespace in ("default", "other"):
            with daemon.client(namespace) as client:
                client.images.load(busybox_archive)
        yield daemon


def scraped(port: int, accept: str = "text/plain") -> tuple[str, str]:
    """Content type and text."""
    with urlopen(Request(f"http://127.0.0.1:{port}/metrics", headers={"Accept": accept}), timeout=20) as answer:
        return answer.headers["Content-Type"], answer.read().decode()


def samples(port: int) -> dict[str, list[tuple[dict[str, str], float]]]:
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(scraped(port)[1]):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def value(port: int, name: str, container: str, **labels: str) -> float:
    [found] = [
        value
        for has, value in samples(port)[f"corral_container_{name}"]
        if has["name"] == container and labels.items() <= has.items()
    ]
    return found


def test_counters_of_a_container_grow_with_what_it_does(box: Corrald, port: int) -> None:
    with box.client() as client:
        client.containers.run("busybox", SPIN, name="spinning", network="none")
        before, began = value(port, "cpu_seconds_total", "spinning"), time.monotonic()
        while value(port, "cpu_seconds_total", "spinning") < before + 0.2:
            assert time.monotonic() < began + 60
        assert value(port, "pids", "spinning") == 1
        client.containers.remove("spinning", force=True)


def test_interfaces_are_counted_each_by_its_name(box: Corrald, port: int) -> None:
    with box.client() as client:
        made = client.containers.run("busybox", ["sleep", "100"], name="talks")
        gateway = made.endpoint.interfaces[0].ipv4_gateway
        before = value(port, "network_transmit_packets_total", "talks", interface="eth0")
        assert client.containers.exec(made.id, ["ping", "-c", "3", "-i", "0.1", gateway]).code == 0
        assert value(port, "network_transmit_packets_total", "talks", interface="eth0") >= before + 3
        assert value(port, "network_receive_bytes_total", "talks", interface="eth0") >= 3 * 84
        client.containers.remove("talks", force=True)


def test_labels_tell_whose_and_limits_are_those_asked_for(box: Corrald, port: int) -> None:
    with box.client() as client, box.client("other") as other:
        made = client.containers.run(
            "busybox", ["sleep", "100"], name="here", network="none", memory="64m", pids_limit=7
        )
        [labels] = [has for has, _ in samples(port)["corral_container_memory_limit_bytes"] if has["name"] == "here"]
        assert labels == {"namespace": "default", "id": made.id, "name": "here", "image": "busybox"}
        assert value(port, "memory_limit_bytes", "here") == 64 << 20
        assert value(port, "pids_limit", "here") == 7
        assert abs(value(port, "start_time_seconds", "here") - time.time()) < 60
        other.containers.run("busybox", ["sleep", "100"], name="here", network="none")
        spaces = {has["namespace"] for has, _ in samples(port)["corral_container_pids"] if has["name"] == "here"}
        assert spaces == {"default", "other"}
        other.containers.remove("here", force=True)
        client.containers.remove("here", force=True)


def test_those_that_do_not_run_are_counted_only(box: Corrald, port: int) -> None:
    with box.client() as client:
        made = client.containers.create("busybox", ["true"], name="made", network="none")
        counted = samples(port)
        assert ({"namespace": "default", "status": "created"}, 1.0) in counted["corral_containers"]
        assert not any(has["id"] == made.id for has, _ in counted.get("corral_container_pids", []))
        client.containers.remove("made")


def test_what_oom_killed_shows(box: Corrald, port: int) -> None:
    hog = ["sh", "-c", "while :; do dd if=/dev/zero of=/dev/shm/x bs=1M count=64; sleep 0.2; done"]
    with box.client() as client:
        client.containers.run("busybox", hog, name="hog", network="none", memory="32m", shm_size="128m")
        deadline = time.monotonic() + 60
        while not (killed := value(port, "memory_oom_kills_total", "hog")):
            assert time.monotonic() < deadline
        assert killed >= 1
        client.containers.remove("hog", force=True)


def test_openmetrics_is_spoken_where_it_is_asked_for(box: Corrald, port: int) -> None:
    kind, text = scraped(port, "application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text")
    names = {family.name for family in openmetrics.text_string_to_metric_families(text)}
    assert {"corral_containers", "corral_container_cpu_seconds", "corral_process_cpu_seconds"} <= names


def test_an_address_that_is_taken_is_told(port: int, box: Corrald) -> None:
    async def start() -> None:
        async def nothing() -> Readings:
            return Readings((), ())

        Exporter(f"127.0.0.1:{port}", nothing).start()

    with pytest.raises(FailedPrecondition, match=f"127.0.0.1:{port}"):
        asyncio.run(start())


@pytest.mark.parametrize("address", ["9323", ":9323", "localhost:", "localhost:http", "localhost:70000"])
async def test_what_is_no_address_is_refused(address: str) -> None:
    async def nothing() -> Readings:
        return Readings((), ())

    with pytest.raises(InvalidArgument, match="HOST:PORT"):
        Exporter(address, nothing)


async def test_a_reading_that_fails_is_no_empty_answer() -> None:
    async def fail() -> Readings:
        raise Unavailable("cgroups is away")

    port = free_port()
    exporter = Exporter(f"127.0.0.1:{port}", fail)
    exporter.start()
    try:
        with pytest.raises(HTTPError, match="500"):
            await asyncio.to_thread(scraped, port)
    finally:
        await asyncio.to_thread(exporter.stop)
