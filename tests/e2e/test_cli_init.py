"""--init: a pid 1 that reaps, passes signals on, and ends as the program does."""

import time

import pytest
from support.cli import ok
from support.corrald import Corrald

ORPHANS = "i=0; while [ $i -lt 20 ]; do (sleep 0.01 &) ; i=$((i+1)); done; sleep 0.5; ps -o pid,ppid,stat,comm"


def test_zombies_are_reaped_and_the_program_is_not_pid_1(box: Corrald, name: str) -> None:
    shown = ok(box, "run", "--rm", "--init", "--name", name, "busybox", "sh", "-c", f"echo $$; {ORPHANS}")
    first, *rest = shown.splitlines()
    assert first == "2"
    assert [line for line in rest if "Z" in line.split()[2]] == []
    assert [line.split()[3] for line in rest if line.split()[:2] == ["1", "0"]] == ["corral-init"]
    without = ok(box, "run", "--rm", "--name", name, "busybox", "sh", "-c", f"exec sh -c '{ORPHANS}; true'")
    assert without


def test_nothing_of_the_host_is_seen_in_pid_1s_command_line(box: Corrald) -> None:
    shown = ok(box, "run", "--rm", "--init", "busybox", "cat", "/proc/1/cmdline")
    assert shown.rstrip("\0").split("\0") == ["corral-init", "--", "cat", "/proc/1/cmdline"]


@pytest.mark.parametrize(("script", "code"), [("exit 7", 7), ("kill -9 $$", 137), ("kill -15 $$", 143), ("true", 0)])
def test_the_container_ends_as_its_program_does(box: Corrald, name: str, script: str, code: int) -> None:
    result = box.corral("run", "--rm", "--init", "--name", name, "busybox", "sh", "-c", script)
    assert result.returncode == code, result.stderr


def test_the_program_gets_the_signals(box: Corrald, name: str) -> None:
    script = "trap 'echo term; exit 3' TERM; echo ready; while :; do sleep 0.05; done"
    ok(box, "run", "-d", "--init", "--name", name, "busybox", "sh", "-c", script)
    deadline = time.monotonic() + 10
    while "ready" not in ok(box, "logs", name):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ok(box, "stop", name)
    assert ok(box, "wait", name) == "3\n"
    assert ok(box, "logs", name) == "ready\nterm\n"


def test_a_program_that_handles_no_signal_is_ended_by_it_at_once(box: Corrald, name: str) -> None:
    """As pid 1 it would have waited for SIGKILL, ten seconds later."""
    ok(box, "run", "-d", "--init", "--name", name, "busybox", "sleep", "1000")
    began = time.monotonic()
    ok(box, "stop", name)
    assert time.monotonic() - began < 8
    assert ok(box, "wait", name) == "143\n"


@pytest.mark.parametrize(("program", "code"), [("/no/such", 127), ("/etc/hostname", 126)])
def test_a_program_that_cannot_be_run_is_told_of_as_ever(box: Corrald, name: str, program: str, code: int) -> None:
    result = box.corral("run", "--rm", "--init", "--name", name, "busybox", program)
    assert result.returncode == code
    assert program.encode() in result.stderr


def test_exec_stdin_and_a_terminal_work_as_ever(box: Corrald, name: str) -> None:
    ok(box, "run", "-d", "-t", "--init", "--name", name, "busybox", "sh", "-c", "tty; sleep 1000")
    assert ok(box, "exec", name, "sh", "-c", "echo inside") == "inside\n"
    deadline = time.monotonic() + 10
    while "/dev/" not in ok(box, "logs", name):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    result = box.corral("run", "--rm", "-i", "--init", "busybox", "cat", stdin=b"through\n")
    assert result.stdout == b"through\n"


def test_the_programs_user_and_filter_are_its_own(box: Corrald, name: str) -> None:
    fields = ok(
        box, "run", "--rm", "--init", "-u", "1000:1000", "busybox", "cat", "/proc/1/status", "/proc/self/status"
    )
    for field in ("Uid:\t1000\t1000\t1000\t1000", "CapEff:\t0000000000000000", "NoNewPrivs:\t1"):
        assert fields.count(field) == 2
    assert "Seccomp:\t2" in fields


def test_pid_1_is_behind_the_filter_too(box: Corrald) -> None:
    fields = ok(box, "run", "--rm", "--init", "busybox", "cat", "/proc/1/status", "/proc/self/status")
    assert fields.count("Seccomp:\t2") == 2


def test_the_programs_capabilities_open_it_what_they_open_without_init(box: Corrald, name: str) -> None:
    """Execve looks at the file with the capabilities that come before it, which pid 1 must not take away too soon."""
    ok(box, "run", "--name", name, "busybox", "sh", "-c", "mkdir -m 700 /own && cp /bin/busybox /own/true")
    ok(box, "commit", name, f"{name}:own")
    program = ("run", "--rm", "-u", "1000", f"{name}:own", "/own/true")
    plain, beside = box.corral(*program), box.corral(program[0], "--init", *program[1:])
    assert (beside.returncode, beside.stderr) == (plain.returncode, plain.stderr)
    assert plain.returncode == 0, plain.stderr
    ok(box, "image", "rm", f"{name}:own")
