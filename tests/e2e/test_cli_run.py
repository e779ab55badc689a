"""`corral run` as a docker user's hands expect it."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from support.corrald import CORRAL, Corrald


def run(box: Corrald, *args: str, stdin: bytes | None = None) -> tuple[int, str, str]:
    result = box.corral("run", "--rm", *args, stdin=stdin)
    return result.returncode, result.stdout.decode(), result.stderr.decode()


def inspect(box: Corrald, name: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(box.corral("inspect", name, check=True).stdout)[0]
    return found


def test_it_prints_what_the_command_prints(box: Corrald) -> None:
    assert run(box, "busybox", "echo", "hello") == (0, "hello\n", "")


def test_stdout_and_stderr_stay_apart(box: Corrald) -> None:
    assert run(box, "busybox", "sh", "-c", "echo out; echo err >&2") == (0, "out\n", "err\n")


def test_the_exit_code_is_the_commands(box: Corrald) -> None:
    assert run(box, "busybox", "sh", "-c", "exit 42")[0] == 42


def test_a_signal_is_128_and_its_number(box: Corrald) -> None:
    assert run(box, "busybox", "sh", "-c", "sh -c 'kill -KILL $$'; exit $?")[0] == 137


def test_limits_reach_the_cgroup(box: Corrald, name: str) -> None:
    device = next((path.read_text().strip() for path in Path("/sys/block").glob("*/dev")), "")
    io = ("--device-write-bps", f"{device}:10m") if device else ()
    box.corral(
        "run", "-d", "--name", name, "--cpu-period", "50000", "--cpu-quota", "20000", "--oom-score-adj", "200", *io,
        "busybox", "sleep", "100", check=True,
    )  # fmt: skip
    pid = int(str(inspect(box, name)["pid"]))
    assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "200\n"
    stats = inspect(box, name)["config"]["resources"]  # type: ignore[index]
    assert (stats["cpu"]["quota_us"], stats["cpu"]["period_us"]) in ((20000, 50000), ("20000", "50000"))
    box.corral("update", "--cpu-quota", "30000", name, check=True)
    quota = inspect(box, name)["config"]["resources"]["cpu"]["quota_us"]  # type: ignore[index]
    assert int(quota) == 30000


def test_a_missing_command_is_127_and_one_clear_sentence(box: Corrald) -> None:
    code, out, err = run(box, "busybox", "no-such-command")
    assert (code, out) == (127, "")
    assert err.count("\n") == 1
    assert "no-such-command" in err
    assert "executable file not found" in err


def test_a_command_that_is_no_program_is_126(box: Corrald) -> None:
    code, _, err = run(box, "busybox", "/etc/passwd")
    assert code == 126
    assert "/etc/passwd" in err
    assert "permission denied" in err.lower()


def test_an_unknown_image_is_125_and_names_the_remedy(box: Corrald) -> None:
    code, _, err = run(box, "--pull", "never", "no-such-image", "true")
    assert code == 125
    assert "no-such-image" in err
    assert "corral pull" in err


def test_a_bad_user_is_125_and_never_root(box: Corrald) -> None:
    for user in ("nobody-here", "0x0", "4294967296", "-1", "root:no-such-group"):
        code, out, err = run(box, "-u", user, "busybox", "id")
        assert (code, out) == (125, ""), (user, out, err)
        assert user.split(":")[-1] in err


def test_memory_over_the_limit_is_an_oom_kill_with_137(box: Corrald) -> None:
    command = "dd if=/dev/zero of=/dev/shm/x bs=1M count=64"
    code, _, err = run(box, "-m", "32m", "busybox", "sh", "-c", command)
    assert code == 137
    assert "OOM" in err


def test_an_oom_kill_is_in_inspect_and_ps(box: Corrald, name: str) -> None:
    command = "dd if=/dev/zero of=/dev/shm/x bs=1M count=64"
    box.corral("run", "--name", name, "-m", "32m", "busybox", "sh", "-c", command)
    status = inspect(box, name)["exit"]
    assert isinstance(status, dict)
    assert (status["code"], status["oom_killed"]) == (137, True)
    assert b"OOM" in box.corral("ps", "-a", "--filter", f"name={name}").stdout


def test_stdin_reaches_the_command_and_ends(box: Corrald) -> None:
    assert run(box, "-i", "busybox", "wc", "-c", stdin=b"x" * 100_000) == (0, "100000\n", "")


def test_binary_data_comes_back_untouched(box: Corrald) -> None:
    data = os.urandom(3_000_000)
    result = box.corral("run", "--rm", "-i", "busybox", "cat", stdin=data)
    assert result.stdout == data


def test_without_i_stdin_is_empty(box: Corrald) -> None:
    assert run(box, "busybox", "cat", stdin=b"not for you")[:2] == (0, "")


def test_environment_user_directory_and_host_name(box: Corrald) -> None:
    script = "echo $A $HOME; id -u; id -g; pwd; hostname"
    code, out, err = run(
        box, "-e", "A=b c", "-u", "app", "-w", "/tmp/deep/dir", "-h", "ranch", "busybox", "sh", "-c", script
    )
    assert (code, err) == (0, "")
    assert out.splitlines() == ["b c /home/app", "1000", "1000", "/tmp/deep/dir", "ranch"]


def test_entrypoint_takes_the_place_of_the_images(box: Corrald) -> None:
    assert run(box, "--entrypoint", "echo", "busybox", "a", "b")[1] == "a b\n"


def test_the_root_can_be_read_only(box: Corrald) -> None:
    code, _, err = run(box, "--read-only", "busybox", "touch", "/x")
    assert code == 1
    assert "Read-only file system" in err
    assert run(box, "--read-only", "--tmpfs", "/scratch", "busybox", "touch", "/scratch/x")[0] == 0


def test_bind_mounts_share_files_and_can_be_read_only(box: Corrald, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("from outside\n")
    volume = f"{tmp_path}:/data"
    assert run(box, "-v", volume, "busybox", "sh", "-c", "cat /data/in; echo inside > /data/out")[1] == "from outside\n"
    assert (tmp_path / "out").read_text() == "inside\n"
    code, _, err = run(box, "-v", f"{volume}:ro", "busybox", "touch", "/data/more")
    assert code == 1
    assert "Read-only file system" in err


def test_a_missing_mount_source_is_named(box: Corrald) -> None:
    code, _, err = run(box, "--mount", "type=bind,source=/no/such/dir,target=/x", "busybox", "true")
    assert code == 125
    assert "/no/such/dir" in err


def test_capabilities_are_dockers_and_can_be_changed(box: Corrald) -> None:
    caps = "grep CapEff /proc/self/status | cut -f2"
    assert run(box, "busybox", "sh", "-c", caps)[1].strip() == "00000000a80425fb"
    assert int(run(box, "--cap-drop", "ALL", "busybox", "sh", "-c", caps)[1], 16) == 0
    only = run(box, "--cap-drop", "ALL", "--cap-add", "NET_ADMIN", "busybox", "sh", "-c", caps)[1]
    assert int(only, 16) == 1 << 12
    code, _, err = run(box, "--cap-add", "NO_SUCH", "busybox", "true")
    assert code == 125
    assert "NO_SUCH" in err


def test_seccomp_and_no_new_privs_are_on(box: Corrald) -> None:
    out = run(box, "busybox", "grep", "-E", "^(Seccomp|NoNewPrivs):", "/proc/self/status")[1]
    assert out.split() == ["NoNewPrivs:", "1", "Seccomp:", "2"]


def test_a_process_limit_is_kept(box: Corrald) -> None:
    script = "for i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 5 & done; wait"
    code, _, err = run(box, "--pids-limit", "8", "busybox", "sh", "-c", script)
    assert code != 0
    assert "fork" in err


def test_nothing_of_the_host_is_open_in_the_container(box: Corrald) -> None:
    out = run(box, "busybox", "sh", "-c", "ls -l /proc/self/fd | wc -l; readlink /proc/self/cwd")[1]
    assert out.split() == ["5", "/"]  # a header, 0, 1, 2 and the directory being listed


def test_a_container_removed_by_rm_is_gone_when_the_command_returns(box: Corrald) -> None:
    run(box, "--name", "short", "busybox", "true")
    assert box.corral("inspect", "short").returncode == 1


def test_a_taken_name_is_refused_and_the_first_keeps_running(box: Corrald, name: str) -> None:
    box.corral("run", "-d", "--name", name, "busybox", "sleep", "100", check=True)
    code, _, err = run(box, "--name", name, "busybox", "true")
    assert code == 125
    assert name in err
    assert "already" in err
    assert inspect(box, name)["status"] == "running"


def test_d_prints_the_id_and_leaves_it_running(box: Corrald, name: str) -> None:
    result = box.corral("run", "-d", "--name", name, "busybox", "sleep", "100", check=True)
    identity = result.stdout.decode().strip()
    assert len(identity) == 64
    assert identity[:12] in box.corral("ps").stdout.decode()
    assert box.corral("ps", "-q").stdout.decode().split() == [identity[:12]]


def test_signals_to_the_command_reach_the_container(box: Corrald) -> None:
    process = started(box, "trap 'echo caught; exit 7' TERM; echo ready; while :; do sleep 0.1; done")
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == b"caught\n"
    assert process.returncode == 7


def started(box: Corrald, script: str, *options: str) -> "subprocess.Popen[bytes]":
    """`corral run --rm` of a script that has printed its first line, "ready"."""
    process = subprocess.Popen(
        [CORRAL, "run", "--rm", *options, "busybox", "sh", "-c", script],
        env=os.environ | {"CORRAL_ADDRESS": box.address},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def test_the_third_interrupt_ends_the_command_though_the_container_ignores_them(box: Corrald, name: str) -> None:
    script = "trap 'echo seen' INT; echo ready; while :; do sleep 0.05; done"
    process = started(box, script, "--name", name)
    assert process.stdout is not None
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == b"seen\n"  # two that come at once would be one
    process.send_signal(signal.SIGINT)
    assert b"asked 3 times" in process.communicate(timeout=20)[1]
    assert process.returncode == 130
    assert inspect(box, name)["status"] == "running"


def test_the_exit_code_is_told_though_the_container_is_gone_before_the_command_asks(box: Corrald, name: str) -> None:
    process = started(box, "echo ready; sleep 0.5; exit 4", "--name", name)
    process.send_signal(signal.SIGSTOP)
    deadline = time.monotonic() + 20
    while box.corral("inspect", name).returncode == 0:
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGCONT)
    assert (process.communicate(timeout=20)[1], process.returncode) == (b"", 4)


def test_closed_standard_streams_are_nobodys(box: Corrald) -> None:
    command = f"{CORRAL} run --rm -i busybox sh -c 'cat; echo x; echo y >&2; exit 3' <&- >&- 2>&-"
    environment = os.environ | {"CORRAL_ADDRESS": box.address}
    assert subprocess.run(["sh", "-c", command], env=environment, check=False).returncode == 3


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("-m", "much"), ("-v", "relative:also-relative"), ("-e", "=x"), ("--cpus", "0.001"), ("--ulimit", "nofile"),
        ("--name", "../x"), ("--network", "no-such-network"), ("-w", "not-absolute"), ("--stop-signal", "SIGNOPE"),
        ("--sysctl", "kernel.hostname=x"), ("--restart", "sometimes"), ("-p", "99999:1"), ("--log-driver", "paper"),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_by_name_and_leaves_nothing(box: Corrald, option: str, value: str) -> None:
    before = box.corral("ps", "-aq").stdout
    code, out, err = run(box, option, value, "busybox", "true")
    assert (code, out) == (125, ""), err
    assert err.startswith("corral: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert value.split(":", maxsplit=1)[0].split("=", maxsplit=1)[0] in err
    assert box.corral("ps", "-aq").stdout == before


def test_hostile_file_names_in_arguments_are_just_arguments(box: Corrald) -> None:
    assert run(box, "busybox", "echo", "$(id)", ";", "|", "\n")[1] == "$(id) ; | \n\n"


def test_two_hundred_lines_a_second_lose_nothing(box: Corrald) -> None:
    began = time.monotonic()
    out = run(box, "busybox", "seq", "1", "20000")[1]
    assert out == "".join(f"{n}\n" for n in range(1, 20001))
    assert time.monotonic() - began < 60
