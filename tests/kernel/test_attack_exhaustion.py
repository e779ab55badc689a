"""A container that takes all it can get: it comes up to its limits, and neither the shim nor the host runs short."""

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import shimclient
from shimclient import wait_gone, workshop
from support import cgroups, elf
from support.cgroups import eventually
from support.requirements import needs

from corral.kernel import inotify, process
from corral.kernel.cgroup import Cgroup, Driver, Resources, detect, signals
from corral.kernel.cgroup.resources import MemoryLimits, PidsLimits
from corral.shim.leftovers import kill_leftovers

pytestmark = needs("root", "busybox")

MOST = 40
"""Processes of a bomb: each of them keeps a processor busy."""
MEMORY = 32 << 20


def plant(root: Path, code: dict[str, str]) -> None:
    """A program of a few instructions, as /bomb."""
    path = root / "bomb"
    path.write_bytes(elf.program(code))
    path.chmod(0o755)


@pytest.fixture
def make_group() -> Iterator[Callable[[], Cgroup]]:
    """Cgroups with room for MOST processes."""
    made: list[Cgroup] = []

    def make() -> Cgroup:
        made.append(Driver(detect()).create(cgroups.fresh_path()))
        made[-1].apply(Resources(pids=PidsLimits(limit=MOST)))
        return made[-1]

    try:
        yield make
    finally:
        for group in made:
            group.remove()
        for directory in {path for group in made for path in group.paths()}:
            for parent in (directory.parent, directory.parent.parent):
                with contextlib.suppress(OSError):  # another test's cgroup is in it
                    parent.rmdir()


@pytest.fixture
def group(make_group: Callable[[], Cgroup]) -> Cgroup:
    return make_group()


class TestForkBomb:
    @pytest.mark.parametrize("namespaces", [shimclient.NAMESPACES, ("mount", "ipc", "uts")], ids=["own", "host"])
    def test_it_is_held_by_the_limit_and_holds_up_nobody(self, group: Cgroup, namespaces):
        with workshop() as shop:
            plant(shop.root, elf.FORK_BOMB)
            shim = shop.spawn("/bomb", namespaces=namespaces)
            shim.create(cgroup={"paths": [str(path) for path in group.paths()]}, driver="none")
            shim.start()
            assert eventually(lambda: len(group.pids()) >= MOST)
            time.sleep(0.2)
            assert len(group.pids()) == MOST
            began = time.monotonic()
            assert shim.state()["state"] == "running"
            assert time.monotonic() - began < 2
            shim.exec("late", "true")
            with pytest.raises(shimclient.RequestError, match="temporarily unavailable"):
                shim.start("late")
            shim.call("kill", signal=int(signal.SIGKILL), all=True)
            wait_gone(shim.pid)
            assert time.monotonic() - began < 15
            assert eventually(lambda: group.pids() == [], within_s=2)


class TestWhatIsLeft:
    """Processes that outlive init, where no PID namespace ends them with it."""

    @pytest.fixture
    def rolling(self, group: Cgroup, tmp_path: Path) -> Iterator[None]:
        """Whoever is listed has ended by the time it is signalled, and has had a child."""
        plant(tmp_path, elf.ROLLING_FORK)

        def body(_fd: int) -> None:
            process.set_child_subreaper()
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # who ends is gone at once, and makes room for another
            for _ in range(MOST // 2):
                if process.fork() == 0:
                    os.execv(tmp_path / "bomb", ["bomb"])
            time.sleep(60)

        with cgroups.inside(group, body):
            time.sleep(0.3)
            assert group.pids(), "nothing lived on, so nothing was tried"
            yield
            group.thaw()  # whoever is left frozen can't be ended

    @pytest.mark.usefixtures("rolling")
    def test_is_frozen_to_be_killed_to_the_last(self, group: Cgroup):
        freezers = [path / name for path in group.paths() for name in ("freezer.state", "cgroup.freeze")]
        watched = [path.parent for path in freezers if path.exists()]
        if not watched:
            pytest.skip("needs a cgroup freezer")
        notes = inotify.open_inotify()
        try:
            for directory in watched:
                inotify.add_watch(notes, directory, inotify.IN_MODIFY)
            began = time.monotonic()
            kill_leftovers(list(map(str, group.paths())), signal.SIGKILL)
            assert time.monotonic() - began < 3
            assert eventually(lambda: group.pids() == [], within_s=2)
            assert list(inotify.read_changes(notes)), "nobody was stopped meanwhile"
        finally:
            os.close(notes)

    def test_is_not_chased_for_ever(self, tmp_path: Path):
        """A list that never gets empty, of a kernel that can't freeze: whoever removes the cgroup has to see to it."""
        (tmp_path / "cgroup.procs").write_text(f"{1 << 22}\n")  # more than any pid
        began = time.monotonic()
        kill_leftovers([str(tmp_path)], signal.SIGKILL)
        assert 0.5 < time.monotonic() - began < 3

    def test_is_not_who_has_a_pid_by_now(self, group: Cgroup):
        """A pid that was listed, and is another process's once it is held."""
        pid, pidfd = process.clone(0)
        if pid == 0:
            time.sleep(60)
            os._exit(0)
        try:
            assert not any(signals._send(directory, pid, signal.SIGKILL) for directory in group.directories)
            assert os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG) is None
        finally:
            process.send_signal(pidfd, signal.SIGKILL)
            os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
            os.close(pidfd)

    def test_is_not_the_shim_itself(self, group: Cgroup):
        """It was put into the container's cgroup by whoever started it: then nobody in there is the container's own."""

        def body(_fd: int) -> None:
            kill_leftovers(list(map(str, group.paths())), signal.SIGKILL)

        with cgroups.inside(group, body) as child:
            ended = eventually(lambda: not child.alive(), within_s=5)
            group.thaw()
            assert ended, "it froze itself"
            assert child.wait() == 0


