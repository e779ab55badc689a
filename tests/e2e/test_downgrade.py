"""An older corral that meets what a newer one has written: it says so, and changes nothing."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from support.corrald import SERVICES, Corrald, running
from support.requirements import needs

from corral.api.version.v1 import version_pb2, version_pb2_grpc

pytestmark = needs("root", "overlayfs", "netns")

USER_VERSION_AT = 60  # of the header of a database of SQLite


@contextmanager
def of_a_newer_corral(path: Path) -> Iterator[None]:
    """Of a database that nobody has open."""
    with path.open("r+b", buffering=0) as file:
        file.seek(USER_VERSION_AT)
        before = file.read(4)
        file.seek(USER_VERSION_AT)
        file.write((999).to_bytes(4))
        yield
        file.seek(USER_VERSION_AT)
        file.write(before)


@contextmanager
def upgraded_by_a_newer_corral(path: Path) -> Iterator[None]:
    """Where a database lies that is open. What is written into that one a checkpoint may overwrite: another lies in its
    place meanwhile."""
    aside = path.with_suffix(".aside")
    newer = bytearray(path.read_bytes())
    newer[USER_VERSION_AT : USER_VERSION_AT + 4] = (999).to_bytes(4)
    path.rename(aside)
    try:
        path.write_bytes(newer)
        yield
    finally:
        aside.rename(path)


def generations(daemon: Corrald) -> dict[str, int]:
    found = {}
    for name in daemon.processes:
        service = "engine" if name == "corrald" else name
        with grpc.insecure_channel(daemon.address_of(service)) as channel:
            answer = version_pb2_grpc.VersionStub(channel).Get(version_pb2.GetRequest(), wait_for_ready=True)
            found[name] = answer.generation
    return found


def contents(daemon: Corrald) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in daemon.root.glob("*/*.db*")}


@pytest.fixture(scope="module")
def stopped() -> Iterator[Corrald]:
    """One that has its databases and does not run; after all that it starts."""
    with Corrald() as daemon:
        daemon.start()
        daemon.stop()
        yield daemon
        daemon.start()


@pytest.mark.parametrize("service", SERVICES)
def test_a_start_is_refused_before_any_service_begins(stopped: Corrald, service: str) -> None:
    database = stopped.root / service / f"{service}.db"
    with of_a_newer_corral(database):
        before = contents(stopped)
        assert len(before) >= len(SERVICES)
        with pytest.raises(RuntimeError, match=f"{database} has schema version 999, this corral knows [0-9]+: a newer"):
            stopped.start()
        assert contents(stopped) == before
        stopped.processes.clear()


@pytest.mark.parametrize("split", [False, True], ids=["one-process", "five-processes"])
def test_an_upgrade_to_an_older_one_is_refused_and_the_newer_one_goes_on(*, split: bool) -> None:
    """All of it: no process is upgraded if one would not start."""
    with running(split=split) as daemon:
        before = generations(daemon)
        assert len(before) == (len(SERVICES) if split else 1)
        for service in ("tasks", "engine"):
            with upgraded_by_a_newer_corral(daemon.root / service / f"{service}.db"):
                refused = daemon.corral("system", "upgrade", timeout_s=120)
            assert refused.returncode == 1
            assert b"would not start, so this one goes on: " in refused.stderr
            assert f"{service}.db has schema version 999".encode() in refused.stderr
            assert generations(daemon) == before
            assert daemon.corral("system", "info").returncode == 0
        upgraded: subprocess.CompletedProcess[bytes] = daemon.corral("system", "upgrade", timeout_s=120)
        assert upgraded.returncode == 0
        assert generations(daemon) == {name: generation + 1 for name, generation in before.items()}
