"""Containers on every snapshot driver, through the command and a whole daemon."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.corrald import Corrald, PlaceOn, running
from support.file_systems import FileSystems
from support.images import Entry, busybox_layer, image_config, layer, write_docker_archive
from support.requirements import needs
from support.snapshotters import CASES, case_id, driver_at, place_for

pytestmark = needs("root", "busybox", "netns")


@pytest.fixture(params=CASES, ids=case_id)
def daemon(
    request: pytest.FixtureRequest, tmp_path: Path, busybox_archive: Path, file_systems: FileSystems
) -> Iterator[Corrald]:
    data = place_for(request.param, tmp_path, file_systems)
    with Corrald(place=PlaceOn.make_on(data), settings={"images": {"driver": request.param[0]}}) as made:
        made.start()
        made.corral("image", "import", str(busybox_archive), "--as", "busybox", check=True)
        yield made


def test_a_container_runs_keeps_what_it_wrote_and_goes_without_a_trace(daemon: Corrald) -> None:
    def say(*words: str) -> str:
        return daemon.corral(*words, check=True).stdout.decode()

    script = "cat /mine || { echo first > /mine; rm /bin/vi; mkdir -m 700 /d; chown 5 /d; id -u > /d/f; }"
    say("create", "--name", "c", "--network", "none", "busybox", "sh", "-c", script)
    for _ in range(2):
        say("start", "c")
        assert say("wait", "c") == "0\n"
    assert daemon.corral("logs", "c", check=True).stdout.decode() == "first\n"
    assert say("run", "--rm", "--network", "none", "busybox", "sh", "-c", "ls /mine; ls /bin/vi") == "/bin/vi\n"
    say("rm", "c")
    say("image", "rm", "busybox")
    daemon.restart()  # what is removed beside the requests is removed by then, or now
    daemon.stop()
    assert trees(daemon.root / "images") == []


def test_what_a_running_container_changed_is_told_and_committed(daemon: Corrald) -> None:
    def say(*words: str) -> str:
        return daemon.corral(*words, check=True).stdout.decode()

    script = "echo first > /mine; rm /bin/vi; trap : TERM; while :; do sleep 0.1; done"
    say("run", "-d", "--name", "c", "--network", "none", "busybox", "sh", "-c", script)
    say("exec", "c", "sh", "-c", "while [ -e /bin/vi ]; do sleep 0.05; done")
    assert {"A /mine", "D /bin/vi", "C /bin"} <= set(say("diff", "c").splitlines())
    say("commit", "c", "made")
    assert say("run", "--rm", "--network", "none", "made", "sh", "-c", "cat /mine; ls /bin/vi || :") == "first\n"
    say("rm", "-f", "c")
    assert "made" in say("images")


def trees(root: Path) -> list[Path]:
    """Every directory of a driver that is named by a number."""
    return [path for path in root.rglob("*") if path.name.isdigit()]


@pytest.mark.parametrize("count", [128, 300])
def test_a_container_on_hundreds_of_layers(tmp_path: Path, count: int) -> None:
    layers = [busybox_layer(), *(layer([Entry(f"layers/{i}", b"%d" % i)]) for i in range(count - 1))]
    archive = write_docker_archive(tmp_path / "tall.tar", "tall", layers, image_config(layers))
    with running() as daemon:
        daemon.corral("image", "import", str(archive), "--as", "tall", check=True)
        script = f"cat /layers/0 /layers/{count - 2}; ls /layers | wc -l; echo x > /layers/0; cat /layers/0"
        result = daemon.corral("run", "--rm", "--network", "none", "tall", "sh", "-c", script, check=True)
        assert result.stdout.decode().split() == [f"0{count - 2}{count - 1}", "x"]


@pytest.mark.parametrize("victim", ["daemon", "shim", "nobody"])
def test_what_serves_a_container_outlives_the_daemon_and_ends_with_the_container(
    busybox_archive: Path, tmp_path: Path, victim: str
) -> None:
    if reason := driver_at("fuse-overlayfs", tmp_path).check():
        pytest.skip(f"fuse-overlayfs: {reason}")
    with running(settings={"images": {"driver": "fuse-overlayfs"}}) as daemon:
        daemon.corral("image", "import", str(busybox_archive), "--as", "busybox", check=True)
        words = ("sh", "-c", "echo mine > /f; exec sleep 1000")
        daemon.corral("run", "-d", "--name", "c", "--network", "none", "busybox", *words, check=True)
        [server] = servers(daemon.root)
        assert Path(f"/proc/{server}/oom_score_adj").read_text() == "0\n"  # not that of the shim, its parent
        facts = json.loads(daemon.corral("inspect", "c", check=True).stdout)[0]
        assert b"fuse" not in daemon.corral("exec", "c", "ps", check=True).stdout
        if victim == "daemon":
            daemon.kill9()
            daemon.start()
        elif victim == "shim":
            os.kill(facts["shim_pid"], signal.SIGKILL)
        if victim != "shim":
            assert daemon.corral("exec", "c", "cat", "/f", check=True).stdout == b"mine\n"
            assert servers(daemon.root) == [server]
        daemon.corral("rm", "-f", "c", check=True)
        deadline = time.monotonic() + 5
        while servers(daemon.root) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert servers(daemon.root) == []


def servers(root: Path) -> list[int]:
    """The programs that serve a tree below a directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (process / "cmdline").read_bytes()
            if command.startswith(b"fuse-overlayfs\0") and str(root).encode() in command:
                found.append(int(process.name))
    return found
