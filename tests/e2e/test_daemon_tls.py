"""Mutual TLS over TCP: who has no certificate of our CA gets nowhere."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.corrald import CORRAL, Corrald
from support.requirements import needs
from test_daemon_life import ECHO, SAY

from corral.client.sync import Client
from corral.rpc import errors
from corral.rpc.address import Tls
from corral.rpc.channel import open_channel

pytestmark = needs("openssl")


def openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], capture_output=True, check=True)


def authority(directory: Path, name: str) -> Path:
    """A CA of its own; returns its certificate."""
    key, cert = directory / f"{name}.key", directory / f"{name}.pem"
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    openssl("req", "-x509", *curve, "-keyout", str(key), "-out", str(cert), "-days", "2", "-subj", f"/CN={name}")
    return cert


def certificate(directory: Path, name: str, ca: Path) -> Tls:
    """A certificate for localhost that `ca` signed."""
    key, cert = directory / f"{name}.key", directory / f"{name}.pem"
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    signer = ["-CA", str(ca), "-CAkey", str(ca.with_suffix(".key"))]
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    output = ["-keyout", str(key), "-out", str(cert), "-days", "2", "-subj", f"/CN={name}"]
    openssl("req", "-x509", *curve, *signer, *names, *output)
    return Tls(cert, key, ca)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return authority(tmp_path_factory.mktemp("tls"), "ca")


@pytest.fixture(scope="module")
def address(ours: Path) -> Iterator[str]:
    server = certificate(ours.parent, "server", ours)
    files = ("--tls-cert", str(server.cert), "--tls-key", str(server.key), "--tls-ca", str(server.ca))
    options = ("--address", "tcp://127.0.0.1:0", *files)
    with Corrald(command=ECHO, services=("echo",), private_names=False, options=options) as daemon:
        daemon.start()
        [ready] = daemon.events("daemon.ready")
        yield str(ready["addresses"][1]).replace("127.0.0.1", "localhost")  # type: ignore[index]


async def test_a_client_of_our_ca_is_served(ours: Path, address: str):
    async with open_channel(address, tls=certificate(ours.parent, "client", ours)) as channel:
        assert (await channel.unary_unary(SAY)(b"you")).startswith(b"hello you")


async def test_a_client_of_another_ca_is_not(ours: Path, address: str, tmp_path: Path):
    stranger = certificate(tmp_path, "client", authority(tmp_path, "other"))
    async with open_channel(address, tls=Tls(stranger.cert, stranger.key, ours)) as channel:
        with pytest.raises(errors.Unavailable):
            await channel.unary_unary(SAY)(b"you", timeout=5)


async def test_a_client_without_tls_is_not(address: str):
    async with open_channel(address) as channel:
        with pytest.raises(errors.Unavailable):
            await channel.unary_unary(SAY)(b"you", timeout=5)


async def test_a_client_does_not_trust_a_server_of_another_ca(address: str, tmp_path: Path):
    async with open_channel(address, tls=certificate(tmp_path, "client", authority(tmp_path, "other"))) as channel:
        with pytest.raises(errors.Unavailable):
            await channel.unary_unary(SAY)(b"you", timeout=5)


def test_the_typed_client_shows_its_certificate(ours: Path, address: str):
    with Client(address, tls=certificate(ours.parent, "typed", ours)) as client:
        assert client.system.version().services == ["echo"]


def test_the_command_takes_its_certificate_from_the_environment(ours: Path, address: str):
    tls = certificate(ours.parent, "command", ours)
    files = {"CORRAL_TLS_CERT": str(tls.cert), "CORRAL_TLS_KEY": str(tls.key), "CORRAL_TLS_CA": str(tls.ca)}
    command = [CORRAL, "--address", address, "version"]
    served = subprocess.run(command, env=os.environ | files, capture_output=True, text=True, check=False)
    assert "Services: echo" in served.stdout, served.stderr
    some = subprocess.run(
        command, env=os.environ | dict([files.popitem()]), capture_output=True, text=True, check=False
    )
    assert "TLS needs all of" in some.stderr
