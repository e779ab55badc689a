"""corrald itself, as a process: starting, refusing, answering, stopping. It hosts the service of echo_daemon.py."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from support.corrald import PATIENCE, Corrald

from corral.api.version.v1 import version_pb2, version_pb2_grpc
from corral.rpc import errors
from corral.rpc.channel import open_channel
from corral.rpc.context import in_namespace

ECHO = (sys.executable, str(Path(__file__).with_name("echo_daemon.py")))
SAY = "/corral.test.v1.Echo/Say"


@pytest.fixture
def make() -> Iterator[Callable[..., Corrald]]:
    """Make daemons that are cleaned up, not started yet."""
    made: list[Corrald] = []

    def build(**options: object) -> Corrald:
        daemon = Corrald(**{"command": ECHO, "services": ("echo",), "split": False, "private_names": False, **options})
        made.append(daemon)
        return daemon

    yield build
    for daemon in made:
        daemon.close()


@pytest.fixture
def echo(make: Callable[..., Corrald]) -> Corrald:
    daemon = make()
    daemon.start()
    return daemon


def address(daemon: Corrald, name: str = "echo") -> str:
    return f"unix://{daemon.state}/{name}.sock"


@pytest.fixture
async def channel(echo: Corrald) -> AsyncIterator[grpc.aio.Channel]:
    async with open_channel(address(echo)) as channel:
        yield channel


def run(daemon: Corrald, *options: str, timeout_s: float = 20) -> subprocess.CompletedProcess[str]:
    """Run another daemon on the same directories, to its end."""
    command = [*ECHO, "--root", str(daemon.root), "--state", str(daemon.state), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


async def test_it_serves_without_any_file(make: Callable[..., Corrald]):
    daemon = make(services=("echo",))
    process = subprocess.Popen(  # noqa: ASYNC220  # nothing else runs on this loop
        [*ECHO, "--root", str(daemon.root), "--state", str(daemon.state), "--service", "echo"],
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stderr is not None
        ready = json.loads(process.stderr.readline())
        assert ready["event"] == "daemon.ready"
        assert ready["addresses"] == [address(daemon)]
        async with open_channel(address(daemon)) as channel:
            assert await channel.unary_unary(SAY)(b"you") == b"hello you in default, number 1"
        process.terminate()
        assert process.wait(10) == 0


async def test_settings_come_from_the_file(make: Callable[..., Corrald]):
    daemon = make(settings={"echo": {"greeting": "moin"}})
    daemon.start()
    async with open_channel(address(daemon)) as channel:
        with in_namespace("blue"):
            assert await channel.unary_unary(SAY)(b"you") == b"moin you in blue, number 1"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[echo]\ngreetng = 'x'\n", "[echo] has no setting 'greetng'; did you mean 'greeting'?"),
        ("[ecco]\n", "there is no section [ecco]; did you mean 'echo'?"),
        ("[echo]\nstart_s = 'soon'\n", "[echo] start_s must be a number, not 'soon'"),
        ("[daemon]\nlog_level = 'loud'\n", "there is no log level 'loud'"),
        ("[daemon\n", "config.toml: "),
        ("[addresses]\necho = 'somewhere'\n", "'somewhere' is not an address"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_sentence(make: Callable[..., Corrald], text: str, sentence: str):
    daemon = make()
    config = daemon.place.directory / "config.toml"
    config.write_text(text)
    done = run(daemon, "--service", "echo", "--config", str(config))
    assert done.returncode == 1
    assert sentence in done.stderr
    assert done.stderr.startswith("corrald: ")
    assert done.stderr.count("\n") == 1


def test_a_service_that_does_not_exist_is_refused(make: Callable[..., Corrald]):
    done = run(make(), "--service", "eco")
    assert (done.returncode, done.stderr) == (1, "corrald: there is no service 'eco'; did you mean 'echo'?\n")


def test_a_service_whose_module_is_missing_is_an_error(make: Callable[..., Corrald]):
    done = run(make(), "--service", "absent")
    assert done.returncode == 1
    assert "corral.absent" in done.stderr


def test_a_second_daemon_on_the_same_root_is_refused_with_the_reason(echo: Corrald):
    pid = echo.processes["corrald"].pid
    done = run(echo, "--service", "echo")
    assert done.returncode == 1
    assert f"another corrald (process {pid}) works on {echo.root}/echo" in done.stderr
    other_state = run(echo, "--service", "echo", "--state", str(echo.place.directory / "other"))
    assert "works on" in other_state.stderr
    assert "hello" not in echo.log("none")


def test_another_root_at_the_same_socket_is_refused_and_the_first_still_answers(echo: Corrald):
    done = run(echo, "--service", "echo", "--root", str(echo.place.directory / "other"))
    assert done.returncode == 1
    assert f"listens at {echo.state}/echo.sock" in done.stderr
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(echo.state / "echo.sock"))


def test_a_file_in_the_place_of_the_socket_is_not_removed(make: Callable[..., Corrald]):
    daemon = make()
    daemon.state.mkdir()
    (daemon.state / "echo.sock").write_text("precious")
    done = run(daemon, "--service", "echo")
    assert "is not a socket" in done.stderr
    assert (daemon.state / "echo.sock").read_text() == "precious"


async def test_after_kill_9_it_starts_again_with_everything_that_was_committed(echo: Corrald):
    async with open_channel(address(echo)) as channel:
        for n in range(5):
            assert (await channel.unary_unary(SAY)(b"x")).endswith(f"number {n + 1}".encode())
        echo.kill9()
        with pytest.raises(errors.Unavailable, match="is corrald running"):
            await channel.unary_unary(SAY)(b"x")
        echo.start()
        answer = await channel.unary_unary(SAY)(b"x", wait_for_ready=True)
        assert answer.endswith(b"number 6")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_stops_it_cleanly_and_followers_learn_why(make: Callable[..., Corrald], number: signal.Signals):
    echo = make(settings={"daemon": {"grace_s": 60}})
    echo.start()
    async with open_channel(address(echo)) as channel:
        call = channel.unary_stream("/corral.test.v1.Echo/Follow")(b"")
        await channel.unary_unary(SAY)(b"one")
        assert await call.read() == b"one"
        process = echo.processes.pop("corrald")
        process.send_signal(number)
        with pytest.raises(errors.Unavailable, match="corral is stopping"):
            await call.read()
        assert await asyncio.to_thread(process.wait, 50) == 0, "who only follows gets no grace"
    assert (echo.root / "echo" / "echo-stopped").read_text() == str(process.pid)
    assert echo.events("daemon.stopped")


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.01)


def test_a_signal_while_starting_stops_it(make: Callable[..., Corrald]):
    daemon = make(settings={"echo": {"start_s": 60}})
    daemon.launch()
    wait_for(daemon.root / "echo" / "echo.db")
    assert daemon.stop() == {"corrald": 0}
    assert (daemon.root / "echo" / "echo-stopped").exists()
    assert not daemon.events("daemon.ready")


def test_a_service_that_cannot_start_ends_it_with_its_sentence(make: Callable[..., Corrald]):
    daemon = make(settings={"echo": {"fail": True}})
    with pytest.raises(RuntimeError, match="echo has no voice"):
        daemon.start()
    assert "Traceback" not in daemon.log()


async def test_a_composer_in_the_same_process_reaches_its_leaf(make: Callable[..., Corrald]):
    daemon = make(services=("echo", "composer"), settings={"composer": {"forward_to": "echo"}})
    daemon.start()
    async with open_channel(address(daemon, "corrald")) as channel:
        with in_namespace("blue"):
            answer = await channel.unary_unary("/corral.test.v1.Composer/Say")(b"x")
    assert answer == b"via composer: hello x in blue, number 2"


async def test_split_services_find_each_other_by_their_default_sockets(make: Callable[..., Corrald]):
    settings = {"composer": {"forward_to": "echo"}}
    daemon = make(services=("echo", "composer"), settings=settings, split=True)
    daemon.start()
    async with open_channel(address(daemon, "composer")) as channel:
        say = channel.unary_unary("/corral.test.v1.Composer/Say")
        assert await say(b"x") == b"via composer: hello x in default, number 2"
        daemon.kill9("echo")
        daemon.start("echo")
        assert await say(b"x") == b"via composer: hello x in default, number 3"


async def test_version_health_and_reflection(echo: Corrald, channel: grpc.aio.Channel):
    version = await version_pb2_grpc.VersionStub(channel).Get(version_pb2.GetRequest())
    assert list(version.services) == ["echo"]
    assert list(version.apis) == ["corral.test.v1"]
    assert (version.root, version.state) == (str(echo.root), str(echo.state))
    assert version.kernel_release == os.uname().release
    health = health_pb2_grpc.HealthStub(channel)
    for name in ("", "echo", "corral.test.v1.Echo"):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    listed = await call.read()
    names = {service.name for service in listed.list_services_response.service}
    assert {"corral.test.v1.Echo", "grpc.health.v1.Health", "corral.version.v1.Version"} <= names
    call.cancel()


def test_directories_are_private_and_sockets_for_owner_and_group(echo: Corrald):
    assert (echo.root / "echo").stat().st_mode & 0o777 == 0o700
    assert (echo.state / "echo.sock").stat().st_mode & 0o777 == 0o660


def test_systemd_is_told_when_it_is_ready_and_when_it_stops(make: Callable[..., Corrald]):
    daemon = make()
    path = daemon.place.directory / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(10)
        daemon.start(environment={"NOTIFY_SOCKET": str(path)})
        assert manager.recv(100) == b"READY=1"
        daemon.stop()
        assert manager.recv(100) == b"STOPPING=1"


def test_the_log_is_json_without_a_terminal(echo: Corrald):
    echo.stop()
    lines = [json.loads(line) for line in echo.log().splitlines()]
    assert [line["event"] for line in lines] == ["daemon.ready", "daemon.stopping", "daemon.stopped"]
    assert lines[0]["took_ms"] > 0


def test_the_console_format_is_for_people(make: Callable[..., Corrald]):
    daemon = make(options=("--log-format", "console"))
    daemon.launch()
    wait_for(daemon.state / "echo.sock")
    daemon.stop()
    assert "daemon.stopped" in daemon.log()
    assert not daemon.log().startswith("{")


async def test_debugging_reports_what_blocks_the_loop(make: Callable[..., Corrald]):
    daemon = make(options=("--log-level", "debug"))
    daemon.start()
    async with open_channel(address(daemon)) as channel:
        await channel.unary_unary("/corral.test.v1.Echo/Block")(b"0.2")
    daemon.stop()
    messages = " ".join(str(event["message"]) for event in daemon.events("library.message"))
    assert max(float(seconds) for seconds in re.findall(r"took (\d+\.\d+) seconds", messages)) >= 0.2


def test_plain_tcp_is_for_loopback_only(make: Callable[..., Corrald]):
    done = run(make(), "--service", "echo", "--address", "tcp://0.0.0.0:0")
    assert done.returncode == 1
    assert "needs TLS" in done.stderr


async def test_loopback_tcp_is_served_beside_the_unix_socket(make: Callable[..., Corrald]):
    daemon = make(options=("--address", "tcp://127.0.0.1:0"))
    daemon.start()
    [ready] = daemon.events("daemon.ready")
    unix, tcp = ready["addresses"]
    assert unix == address(daemon)
    async with open_channel(tcp) as channel:
        assert await channel.unary_unary(SAY)(b"x") == b"hello x in default, number 1"


def test_what_it_keeps_is_in_huge_pages_soon(echo: Corrald):
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not enabled.exists() or "[never]" in enabled.read_text("ascii"):
        return
    [pid] = (process.pid for process in echo.processes.values())
    deadline = time.monotonic() + 20 * PATIENCE
    while not huge_kib(pid):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def huge_kib(pid: int) -> int:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text("ascii")
    return int(re.findall(r"AnonHugePages: +(\d+) kB", rollup)[0])
