"""`corral system check`: what does not fit together is told by name, and put right."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.corrald import CORRAL, Corrald, running
from support.requirements import needs
from support.sweep import cgroups

from corral.api.cgroups.v1 import cgroups_pb2, cgroups_pb2_grpc

pytestmark = needs("root", "overlayfs", "busybox", "netns")


@pytest.fixture(scope="module")
def own(busybox_archive: Path) -> Iterator[Corrald]:
    """A daemon that tests damage, and leave as it was."""
    with running() as daemon:
        daemon.corral("image", "import", str(busybox_archive), "--as", "busybox", check=True)
        yield daemon


def check(daemon: Corrald, *options: str, code: int) -> list[str]:
    """The lines that it prints."""
    result = daemon.corral("system", "check", *options)
    assert result.returncode == code, result.stdout.decode() + result.stderr.decode()
    assert result.stderr == b""
    return result.stdout.decode().splitlines()


def test_nothing_is_found_where_nothing_is_wrong(box: Corrald, name: str) -> None:
    assert check(box, "--deep", code=0) == []
    box.corral("run", "-d", "--name", name, "-v", "/v", "busybox", "sleep", "1000", check=True)
    assert check(box, "--repair", code=0) == []
    box.corral("pause", name, check=True)
    assert check(box, code=0) == []
    box.corral("kill", name)
    box.corral("unpause", name)
    box.corral("stop", "-t", "0", name)
    assert check(box, code=0) == []
    box.corral("rm", "-f", "-v", name, check=True)
    assert check(box, code=0) == []


def test_nothing_is_found_while_containers_come_and_go(own: Corrald) -> None:
    own.corral("run", "--rm", "busybox", "true", check=True)
    loop = f"for i in 1 2 3 4 5 6 7 8; do {CORRAL} run --rm busybox true; done"
    environment = os.environ | {"CORRAL_ADDRESS": own.address}
    with subprocess.Popen(["sh", "-c", loop], env=environment, stdout=subprocess.DEVNULL) as working:
        while working.poll() is None:
            assert check(own, "--repair", code=0) == []
    assert working.returncode == 0


def test_what_is_left_over_is_told_by_name_and_removed(own: Corrald) -> None:
    own.corral("run", "-d", "--name", "kept", "busybox", "sleep", "1000", check=True)
    engine, state = own.root / "engine", own.state
    (engine / "volumes/default/stray/data").mkdir(parents=True)
    (engine / "containers/default/stray").mkdir(parents=True)
    (own.root / "images/overlay/l/9000").mkdir()
    (own.root / "network/endpoints/default/stray").mkdir(parents=True)
    (state / "shim/default/stray").mkdir(parents=True)
    cgroup = cgroups(own.place.cgroup_parent)[-1] / "default/stray"
    cgroup.mkdir()
    with own.client() as client:
        leaf = client.leaf("cgroups")
        labels = {"corral.owner": "engine", "corral.namespace": "default", "corral.container": "labelled"}
        stub = cgroups_pb2_grpc.CgroupsStub(leaf.channel)
        leaf.unary(stub.Create, cgroups_pb2.CreateCgroupRequest(id="labelled", labels=labels))
    lines = check(own, code=1)
    assert lines == [
        "images: tree 9000 of overlayfs belongs to no snapshot; repair removes it",
        f"cgroups: cgroup {own.place.cgroup_parent}/default/stray is there, but nobody made it here;"
        " repair kills what is in it and removes it",
        "network: files of endpoint default/stray belong to no endpoint; repair removes them",
        "tasks: bundle default/stray belongs to no task; repair ends what runs in it and removes it",
        "engine: cgroup default/labelled belongs to no container; repair removes it",
        "engine: volume default/stray is a directory that no row describes; repair removes it",
        f"engine: directory {engine}/containers/default/stray belongs to no container; repair removes it",
    ]
    assert check(own, "--repair", code=0) == [f"{line}: done" for line in lines]
    assert check(own, code=0) == []
    assert own.corral("exec", "kept", "echo", "alive").stdout == b"alive\n"
    own.corral("rm", "-f", "kept", check=True)


def test_what_a_container_has_lost_is_made_again(own: Corrald) -> None:
    own.corral("volume", "create", "vol", check=True)
    own.corral("run", "--name", "one", "-v", "vol:/v", "busybox", "touch", "/mine", check=True)
    shutil.rmtree(own.root / "engine/volumes/default/vol")
    for tree in (own.root / "images/overlay/s").iterdir():
        shutil.rmtree(tree)
    lines = check(own, code=1)
    assert [line.partition(";")[0].partition(": ")[2].partition(" has ")[2] for line in lines] == [
        "lost its tree",
        "lost its directory",
    ]
    assert "what was written to it is lost" in lines[0]
    assert all(line.endswith(": done") for line in check(own, "--repair", code=0))
    own.corral("start", "one", check=True)
    assert own.corral("wait", "one").stdout == b"0\n"
    own.corral("rm", "-f", "one", check=True)
    own.corral("volume", "rm", "vol", check=True)


def test_a_lost_network_comes_back_by_itself_and_nothing_is_to_be_repaired(own: Corrald) -> None:
    own.corral("run", "-d", "--name", "one", "busybox", "sleep", "1000", check=True)
    table = ["nft", "list", "table", "inet", own.place.nft_table]
    subprocess.run(["nft", "delete", "table", "inet", own.place.nft_table], check=True)
    deadline = time.monotonic() + 20
    while subprocess.run(table, capture_output=True, check=False).returncode:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert check(own, code=0) == []
    own.corral("rm", "-f", "one", check=True)


def test_a_lost_database_of_images_costs_no_container(own: Corrald) -> None:
    own.corral("run", "-d", "--name", "running", "busybox", "sleep", "1000", check=True)
    own.corral("run", "--name", "ended", "busybox", "sh", "-c", "echo kept > /mine", check=True)
    own.corral("image", "tag", "busybox", "registry.example/two:1", check=True)
    own.stop()
    (own.root / "images/images.db").rename(own.root / "images/away.db")
    own.start()
    assert own.corral("images", "-q").stdout == b""
    [line] = check(own, code=1)
    assert line.startswith(f"images: database {own.root}/images/images.db was lost or damaged")
    [line] = check(own, "--repair", code=0)
    assert line.endswith(": done")
    assert check(own, code=0) == []
    listed = own.corral("images").stdout.decode()
    assert "busybox" in listed
    assert "registry.example/two" in listed
    assert own.corral("exec", "running", "echo", "alive").stdout == b"alive\n"
    assert own.corral("diff", "ended").stdout == b"A /mine\n"
    own.corral("commit", "ended", "kept:1", check=True)
    assert own.corral("run", "--rm", "kept:1", "cat", "/mine").stdout == b"kept\n"
    own.corral("rm", "-f", "running", "ended", check=True)


def test_after_a_shim_has_died_nothing_is_to_be_repaired(own: Corrald) -> None:
    own.corral("run", "-d", "--name", "one", "busybox", "sleep", "1000", check=True)
    with own.client() as client:
        shim = client.containers.get("one").shim_pid
    os.kill(shim, signal.SIGKILL)
    assert own.corral("exec", "one", "echo", "here").stdout == b"here\n"
    assert check(own, code=0) == []
    own.corral("rm", "-f", "one", check=True)
