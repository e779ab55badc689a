"""What networks cost: an endpoint made and taken apart, a published port among a thousand, bytes between containers."""

import contextlib
import itertools
import json
import os
import secrets
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
from peers import Peer, quiet
from support.corrald import Corrald

from corral.api.network.v1 import network_pb2 as pb
from corral.api.network.v1.network_pb2_grpc import EndpointsStub, NetworksStub
from corral.kernel.netns import create_pinned, remove_pinned

ROUNDS = int(os.environ.get("CORRAL_BENCH_ROUNDS", "20"))
PORTS, CONTAINERS = 1000, 20
STREAM_ROUNDS = int(os.environ.get("CORRAL_BENCH_STREAM_ROUNDS", "7"))
STREAM_S = 3
NETWORK = "bench"

type Stream = tuple[float, float]
"""Bits that arrive per second, and per second of CPU that both ends take."""


def bench_network(daemon: Corrald, peers: list[Peer]) -> None:
    """The leaf over gRPC, as the engine calls it."""
    with grpc.insecure_channel(daemon.address_of("network")) as channel:
        endpoints = EndpointsStub(channel)
        _bench_attach(endpoints)
        _bench_ports(endpoints)
        if shutil.which("iperf3"):
            with _network(NetworksStub(channel)) as bridge:
                _bench_stream(endpoints, bridge)
        else:
            print("\nwithout bytes between containers: iperf3 is not installed")


def _bench_attach(endpoints: EndpointsStub) -> None:
    samples = []
    for number in range(ROUNDS * 10):
        began = time.perf_counter()
        with _attached(endpoints, f"bench{number}"):
            pass
        samples.append((time.perf_counter() - began) * 1000)
    print("\nattach+detach on the bridge over gRPC")
    first, *_, last = statistics.quantiles(samples[10:], n=10)
    print(
        f"  median {statistics.median(samples[10:]):.2f} ms; of ten, one below {first:.2f} and one above {last:.2f} ms"
    )


