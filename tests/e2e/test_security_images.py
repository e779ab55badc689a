"""Images that somebody hostile made, from import to run: what they may not reach, and what they may not break."""

import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from support import images
from support.corrald import Corrald, running
from support.requirements import needs

pytestmark = needs("root", "overlayfs", "busybox")

STEERING = "\x1b]0;owned\x07\r\x9b31m"


@pytest.fixture(scope="module")
def daemon() -> Iterator[Corrald]:
    with running() as daemon:
        yield daemon


class Maker:
    """Imports images made of busybox and what a test adds."""

    def __init__(self, daemon: Corrald, directory: Path) -> None:
        self.daemon, self.directory = daemon, directory
        self.busybox = images.busybox_layer()

    def image(self, name: str, entries: Sequence[images.Entry] = (), **config: object) -> subprocess.CompletedProcess:
        layers = [self.busybox, *([images.layer(entries)] if entries else [])]
        path = self.directory / f"{name}.tar"
        images.write_docker_archive(path, f"{name}:latest", layers, images.image_config(layers, **config))
        return self.daemon.corral("image", "import", str(path))


@pytest.fixture
def make(daemon: Corrald, tmp_path: Path) -> Maker:
    return Maker(daemon, tmp_path)


def steers(output: bytes) -> bool:
    return any(not c.isprintable() and c != "\n" for c in output.decode())


def test_a_command_does_not_steer_the_terminal_of_who_lists_it(daemon, make):
    make.image("escape", Entrypoint=[f"/bin/{STEERING}"], Cmd=[STEERING])
    made = daemon.corral("create", "escape:latest", check=True).stdout.strip().decode()
    listed = daemon.corral("ps", "-a", check=True)
    assert rb"\x1b]0;owned" in listed.stdout
    assert not steers(listed.stdout)
    refused = daemon.corral("start", made)
    assert refused.returncode == 1
    assert b"owned" in refused.stderr
    assert not steers(refused.stderr)
    daemon.corral("rm", "-f", made, check=True)


def test_a_user_does_not_steer_the_terminal_of_who_runs_it(daemon, make):
    make.image("user", User=f"bob{STEERING}")
    refused = daemon.corral("run", "--rm", "user:latest")
    assert refused.returncode == 125
    assert not steers(refused.stderr)


@pytest.mark.parametrize("config", [{"Entrypoint": ["\ud800"]}, {"Labels": {"\udc80": ""}}, {"Env": ["A=\udcff"]}])
def test_half_a_character_is_refused_and_breaks_no_list(daemon, make, config):
    refused = make.image("half", **config)
    assert refused.returncode == 1
    assert b"not JSON" in refused.stderr
    assert b"half" not in daemon.corral("images", check=True).stdout


def test_a_stop_signal_that_is_none_stops_all_the_same(daemon, make):
    make.image("signal", StopSignal="SIGBANANA")
    made = daemon.corral("run", "-d", "signal:latest", "sleep", "1000", check=True).stdout.strip().decode()
    daemon.corral("stop", "-t", "0", made, check=True)
    daemon.corral("rm", made, check=True)


@pytest.mark.parametrize("target", ["/", "/proc", "/sys", "/proc/sys"])
def test_a_volume_behind_a_link_covers_nothing_that_counts(daemon, make, target):
    """CVE-2019-16884: what the image declares as a volume goes over /proc, and takes the masks away."""
    make.image("link", [images.symlink("data", target)], Volumes={"/data": {}})
    refused = daemon.corral("run", "--rm", "link:latest", "true")
    assert refused.returncode == 125, refused.stdout


@pytest.mark.parametrize("path", ["/proc", "//proc", "/proc/sys", "/"])
def test_a_volume_covers_nothing_that_counts(daemon, make, path):
    """CVE-2019-16884, without a link."""
    make.image("volume", Volumes={path: {}})
    assert daemon.corral("run", "--rm", "volume:latest", "true").returncode == 125


def test_read_only_covers_what_is_mounted_in_the_source(daemon, make, tmp_path):
    make.image("plain")
    below = tmp_path / "source" / "below"
    below.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "corral-test", str(below)], check=True)
    try:
        volume = f"{below.parent}:/data:ro"
        touched = daemon.corral("run", "--rm", "-v", volume, "plain:latest", "touch", "/data/below/file")
        assert b"Read-only file system" in touched.stderr
        assert not list(below.iterdir())
    finally:
        subprocess.run(["umount", str(below)], check=True)
