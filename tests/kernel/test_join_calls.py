"""An exec as a list of system calls is the exec that Python makes, only that no Python is forked for it."""

import contextlib
import fcntl
import os
import re
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.races import exchange
from support.requirements import needs

from corral.kernel import paths, process, sequence
from corral.kernel.sequence import Call
from corral.oci import crossing, join_calls, program, users
from corral.oci.channel import START
from corral.oci.container import Container
from corral.oci.runtime import ExecFailed, Stdio
from corral.oci.spec import Rlimit, User

pytestmark = [
    needs("root", "overlayfs", "busybox"),
    pytest.mark.skipif(os.uname().machine not in sequence.MACHINES, reason="a sequence is for x86-64"),
]
OF_PYTHON = 400
"""Pages that a fork of Python touches at least; a list of calls touches some sixty."""
WRITE, PAUSE, CLONE, EXIT = 1, 34, 56, 231
SEEN = (
    "id; pwd; umask; env | sort; ulimit -n; ulimit -Hn; cut -d' ' -f5,6 /proc/$$/stat; ls -l /proc/self/fd;"
    "grep -E 'Uid|Gid|Groups|^Sig[BIC]|Cap|NoNew|Seccomp|NSpid' /proc/self/status; cat /proc/self/oom_score_adj;"
    "for each in /proc/self/ns/*; do readlink $each; done; cat /proc/self/cgroup"
)


@pytest.fixture
def container(lab, busybox_root: Path, cgroups: list[Path]) -> Iterator[Container]:
    """One that runs, whose users were written down a while ago."""
    for name in users.DATABASES:
        age = time.time() - (busybox_root / name[1:]).stat().st_ctime
        time.sleep(max(0.0, 2.1 - age))
    made = lab.create(lab.spec("sleep", "1000"), cgroup_paths=cgroups)
    made.start()
    yield made
    lab.close()  # its cgroups are next
    lab.made.clear()
    lab.containers.clear()


def forked_python(run: Callable[[], object]) -> bool:
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt
    run()
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt - before > OF_PYTHON


def without_names(output: str) -> str:
    """Less what no two processes have in common."""
    return re.sub(r"pipe:\[\d+\]|NSpid:\t\d+|^\d+ \d+$| -> /proc/\d+/fd|\d\d:\d\d", "", output, flags=re.MULTILINE)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"user": "bob"},
        {"user": "1000:10"},
        {"user": "4711"},
        {"cwd": "/home/bob"},
        {"no_new_privileges": False},
        {"env": ("A=1", "HOME=/else", "E=", "PATH=/nowhere:/bin")},
        {"rlimits": (Rlimit("RLIMIT_NOFILE", soft=200, hard=300),)},
        {"oom_score_adj": 500},
    ],
    ids=str,
)
def test_what_runs_is_in_the_same_state(lab, container: Container, cgroups: list[Path], changes: dict) -> None:
    def run() -> str:
        result = lab.exec(container, SEEN, cgroup_paths=cgroups, **changes)
        assert result.code == 0, result.output
        return without_names(result.output)

    by_python = run()
    assert container.sightings
    assert run() == by_python
    assert not forked_python(lambda: lab.exec(container, "true", "", cgroup_paths=cgroups, **changes))


def test_it_is_in_each_cgroup_of_the_container(lab, container: Container, cgroups: list[Path]) -> None:
    for _ in range(2):
        handle = container.exec(lab.process("sleep", "60"), stdio=Stdio(), cgroup_paths=cgroups)
        lab.made.append(handle)
        assert all(str(handle.pid) in (path / "cgroup.procs").read_text().split() for path in cgroups)


def test_who_a_name_is_is_found_out_anew_once_the_database_says_something_else(lab, container: Container) -> None:
    ask = lambda: lab.exec(container, "id -u; echo $HOME", user="bob").output  # noqa: E731
    assert {ask(), ask()} == {"1000\n/home/bob\n"}
    lab.exec(container, "echo bob:x:1234:1:Bob:/elsewhere:/bin/sh > /etc/passwd")
    assert ask() == "1234\n/elsewhere\n"
    assert ask() == "1234\n/elsewhere\n"
    lab.exec(container, "rm /etc/passwd")
    with pytest.raises(ExecFailed, match="unable to find user bob"):
        ask()


