"""A container's life: created, started, joined by others, ended."""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support.requirements import needs

from corral.kernel import process as kernel_process
from corral.oci.runtime import EXEC_DENIED, EXEC_NOT_FOUND, SETUP, Container, ExecFailed, Stdio
from corral.oci.spec import Action, Capabilities, Mount, Seccomp, SeccompSyscall

pytestmark = needs("root", "overlayfs", "busybox")


def mounts() -> list[str]:
    """The mounts of this process, but for those that other tests make and drop meanwhile."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in lines if "nsfs" not in line and "/pytest-" in line]


def open_fds() -> list[str]:
    return sorted(entry.name for entry in Path("/proc/self/fd").iterdir())


def namespace(pid: int | str, name: str) -> str:
    return str(Path(f"/proc/{pid}/ns/{name}").readlink())


def children() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def test_init_waits_for_start(lab):
    marker = lab.upper / "started"
    container = lab.create(lab.spec("touch /started"))
    time.sleep(0.1)
    assert not marker.exists()
    container.start()
    assert lab.wait(container.init) == 0
    assert marker.exists()


def test_the_exit_code_is_the_programs(lab):
    assert lab.run("exit 7").code == 7


def test_a_signal_is_seen_as_such(lab):
    container = lab.create(lab.spec("sleep", "60"))
    container.start()
    signal.pidfd_send_signal(container.init.pidfd, signal.SIGKILL)
    assert lab.wait(container.init) == -signal.SIGKILL


def test_the_handle_names_the_process_for_good(lab):
    container = lab.create(lab.spec("sleep", "60"))
    handle = container.init
    assert kernel_process.start_time(handle.pid) == handle.start_time
    assert f"Pid:\t{handle.pid}\n" in Path(f"/proc/self/fdinfo/{handle.pidfd}").read_text()
    assert os.get_inheritable(handle.pidfd) is False


def test_output_goes_to_the_given_fds(lab):
    assert lab.run("echo out; echo err >&2").output == "out\nerr\n"


def test_a_container_starts_only_once(lab):
    container = lab.create(lab.spec("sleep", "60"))
    container.start()
    with pytest.raises(ExecFailed, match="started already"):
        container.start()


def test_starting_a_dead_init_fails(lab):
    container = lab.create(lab.spec("true"))
    signal.pidfd_send_signal(container.init.pidfd, signal.SIGKILL)
    os.waitid(os.P_PIDFD, container.init.pidfd, os.WEXITED | os.WNOWAIT)
    with pytest.raises(ExecFailed, match="ended before"):
        container.start()


DEADLY_EXECVE = Seccomp(Action.ALLOW, syscalls=(SeccompSyscall(("execve",), Action.KILL_PROCESS),))


def test_a_process_that_is_killed_before_it_executes_anything_was_not_started(lab):
    container = lab.create(lab.spec("true", linux={"seccomp": DEADLY_EXECVE}))
    with pytest.raises(ExecFailed, match="killed before"):
        container.start()
    running = lab.create(lab.spec("sleep", "60"))
    running.start()
    deadly = replace(running.spec, linux=replace(running.spec.linux, seccomp=DEADLY_EXECVE))
    other = Container.adopt(deadly, pid=running.init.pid, start_time=running.init.start_time)
    with pytest.raises(ExecFailed, match=r"killed during its set-up: linux.seccomp"):
        other.exec(lab.process("true"), stdio=Stdio())
    os.close(other.init.pidfd)


def test_a_program_that_ends_at_once_was_started_all_the_same(lab):
    for _ in range(20):
        container = lab.create(lab.spec("true"))
        container.start()
        assert lab.wait(container.init) == 0


def test_init_ends_with_the_runtime(lab):
    """The channel's other end is closed, as it is when the runtime dies: nobody could start it any more."""
    container = lab.create(lab.spec("sleep", "60"))
    container.close()
    assert lab.wait(container.init) == 1


@pytest.mark.parametrize(
    ("program", "kind", "sentence"),
    [
        ("nonsense", EXEC_NOT_FOUND, "executable file not found in $PATH"),
        ("/bin/nonsense", EXEC_NOT_FOUND, "no such file or directory"),
        ("/etc", EXEC_DENIED, "is a directory"),
        ("/etc/passwd", EXEC_DENIED, "permission denied"),
        ("/etc/passwd/x", EXEC_NOT_FOUND, "no such file or directory"),
        ("/garbage", EXEC_DENIED, "exec format error"),
        ("/script", EXEC_NOT_FOUND, "no such file or directory"),
    ],
)
def test_a_program_that_cannot_run_is_told_apart(lab, program, kind, sentence):
    plant(lab, "garbage", b"\x7fELF but not really")
    plant(lab, "script", b"#!/no/interpreter\n")
    container = lab.create(lab.spec(program, "argument"))
    with pytest.raises(ExecFailed) as failed:
        container.start()
    assert (failed.value.kind, sentence in failed.value.message) == (kind, True)
    assert lab.wait(container.init) == 1