class TestMemory:
    def test_it_is_killed_at_its_limit_and_the_shim_tells(self, group: Cgroup):
        group.apply(Resources(memory=MemoryLimits(limit_bytes=MEMORY)))
        with workshop() as shop:
            shim = shop.spawn("sleep", "100")
            shim.create(cgroup={"paths": [str(path) for path in group.paths()]})
            shim.start()
            shim.exec("greedy", "sh", "-c", "x=a; while :; do x=$x$x; done")
            shim.start("greedy")
            assert shim.wait_state("stopped", "greedy")["exit"]["code"] == 137
            assert 0 < group.read().memory.peak_bytes <= MEMORY
            assert eventually(lambda: shim.state()["oom_kills"] == 1)
            assert shim.run_exec("echo", "fine") == b"fine\n"

    def test_output_without_end_costs_the_shim_none(self):
        """And a line without end neither."""
        with workshop() as shop:
            shim = shop.spawn("sh", "-c", "yes | tr -d '\\n'")
            shim.create(
                log={"driver": "json-file", "path": str(shop.directory / "log"), "max_size": 1 << 20, "max_files": 2}
            )
            shim.start()
            time.sleep(1)
            assert resident(shim.pid) < 64 << 20
            assert sum(path.stat().st_size for path in shop.directory.glob("log*")) < 4 << 20


class TestDescriptors:
    LIMIT = 64
    TAKE_ALL = """
trap 'echo $i; sleep 60' EXIT
i=3
while [ $i -lt 1000 ] && eval "exec $i</dev/null"; do i=$((i+1)); done
"""

    def test_it_gets_no_more_than_its_limit_and_holds_up_nobody(self):
        """What enters it brings its own."""
        with workshop() as shop:
            limits = [{"type": "RLIMIT_NOFILE", "soft": self.LIMIT, "hard": self.LIMIT}]
            shim = shop.spawn("sh", "-c", self.TAKE_ALL, rlimits=limits)
            shim.create()
            (reader,) = shim.attach("stdout")
            shim.start()
            taken = int(re.sub(rb"\D", b"", shimclient.read_until(reader, b"\n")))
            os.close(reader)
            assert self.LIMIT // 2 < taken <= self.LIMIT
            assert shim.run_exec("echo", "fine", rlimits=limits) == b"fine\n"


def held_by(pid: int) -> int:
    """How many descriptors a process has."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


class TestComingAndGoing:
    """What is done over and over costs no more than once."""

    def test_cve_2025_64329_attaching(self):
        with workshop() as shop:
            shim = shop.run("sleep", "60")
            before = held_by(shim.pid)
            for _ in range(100):
                for fd in shim.attach("stdout", "stderr"):
                    os.close(fd)
            assert eventually(lambda: shim.state() and held_by(shim.pid) == before)

    @pytest.mark.parametrize("terminal", [True, False])
    @pytest.mark.parametrize("program", ["/missing", "true"])
    def test_cve_2022_23471_programs_that_end_at_once(self, terminal, program):
        with workshop() as shop:
            shim = shop.run("sleep", "60")
            before = held_by(shim.pid)
            for number in range(15):
                shim.exec(f"e{number}", program, terminal=terminal)
                with contextlib.suppress(shimclient.RequestError):
                    shim.start(f"e{number}")
                    shim.wait_state("stopped", f"e{number}")
                shim.call("delete_exec", exec=f"e{number}")
            assert eventually(lambda: shim.state() and held_by(shim.pid) == before)
            assert not list((shim.bundle / "execs").iterdir())

    def test_cve_2026_53495_programs_that_leave_somebody_who_holds_their_output(self):
        """He is read from as long as he lives, which is for the pids limit to bound, and is waited for by nobody."""
        with workshop() as shop:
            shim = shop.run("sleep", "60")
            before = held_by(shim.pid)
            for number in range(10):
                shim.exec(f"e{number}", "sh", "-c", "sleep 4 &")
                shim.start(f"e{number}")
            began = time.monotonic()
            for number in range(10):
                shim.wait_state("stopped", f"e{number}")
                shim.call("delete_exec", exec=f"e{number}")
            assert time.monotonic() - began < 3.5
            assert eventually(lambda: shim.state() and held_by(shim.pid) == before)

    def test_cve_2022_31030_and_cve_2022_1708_output_of_an_exec_that_nobody_reads(self):
        with workshop() as shop:
            shim = shop.run("sleep", "60")
            shim.exec("e", "sh", "-c", "yes | tr -d '\\n'")
            (reader,) = shim.attach("stdout", exec_id="e")
            shim.start("e")
            time.sleep(0.2)
            before = resident(shim.pid)
            time.sleep(0.8)
            assert resident(shim.pid) - before < 8 << 20
            os.close(reader)


def test_the_reply_to_a_hostile_name_stays_a_frame():
    """What fails names what the container chose; a frame has a limit, and the shim goes on."""
    with workshop() as shop:
        shim = shop.run("sleep", "60")
        shim.exec("e", "x" * 500_000)
        with pytest.raises(shimclient.RequestError, match="xxx"):
            shim.start("e")
        assert shim.run_exec("echo", "fine") == b"fine\n"
