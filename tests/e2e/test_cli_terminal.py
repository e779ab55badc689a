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
        line = f"CORRAL_ADDRESS={address} {shlex.join(command)}; echo code=$?; exec sleep 1000"
        self.tmux("new-session", "-d", "-x", str(width), "-y", str(height), f"sh -c {shlex.quote(line)}")

    def type(self, text: str) -> None:
        self.tmux("send-keys", "-l", text)

    def press(self, *keys: str) -> None:
        self.tmux("send-keys", *keys)

    def screen(self) -> str:
        return self.tmux("capture-pane", "-p")

    def wait_for(self, text: str, timeout_s: float = 15) -> str:
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
