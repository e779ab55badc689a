import os
import subprocess
import sys
from pathlib import Path

import pytest

from corral.kernel.failpoint import Trigger, parse
from corral.store import Lock, LockHeld, atomic_write


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_atomic_write_replaces_the_content_and_leaves_nothing_else(tmp_path: Path):
    path = tmp_path / "f"
    atomic_write(path, b"one")
    atomic_write(path, b"two", mode=0o644)
    assert path.read_bytes() == b"two"
    assert names_in(tmp_path) == ["f"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_failing_atomic_write_leaves_the_old_content(tmp_path: Path):
    directory = tmp_path / "d"
    (directory / "f" / "x").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        atomic_write(directory / "f", b"data")
    assert names_in(directory) == ["f"]


def test_a_lock_excludes_and_names_its_holder(tmp_path: Path):
    with Lock(tmp_path / "lock"):
        with pytest.raises(LockHeld) as caught:
            Lock(tmp_path / "lock")
        assert caught.value.holder == os.getpid()
        assert f"process {os.getpid()}" in str(caught.value)
    Lock(tmp_path / "lock").release()


def test_a_lock_dies_with_its_process(tmp_path: Path):
    code = (
        "import sys, pathlib; from corral.store.files import Lock;"
        "lock = Lock(pathlib.Path(sys.argv[1])); print('ok', flush=True); input()"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    ) as child:
        assert child.stdout.readline() == b"ok\n"
        with pytest.raises(LockHeld):
            Lock(tmp_path / "lock")
        child.kill()
        child.wait()
        Lock(tmp_path / "lock").release()


def test_a_lock_waits_for_the_children_of_a_process_that_was_killed(tmp_path: Path):
    """A daemon that is killed may just have forked somebody, who has its descriptors until a program is executed."""
    code = (
        "import os, sys, pathlib, time; from corral.store.files import Lock;"
        "lock = Lock(pathlib.Path(sys.argv[1]));"
        "forked = os.fork();"
        "forked or (time.sleep(0.7), os._exit(0));"
        "print('ok', flush=True); input()"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as child:
        assert child.stdout.readline() == b"ok\n"
        child.kill()
        child.wait()
        Lock(tmp_path / "lock").release()


def test_failpoints_parse():
    assert parse("") == {}
    assert parse("a.b=kill, c=error@2,d=sleep:0.5@1") == {
        "a.b": Trigger("kill"),
        "c": Trigger("error", only_hit=2),
        "d": Trigger("sleep", 0.5, 1),
    }


@pytest.mark.parametrize("text", ["a", "a=die", "a=sleep", "a=sleep:x", "a=kill@x", "=kill", "a=kill:3"])
def test_a_malformed_failpoint_is_refused_by_name(text: str):
    with pytest.raises(ValueError, match="CORRAL_FAILPOINTS"):
        parse(text)


def test_a_failpoint_kills_its_process_at_the_nth_hit():
    code = "from corral.store import failpoint\nfor i in range(5): print(i, flush=True); failpoint('x')"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "CORRAL_FAILPOINTS": "x=kill@3",
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
    assert done.returncode == -9
    assert (done.stdout, done.stderr) == (b"0\n1\n2\n", b"failpoint x\n")
