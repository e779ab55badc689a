"""`corral run -it` in a real terminal: tmux types, and reads the screen."""

import contextlib
import os
import shlex
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.corrald import CORRAL, Corrald
from support.requirements import needs

pytestmark = needs("root", "tmux")


@dataclass(slots=True)
class Terminal:
    """One tmux window, on a server of its own."""

    server: str

    def tmux(self, *args: str) -> str:
        command = ["tmux", "-L", self.server, "-f", "/dev/null", *args]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, env=os.environ | {"TERM": "screen"}
        ).stdout

    def open(self, command: list[str], address: str, width: int = 80, height: int = 24) -> None:
        # The shell outlives a ctrl-c, but not by ignoring it, which the command would inherit.
        line = f"trap : INT; CORRAL_ADDRESS={address} {shlex.join(command)}; echo code=$?; exec sleep 1000"
        session = ("new-session", "-d", "-x", str(width), "-y", str(height), f"sh -c {shlex.quote(line)}")
        for _ in range(3):
            with contextlib.suppress(subprocess.CalledProcessError):  # its server is not always there in time
                self.tmux(*session)
                return
            time.sleep(0.5)
        self.tmux(*session)

    def type(self, text: str) -> None:
        self.tmux("send-keys", "-l", text)

    def press(self, *keys: str) -> None:
        self.tmux("send-keys", *keys)

    def screen(self) -> str:
        return self.tmux("capture-pane", "-p")

    def wait_for(self, text: str, timeout_s: float = 45) -> str:
        deadline = time.monotonic() + timeout_s
        while text not in (screen := self.screen()):
            assert time.monotonic() < deadline, f"{text!r} is not on the screen:\n{screen}"
            time.sleep(0.05)
        return screen


@pytest.fixture
def terminal(request: pytest.FixtureRequest) -> Iterator[Terminal]:
    opened = Terminal(f"corral-{os.getpid()}-{abs(hash(request.node.nodeid)) % 10**6}")
    yield opened
    subprocess.run(["tmux", "-L", opened.server, "kill-server"], capture_output=True, check=False)


def test_a_shell_works_and_its_exit_code_comes_back(box: Corrald, terminal: Terminal) -> None:
    terminal.open([str(CORRAL), "run", "--rm", "-it", "busybox", "sh"], box.address)
    terminal.wait_for("/ #")
    terminal.type("tty; echo $((6*7))\n")
    assert "/dev/pts/0" in terminal.wait_for("42")
    terminal.type("exit 7\n")
    terminal.wait_for("code=7")


def test_the_size_is_the_terminals_and_follows_it(box: Corrald, terminal: Terminal) -> None:
    terminal.open([str(CORRAL), "run", "--rm", "-it", "busybox", "sh"], box.address, 93, 31)
    terminal.wait_for("/ #")
    terminal.type("stty size\n")
    terminal.wait_for("31 93")
    terminal.tmux("resize-window", "-x", "101", "-y", "37")
    terminal.type("until stty size | grep '37 101'; do usleep 50000; done\n")
    terminal.wait_for("\n37 101")
    terminal.type("exit\n")
    terminal.wait_for("code=0")


def test_ctrl_c_is_typed_to_the_container_not_to_corral(box: Corrald, terminal: Terminal, name: str) -> None:
    terminal.open([str(CORRAL), "run", "--rm", "-it", "--name", name, "busybox", "sh"], box.address)
    terminal.wait_for("/ #")
    terminal.type("sleep 1000\n")
    deadline = time.monotonic() + 20
    while b"sleep 1000" not in box.corral("exec", name, "ps").stdout:
        assert time.monotonic() < deadline
    terminal.press("C-c")
    terminal.type("echo still-$((1+1))-here\n")
    terminal.wait_for("still-2-here")
    terminal.type("exit\n")
    terminal.wait_for("code=0")


def test_ctrl_p_ctrl_q_detaches_and_attach_comes_back(box: Corrald, terminal: Terminal, name: str) -> None:
    terminal.open([str(CORRAL), "run", "--name", name, "-it", "busybox", "sh"], box.address)
    terminal.wait_for("/ #")
    terminal.type("x=remembered\n")
    terminal.press("C-p", "C-q")
    terminal.wait_for("code=0")
    assert name in box.corral("ps").stdout.decode()
    terminal.tmux("kill-server")
    terminal.open([str(CORRAL), "attach", name], box.address)
    terminal.wait_for("/ #")
    terminal.type("echo $x-$((2+3))\n")
    terminal.wait_for("remembered-5")
    terminal.type("exit\n")
    terminal.wait_for("code=0")


