"""Containers and volumes that may write no more than so much, through the command and a whole daemon."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cli import eventually
from support.corrald import Corrald, running
from support.file_systems import loop_devices
from support.requirements import needs

from corral.rpc.errors import ResourceExhausted

pytestmark = needs("root", "overlayfs", "busybox", "netns", "mkfs.ext4")

FILL = "dd if=/dev/zero of={} bs=1M count=64"


@pytest.fixture(scope="module")
def box(busybox_archive: Path) -> Iterator[Corrald]:
    with running() as daemon:
        daemon.corral("image", "import", str(busybox_archive), "--as", "busybox", check=True)
        yield daemon


def run(box: Corrald, *words: str) -> tuple[int, str]:
    """Exit code and everything that was said."""
    done = box.corral("run", "--network", "none", *words)
    return done.returncode, (done.stdout + done.stderr).decode()


def first(box: Corrald, *words: str) -> dict[str, object]:
    answer: dict[str, object] = json.loads(box.corral(*words, check=True).stdout)[0]
    return answer


def eventually_no_devices(root: Path) -> list[str]:
    deadline = time.monotonic() + 5
    while (left := loop_devices(root)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


@pytest.mark.parametrize("size", [str(1 << 62), "8000000t"])
def test_a_quota_that_nothing_has_room_for_is_refused_with_a_sentence(box: Corrald, size: str) -> None:
    refused = box.corral("create", "--storage-opt", f"size={size}", "busybox", "true")
    assert refused.returncode == 125
    said = refused.stderr.decode()
    assert "17592186040320 bytes" in said or "no quota of" in said
    assert "fault of corral" not in said
    assert box.corral("ps", "-aq").stdout == b""
    with box.client() as client, pytest.raises(ResourceExhausted):
        client.containers.create("busybox", ["true"], storage_options=[f"size={size}"])


def test_a_container_that_writes_past_its_quota_is_out_of_space_and_its_neighbours_are_not(box: Corrald) -> None:
    code, said = run(box, "--name", "small", "--storage-opt", "size=32m", "busybox", "sh", "-c", FILL.format("/f"))
    assert (code, "No space left" in said or "quota exceeded" in said) == (1, True), said
    code, said = run(box, "--name", "large", "busybox", "sh", "-c", FILL.format("/f"))
    assert code == 0, said
    small, large = first(box, "inspect", "--size", "small"), first(box, "inspect", "--size", "large")
    assert 16 << 20 < small["size_rw_bytes"] <= 33 << 20
    assert small["config"]["storage_quota_bytes"] == 32 << 20
    assert large["size_rw_bytes"] >= 64 << 20
    assert large["size_root_bytes"] > large["size_rw_bytes"] + (1 << 20)
    assert "size_rw_bytes" not in first(box, "inspect", "small")
    table = box.corral("ps", "-a", "--size", check=True).stdout.decode()
    [line] = [line for line in table.splitlines() if "small" in line]
    assert " of 33.6MB (virtual " in line
    box.corral("rm", "small", "large", check=True)
    assert eventually_no_devices(box.root / "images") == []


def test_what_it_wrote_is_there_when_it_runs_again_and_stats_tell_how_much_it_is(box: Corrald) -> None:
    script = "cat /kept; echo again > /kept; head -c 5000000 /dev/zero > /f; sync; exec sleep 100"
    run(box, "-d", "--name", "c", "--storage-opt", "size=64m", "busybox", "sh", "-c", script)
    try:
        eventually(lambda: box.corral("exec", "c", "cat", "/kept").stdout == b"again\n")
        box.corral("restart", "-t", "0", "c", check=True)
        deadline = time.monotonic() + 10
        while b"again" not in box.corral("logs", "c").stdout and time.monotonic() < deadline:
            time.sleep(0.05)
        assert box.corral("logs", "c").stdout.endswith(b"again\n")
        while time.monotonic() < deadline + 10:
            found = json.loads(box.corral("stats", "--no-stream", "--format", "json", "c").stdout)
            if found["storage"]["used_bytes"] >= 4_900_000:
                break
        assert found["storage"]["quota_bytes"] == 64 << 20
        assert 4_900_000 < found["storage"]["used_bytes"] < 64 << 20
        box.kill9()
        box.start()
        assert box.corral("exec", "c", "cat", "/kept", check=True).stdout == b"again\n"
    finally:
        box.corral("rm", "-f", "c", check=True)
    assert eventually_no_devices(box.root / "images") == []


def test_a_volume_is_bounded_for_all_who_use_it(box: Corrald) -> None:
    box.corral("volume", "create", "--opt", "size=16m", "v", check=True)
    code, said = run(box, "--rm", "-v", "v:/v", "busybox", "sh", "-c", "ls -a /v; " + FILL.format("/v/f"))
    assert code == 1, said
    assert "No space left" in said or "quota exceeded" in said
    assert said.split()[:2] == [".", ".."]
    code, said = run(box, "--rm", "-v", "v:/v", "busybox", "sh", "-c", "head -c 2000000 /dev/zero > /v/g")
    assert code == 1, said
    assert run(box, "--rm", "-v", "v:/v", "busybox", "sh", "-c", "rm /v/f; echo x > /v/g && cat /v/g")[0] == 0
    facts = first(box, "volume", "inspect", "v")
    assert facts["quota_bytes"] == 16 << 20
    assert facts["options"] == {"size": "16m"}
    assert facts["used_bytes"] < 16 << 20
    assert Path(str(facts["mountpoint"]), "g").read_text() == "x\n"


def test_a_bounded_volume_outlives_the_daemon_and_goes_without_a_trace(box: Corrald) -> None:
    box.corral("volume", "create", "--opt", "size=16m", "w", check=True)
    run(box, "-d", "--name", "user", "-v", "w:/w", "busybox", "sh", "-c", "echo mine > /w/f; exec sleep 100")
    box.kill9()
    box.start()
    assert run(box, "--rm", "-v", "w:/w", "busybox", "cat", "/w/f") == (0, "mine\n")
    refused = box.corral("volume", "rm", "w")
    assert refused.returncode == 1
    box.corral("rm", "-f", "user", check=True)
    for name in ("v", "w"):
        box.corral("volume", "rm", name)
    volumes = box.root / "engine/volumes"
    assert list(volumes.glob("*/*")) == []
    assert eventually_no_devices(volumes) == []
    assert not [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(volumes) in line]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["create", "--storage-opt", "size=1k", "busybox"], "at least 4 MiB"),
        (["create", "--storage-opt", "speed=9", "busybox"], "give size=10g"),
        (["volume", "create", "--opt", "size=lots"], "is not understood"),
        (["volume", "create", "--opt", "size=9"], "at least 4 MiB"),
        (["volume", "create", "--opt", "colour=red"], "no option of a volume"),
        (["volume", "create", "--opt", "type=nfs"], "'device' is missing"),
        (["volume", "create", "--opt", "type=tmpfs", "--opt", "device=x", "--opt", "size=9m"], "cannot be bounded"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(box: Corrald, words: list[str], why: str) -> None:
    refused = box.corral(*words)
    assert refused.returncode in (1, 125)
    assert why in refused.stderr.decode()
