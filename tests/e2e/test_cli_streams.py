"""Which streams `run` and `attach` take part in, groups by name, and what `exec` gives a process, as docker has it."""

from pathlib import Path

import pytest
from support.cli import ok
from support.corrald import Corrald
from support.requirements import needs

pytestmark = needs("root", "overlayfs", "busybox", "netns")


@pytest.mark.parametrize(("streams", "shown"), [(("stdout",), (b"out\n", b"")), (("STDERR",), (b"", b"err\n"))])
def test_run_attaches_only_to_what_it_is_told(
    box: Corrald, name: str, streams: tuple[str, ...], shown: tuple[bytes, bytes]
) -> None:
    flags = [word for stream in streams for word in ("-a", stream)]
    result = box.corral("run", "--name", name, *flags, "busybox", "sh", "-c", "echo out; echo err >&2; exit 4")
    assert (result.returncode, result.stdout, result.stderr) == (4, *shown)
    logged = box.corral("logs", name)
    assert (logged.stdout, logged.stderr) == (b"out\n", b"err\n")


def test_run_attached_to_stdin_alone_tells_the_id(box: Corrald, name: str) -> None:
    shown = ok(box, "run", "-i", "--attach", "stdin", "--name", name, "busybox", "cat", stdin=b"hello\n")
    assert shown == ok(box, "inspect", "-f", "{{.Id}}", name)
    assert ok(box, "logs", name) == "hello\n"


def test_run_that_is_attached_to_stdout_alone_sends_nothing(box: Corrald, name: str) -> None:
    result = box.corral(
        "run", "-i", "-a", "stdout", "--name", name, "busybox", "sh", "-c", "timeout 1 cat; echo $?", stdin=b"hello\n"
    )
    assert (result.returncode, result.stdout) == (0, b"143\n")


def test_attached_and_detached_exclude_one_another(box: Corrald, name: str) -> None:
    result = box.corral("run", "-d", "-a", "stdout", "--name", name, "busybox", "true")
    assert (result.returncode, b"-d and -a exclude one another" in result.stderr) == (125, True)


def test_switches_take_true_and_false_as_dockers_do(box: Corrald, name: str) -> None:
    ok(box, "run", "--rm=false", "--init=true", "--sig-proxy=false", "--name", name, "busybox", "true")
    ok(box, "inspect", name)
    ok(box, "rm", name)
    ok(box, "run", "--rm=true", "--detach=false", "--name", name, "busybox", "echo", "--rm=false")
    assert box.corral("inspect", name).returncode == 1
    result = box.corral("run", "--rm=perhaps", "--name", name, "busybox", "true")
    assert b"--rm is true or false, not 'perhaps'" in result.stderr


def test_attach_without_stdin_sends_nothing(box: Corrald, name: str) -> None:
    ok(box, "run", "-d", "-i", "--name", name, "busybox", "sh", "-c", "timeout 2 cat; echo $?")
    result = box.corral("attach", "--no-stdin", "--sig-proxy=false", name, stdin=b"hello\n")
    assert (result.returncode, result.stdout) == (0, b"143\n")


def test_groups_are_added_by_the_name_that_they_have_inside(box: Corrald, name: str, tmp_path: Path) -> None:
    group = tmp_path / "group"
    group.write_text("root:x:0:\napp:x:4711:\n")
    flags = ("-v", f"{group}:/etc/group:ro", "--group-add", "app", "--group-add", "33")
    ok(box, "run", "-d", "--name", name, "-u", "7:8", *flags, "busybox", "sleep", "1000")
    assert ok(box, "exec", name, "sh", "-c", "id -u; id -g; id -G").split() == ["7", "8", "8", "33", "4711"]
    assert "4711" in ok(box, "exec", "-u", "0", name, "id", "-G")
    ok(box, "rm", "-f", name)
    result = box.corral("run", "--name", name, "--group-add", "nobody-here", "busybox", "true")
    assert (result.returncode, b"unable to find group nobody-here" in result.stderr) == (125, True)


def test_exec_has_dockers_options(box: Corrald, name: str, tmp_path: Path) -> None:
    ok(box, "run", "-d", "--name", name, "-e", "A=of-container", "busybox", "sleep", "1000")
    (tmp_path / "env").write_text("# comment\nB=of-file\nC=of-file\n")
    env = ("-e", "C=of-flag", "--env-file", str(tmp_path / "env"))
    shown = ok(box, "exec", *env, "-w", "/tmp", "-u", "5:6", name, "sh", "-c", "echo $A $B $C; pwd; id -u; id -g")
    assert shown.split() == ["of-container", "of-file", "of-flag", "/tmp", "5", "6"]
    assert ok(box, "exec", "-i", name, "cat", stdin=b"in\0put") == "in\0put"
    assert box.corral("exec", name, "sh", "-c", "exit 9").returncode == 9
    assert box.corral("exec", name, "no-such-program").returncode == 127
    assert box.corral("exec", name, "/etc").returncode == 126
    mask = "grep CapEff /proc/self/status"
    assert ok(box, "exec", "--privileged", name, "sh", "-c", mask) != ok(box, "exec", name, "sh", "-c", mask)
    assert ok(box, "exec", "-d", name, "sh", "-c", "echo done > /done") == ""
    assert ok(box, "exec", name, "sh", "-c", "until [ -s /done ]; do usleep 1000; done; cat /done") == "done\n"
    assert ok(box, "exec", "-t", name, "sh", "-c", "test -t 1 && echo terminal").strip() == "terminal"


def test_what_was_created_with_stdin_ends_with_the_input_of_who_starts_it(box: Corrald, name: str) -> None:
    ok(box, "create", "-i", "--name", name, "busybox", "cat")
    assert ok(box, "start", "-ai", name, stdin=b"hello\n") == "hello\n"


def test_a_process_has_its_own_group_among_its_further_ones(box: Corrald) -> None:
    """A setgid program would else get rid of it, and of what is closed to it (CVE-2022-36109)."""
    tell = ("busybox", "grep", "Groups:", "/proc/self/status")
    told = {flags: ok(box, "run", "--rm", *flags, *tell).split()[1:] for flags in ((), ("-u", "app"), ("-u", "7:50"))}
    assert told == {(): ["0"], ("-u", "app"): ["50", "1000"], ("-u", "7:50"): ["50"]}
