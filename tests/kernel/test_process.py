"""Processes as the kernel layer makes and names them."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.requirements import needs

from corral.kernel import mount, namespaces, process
from corral.kernel.namespaces import Kind
from corral.kernel.seccomp import load
from corral.kernel.syscalls import AT_FDCWD
from corral.oci.seccomp import filter_of
from corral.oci.spec import Action, Seccomp, SeccompSyscall
from corral.tasks.identity import Identity

pytestmark = pytest.mark.timeout(60, method="signal")


KERNEL = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
pidfd_info = pytest.mark.skipif(KERNEL < (6, 15), reason="needs PIDFD_INFO_EXIT (Linux 6.15)")


def child_of(body) -> tuple[int, int]:
    pid, pidfd = process.clone(0)
    if pid == 0:
        try:
            body()
        finally:
            os._exit(0)
    return pid, pidfd


def test_a_pid_that_a_thread_has_by_now_is_no_process() -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    assert thread.native_id is not None
    try:
        with pytest.raises(ProcessLookupError):
            process.pidfd_open(thread.native_id)
        assert not Identity(thread.native_id, process.start_time(thread.native_id)).runs
    finally:
        done.set()
        thread.join()


def reap(pidfd: int) -> None:
    os.waitid(os.P_PIDFD, pidfd, os.WEXITED)


@pidfd_info
def test_the_exit_status_outlives_the_reaping():
    _, pidfd = child_of(lambda: os._exit(7))
    reap(pidfd)
    info = process.pidfd_info(pidfd)
    assert os.waitstatus_to_exitcode(info.exit_status) == 7
    os.close(pidfd)


@pidfd_info
def test_a_signal_is_told_from_an_exit():
    _, pidfd = child_of(lambda: time.sleep(60))
    process.send_signal(pidfd, signal.SIGTERM)
    reap(pidfd)
    info = process.pidfd_info(pidfd)
    assert os.waitstatus_to_exitcode(info.exit_status) == -signal.SIGTERM
    os.close(pidfd)


@pidfd_info
def test_a_live_process_has_no_status():
    pid, pidfd = child_of(lambda: time.sleep(60))
    try:
        info = process.pidfd_info(pidfd)
        assert (info.pid, info.ppid, info.exit_status) == (pid, os.getpid(), None)
    finally:
        process.send_signal(pidfd, signal.SIGKILL)
        reap(pidfd)
        os.close(pidfd)


def test_a_reaped_process_gets_no_signal():
    _, pidfd = child_of(lambda: None)
    reap(pidfd)
    with pytest.raises(ProcessLookupError):
        process.send_signal(pidfd, signal.SIGTERM)
    os.close(pidfd)


def test_the_start_time_is_that_of_proc_whatever_the_name():
    pid, pidfd = child_of(lambda: (process.set_name("a) b (c) 1 2"), time.sleep(60)))
    while "a) b" not in Path(f"/proc/{pid}/stat").read_text():
        time.sleep(0.001)
    ticks = os.sysconf("SC_CLK_TCK")
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - process.start_time(pid) / ticks
    assert -1 < age < 10
    process.send_signal(pidfd, signal.SIGKILL)
    reap(pidfd)
    os.close(pidfd)
    with pytest.raises(FileNotFoundError):
        process.start_time(pid)


def test_only_what_is_kept_stays_open():
    reader, writer = os.pipe()

    def body():
        kept = os.dup(writer)
        os.dup(reader)
        process.close_fds([0, 1, 2, kept])
        os.write(kept, " ".join(entry.name for entry in Path("/proc/self/fd").iterdir()).encode())
        os._exit(kept)

    _, pidfd = child_of(body)
    result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    left = os.read(reader, 100).decode().split()
    assert len(left) == 5  # and one to list them with
    assert {"0", "1", "2", str(result.si_status)} < set(left)
    for fd in (reader, writer, pidfd):
        os.close(fd)


WITHOUT_CLOSE_RANGE = filter_of(
    Seccomp(default_action=Action.ALLOW, syscalls=(SeccompSyscall(names=("close_range",), action=Action.ERRNO),))
)
NO_PROC, A_LIE_FOR_PROC = "no /proc", "a /proc that is none"


def left_open(proc: str = "") -> list[bool]:
    """Which of 90, 91, 7900 and 7901 are open after 91 and 7901 were to be closed, with a limit of 100."""
    reader, writer = os.pipe()

    def body():
        resource.setrlimit(resource.RLIMIT_NOFILE, (8000, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        for fd in (90, 91, 7900, 7901):
            os.dup2(writer, fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
        if proc:
            namespaces.leave(Kind.MOUNT.flag)
            mount.set_propagation("/", mount.MS_PRIVATE, recursive=True)
            tree = mount.new_mount("tmpfs", "tmpfs")
            mount.move_mount(tree, AT_FDCWD, "/proc", what="tmpfs", where="/proc")
        if proc == A_LIE_FOR_PROC:
            Path("/proc/self/fd/90").mkdir(parents=True)
        process.set_no_new_privs()
        load(WITHOUT_CLOSE_RANGE)
        process.close_fds([0, 1, 2, 90, 7900])
        os.write(90, bytes(is_open(fd) for fd in (90, 91, 7900, 7901)))

    _, pidfd = child_of(body)
    reap(pidfd)
    os.close(writer)
    found = os.read(reader, 4)
    os.close(reader)
    os.close(pidfd)
    return [bool(each) for each in found]


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_what_lies_above_a_lowered_limit_is_closed_where_a_filter_refuses_close_range():
    assert left_open() == [True, False, True, False]


@needs("root")
@pytest.mark.parametrize("proc", [NO_PROC, A_LIE_FOR_PROC])
def test_and_also_where_proc_does_not_tell_what_is_open(proc):
    assert left_open(proc) == [True, False, True, False]


def test_ignored_signals_are_not_inherited():
    before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    reader, writer = os.pipe()

    def body():
        process.reset_signals()
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("SigIgn"))
        os.write(writer, line.split()[1].encode())

    _, pidfd = child_of(body)
    reap(pidfd)
    signal.signal(signal.SIGUSR2, before)
    assert int(os.read(reader, 100), 16) == 0
    for fd in (reader, writer, pidfd):
        os.close(fd)


@needs("root")
def test_a_subreaper_gets_orphans():
    reader, writer = os.pipe()

    def body():
        process.set_child_subreaper()
        middle, _ = process.clone(0)
        if middle == 0:
            process.clone(0)
            os._exit(0)
        os.waitpid(middle, 0)
        pid, _ = os.waitpid(-1, 0)
        os.write(writer, b"reaped" if pid > 0 else b"")

    _, pidfd = child_of(body)
    reap(pidfd)
    assert os.read(reader, 10) == b"reaped"
    for fd in (reader, writer, pidfd):
        os.close(fd)


@needs("root")
def test_a_process_can_be_born_in_a_cgroup():
    lines = (line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines())
    mount = next((Path(fields[4]) for fields in lines if fields[fields.index("-") + 1] == "cgroup2"), None)
    if mount is None:
        pytest.skip("needs a mounted cgroup2")
    place = mount / f"corral-born-{os.getpid()}"
    place.mkdir()
    fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    pid, pidfd = process.clone(0, cgroup=fd)
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    try:
        assert (place / "cgroup.procs").read_text().split() == [str(pid)]
    finally:
        process.send_signal(pidfd, signal.SIGKILL)
        reap(pidfd)
        os.close(pidfd)
        os.close(fd)
        place.rmdir()


@needs("root")
@pytest.mark.parametrize(("score", "then"), [("-998\n", "0998\n"), ("500\n", "500\n")])
def test_a_lowered_oom_score_is_given_up_and_a_raised_one_stays(tmp_path: Path, score: str, then: str) -> None:
    """A file takes the place of the kernel's, for not every root may lower a score: the 0 is written over its start."""
    stand_in = tmp_path / "score"
    stand_in.write_text(score)
    program = "from corral.kernel.process import lose_oom_protection; lose_oom_protection()"
    script = 'mount --bind "$1" /proc/$$/oom_score_adj && exec "$2" -c "$3"'
    unshare = ["unshare", "--mount", "sh", "-ec", script, "sh", str(stand_in), sys.executable, program]
    subprocess.run(unshare, check=True)
    assert stand_in.read_text() == then
