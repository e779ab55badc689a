"""Scopes of a systemd that does not answer, which is not one that is gone."""

import contextlib
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.requirements import needs

from corral.runtime import units
from corral.runtime.errors import CommandError
from corral.runtime.state import Record

pytestmark = needs("root")


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Record:
    """Of a container in a scope of a user's own systemd, whose sockets are below the test's directory."""
    monkeypatch.setattr(units, "BOOTED", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", f"unix:path={tmp_path}/bus")
    return Record(
        id="c", bundle="/b", rootfs="/b/rootfs", created="", owner=0, annotations={},
        cgroup="/corral-nowhere/c.scope", cgroup_is_own=True, unit="c.scope", user_manager=True,
    )  # fmt: skip


@contextlib.contextmanager
def hanging_up(path: Path) -> Iterator[None]:
    """A socket whose owner ends each connection at once."""
    path.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    listener.accept()[0].close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize("take_away", [units.remove, units.forget])
def test_a_users_systemd_that_ended_with_the_session_has_no_scope_any_more(take_away, record: Record) -> None:
    take_away(record)


@pytest.mark.parametrize("take_away", [units.remove, units.forget])
def test_no_systemd_at_all_has_no_scope_either(take_away, record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "BOOTED", "/nowhere")
    record.user_manager = False
    take_away(record)


@pytest.mark.parametrize("take_away", [units.remove, units.forget])
def test_one_that_hangs_up_is_told_of_so_that_the_container_can_be_deleted_later(
    take_away, record: Record, tmp_path: Path
) -> None:
    with hanging_up(tmp_path / "systemd/private"), pytest.raises(CommandError, match="cannot reach the user's systemd"):
        take_away(record)


@needs("dbus-daemon")
def test_a_bus_without_systemd_is_told_of_too(record: Record, tmp_path: Path) -> None:
    words = ["dbus-daemon", "--session", "--nofork", "--nopidfile", f"--address=unix:path={tmp_path}/bus"]
    with subprocess.Popen([*words, "--print-address"], stdout=subprocess.PIPE, text=True) as daemon:
        try:
            assert daemon.stdout is not None
            daemon.stdout.readline()
            with pytest.raises(CommandError, match="cannot reach the user's systemd"):
                units.remove(record)
        finally:
            daemon.terminate()