def _bench_ports(endpoints: EndpointsStub) -> None:
    """Beside a thousand ports of other containers; and of a container that has them itself, whose answer lists them."""
    rows = {}
    with contextlib.ExitStack() as stack:
        one = stack.enter_context(_attached(endpoints, "bench"))
        rows["the first"] = _publish_ms(endpoints, one.id)
        for number in range(CONTAINERS):
            other = stack.enter_context(_attached(endpoints, f"bench{number}"))
            for _ in range(PORTS // CONTAINERS):
                _publish(endpoints, other.id)
        rows[f"beside {PORTS:,} of others"] = _publish_ms(endpoints, one.id)
    with _attached(endpoints, "bench") as one:
        for _ in range(PORTS):
            _publish(endpoints, one.id)
        rows[f"of a container with {PORTS:,}"] = _publish_ms(endpoints, one.id)
    print("\na port published over gRPC")
    for name, took in rows.items():
        print(f"  {name:<28} {took:9.2f} ms   {took / rows['the first']:6.2f}x")


def _publish_ms(endpoints: EndpointsStub, name: str) -> float:
    samples = []
    for _ in range(ROUNDS * 2 + 5):
        began = time.perf_counter()
        port = _publish(endpoints, name)
        samples.append((time.perf_counter() - began) * 1000)
        endpoints.Unpublish(pb.UnpublishRequest(endpoint_id=name, ports=[port]))
    return statistics.median(samples[5:])


_inside = itertools.count(1)


def _publish(endpoints: EndpointsStub, name: str) -> pb.PortMapping:
    wanted = pb.PortMapping(host_ip="127.0.0.1", container_port=next(_inside))
    published = endpoints.Publish(pb.PublishRequest(endpoint_id=name, ports=[wanted])).ports
    return next(port for port in reversed(published) if port.container_port == wanted.container_port)


def _bench_stream(endpoints: EndpointsStub, bridge: str) -> None:
    """In turn, so that noise hits both alike, and in either order; by CPU time, too, of which others take nothing."""
    mtu = int(Path(f"/sys/class/net/{bridge}/mtu").read_text())
    with contextlib.ExitStack() as stack:
        ours = [stack.enter_context(_attached(endpoints, f"bench{side}", NETWORK)) for side in ("a", "b")]
        target = ours[1].interfaces[0].ipv4_address.partition("/")[0]
        pairs = {
            "corral": (ours[0].netns_path, ours[1].netns_path, target),
            "by hand": stack.enter_context(_by_hand(mtu)),
        }
        taken: dict[str, list[Stream]] = {name: [] for name in pairs}
        for number in range(STREAM_ROUNDS):
            for name in sorted(pairs, reverse=bool(number % 2)):
                taken[name].append(_stream(*pairs[name]))
    print(f"\nbytes between two containers, iperf3, MTU {mtu}, {STREAM_ROUNDS} rounds of {STREAM_S} s")
    for name, streams in taken.items():
        rate, worth = (statistics.median(each) / 1e9 for each in zip(*streams, strict=True))
        print(f"  {name:<28} {rate:9.2f} Gbit/s   {worth:6.2f} Gbit per second of CPU")
    worths = [ours[1] / theirs[1] for ours, theirs in zip(*taken.values(), strict=True)]
    print(f"  corral beside the other, per CPU, of a round: {statistics.median(worths):.3f}x")


def _stream(client: str, server: str, target: str) -> Stream:
    listening = subprocess.Popen(
        ["nsenter", f"--net={server}", "iperf3", "--server", "--one-off", "--bind", target],
        stdout=subprocess.DEVNULL,
    )
    try:
        words = ["iperf3", "--client", target, "--time", str(STREAM_S), "--json", "--connect-timeout", "2000"]
        for _ in range(50):
            answer = subprocess.run(["nsenter", f"--net={client}", *words], capture_output=True, text=True, check=False)
            if answer.returncode == 0:
                return _rates(json.loads(answer.stdout)["end"])
            time.sleep(0.1)
        raise RuntimeError(f"iperf3: {answer.stdout}{answer.stderr}")
    finally:
        listening.kill()
        listening.wait()


def _rates(end: Mapping[str, Any]) -> Stream:
    arrived = end["sum_received"]
    used = end["cpu_utilization_percent"]["host_total"] + end["cpu_utilization_percent"]["remote_total"]
    return float(arrived["bits_per_second"]), float(arrived["bits_per_second"]) / (used / 100)


@contextlib.contextmanager
def _attached(endpoints: EndpointsStub, name: str, *networks: str) -> Iterator[pb.Endpoint]:
    wanted = [pb.NetworkAttachment(network=network) for network in networks]
    made = endpoints.Attach(pb.AttachRequest(endpoint_id=name, networks=wanted))
    try:
        yield made
    finally:
        endpoints.Detach(pb.DetachRequest(endpoint_id=name))


@contextlib.contextmanager
def _network(networks: NetworksStub) -> Iterator[str]:
    """One that is made as users do it; yields its bridge."""
    networks.Create(pb.CreateNetworkRequest(name=NETWORK))
    try:
        yield networks.Get(pb.GetNetworkRequest(name=NETWORK)).interface
    finally:
        networks.Remove(pb.RemoveNetworkRequest(name=NETWORK))


@contextlib.contextmanager
def _by_hand(mtu: int) -> Iterator[tuple[str, str, str]]:
    """Two namespaces on a bridge, by ip(8); yields where they are and the address of the second."""
    tag = secrets.token_hex(2)
    bridge = f"corralb{tag}"
    with contextlib.ExitStack() as stack:
        quiet(["ip", "link", "add", bridge, "mtu", str(mtu), "type", "bridge"])
        stack.callback(quiet, ["ip", "link", "delete", bridge])
        quiet(["ip", "link", "set", bridge, "up"])
        pins = []
        for side in ("1", "2"):
            pin = f"/run/corral-bench-{tag}-{side}"
            create_pinned(pin)
            stack.callback(remove_pinned, pin)
            end = f"corral{tag}{side}"
            peer = ["peer", "name", "eth0", "mtu", str(mtu), "netns", pin]
            quiet(["ip", "link", "add", end, "mtu", str(mtu), "type", "veth", *peer])
            stack.callback(quiet, ["ip", "link", "delete", end])
            quiet(["ip", "link", "set", end, "master", bridge, "up"])
            quiet(["nsenter", f"--net={pin}", "ip", "address", "add", f"198.18.77.{side}/24", "dev", "eth0"])
            quiet(["nsenter", f"--net={pin}", "ip", "link", "set", "eth0", "up"])
            pins.append(pin)
        yield pins[0], pins[1], "198.18.77.2"
