"""`corral commit`, `diff`, `export` and `history`."""

import io
import json
import tarfile
from concurrent.futures import ThreadPoolExecutor

from support.corrald import Corrald
from support.requirements import needs

pytestmark = needs("root", "overlayfs", "busybox")


def test_what_a_running_container_wrote_becomes_an_image(box: Corrald, name: str) -> None:
    script = "echo hello >/made; trap : TERM; while :; do sleep 0.1; done"
    box.corral("run", "-d", "--name", name, "-e", "A=1", "busybox", "sh", "-c", script, check=True)
    box.corral("exec", name, "sh", "-c", "until [ -e /made ]; do sleep 0.1; done; sync", check=True)
    made = box.corral("commit", "-m", "why", "-a", "ann", "-c", "CMD cat /made", "-c", "LABEL k=v", name, "made:1",
                      check=True)  # fmt: skip
    assert box.corral("run", "--rm", "made:1").stdout == b"hello\n"
    image = json.loads(box.corral("image", "inspect", "made:1", check=True).stdout)[0]
    assert made.stdout.decode().strip() == image["id"]
    assert "A=1" in image["config"]["env"]
    assert image["config"]["labels"] == {"k": "v"}
    assert (image["history"][-1]["author"], image["history"][-1]["comment"]) == ("ann", "why")
    assert json.loads(box.corral("inspect", name).stdout)[0]["status"] == "running"
    assert b"A /made\n" in box.corral("diff", name, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(box.corral("export", name, check=True).stdout)) as tar:
        assert {"made", "bin/busybox", "etc/passwd"} < set(tar.getnames())
    rows = box.corral("history", "made:1", check=True).stdout.decode().splitlines()
    assert [row.split()[-1] for row in rows[:2]] == ["COMMENT", "why"]
    assert "corral tests" in rows[2]
    steps = box.corral("image", "history", "--format", "json", "made:1", check=True).stdout.splitlines()
    assert [json.loads(step)["comment"] for step in steps] == ["why", ""]
    box.corral("image", "rm", "made:1", check=True)


def test_a_paused_container_stays_paused_and_an_ended_one_ended(box: Corrald, name: str) -> None:
    box.corral("run", "-d", "--name", name, "busybox", "sleep", "1000", check=True)
    box.corral("pause", name, check=True)
    box.corral("commit", name, "paused:1", check=True)
    assert json.loads(box.corral("inspect", name).stdout)[0]["status"] == "paused"
    box.corral("unpause", name, check=True)
    box.corral("kill", name, check=True)
    box.corral("wait", name, check=True)
    box.corral("commit", name, "ended:1", check=True)
    assert json.loads(box.corral("inspect", name).stdout)[0]["status"] == "exited"
    box.corral("image", "rm", "paused:1", "ended:1", check=True)


def test_a_container_that_is_removed_while_it_is_committed_leaves_an_image(box: Corrald, name: str) -> None:
    script = "dd if=/dev/urandom of=/large bs=1M count=64; touch /made; sleep 1000"
    box.corral("run", "-d", "--name", name, "busybox", "sh", "-c", script, check=True)
    box.corral("exec", name, "sh", "-c", "until [ -e /made ]; do sleep 0.1; done; sync", check=True)
    with ThreadPoolExecutor(1) as threads:
        committing = threads.submit(box.corral, "commit", name, "late:1")
        while json.loads(box.corral("inspect", name, check=True).stdout)[0]["status"] != "paused":
            assert not committing.done(), committing.result()
        box.corral("rm", "-f", name, check=True)
        made = committing.result()
    assert (made.returncode, made.stderr) == (0, b"")
    box.corral("image", "rm", "late:1", check=True)


def test_a_change_that_is_none_is_one_sentence(box: Corrald, name: str) -> None:
    box.corral("create", "--name", name, "busybox", "true", check=True)
    result = box.corral("commit", "-c", "RUN rm -rf /", name, "bad:1")
    assert result.returncode == 1
    assert b"'RUN'" in result.stderr
    assert result.stderr.count(b"\n") == 1


def test_an_image_without_a_name_goes_with_the_next_prune(box: Corrald, name: str) -> None:
    box.corral("create", "--name", name, "busybox", "true", check=True)
    made = box.corral("commit", name, check=True).stdout.decode().strip()
    assert made in box.corral("image", "ls", "-q", "--no-trunc", check=True).stdout.decode()
    pruned = box.corral("image", "prune", check=True).stdout.decode()
    assert made in pruned
    assert pruned.splitlines()[-1].startswith("Total reclaimed space: ")
    assert made not in box.corral("image", "ls", "-q", "--no-trunc", check=True).stdout.decode()
    assert box.corral("image", "inspect", "busybox").returncode == 0