def test_two_terminals_on_one_container_see_the_same(box: Corrald, terminal: Terminal, name: str) -> None:
    terminal.open([str(CORRAL), "run", "--name", name, "-it", "busybox", "sh"], box.address)
    terminal.wait_for("/ #")
    second = Terminal(f"{terminal.server}-b")
    second.open([str(CORRAL), "attach", name], box.address)
    try:
        second.wait_for("/ #")
        second.type("echo both-$((3*3))\n")
        second.wait_for("both-9")
        terminal.wait_for("both-9")
    finally:
        second.tmux("kill-server")


@pytest.fixture
def other(terminal: Terminal) -> Iterator[Terminal]:
    """A second terminal."""
    opened = Terminal(f"{terminal.server}-b")
    yield opened
    subprocess.run(["tmux", "-L", opened.server, "kill-server"], capture_output=True, check=False)


def test_one_of_two_terminals_detaches_and_the_other_goes_on(
    box: Corrald, terminal: Terminal, other: Terminal, name: str
) -> None:
    terminal.open([str(CORRAL), "run", "--name", name, "-it", "busybox", "sh"], box.address)
    terminal.wait_for("/ #")
    other.open([str(CORRAL), "attach", "--detach-keys", "ctrl-x,d", name], box.address)
    other.wait_for("/ #")
    other.press("C-x")
    other.type("d")
    other.wait_for("code=0")
    terminal.type("echo alone-$((6*7))\n")
    terminal.wait_for("alone-42")
    assert "alone-42" not in other.screen()
    terminal.type("exit 4\n")
    terminal.wait_for("code=4")


def test_the_size_is_that_of_the_terminal_that_was_attached_or_changed_last(
    box: Corrald, terminal: Terminal, other: Terminal, name: str
) -> None:
    def asks_for(size: str, asking: Terminal) -> None:
        asking.type(f"until stty size | grep '{size}'; do usleep 50000; done\n")
        asking.wait_for(f"\n{size}")

    terminal.open([str(CORRAL), "run", "--name", name, "-it", "busybox", "sh"], box.address, 90, 30)
    terminal.wait_for("/ #")
    asks_for("30 90", terminal)
    other.open([str(CORRAL), "attach", name], box.address, 71, 21)
    other.wait_for("/ #")
    asks_for("21 71", terminal)
    terminal.tmux("resize-window", "-x", "95", "-y", "33")
    asks_for("33 95", terminal)
    other.tmux("resize-window", "-x", "77", "-y", "25")
    asks_for("25 77", terminal)
    terminal.press("C-p", "C-q")
    terminal.wait_for("code=0")
    terminal.tmux("kill-server")
    terminal.open([str(CORRAL), "attach", name], box.address, 88, 28)
    terminal.wait_for("/ #")
    asks_for("28 88", terminal)


@pytest.mark.parametrize("options", [[], ["-i"]], ids=["plain", "interactive"])
def test_ctrl_c_without_a_terminal_is_a_signal_to_the_container(
    box: Corrald, terminal: Terminal, name: str, options: list[str]
) -> None:
    script = "trap 'echo told; exit 9' INT; echo ready; while :; do sleep 0.1; done"
    terminal.open([str(CORRAL), "run", "--name", name, *options, "busybox", "sh", "-c", script], box.address)
    terminal.wait_for("ready")
    terminal.press("C-c")
    screen = terminal.wait_for("code=9")
    assert "told" in screen


def test_ctrl_c_ends_an_attached_command_at_last_where_the_container_ignores_it(
    box: Corrald, terminal: Terminal, name: str
) -> None:
    script = "trap '' INT; echo ready; while :; do sleep 0.1; done"
    terminal.open([str(CORRAL), "run", "--name", name, "busybox", "sh", "-c", script], box.address)
    terminal.wait_for("ready")
    for _ in range(3):
        terminal.press("C-c")
        time.sleep(0.2)
    terminal.wait_for("asked 3 times to end")
    terminal.wait_for("code=")
    assert name in box.corral("ps").stdout.decode()


def test_ctrl_c_without_signal_proxy_ends_the_command_and_leaves_the_container(
    box: Corrald, terminal: Terminal, name: str
) -> None:
    script = "echo ready; while :; do sleep 0.1; done"
    run = [str(CORRAL), "run", "--name", name, "--no-sig-proxy", "busybox", "sh", "-c", script]
    terminal.open(run, box.address)
    terminal.wait_for("ready")
    terminal.press("C-c")
    terminal.wait_for("code=")
    assert name in box.corral("ps").stdout.decode()


