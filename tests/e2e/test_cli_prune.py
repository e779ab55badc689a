"""`corral container prune`, `network prune`, `system prune`: what nobody uses goes, and nothing else."""

from collections.abc import Iterator

import pytest
from support.cli import ok
from support.corrald import Corrald, running
from support.images import write_busybox
from support.requirements import needs

pytestmark = needs("root", "overlayfs", "busybox")


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Corrald]:
    archive = write_busybox(tmp_path_factory.mktemp("box") / "b.tar")
    with running() as daemon:
        daemon.corral("load", "-i", str(archive), check=True)
        yield daemon


def names(box: Corrald) -> set[str]:
    return set(ok(box, "container", "ls", "-a", "--format", "{{.Names}}").split())


def test_what_nobody_uses_goes(box: Corrald) -> None:
    first, second = box.place.network
    for number, net in enumerate(("idle", "busy")):
        ok(box, "network", "create", "--subnet", f"{first}.{second}.{150 + number}.0/24", net)
    ok(box, "run", "-d", "--name", "runs", "--network", "busy", "busybox", "sleep", "1000")
    ok(box, "container", "run", "--name", "ended", "busybox", "dd", "if=/dev/zero", "of=/file", "bs=1M", "count=3")
    ok(box, "commit", "ended", "other:1")
    ok(box, "create", "--name", "kept", "--label", "keep=1", "busybox", "true")
    ok(box, "create", "--name", "never", "busybox", "true")

    assert "Deleted" not in ok(box, "container", "prune", "-f", "--filter", "until=1h")
    told = ok(box, "container", "prune", "-f", "--filter", "label!=keep")
    assert "Deleted Containers:" in told
    assert told.splitlines()[-1].startswith("Total reclaimed space: 3")
    assert names(box) == {"runs", "kept"}

    assert ok(box, "network", "prune", "-f").splitlines()[:2] == ["Deleted Networks:", "idle"]
    listed = ok(box, "network", "ls", "-q").split()
    assert "busy" in listed
    assert "bridge" in listed

    told = ok(box, "system", "prune", "-a", "-f")
    assert "other:1" in told
    assert names(box) == {"runs"}
    ok(box, "rm", "-f", "runs")
    assert "busy" in ok(box, "system", "prune", "-f", "--volumes")


def test_a_filter_that_is_not_understood_is_named(box: Corrald) -> None:
    for verb in ("container", "network", "system"):
        refused = box.corral(verb, "prune", "--filter", "size=1")
        assert refused.returncode == 1
        assert b"'size=1' is not understood" in refused.stderr


def test_volumes_are_not_pruned_past_a_filter(box: Corrald) -> None:
    anonymous = ok(box, "volume", "create").strip()
    refused = box.corral("system", "prune", "--volumes", "--filter", "label=none")
    assert refused.returncode == 1
    assert b"--volumes and --filter exclude one another" in refused.stderr
    assert ok(box, "volume", "ls", "-q").split() == [anonymous]
    ok(box, "volume", "rm", anonymous)


def test_the_noun_changes_no_exit_code(box: Corrald) -> None:
    assert box.corral("container", "run", "--no-such-flag", "busybox").returncode == 125
    assert box.corral("container", "ls", "--no-such-flag").returncode == 2