def test_a_database_that_was_written_just_now_is_not_remembered(lab, container: Container) -> None:
    lab.exec(container, "echo eve:x:1:1:Eve:/eve:/bin/sh >> /etc/passwd", user="0")
    container.sightings.clear()
    assert lab.exec(container, "id -u", user="eve").output == "1\n"
    assert not container.sightings


@pytest.mark.parametrize(
    ("args", "kind", "words"),
    [
        (("nonesuch", "x"), "exec_not_found", "executable file not found in $PATH"),
        (("/etc/passwd", "x"), "exec_denied", "permission denied"),
        (("/tmp", "x"), "exec_denied", "is a directory"),
    ],
)
def test_a_program_that_cannot_be_executed_is_told_as_ever(
    lab, container: Container, args: tuple[str, ...], kind: str, words: str
) -> None:
    assert lab.exec(container, "true").code == 0
    with pytest.raises(ExecFailed, match=re.escape(words)) as failed:
        lab.exec(container, *args)
    assert failed.value.kind == kind
    with pytest.raises(ChildProcessError):  # but init
        reap_all(container.init.pid)


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        ("no program", "exec_denied", "exec format error"),
        ("#!/none\n", "exec_not_found", "no such file or directory"),
        ("#!/etc\n", "exec_denied", "permission denied"),
    ],
)
def test_so_is_one_of_which_only_the_kernel_knows_that(
    lab, container: Container, content: str, kind: str, words: str
) -> None:
    (lab.upper / "file").write_text(content)
    (lab.upper / "file").chmod(0o755)
    for _ in range(2):
        with pytest.raises(ExecFailed, match=words) as failed:
            lab.exec(container, "/file", "")
        assert failed.value.kind == kind
        assert lab.exec(container, "true").code == 0


def reap_all(but: int) -> None:
    """Raises ChildProcessError if there is no child that has ended, or is not known."""
    found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if found is None or found.si_pid == but:
        raise ChildProcessError


def test_what_the_container_has_put_in_place_of_the_null_device_is_not_opened(lab, container: Container) -> None:
    assert lab.exec(container, "true").code == 0
    lab.exec(container, "rm /dev/null; touch /dev/null")
    with pytest.raises(ExecFailed, match="not the null device"):
        lab.exec(container, "true")


def test_a_working_directory_outside_is_refused(lab, container: Container) -> None:
    for _ in range(2):
        assert lab.exec(container, "true").code == 0
        with pytest.raises(ExecFailed, match="chdir to cwd"):
            lab.exec(container, "pwd", cwd="/proc/1/fd/7")


def test_one_that_is_stopped_while_it_is_made_holds_nobody_up(lab, container: Container) -> None:
    """Whatever of it can be seen from inside is stopped as soon as it is there."""
    others = "for p in /proc/[0-9]*; do p=${p#/proc/}; [ $p = 1 ] || [ $p = $$ ] || kill -STOP $p; done"
    handle = container.exec(lab.process(f"while :; do {others}; done"), stdio=Stdio())
    lab.made.append(handle)
    for _ in range(30):
        with contextlib.suppress(ExecFailed):
            one = container.exec(lab.process("true", ""), stdio=Stdio())
            signal.pidfd_send_signal(one.pidfd, signal.SIGKILL)
            os.waitid(os.P_PIDFD, one.pidfd, os.WEXITED)
            os.close(one.pidfd)
    signal.pidfd_send_signal(handle.pidfd, signal.SIGKILL)
    assert lab.exec(container, "true").code == 0


def test_no_descriptor_is_left(lab, container: Container, cgroups: list[Path]) -> None:
    before = sorted(map(str, Path("/proc/self/fd").iterdir()))
    for args in (("true", ""), ("true", ""), ("nonesuch", "")) * 3:
        try:
            lab.exec(container, *args, cgroup_paths=cgroups)
        except ExecFailed:
            continue
    assert sorted(map(str, Path("/proc/self/fd").iterdir())) == before


