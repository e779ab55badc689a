"""An older corral that meets what a newer one has written: it says so, and changes nothing."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.corrald import SERVICES, Corrald, running
from support.requirements import needs

pytestmark = needs("root", "overlayfs", "netns")

USER_VERSION_AT = 60  # of the header of a database of SQLite


@contextmanager
def of_a_newer_corral(path: Path) -> Iterator[None]:
    with path.open("r+b", buffering=0) as file:
        file.seek(USER_VERSION_AT)
        before = file.read(4)
        file.seek(USER_VERSION_AT)
        file.write((999).to_bytes(4))
        yield
        file.seek(USER_VERSION_AT)
        file.write(before)


def contents(daemon: Corrald) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in daemon.root.glob("*/*.db*")}


@pytest.mark.parametrize("service", SERVICES)
def test_a_start_is_refused_before_any_service_begins(service: str) -> None:
    with Corrald() as daemon:
        daemon.start()
        daemon.stop()
        database = daemon.root / service / f"{service}.db"
        with of_a_newer_corral(database):
            before = contents(daemon)
            assert len(before) >= len(SERVICES)
            with pytest.raises(
                RuntimeError, match=f"{database} has schema version 999, this corral knows [0-9]+: a newer"
            ):
                daemon.start()
            assert contents(daemon) == before
            daemon.processes.clear()
        daemon.start()


def test_an_upgrade_to_an_older_one_is_refused_and_the_newer_one_goes_on() -> None:
    with running() as daemon:
        database = daemon.root / "tasks" / "tasks.db"
        with of_a_newer_corral(database):
            refused = daemon.corral("system", "upgrade", timeout_s=120)
        assert refused.returncode == 1
        assert b"would not start, so this one goes on: " in refused.stderr
        assert b"tasks.db has schema version 999" in refused.stderr
        assert daemon.corral("system", "info").returncode == 0
        upgraded: subprocess.CompletedProcess[bytes] = daemon.corral("system", "upgrade", timeout_s=120)
        assert upgraded.returncode == 0
