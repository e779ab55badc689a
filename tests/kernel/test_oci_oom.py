"""`corral-oci events` tells each OOM kill of a container once, whoever makes its cgroup.

CORRAL_OOM_ROUNDS (2): how often each is tried.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.ocicommand import Runtime, runtime_in, wait_until
from support.requirements import needs

from corral.kernel.cgroup import Driver, detect

pytestmark = [needs("root", "busybox", "cgroup"), pytest.mark.timeout(1200)]

LIMIT = {"limit": 16 << 20, "swap": 16 << 20}
SLICE = f"corraltest{os.getpid()}.slice"
"""Of this process alone: it is stopped in the end with all that is in it."""
HOG = "tail /dev/zero"
SLOW_S = 120
"""A command may take a while where the processor is emulated."""
rounds = pytest.mark.parametrize("number", range(int(os.environ.get("CORRAL_OOM_ROUNDS", "2"))))


@pytest.fixture(params=["cgroupfs", pytest.param("systemd", marks=needs("systemd"))])
def driver(request: pytest.FixtureRequest) -> str:
    driver: str = request.param
    return driver


@pytest.fixture
def oci(tmp_path: Path, driver: str) -> Iterator[Runtime]:
    class Chosen(Runtime):
        def words(self, *words: str) -> list[str]:
            command, *rest = super().words(*words)
            return [command, *(["--systemd-cgroup"] if driver == "systemd" else []), *rest]

    with runtime_in(tmp_path) as plain:
        runtime = Chosen(plain.directory)
        try:
            yield runtime
        finally:
            runtime.close()
            if driver == "systemd":
                subprocess.run(["systemctl", "stop", SLICE], check=False)
                Driver(detect()).prune(f"/{SLICE}")  # on v1, where systemd does not know all hierarchies


def sleeping(oci: Runtime, driver: str, *args: str, **unified: str) -> str:
    """A container with little memory."""
    name = oci.new_id()
    spec = oci.spec(*(args or ("sleep", "1000")))
    linux = spec["linux"]
    assert isinstance(linux, dict)
    linux["cgroupsPath"] = f"{SLICE}:oom:{name}" if driver == "systemd" else f"/corraltest-{name}"
    linux["resources"] |= {"memory": LIMIT} | ({"unified": unified} if unified else {})
    oci.write_spec(spec)
    oci.detached("run", "--detach", name)
    return name


def watched(oci: Runtime, name: str) -> "subprocess.Popen[str]":
    """`events`, once it watches."""
    events = subprocess.Popen(oci.words("events", "--interval", "1000h", name), stdout=subprocess.PIPE, text=True)
    assert events.stdout is not None
    assert json.loads(events.stdout.readline())["type"] == "stats"
    return events


@rounds
def test_an_exec_and_a_child_of_one_that_run_out_of_memory_are_told_at_once(
    oci: Runtime, driver: str, number: int
) -> None:
    name = sleeping(oci, driver)
    with watched(oci, name) as events:
        assert events.stdout is not None
        for script, code in ((f"exec {HOG}", 137), (f"{HOG}; exit 3", 3)):
            assert oci.call("exec", name, "sh", "-c", script, timeout=SLOW_S).returncode == code
            assert json.loads(events.stdout.readline()) == {"type": "oom", "id": name}
            assert oci.status(name) == "running"
        assert oci.call("exec", name, "sh", "-c", "kill -9 $$", timeout=SLOW_S).returncode == 137
        oci.ok("kill", name, "9")
        assert events.communicate(timeout=SLOW_S)[0] == ""


@needs("cgroup2")
@rounds
def test_a_group_ends_as_a_whole(oci: Runtime, driver: str, number: int) -> None:
    name = sleeping(oci, driver, **{"memory.oom.group": "1"})
    with watched(oci, name) as events:
        assert oci.call("exec", name, "sh", "-c", f"exec {HOG}", timeout=SLOW_S).returncode == 137
        told = [json.loads(line)["type"] for line in events.communicate(timeout=SLOW_S)[0].splitlines()]
        assert set(told) == {"oom"}
        assert len(told) in (2, 3)  # the kernel may count the one that it chose once more as one of the group
        wait_until(lambda: oci.status(name) == "stopped", SLOW_S)


@rounds
def test_the_containers_own_process_is_told_though_the_cgroup_goes_with_it(
    oci: Runtime, driver: str, number: int
) -> None:
    name = sleeping(oci, driver, f"until [ -e /go ]; do sleep 0.1; done; exec {HOG}")
    with watched(oci, name) as events:
        (oci.bundle / "rootfs/go").touch()
        told = [json.loads(line)["type"] for line in events.communicate(timeout=SLOW_S)[0].splitlines()]
        assert told == ["oom"]
