"""A process that goes on as a sibling of itself, in its own memory."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cgroups import eventually
from support.requirements import needs

from corral.kernel import rebirth

pytestmark = [needs("root"), pytest.mark.skipif(not rebirth.POSSIBLE, reason="needs x86-64")]

_SHARED = str(Path(rebirth.__file__).parents[2])
_PARENT = """
import json, os, signal, sys
sys.path.insert(0, {path!r})
from corral.kernel import process, rebirth
from corral.kernel.namespaces import Kind
signal.alarm(30)
before = process.fork()
if before == 0:
{body}
    os._exit(9)
print(before, flush=True)
print(sys.stdin.readline(), end="", flush=True)
ended = [os.waitid(os.P_ALL, 0, os.WEXITED) for _ in range({children})]
print(json.dumps(dict((each.si_pid, [each.si_code, each.si_status]) for each in ended)), flush=True)
"""


class Family:
    """A process, its child, and who that child goes on as."""

    def __init__(self, body: str, *, children: int = 2) -> None:
        indented = "".join(f"    {line}\n" for line in body.splitlines())
        code = _PARENT.format(path=_SHARED, body=indented, children=children)
        self.parent = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.parent.stdout is not None
        lines = {self.parent.stdout.readline().strip() for _ in range(2)}
        self.before = next(int(line) for line in lines if not line.startswith("{"))
        self.told = json.loads(next(line for line in lines if line.startswith("{")))

    def end(self) -> dict[int, list[int]]:
        """How its children ended, by pid: si_code and si_status."""
        out, _ = self.parent.communicate("\n", timeout=20)
        return {int(pid): how for pid, how in json.loads(out.splitlines()[-1]).items()}


@pytest.fixture
def families() -> Iterator[list[Family]]:
    made: list[Family] = []
    yield made
    for family in made:
        with family.parent:
            family.parent.kill()


_TELLS = 'print(json.dumps({"pid": pid, "own": os.getpid(), "parent": os.getppid(), "seen": seen}), flush=True)'


def test_it_is_a_child_of_its_parent_in_the_same_memory_and_the_one_before_waits(families: list[Family]) -> None:
    body = (
        f"seen = [1]\nalias = seen\npid, pipe = rebirth.go_on(0)\nalias.append(2)\n{_TELLS}\nos.read(0, 1)\nos._exit(3)"
    )
    family = Family(body)
    families.append(family)
    pid = family.told["pid"]
    assert family.told == {"pid": pid, "own": pid, "parent": family.parent.pid, "seen": [1, 2]}
    assert eventually(lambda: len(list(Path(f"/proc/{family.before}/fd").iterdir())) == 1)  # of the pipe
    status = Path(f"/proc/{family.before}/status").read_text()
    assert "State:\tS" in status  # no load
    assert eventually(lambda: "Seccomp:\t1" in Path(f"/proc/{family.before}/status").read_text())
    assert family.parent.stdin is not None
    family.parent.stdin.write("x\n\n")
    family.parent.stdin.flush()
    assert family.end() == {pid: [os.CLD_EXITED, 3], family.before: [os.CLD_EXITED, 0]}


def test_the_one_before_ends_with_the_execve(families: list[Family]) -> None:
    program = 'os.dup2(os.open("/dev/null", os.O_WRONLY), 1)\nos.execve("/bin/sleep", ["sleep", "3"], {})'
    family = Family(f"seen = []\npid, pipe = rebirth.go_on(0)\n{_TELLS}\n{program}", children=1)
    families.append(family)
    assert family.end() == {family.before: [os.CLD_EXITED, 0]}
    assert Path(f"/proc/{family.told['pid']}/comm").read_text() == "sleep\n"


def test_it_is_the_first_of_a_pid_namespace(families: list[Family]) -> None:
    family = Family(f"seen = []\npid, pipe = rebirth.go_on(Kind.PID.flag)\n{_TELLS}\nos._exit(0)")
    families.append(family)
    assert (family.told["own"], family.told["parent"]) == (1, 0)
    assert set(family.end()) == {family.before, family.told["pid"]}


def test_a_killed_one_is_told_of_and_the_one_before_ends(families: list[Family]) -> None:
    family = Family(f"seen = []\npid, pipe = rebirth.go_on(0)\nrebirth.await_harmless(pipe)\n{_TELLS}\nos.kill(pid, 9)")
    families.append(family)
    assert family.end() == {family.told["pid"]: [os.CLD_KILLED, 9], family.before: [os.CLD_EXITED, 0]}


def test_it_goes_on_if_the_one_before_is_killed(families: list[Family]) -> None:
    family = Family(f"seen = []\npid, pipe = rebirth.go_on(0)\n{_TELLS}\nos.read(0, 1)\nos._exit(len(seen) + 5)")
    families.append(family)
    os.kill(family.before, 9)
    assert family.parent.stdin is not None
    family.parent.stdin.write("x\n\n")
    family.parent.stdin.flush()
    assert family.end() == {family.told["pid"]: [os.CLD_EXITED, 5], family.before: [os.CLD_KILLED, 9]}


# A filter of the one before, whose first call is close_range, and last one exit; with a filter there is no strict mode.
_FILTERED = """
import signal, time
from corral.kernel import seccomp
rule = seccomp.Rule(({name!r},), {action:#x})
native = seccomp.Architecture.X86_64
profile = seccomp.Profile(default=0x7FFF0000, unknown=0x7FFF0000, architectures=(native,), rules=(rule,))
before, listener = os.getpid(), seccomp.load(seccomp.Filter(seccomp.compile_profile(profile), {flags}))
def state():
    return next(line.split()[1] for line in open(f"/proc/{{before}}/status") if line.startswith("State"))
def sleep(seconds):
    time.sleep(seconds)
    if "{name}" == "exit" and open(f"/proc/{{before}}/syscall").read().startswith("60 "):
        os.close(listener)
rebirth.time = type("", (), dict(sleep=staticmethod(sleep)))
pid, pipe = rebirth.go_on(0)
signal.alarm(20)
rebirth.await_harmless(pipe)
seen = state()
"""
_KILL, _NOTIFY = 0x80000000, 0x7FC00000


def test_one_before_that_is_killed_at_once_is_not_waited_for(families: list[Family]) -> None:
    body = _FILTERED.format(name="close_range", action=_KILL, flags=0)
    family = Family(f"{body}{_TELLS}\nos._exit(3)")
    families.append(family)
    assert family.told["seen"] == "Z"
    ended = family.end()
    assert ended[family.told["pid"]] == [os.CLD_EXITED, 3]
    assert ended[family.before][1] == signal.SIGSYS


def test_one_before_that_cannot_be_harmless_is_waited_for_until_it_is_gone(families: list[Family]) -> None:
    body = _FILTERED.format(name="exit", action=_NOTIFY, flags=8)
    family = Family(f"{body}{_TELLS}\nos._exit(3)")
    families.append(family)
    assert family.told["seen"] == "Z"
    assert family.end()[family.told["pid"]] == [os.CLD_EXITED, 3]


def test_where_that_cannot_be_nothing_has_changed(families: list[Family]) -> None:
    body = f"""
def fds():
    return len(os.listdir('/proc/self/fd'))
pid, before = 0, fds()
try:
    rebirth.go_on(0, cgroup=0)
except OSError as e:
    seen = e.errno, e.strerror, fds() - before
{_TELLS}"""
    family = Family(body, children=1)
    families.append(family)
    assert family.told["own"] == family.before
    code, text, more = family.told["seen"]
    assert code
    assert "clone3" in text
    assert more == 0
    assert family.end() == {family.before: [os.CLD_EXITED, 9]}
