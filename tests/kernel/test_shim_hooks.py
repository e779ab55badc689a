"""Hooks, and what else a shim does for the containers that ask for it: all of it was loaded before the fork."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from shimclient import RequestError, Shim, Workshop, workshop
from support.requirements import needs

pytestmark = needs("root", "busybox")

ON_HOST = ("prestart", "createRuntime", "createContainer", "poststart", "poststop")


@pytest.fixture(scope="module")
def shop() -> Iterator[Workshop]:
    with workshop() as made:
        yield made


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def with_hooks(shop: Workshop, log: Path, *args: str, failing: str = "") -> Shim:
    hook = log.parent / "hook"
    hook.write_text(f'#!/bin/sh\necho "$1 $(cat)" >> {log}; test "$1" != "{failing}"\n')
    hook.chmod(0o755)
    shim = shop.spawn(*args)
    config = json.loads((shim.bundle / "config.json").read_text())
    config["hooks"] = {point: [{"path": str(hook), "args": ["hook", point]}] for point in ON_HOST}
    config["hooks"]["startContainer"] = [{"path": "/bin/busybox", "args": ["busybox", "touch", f"/{shim.name}"]}]
    (shim.bundle / "config.json").write_text(json.dumps(config))
    return shim


def points(log: Path) -> list[str]:
    return [line.split()[0] for line in log.read_text().splitlines()]


def test_are_run_at_their_moments_and_poststop_when_the_container_is_no_more(shop: Workshop, log: Path) -> None:
    shim = with_hooks(shop, log, "sh", "-c", "exit 3")
    pid = shim.create()
    assert points(log) == ["prestart", "createRuntime", "createContainer"]
    shim.start()
    assert points(log)[3] == "poststart"
    assert shim.wait()["code"] == 3
    assert points(log)[4:] == ["poststop"]
    states = [json.loads(line.split(" ", 1)[1]) for line in log.read_text().splitlines()]
    assert {(state["id"], state["bundle"]) for state in states} == {(shim.name, str(shim.bundle))}
    assert [state["pid"] for state in states] == [pid, pid, 1, pid, 0]
    assert (shop.root / shim.name).exists()
    assert shim.reports() == ""


def test_get_no_signal_mask_of_the_shims(shop: Workshop, log: Path) -> None:
    shim = with_hooks(shop, log, "true")
    hook = log.parent / "hook"
    hook.write_text(hook.read_text() + f"grep SigBlk /proc/self/status >> {log}.mask\n")
    shim.create()
    shim.start()
    shim.wait()
    assert set(Path(f"{log}.mask").read_text().split()) == {"SigBlk:", "0000000000000000"}


def test_and_what_they_leave_running_are_not_spared_by_the_oom_killer(shop: Workshop, log: Path) -> None:
    shim = with_hooks(shop, log, "true")
    hook = log.parent / "hook"
    hook.write_text(hook.read_text() + f"cat /proc/self/oom_score_adj >> {log}.scores\n")
    shim.create()
    shim.start()
    shim.wait()
    assert set(Path(f"{log}.scores").read_text().split()) == {"0"}


def test_that_fail_at_create_leave_no_container_and_the_shim_can_be_asked_again(shop: Workshop, log: Path) -> None:
    shim = with_hooks(shop, log, "true", failing="createRuntime")
    with pytest.raises(RequestError, match=r"error running createRuntime hook #0: .*exit status 1"):
        shim.create()
    assert points(log) == ["prestart", "createRuntime", "poststop"]
    assert shim.state()["state"] == "new"


def test_poststart_that_fails_stops_the_container(shop: Workshop, log: Path) -> None:
    shim = with_hooks(shop, log, "sleep", "60", failing="poststart")
    shim.create()
    with pytest.raises(RequestError, match=r"error running poststart hook #0"):
        shim.start()
    assert "error running poststart hook #0" in str(shim.wait()["reason"])
    assert points(log)[-1] == "poststop"


def test_what_the_machine_gives_is_set(shop: Workshop) -> None:
    shim = shop.spawn("sh", "-c", "busybox awk '{ print $19 }' /proc/self/stat; sleep 60")
    config = json.loads((shim.bundle / "config.json").read_text())
    config["process"]["scheduler"] = {"policy": "SCHED_BATCH", "nice": 7}
    config["process"]["ioPriority"] = {"class": "IOPRIO_CLASS_IDLE", "priority": 0}
    config["process"]["execCPUAffinity"] = {"final": "0"}
    config["linux"]["memoryPolicy"] = {"mode": "MPOL_BIND", "nodes": "0"}
    (shim.bundle / "config.json").write_text(json.dumps(config))
    shim.create()
    shim.start()
    assert shim.run_exec("grep", "Cpus_allowed_list", "/proc/self/status").split()[-1] == b"0"
    assert shim.log_entries() == [("stdout", "7\n")]


def test_labels_that_the_kernel_cannot_give_are_refused(shop: Workshop) -> None:
    shim = shop.spawn("true")
    config = json.loads((shim.bundle / "config.json").read_text())
    config["process"]["apparmorProfile"] = "no-such-profile"
    (shim.bundle / "config.json").write_text(json.dumps(config))
    with pytest.raises(RequestError, match=r"process\.apparmorProfile|AppArmor profile 'no-such-profile'"):
        shim.create()
