"""corrald with the cgroup driver systemd: containers are scopes below a slice, and systemd keeps to their limits."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest
from support.cgroups import eventually
from support.corrald import PATIENCE, Corrald, PlaceOn, running
from support.databases import copied
from support.requirements import needs

from corral.kernel.cgroup import Cgroup, Driver, Kind, PidsLimits, Resources, detect, open_driver
from corral.kernel.cgroup.systemd.names import slice_of_its_own

pytestmark = [needs("root", "busybox"), pytest.mark.timeout(1200)]
on_systemd = needs("systemd")

IS_V2 = detect().kind is Kind.V2
MIB = 1 << 20
ENGINE_PIDS = 500
SLOW_S = 30 * PATIENCE
OTHER_SLICE = "corraltest-web.slice"
HOG_WHEN_TOLD = "rm -f /go; until [ -e /go ]; do sleep 0.1; done; exec tail /dev/zero"


class SlicePlace(PlaceOn):
    """One whose containers are below a slice; its data where a virtual machine has a disk."""

    @property
    def cgroup_parent(self) -> str:
        return f"/{self.tag}.slice"


def systemctl(*words: str) -> str:
    return subprocess.run(["systemctl", *words], capture_output=True, text=True, check=False).stdout.strip()


@pytest.fixture(scope="module")
def box(busybox_archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Corrald]:
    place = SlicePlace.make_on(tmp_path_factory.mktemp("data"))
    slice_ = f"{place.tag}.slice"
    settings = {"cgroups": {"driver": "systemd", "parent": slice_, "pids": ENGINE_PIDS}}
    try:
        with running(place=place, settings=settings) as daemon:
            ok(daemon, "image", "import", str(busybox_archive), "--as", "busybox")
            yield daemon
            assert not scopes_of(daemon)
            daemon.stop()
            assert not driver().open(f"/{slice_}").exists()
    finally:
        systemctl("stop", slice_, "corraltest.slice")
        driver().prune(f"/corraltest.slice/{OTHER_SLICE}")  # on v1, where systemd does not know all hierarchies


def ok(box: Corrald, *words: str) -> str:
    result = box.corral(*words, timeout_s=SLOW_S)
    assert result.returncode == 0, result.stderr.decode() + box.log()[-4000:]
    return result.stdout.decode().strip()


def sleeping(box: Corrald, *options: str) -> str:
    return ok(box, "run", "-d", "--network", "none", *options, "busybox", "sleep", "1000").split()[-1]


def driver() -> Driver:
    return open_driver(detect())


def slice_of(box: Corrald) -> str:
    return box.place.cgroup_parent.removeprefix("/")


def group_of(box: Corrald, id_: str) -> Cgroup:
    return driver().open(below(f"/{slice_of(box)}", unit_of(box, id_)))


def below(parent: str, unit: str) -> str:
    """The cgroup of a scope of ours in a slice: on v2 it is in another one, which keeps the count of OOM kills."""
    return f"{parent}/{own_slice(parent, unit)}/{unit}" if IS_V2 else f"{parent}/{unit}"


def own_slice(parent: str, unit: str) -> str:
    within = parent.rpartition("/")[2]
    return slice_of_its_own(unit, within) if IS_V2 else within


def unit_of(box: Corrald, id_: str, namespace: str = "default") -> str:
    engine, within = (sha256(name.encode()).hexdigest()[:8] for name in (str(box.root / "cgroups"), namespace))
    return f"corral-{engine}-{within}-{id_}.scope"


def limits(group: Cgroup) -> tuple[int, float | None, int]:
    """Of memory, CPUs and processes, as the kernel has them."""
    return group.memory_limit(), group.cpus(), group.pids_limit()


def scopes_of(box: Corrald) -> set[str]:
    """All that systemd knows, and all that have a cgroup."""
    return units() | driver().list(f"/{slice_of(box)}")


def units() -> set[str]:
    listed = systemctl("list-units", "--all", "--plain", "--no-legend", "corral-*.scope").splitlines()
    return {line.split()[0] for line in listed}


def made(box: Corrald) -> int:
    """How many scopes there are with all their limits, also if the daemon does not answer."""
    with copied(box.root / "cgroups/cgroups.db") as database:
        (count,) = database.execute("SELECT count(*) FROM cgroups WHERE state = 'ready'").fetchone()
    return int(count)


def shown(unit: str, *properties: str) -> dict[str, str]:
    lines = systemctl("show", unit, "--property", ",".join(properties)).splitlines()
    return dict(line.split("=", 1) for line in lines)


def inspected(box: Corrald, id_: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(ok(box, "inspect", id_))[0]
    return found


def is_out_of_memory(box: Corrald, id_: str) -> bool:
    return '"oom_killed": true' in json.dumps(inspected(box, id_)).lower().replace("oomkilled", "oom_killed")


@on_systemd
def test_a_container_is_a_scope_and_its_limits_outlive_a_reload(box: Corrald) -> None:
    options = ("--memory", "64m", "--cpus", "0.5", "--pids-limit", "40", "--cpu-shares", "512", "--cpuset-cpus", "0")
    id_ = sleeping(box, *options)
    unit, group = unit_of(box, id_), group_of(box, id_)
    told = {
        "ActiveState": "active", "Slice": own_slice(slice_of(box), unit), "Delegate": "yes",
        "CPUQuotaPerSecUSec": "500ms", "TasksMax": "40", "ControlGroup": group.path,
    }  # fmt: skip
    if IS_V2:
        told |= {"CPUWeight": "59", "AllowedCPUs": "0", "MemoryMax": str(64 * MIB), "MemorySwapMax": str(64 * MIB)}
    assert shown(unit, *told) == told
    assert limits(group) == (64 * MIB, 0.5, 40)
    assert len(group.pids()) == 1, "whoever held the scope is gone"
    systemctl("daemon-reload")
    assert limits(group) == (64 * MIB, 0.5, 40)
    assert limits(driver().open(f"/{slice_of(box)}"))[2] == ENGINE_PIDS
    ok(box, "update", "--memory", "32m", "--cpus", "0.25", "--pids-limit", "20", id_)
    assert shown(unit, "TasksMax", "CPUQuotaPerSecUSec") == {"TasksMax": "20", "CPUQuotaPerSecUSec": "250ms"}
    systemctl("daemon-reload")
    assert limits(group) == (32 * MIB, 0.25, 20)
    ok(box, "rm", "-f", id_)
    assert not scopes_of(box)


@on_systemd
def test_a_scope_is_counted_paused_and_entered_as_any_cgroup(box: Corrald) -> None:
    id_ = sleeping(box, "--memory", "64m")
    group = group_of(box, id_)
    assert "64" in ok(box, "stats", "--no-stream", id_)
    ok(box, "exec", "-d", id_, "sleep", "1000")
    assert eventually(lambda: len(group.pids()) == 2, within_s=SLOW_S)
    ok(box, "pause", id_)
    systemctl("daemon-reload")
    assert group.is_frozen()
    ok(box, "unpause", id_)
    assert "Cgroup driver: systemd" in ok(box, "system", "info")
    ok(box, "rm", "-f", id_)
    assert not scopes_of(box)


@on_systemd
def test_a_container_that_starts_again_has_a_new_scope_with_its_limits(box: Corrald) -> None:
    id_ = sleeping(box, "--memory", "64m")
    group = group_of(box, id_)
    ok(box, "restart", "-t", "0", id_)
    assert limits(group)[0] == 64 * MIB
    ok(box, "kill", id_)
    assert eventually(lambda: not units(), within_s=SLOW_S), "it goes with its last process"
    ok(box, "update", "--memory", "48m", id_)
    ok(box, "system", "check")
    ok(box, "start", id_)
    systemctl("daemon-reload")
    assert limits(group)[0] == 48 * MIB
    systemctl("kill", "--signal=KILL", unit_of(box, id_))
    assert eventually(lambda: not units(), within_s=SLOW_S)
    ok(box, "rm", "-f", id_)
    assert not scopes_of(box)


@on_systemd
@pytest.mark.parametrize("round_", range(3))
def test_who_ran_out_of_memory_is_told(box: Corrald, round_: int) -> None:
    result = box.corral(
        "run", "--name", f"hog{round_}", "--network", "none", "--memory", "16m", "busybox", "tail", "/dev/zero",
        timeout_s=SLOW_S,
    )  # fmt: skip
    assert result.returncode == 137, result.stderr
    assert is_out_of_memory(box, f"hog{round_}")
    ok(box, "rm", f"hog{round_}")
    assert not scopes_of(box), "and no unit is left that failed"


@on_systemd
def test_each_life_of_a_container_has_its_kills_told_also_one_that_ends_without_a_daemon(box: Corrald) -> None:
    """systemd removes the scope long before somebody can count."""
    id_ = ok(box, "run", "-d", "--network", "none", "--memory", "16m", "busybox", "sh", "-c", HOG_WHEN_TOLD).split()[-1]
    for kills in (1, 2):
        (init,) = group_of(box, id_).pids()[:1]
        if kills == 2:
            box.kill9()
        Path(f"/proc/{init}/root/go").touch()
        assert eventually(lambda: not units(), within_s=SLOW_S)
        box.start()
        assert eventually(lambda: is_out_of_memory(box, id_), within_s=SLOW_S)
        assert eventually(lambda kills=kills: kills_told(box, id_) == list(range(1, kills + 1)), within_s=SLOW_S)
        if kills == 1:
            ok(box, "start", id_)
    ok(box, "rm", id_)
    assert not scopes_of(box)


def kills_told(box: Corrald, id_: str) -> list[int]:
    lines = ok(box, "events", "--no-follow", "--format", "json", "-f", "topic=cgroup.oom", "-f", f"subject={id_}")
    return [int(json.loads(line)["payload"]["oom_kills"]) for line in lines.splitlines()]


@on_systemd
def test_a_killed_daemon_finds_its_scopes_again_and_leaves_none_behind(box: Corrald) -> None:
    id_ = sleeping(box, "--memory", "64m")
    group = group_of(box, id_)
    pids = group.pids()
    box.kill9()
    systemctl("daemon-reload")
    assert group.pids() == pids
    box.start()
    ok(box, "update", "--memory", "32m", id_)
    systemctl("daemon-reload")
    assert limits(group)[0] == 32 * MIB
    before = scopes_of(box)
    for moment in ("cgroups.create.after_make", "engine.task.before_create", "engine.create.after_task"):
        box.kill9()
        box.start(environment={"CORRAL_FAILPOINTS": f"{moment}=kill"})
        box.corral("run", "-d", "--network", "none", "busybox", "sleep", "1000", timeout_s=SLOW_S)
        box.revive()
        assert eventually(lambda: scopes_of(box) == before, within_s=SLOW_S), moment
    ok(box, "rm", "-f", id_)
    assert not scopes_of(box)


@on_systemd
def test_what_is_called_the_same_elsewhere_or_lies_in_our_slice_is_left_alone(box: Corrald) -> None:
    id_, ended = sleeping(box), sleeping(box)
    ok(box, "kill", ended)
    assert eventually(lambda: units() == {unit_of(box, id_)}, within_s=SLOW_S)
    strangers = [unit_of(box, ended), "corral-f00d.scope", "corral-0a1b2c3d-0a1b2c3d-f00d.scope"]
    slices = ["system.slice", slice_of(box), slice_of(box)]
    run = [
        subprocess.Popen(
            ["systemd-run", "--quiet", "--scope", "--collect", "--unit", unit, "--slice", slice_, "sleep", "600"]
        )
        for unit, slice_ in zip(strangers, slices, strict=True)
    ]
    try:
        assert eventually(lambda: units() >= set(strangers), within_s=SLOW_S)
        refused = box.corral("start", ended, timeout_s=SLOW_S)
        assert "there is such a scope at /system.slice" in refused.stderr.decode()
        ok(box, "system", "check", "--repair")
        box.kill9()
        box.start()
        assert units() >= set(strangers) | {unit_of(box, id_)}
        assert [process.poll() for process in run] == [None] * 3
    finally:
        systemctl("stop", *strangers)
        for process in run:
            process.wait(SLOW_S)
    ok(box, "rm", "-f", id_, ended)
    assert not scopes_of(box)


@on_systemd
def test_what_an_ended_container_may_use_is_changed_also_after_a_restart(box: Corrald) -> None:
    id_ = sleeping(box, "--memory", "64m")
    box.kill9()
    systemctl("kill", "--signal=KILL", unit_of(box, id_))
    assert eventually(lambda: not units(), within_s=SLOW_S)
    box.start()
    ok(box, "update", "--memory", "48m", id_)
    box.restart()
    ok(box, "start", id_)
    assert limits(group_of(box, id_))[0] == 48 * MIB
    ok(box, "rm", "-f", id_)
    assert not scopes_of(box)


@on_systemd
def test_a_scope_whose_holder_was_killed_before_the_container_came_is_made_again(box: Corrald) -> None:
    box.restart_with({"CORRAL_FAILPOINTS": f"engine.task.before_create=sleep:{3 + PATIENCE}@1"})
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(sleeping, box, "--memory", "64m", "--pids-limit", "40")
        assert eventually(lambda: made(box) == 1, within_s=SLOW_S)
        held = driver().open(below(f"/{slice_of(box)}", next(iter(units()))))
        (holder,) = held.pids()
        os.kill(holder, signal.SIGKILL)
        assert eventually(lambda: not units(), within_s=2 + PATIENCE)
        id_ = run.result()
    assert limits(group_of(box, id_))[::2] == (64 * MIB, 40)
    systemctl("daemon-reload")
    assert limits(group_of(box, id_))[::2] == (64 * MIB, 40)
    assert not Path(f"/proc/{holder}").exists(), "it was reaped"
    ok(box, "rm", "-f", id_)
    box.restart()
    assert not scopes_of(box)


@on_systemd
def test_a_created_container_does_not_start_without_its_limits(box: Corrald) -> None:
    id_ = ok(box, "create", "--network", "none", "--pids-limit", "40", "busybox", "sleep", "1000").split()[-1]
    group = group_of(box, id_)
    (init,) = group.pids()
    (group.paths()[0] / "pids.max" if IS_V2 else Path(f"/sys/fs/cgroup/pids{group.path}/pids.max")).write_text("max")
    if not IS_V2:  # systemd loses a scope that is empty in its own hierarchy
        for hierarchy in ("systemd", "unified"):
            Path(f"/sys/fs/cgroup/{hierarchy}/cgroup.procs").write_text(str(init))
        assert eventually(lambda: not units(), within_s=SLOW_S)
        assert group.pids() == [init]
    ok(box, "start", id_)
    assert limits(group)[2] == 40
    assert shown(unit_of(box, id_), "TasksMax") == {"TasksMax": "40"}
    assert IS_V2 or group.pids() != [init]
    ok(box, "rm", "-f", id_)
    assert not scopes_of(box)


@on_systemd
def test_a_driver_that_is_closed_holds_no_scope_and_leaves_no_child() -> None:
    held = open_driver(detect(), "systemd")
    group = held.create("/system.slice/corraltest-held.scope", Resources(pids=PidsLimits(40)))
    (holder,) = group.pids()
    held.close()
    assert not Path(f"/proc/{holder}").exists()
    assert eventually(lambda: not group.is_lasting(), within_s=SLOW_S)


@on_systemd
def test_a_parent_of_a_containers_own_is_a_slice_in_another(box: Corrald) -> None:
    id_ = sleeping(box, "--cgroup-parent", OTHER_SLICE, "--memory", "64m")
    parent = f"/corraltest.slice/{OTHER_SLICE}"
    group = driver().open(below(parent, unit_of(box, id_)))
    assert limits(group)[0] == 64 * MIB
    assert shown(unit_of(box, id_), "Slice") == {"Slice": own_slice(parent, unit_of(box, id_))}
    box.restart()
    ok(box, "restart", "-t", "0", id_)
    assert limits(group)[0] == 64 * MIB
    ok(box, "rm", "-f", id_)
    assert not group.exists()
    for parent in ("/corraltest", "corraltest", "a--b.slice"):
        result = box.corral("run", "--cgroup-parent", parent, "busybox", "true", timeout_s=SLOW_S)
        assert result.returncode == 125
        assert "slice" in result.stderr.decode()


@needs("no systemd")
def test_without_systemd_the_driver_is_refused_with_what_to_do() -> None:
    settings = {"cgroups": {"driver": "systemd", "parent": "corraltest.slice"}}
    said = r"needs systemd as pid 1, and its D-Bus socket.*use driver = .*cgroupfs"
    with pytest.raises(RuntimeError, match=said), Corrald(settings=settings) as daemon:
        daemon.start()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"driver": "sytemd"}, "driver must be one of cgroupfs, systemd"),
        ({"driver": "systemd", "parent": "/corral"}, "'/corral' is not the name of a systemd"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(settings: dict[str, object], said: str) -> None:
    with pytest.raises(RuntimeError, match=said), Corrald(settings={"cgroups": settings}) as daemon:
        daemon.start()
