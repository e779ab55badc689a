"""corrald executes itself anew while clients call by TCP: none is refused, and who else may listen there stays so."""

import contextlib
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from support.corrald import Corrald
from support.requirements import needs
from test_daemon_tls import authority, certificate
from test_upgrade import UPGRADES, meanwhile, upgrade

from corral.api.version.v1 import version_pb2, version_pb2_grpc
from corral.client.sync import Client
from corral.rpc.address import Tls

pytestmark = needs("root")


@contextmanager
def listening(host: str, *options: str) -> Iterator[tuple[Corrald, int]]:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as free:
        free.bind((host, 0))
        port = free.getsockname()[1]
    daemon = Corrald(services=("cgroups", "tasks"))
    name = f"[{host}]" if ":" in host else host
    unix = f"unix://{daemon.state}/corrald.sock"
    daemon.options = ("--address", unix, "--address", f"tcp://{name}:{port}", *options)
    with daemon:
        daemon.start()
        yield daemon, port


def call_while_it_is_upgraded(daemon: Corrald, address: str, tls: Tls | None = None) -> None:
    with Client(address, tls=tls) as client:

        def over_one_connection() -> None:
            client.system.version()

        def over_a_new_connection() -> None:
            with Client(address, tls=tls) as new:
                new.system.version()

        def without_our_client() -> None:
            target = address.removeprefix("tcp://")
            with grpc.insecure_channel(target, [("grpc.min_reconnect_backoff_ms", 60_000)]) as channel:
                for _ in range(3):
                    version_pb2_grpc.VersionStub(channel).Get(version_pb2.GetRequest())

        before = client.system.version()
        foreign = () if tls else (without_our_client,)  # that it may call again it is told by no word that TLS hides
        with meanwhile(over_one_connection, over_a_new_connection, *foreign) as counts:
            for _ in range(UPGRADES):
                upgrade(daemon)
        after = client.system.version()
    assert min(counts.values()) > 5 * UPGRADES, counts
    assert (after.generation, after.pid) == (before.generation + UPGRADES, before.pid)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_no_call_by_tcp_fails_while_it_is_upgraded(host: str) -> None:
    with listening(host) as (daemon, port):
        name = f"[{host}]" if ":" in host else host
        call_while_it_is_upgraded(daemon, f"tcp://{name}:{port}")


@needs("openssl")
def test_no_call_of_our_client_fails_behind_tls(tmp_path: Path) -> None:
    server = certificate(tmp_path, "server", authority(tmp_path, "ca"))
    files = ("--tls-cert", str(server.cert), "--tls-key", str(server.key), "--tls-ca", str(server.ca))
    with listening("0.0.0.0", *files) as (daemon, port):
        call_while_it_is_upgraded(daemon, f"tcp://localhost:{port}", certificate(tmp_path, "client", server.ca))


def test_no_other_daemon_may_listen_there_afterwards() -> None:
    with listening("127.0.0.1") as (daemon, port):
        for _ in range(2):
            upgrade(daemon)
            with socket.socket() as other:
                other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                with pytest.raises(OSError, match="in use"):
                    other.bind(("127.0.0.1", port))


def test_who_waits_for_one_that_does_not_come_back_is_refused() -> None:
    """The plain socket goes with the process."""
    with listening("127.0.0.1") as (daemon, port):
        upgrade(daemon)
        daemon.stop()
        with contextlib.closing(socket.socket()) as late, pytest.raises(ConnectionRefusedError):
            late.connect(("127.0.0.1", port))