def plant(lab, name: str, data: bytes) -> None:
    path = lab.plant / name
    path.write_bytes(data)
    path.chmod(0o755)


def test_a_program_that_is_first_on_the_path_but_forbidden_is_passed_over(lab):
    """As execvp does: EACCES counts only when nothing later on PATH runs."""
    (lab.plant / "first").mkdir()
    (lab.plant / "first/true").write_bytes(b"")
    assert lab.run("true", "", env=("PATH=/first:/bin",)).code == 0


def test_an_empty_path_entry_is_not_the_working_directory(lab):
    plant(lab, "tool", b"#!/bin/sh\nexit 0\n")
    container = lab.create(lab.spec("tool", "x", env=("PATH=:/bin:",)))
    with pytest.raises(ExecFailed) as failed:
        container.start()
    assert failed.value.kind == EXEC_NOT_FOUND


def test_a_failed_create_leaves_no_process_and_no_mount(lab):
    before = children(), mounts()
    fds = open_fds()
    broken = Mount("/data", "bind", str(lab.directory / "missing"), ("rbind",))
    with pytest.raises(ExecFailed, match="missing does not exist") as failed:
        lab.create(lab.spec("true", mounts=[broken]))
    assert failed.value.kind == SETUP
    assert (children(), mounts()) == before
    assert open_fds() == fds


def test_create_and_exit_leak_no_fd(lab):
    fds = open_fds()
    lab.run("true")
    assert open_fds() == fds


def test_nothing_of_a_container_is_seen_on_the_host(lab):
    before = mounts()
    container = lab.create(lab.spec("sleep", "60"))
    container.start()
    assert mounts() == before
    assert list((lab.directory / "bundle").iterdir()) == []


class TestExec:
    @pytest.fixture
    def running(self, lab) -> Container:
        container = lab.create(lab.spec("sleep", "60"))
        container.start()
        return container

    def test_runs_in_the_containers_namespaces(self, lab, running):
        init = [namespace(running.init.pid, name) for name in ("mnt", "net", "ipc", "uts", "pid")]
        seen = lab.exec(running, "for i in mnt net ipc uts pid; do readlink /proc/self/ns/$i; done").output.split()
        assert seen == init

    def test_sees_init_as_pid_1(self, lab, running):
        assert lab.exec(running, "cat /proc/1/cmdline").output == "sleep\x0060\x00"

    def test_the_exit_code_is_the_programs(self, lab, running):
        assert lab.exec(running, "exit 9").code == 9

    def test_the_runtimes_own_namespace_is_as_before(self, lab, running):
        before = namespace("self", "pid_for_children")
        lab.exec(running, "true")
        assert namespace("self", "pid_for_children") == before

    def test_a_missing_program_is_reaped(self, lab, running):
        before = children()
        with pytest.raises(ExecFailed) as failed:
            lab.exec(running, "nonsense", "x")
        assert failed.value.kind == EXEC_NOT_FOUND
        assert children() == before

    def test_a_missing_directory_is_named(self, lab, running):
        with pytest.raises(ExecFailed, match=r"/nowhere.*no such file"):
            lab.exec(running, "true", cwd="/nowhere")

    def test_into_an_ended_container_fails(self, lab):
        container = lab.create(lab.spec("true"))
        container.start()
        os.waitid(os.P_PIDFD, container.init.pidfd, os.WEXITED | os.WNOWAIT)
        with pytest.raises(ExecFailed, match="the container is not running"):
            container.exec(lab.process("true"), stdio=Stdio())

    def test_without_capabilities_of_its_own_it_gets_those_of_init(self, lab, running):
        own = lab.exec(running, "grep CapEff /proc/self/status").output
        assert lab.exec(running, "grep CapEff /proc/self/status", capabilities=None).output == own
        none = lab.exec(running, "grep CapEff /proc/self/status", capabilities=Capabilities()).output
        assert none.split()[1] == "0000000000000000"

    def test_is_filtered_like_init(self, lab, running):
        assert "Seccomp:\t2" in lab.exec(running, "cat /proc/self/status").output

    def test_reaches_an_adopted_container(self, lab, running):
        adopted = Container.adopt(running.spec, pid=running.init.pid, start_time=running.init.start_time)
        try:
            assert lab.exec(adopted, "hostname").output == "box\n"
        finally:
            os.close(adopted.init.pidfd)

    def test_a_reused_pid_is_not_adopted(self, running):
        with pytest.raises(ProcessLookupError):
            Container.adopt(running.spec, pid=running.init.pid, start_time=running.init.start_time + 1)
