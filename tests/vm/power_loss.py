"""A machine loses its power while containers come and go; what is there at its next boot.

    .venv/bin/python tests/vm/power_loss.py

Two runs of a virtual machine (run.py) on one disk. The first is reset, by `echo b >/proc/sysrq-trigger`, and nothing is
synced before: what the kernel has not written is gone, as are /run and every process. What the client was told until
then is looked for in the second. Prints what was compared; the exit status is run.py's, or 1.
"""
# ruff: noqa: E402 (run as a program, it has to say where the modules of the tests are)

import os
import random
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from support.corrald import PATIENCE, Corrald, PlaceOn
from support.images import write_busybox
from support.sweep import forgotten

from corral.api.engine.v1 import engine_pb2 as pb
from corral.client.sync import Client

TAG = "corralpw0b0e"
DATA = Path("/var/tmp/power")
LIVING_S = 6.0
DIED = 125
WORKERS = 2
SYNC = ("sh", "-c", "echo kept | dd of=/kept conv=fsync")


def main() -> int:
    """On the host. Its TMPDIR must not be /var/tmp, which the machine covers with its disk."""
    with tempfile.TemporaryDirectory(prefix="corral-power-") as directory:
        disk = Path(directory, "disk")
        before = _machine(disk, "before")
        sys.stdout.write(before.stdout)
        if before.returncode != DIED or "now the power goes" not in before.stdout:
            sys.stderr.write(before.stderr)
            return before.returncode or 1
        told = Path(directory, "told")
        told.write_text(before.stdout)
        after = _machine(disk, "after", str(told))
        sys.stdout.write(after.stdout)
        sys.stderr.write(after.stderr)
        return after.returncode


def _machine(disk: Path, *what: str) -> "subprocess.CompletedProcess[str]":
    run = [sys.executable, HERE / "run.py", "--disk", disk, "--timeout", "900", "--", sys.executable, __file__, *what]
    return subprocess.run(run, capture_output=True, text=True, check=False)


def _daemon() -> Corrald:
    directory = Path("/tmp", TAG)
    directory.mkdir()
    DATA.mkdir(exist_ok=True)
    return Corrald(place=PlaceOn(TAG, directory, Path("/run", TAG), DATA / "root"))


def say(what: str, *names: str) -> None:
    """One line, at once: the next moment there may be no power."""
    os.write(1, f"{what} {' '.join(names)}\n".encode())


def before() -> None:
    """In the machine, until its power goes."""
    daemon = _daemon()
    daemon.start()
    archive = write_busybox(Path("/tmp", "busybox.tar"))
    daemon.corral("image", "import", str(archive), timeout_s=60 * PATIENCE, check=True)
    with daemon.client() as client:
        client.volumes.create("kept")
        for policy in ("always", "unless-stopped", "on-failure", "no"):
            client.containers.run("busybox", ["sleep", "1000"], name=policy, restart=policy, network="none")
        client.containers.run("busybox", ["true"], name="ended", network="none")
        client.containers.wait("ended")
        client.containers.run("busybox", ["sleep", "1000"], name="halted", restart="unless-stopped", network="none")
        client.containers.stop("halted", timeout_s=0)
        say("stands")
        for worker in range(WORKERS):
            threading.Thread(target=_live, args=(daemon.client(), worker), daemon=True).start()
        time.sleep(LIVING_S * PATIENCE**0.5)
        client.containers.run("busybox", ["sleep", "1000"], name="last", restart="always", network="none")
        _sync(client, "last")
        say("now the power goes")
        Path("/proc/sysrq-trigger").write_text("b")
        time.sleep(60)


def _live(client: Client, worker: int) -> None:
    rng = random.Random(worker)
    names: list[str] = []
    for number in range(10_000):
        name = f"c{worker}-{number}"
        client.containers.run("busybox", ["sleep", "1000"], name=name, network="none")
        say("made", name)
        names.append(name)
        _sync(client, name)
        if rng.random() < 0.6:
            name = names.pop(rng.randrange(len(names)))
            say("removing", name)
            client.containers.remove(name, force=True)
            say("removed", name)


def _sync(client: Client, name: str) -> None:
    """As a database in the container does it, right after it was made."""
    assert client.containers.exec(name, SYNC).code == 0
    say("synced", name)


def after(told: str) -> None:
    """In the machine, at its next boot. Raises AssertionError."""
    words = [line.split() for line in Path(told).read_text().splitlines()]
    made = {w[1] for w in words if w[0] == "made"}
    removing, removed = ({w[1] for w in words if w[0] == what} for what in ("removing", "removed"))
    databases = list((DATA / "root").glob("*/*.db"))
    assert len(databases) == 5, databases
    for path in databases:
        with sqlite3.connect(path) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)], path
            assert connection.execute("PRAGMA foreign_key_check").fetchall() == [], path
        connection.close()
    say(f"{len(databases)} databases are whole")
    daemon = _daemon()
    daemon.start()
    with daemon.client() as client:
        _compare(client, made - removing, removed)
        _find_synced(client, {w[1] for w in words if w[0] == "synced"} - removing)
        assert client.system.check() == []
        say("system check finds nothing")
        assert client.volumes.get("kept").name == "kept"
        client.containers.run("busybox", ["sh", "-c", "exit 5"], name="next", network="none")
        assert client.containers.wait("next").code == 5
        for container in client.containers.list(all=True):
            client.containers.remove(container.id, force=True)
        assert client.system.check() == []
    assert forgotten(daemon) == []
    assert [line for line in daemon.log().splitlines() if '"level": "error"' in line] == []
    daemon.stop()
    say("a next life leaves nothing")


def _compare(client: Client, standing: set[str], removed: set[str]) -> None:
    deadline = time.monotonic() + 20 * PATIENCE
    for name in ("always", "last"):
        while client.containers.get(name).status != pb.STATUS_RUNNING:
            assert time.monotonic() < deadline, client.containers.get(name)
            time.sleep(0.2)
    found = {container.name: container for container in client.containers.list(all=True)}
    assert standing <= found.keys(), f"lost: {standing - found.keys()}"
    assert not removed & found.keys(), f"came back: {removed & found.keys()}"
    for name in standing:
        container = client.containers.get(name)
        if container.status == pb.STATUS_CREATED:  # no policy would restart it, so no start of it waits for the disk
            continue
        assert container.status == pb.STATUS_EXITED, (name, container)
        assert not container.exit.known, (name, container.exit)
        assert container.exit.reason
    say(f"{len(standing)} containers are known, as created or ended nobody knows how; {len(removed)} are gone")
    for name, runs in {
        "always": True,
        "unless-stopped": True,
        "on-failure": True,
        "no": False,
        "halted": False,
    }.items():
        container = client.containers.get(name)
        assert (container.status == pb.STATUS_RUNNING) == runs, (name, container)
    ended = client.containers.get("ended")
    assert (ended.status, ended.exit.code, ended.exit.known) == (pb.STATUS_EXITED, 0, True), ended
    say("restart policies have acted")


def _find_synced(client: Client, names: set[str]) -> None:
    assert "last" in names
    for name in names:
        client.containers.start(name)
        assert client.containers.exec(name, ["cat", "/kept"]).stdout == b"kept\n", name
    say(f"{len(names)} containers have what they had synced")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["before"]:
            before()
        case ["after", told]:
            after(told)
        case _:
            sys.exit(main())
