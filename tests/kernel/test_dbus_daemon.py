"""D-Bus as others speak it: a message bus of the test's own."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.requirements import needs

from corral.kernel import process
from corral.kernel.dbus.connection import BUS, CallFailed, Connection, Target
from corral.kernel.dbus.marshalling import Variant
from corral.kernel.namespaces import Kind
from corral.kernel.user_namespaces import write_mappings

pytestmark = needs("dbus-daemon")
INSIDE = 5000


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    wanted = f"unix:path={tmp_path}/bus"
    words = ["dbus-daemon", "--session", "--nofork", "--nopidfile", f"--address={wanted}", "--print-address"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as daemon:
        try:
            assert daemon.stdout is not None
            yield daemon.stdout.readline().strip()
        finally:
            daemon.terminate()


def test_a_bus_answers_calls_and_tells_errors(address: str) -> None:
    with Connection.to_bus(f"unix:path=/nowhere;{address}", timeout_s=10) as bus:
        (names,) = bus.call(BUS, "ListNames")
        assert "org.freedesktop.DBus" in names
        with pytest.raises(CallFailed, match="GetConnectionUnixUser") as e:
            bus.call(BUS, "GetConnectionUnixUser", "s", "org.example.nobody")
        assert e.value.name == "org.freedesktop.DBus.Error.NameHasNoOwner"


def test_the_kernel_tells_the_bus_who_calls(address: str) -> None:
    with Connection.to_bus(address, timeout_s=10) as bus:
        (name,) = [each for each in bus.call(BUS, "ListNames")[0] if each.startswith(":")]
        assert bus.call(BUS, "GetConnectionUnixUser", "s", name) == (os.getuid(),)
        (facts,) = bus.call(BUS, "GetConnectionCredentials", "s", name)
        assert facts["ProcessID"] == Variant("u", os.getpid())


def test_a_signal_is_waited_for_until_it_comes(address: str) -> None:
    with Connection.to_bus(address, timeout_s=10) as watcher, Connection.to_bus(address, timeout_s=10) as owner:
        watcher.call(BUS, "AddMatch", "s", "type='signal',member='NameOwnerChanged'")
        owner.call(BUS, "RequestName", "su", "org.example.corral", 0)
        changed = watcher.wait_for_signal(
            BUS.interface, "NameOwnerChanged", lambda body: body[0] == "org.example.corral"
        )
        assert changed[1] == ""
        assert changed[2].startswith(":")


def test_a_call_of_another_client_that_never_answers_ends_in_time(address: str) -> None:
    with Connection.to_bus(address, timeout_s=0.5) as silent, Connection.to_bus(address, timeout_s=0.5) as caller:
        silent.call(BUS, "RequestName", "su", "org.example.silent", 0)
        with pytest.raises(TimeoutError):
            caller.call(Target("org.example.silent", "/", "org.example.I"), "Ask")


@needs("root", "userns")
def test_who_is_somebody_else_in_a_user_namespace_is_let_in_as_who_he_is_outside(address: str) -> None:
    reader, writer = os.pipe()
    pid, pidfd = process.clone(Kind.USER.flag)
    if pid == 0:
        with contextlib.suppress(BaseException):
            os.close(writer)
            os.read(reader, 1)
            with Connection.to_bus(address, timeout_s=10) as bus:
                (name,) = [each for each in bus.call(BUS, "ListNames")[0] if each.startswith(":")]
                seen = bus.call(BUS, "GetConnectionUnixUser", "s", name)
                os._exit(0 if (os.getuid(), *seen) == (INSIDE, 0) else 1)
        os._exit(2)
    write_mappings(pid, [(INSIDE, 0, 1)], [(INSIDE, 0, 1)])
    os.close(reader)
    os.close(writer)
    try:
        assert os.waitid(os.P_PIDFD, pidfd, os.WEXITED).si_status == 0
    finally:
        os.close(pidfd)
