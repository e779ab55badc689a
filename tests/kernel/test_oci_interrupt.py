"""Ctrl-C, and readers that go: a command ends quietly, and what it had begun is undone."""

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.ocicommand import Runtime, runtime_in, wait_until
from support.requirements import needs

pytestmark = [needs("root", "busybox"), pytest.mark.timeout(90)]

INTERRUPTED = 128 + signal.SIGINT


@pytest.fixture
def oci(tmp_path: Path) -> Iterator[Runtime]:
    with runtime_in(tmp_path) as runtime:
        yield runtime


def begin(oci: Runtime, *words: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        oci.words(*words), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=oci.bundle,
    )  # fmt: skip


def hook_that_stays(oci: Runtime) -> Path:
    """A bundle whose creation takes until somebody interrupts it; the file that will have the pid of its hook."""
    marker = oci.directory / "hook"
    hook = {"path": "/bin/sh", "args": ["sh", "-c", f"echo $$ > {marker}.new; mv {marker}.new {marker}; sleep 1000"]}
    oci.write_spec(oci.spec("true") | {"hooks": {"createRuntime": [hook]}})
    return marker


@pytest.mark.parametrize("words", [["create"], ["run", "--detach"]])
@pytest.mark.parametrize("times", [1, 3])
def test_a_container_that_is_being_made_is_undone_by_ctrl_c_however_often_it_is_pressed(
    oci: Runtime, words: list[str], times: int
) -> None:
    marker, name = hook_that_stays(oci), oci.new_id()
    with begin(oci, *words, name) as command:
        wait_until(marker.exists)
        init = int(oci.state(name)["pid"])  # type: ignore[call-overload]
        for _ in range(times):
            command.send_signal(signal.SIGINT)
        out, err = command.communicate(timeout=30)
    assert (command.returncode, out, err) == (INTERRUPTED, "", "")
    assert json.loads(oci.ok("list", "--format", "json")) == []
    assert not Path(f"/proc/{init}").exists()
    assert not Path(f"/proc/{marker.read_text().strip()}").exists()
    assert not list(Path("/sys/fs/cgroup").glob(f"*/corral-oci/{name}"))


def test_events_that_were_watched_long_enough_end_quietly(oci: Runtime) -> None:
    name = oci.sleeping()
    with begin(oci, "events", name) as command:
        assert command.stdout is not None
        assert json.loads(command.stdout.readline())["type"] == "stats"
        command.send_signal(signal.SIGINT)
        assert command.stderr is not None
        assert (command.wait(30), command.stderr.read()) == (INTERRUPTED, "")
    assert oci.status(name) == "running"


def test_an_interrupt_before_anything_was_done_says_nothing_either(oci: Runtime) -> None:
    for _ in range(20):
        with begin(oci, "list") as command:
            command.send_signal(signal.SIGINT)
            _, err = command.communicate(timeout=30)
        assert "Traceback" not in err
        assert command.returncode in (0, INTERRUPTED, -signal.SIGINT)


def test_a_background_job_that_ignores_ctrl_c_is_made_to_the_end(oci: Runtime) -> None:
    oci.write("echo made")
    script = 'trap "" INT; "$@" & wait'
    with subprocess.Popen(
        ["sh", "-c", script, "sh", *oci.words("run", oci.new_id())], cwd=oci.bundle, stdout=subprocess.PIPE, text=True
    ) as command:
        assert command.communicate(timeout=30)[0] == "made\n"


def test_a_reader_that_has_gone_is_not_worth_a_word(oci: Runtime) -> None:
    with begin(oci, "features") as command:
        assert command.stdout is not None
        command.stdout.close()
        assert command.stderr is not None
        assert command.stderr.read() == ""
        assert command.wait(30) == 128 + signal.SIGPIPE