def test_a_program_that_a_container_may_have_got_at_is_not_executed_again(
    lab, container: Container, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has it by /proc/PID/exe. Who owns a file can have each execve of it wait, with a lease."""
    theirs: list[int] = []
    original = process.spawn

    def watched(executable: int, kept: Iterable[int]) -> int:
        theirs.append(fcntl.fcntl(executable, fcntl.F_DUPFD_CLOEXEC, 500))
        return original(executable, kept)

    monkeypatch.setattr(process, "spawn", watched)
    try:
        for _ in range(4):
            assert lab.exec(container, "true", "").code == 0
        inodes = {os.fstat(fd).st_ino for fd in theirs}
        assert len(theirs) == len(inodes) == 3
    finally:
        for fd in theirs:
            os.close(fd)


def broken(lab, container: Container, monkeypatch: pytest.MonkeyPatch, calls: Callable[[int], list[Call]]) -> None:
    """Have execs whose first process does just this, given the channel."""
    with monkeypatch.context() as patch:
        patch.setattr(join_calls, "SETUP_S", 0.2)
        patch.setattr(join_calls, "image", lambda _, channel: sequence.image(calls(channel), channel))
        for _ in range(3):
            assert lab.exec(container, "true", "").code == 0


def test_where_such_a_program_does_not_run_it_is_pythons_turn_for_good(
    lab, container: Container, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(lab, container, monkeypatch, lambda _: [Call(EXIT)])
    for _ in range(2):
        assert forked_python(lambda: lab.exec(container, "true", "true"))


@pytest.mark.parametrize(
    "calls",
    [
        lambda _: [Call(PAUSE)],
        lambda channel: [Call(WRITE, (channel, b"{}", 2)), Call(EXIT)],
        lambda channel: [Call(WRITE, (channel, b"", 0)), Call(EXIT)],
    ],
    ids=["slow", "nonsense", "nothing"],
)
def test_one_that_was_too_slow_or_was_spoken_for_is_pythons_turn_this_time(
    lab, container: Container, monkeypatch: pytest.MonkeyPatch, calls: Callable[[int], list[Call]]
) -> None:
    """The container may have a part in that."""
    broken(lab, container, monkeypatch, calls)
    assert not forked_python(lambda: lab.exec(container, "true", "true"))


@pytest.mark.parametrize("mortal", [True, False])
def test_a_mortal_one_of_a_runtime_that_ended_before_it_was_born_is_not_the_program(mortal: bool) -> None:
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.send(START)
    ours.close()
    born = Call(CLONE, (process.CLONE_PARENT,))
    calls = join_calls._have_successor(born, its.fileno(), [Call(EXIT, (7,))], mortal=mortal)
    with paths.opened(crossing.sealed(sequence.image(calls, its.fileno()))) as file:
        first = process.spawn(file, [its.fileno()])
    its.close()
    os.waitpid(first, 0)
    _, status = os.waitpid(-1, 0)
    assert (os.waitstatus_to_exitcode(status) == 7) is not mortal


def test_who_was_found_in_another_file_than_was_looked_at_is_not_remembered(
    lab, container: Container, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.exec(container, "echo bob:x:1234:1:Bob:/:/bin/sh > /etc/other")
    original = program.identity_of

    def exchanged(*args: Any) -> users.Identity:
        exchange(Path("/etc/passwd"), Path("/etc/other"))
        return original(*args)

    with monkeypatch.context() as raced:
        raced.setattr(program, "identity_of", exchanged)
        container.sightings.clear()
        assert lab.exec(container, "id -u", user="bob").output == "1234\n"
    assert not container.sightings


def test_a_user_that_is_a_number_needs_no_database(lab, container: Container) -> None:
    lab.exec(container, "rm /etc/passwd /etc/group")
    asked = replace(lab.process("id", "-u"), user=User(uid=77, gid=78))
    for _ in range(2):
        handle = container.exec(asked, stdio=Stdio())
        lab.made.append(handle)
        assert lab.wait(handle) == 0