def test_ctrl_c_at_an_exec_is_no_signal_to_the_container(box: Corrald, terminal: Terminal, name: str) -> None:
    script = "trap 'exit 9' INT; while :; do sleep 0.1; done"
    box.corral("run", "-d", "--name", name, "busybox", "sh", "-c", script, check=True)
    terminal.open([str(CORRAL), "exec", name, "sh", "-c", "echo ready; sleep 1000"], box.address)
    terminal.wait_for("ready")
    terminal.press("C-c")
    terminal.wait_for("code=")
    time.sleep(0.5)
    assert name in box.corral("ps").stdout.decode()


def test_a_shell_in_a_terminal_goes_on_over_an_upgrade_of_the_daemon(
    box: Corrald, terminal: Terminal, name: str
) -> None:
    terminal.open([str(CORRAL), "run", "--name", name, "-it", "busybox", "sh"], box.address)
    terminal.wait_for("/ #")
    terminal.type("x=kept; ")
    box.corral("system", "upgrade", timeout_s=110, check=True)
    terminal.type("echo $x-$((1+2))\n")
    screen = terminal.wait_for("kept-3", timeout_s=60)
    assert "corral:" not in screen
    terminal.tmux("resize-window", "-x", "99", "-y", "32")
    terminal.type("until stty size | grep '32 99'; do usleep 50000; done\n")
    terminal.wait_for("\n32 99")
    terminal.type("exit 6\n")
    terminal.wait_for("code=6")


def test_exec_with_a_terminal(box: Corrald, terminal: Terminal, name: str) -> None:
    box.corral("run", "-d", "--name", name, "busybox", "sleep", "1000", check=True)
    terminal.open([str(CORRAL), "exec", "-it", name, "sh"], box.address)
    terminal.wait_for("/ #")
    terminal.type("test -t 0 && echo terminal-$((4+4)); exit 3\n")
    terminal.wait_for("terminal-8")
    terminal.wait_for("code=3")


def test_t_without_a_terminal_is_refused_with_the_remedy(box: Corrald) -> None:
    before = box.corral("ps", "-aq").stdout
    result = box.corral("run", "--rm", "-it", "busybox", "true")
    assert result.returncode == 125
    assert b"-t" in result.stderr
    assert box.corral("ps", "-aq").stdout == before


def test_a_terminal_that_goes_away_takes_the_command_along_but_not_the_container(
    box: Corrald, terminal: Terminal, name: str
) -> None:
    terminal.open([str(CORRAL), "run", "--name", name, "-it", "busybox", "sh"], box.address)
    terminal.wait_for("/ #")
    client = int(terminal.tmux("list-panes", "-F", "#{pane_pid}"))
    terminal.tmux("kill-server")
    deadline = time.monotonic() + 10
    while Path(f"/proc/{client}").exists() or name.encode() in attached_commands():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert name in box.corral("ps").stdout.decode()


def attached_commands() -> bytes:
    commands = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            commands.append((entry / "cmdline").read_bytes())
    return b"\n".join(c for c in commands if b"corral\0run" in c)


@pytest.mark.parametrize("words", [("start", "-a", "-i"), ("attach",)], ids=["start", "attach"])
def test_other_detach_keys_can_be_chosen(box: Corrald, terminal: Terminal, name: str, words: tuple[str, ...]) -> None:
    make = ["create"] if words[0] == "start" else ["run", "-d"]
    box.corral(*make, "--name", name, "-it", "busybox", "sh", check=True)
    terminal.open([str(CORRAL), *words, "--detach-keys", "ctrl-x,q", name], box.address)
    terminal.wait_for("/ #")
    terminal.press("C-p", "C-q", "C-x", "q")
    terminal.wait_for("code=0")
    assert name in box.corral("ps").stdout.decode()


def test_start_without_signal_proxy_leaves_the_container_to_ctrl_c(box: Corrald, terminal: Terminal, name: str) -> None:
    box.corral("create", "--name", name, "busybox", "sh", "-c", "echo ready; exec sleep 1000", check=True)
    terminal.open([str(CORRAL), "start", "-a", "--sig-proxy=false", name], box.address)
    terminal.wait_for("ready")
    terminal.press("C-c")
    terminal.wait_for("code=")
    assert name in box.corral("ps").stdout.decode()
