"""`make demo`: five scenes on a private corrald, with an image made from Debian's busybox. Exits 0 if all went well."""

import os
import re
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.corrald import Corrald, running
from support.images import write_busybox

BOLD, DIM, PLAIN = ("\033[1m", "\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "", "")


class Stage:
    """Runs `corral` before the audience: shows the command, its output and its exit code."""

    def __init__(self, daemon: Corrald) -> None:
        self.daemon = daemon

    def scene(self, number: int, title: str) -> None:
        print(f"\n{BOLD}Scene {number}: {title}{PLAIN}", flush=True)

    def corral(self, *args: str, expect: int = 0, show: bool = True) -> str:
        result = self.daemon.corral(*args)
        output = (result.stdout + result.stderr).decode(errors="replace")
        if show:
            words = [repr(a) if re.search(r"[\s;|&$]", a) else a for a in args]
            print(f"{DIM}$ corral {' '.join(words)}{PLAIN}")
            print(output, end="", flush=True)
            if expect:
                print(f"{DIM}[exit code {result.returncode}]{PLAIN}")
        if result.returncode != expect:
            raise SystemExit(
                f"demo: expected exit code {expect}, got {result.returncode}: {output}\n{self.daemon.log()}"
            )
        return output


def hello(stage: Stage) -> None:
    stage.scene(1, "hello")
    assert stage.corral("run", "--rm", "busybox", "echo", "hello").strip() == "hello"


def alone(stage: Stage) -> None:
    stage.scene(2, "a process table of its own: the command is process 1")
    output = stage.corral("run", "--rm", "busybox", "ps")
    assert re.search(r"^\s*1\s+root\s.*ps$", output, re.MULTILINE), output


def memory_limit(stage: Stage) -> None:
    stage.scene(3, "a memory limit that is kept")
    command = "dd if=/dev/zero of=/dev/shm/x bs=1M count=64"
    stage.corral("run", "--name", "hungry", "-m", "32m", "busybox", "sh", "-c", command, expect=137)
    listed = stage.corral("ps", "-a", "--filter", "name=hungry")
    assert "OOM" in listed, listed
    stage.corral("rm", "hungry", show=False)


def two_on_a_bridge(stage: Stage) -> None:
    stage.scene(4, "two containers on one bridge")
    stage.corral("run", "-d", "--name", "alice", "busybox", "sleep", "1000")
    stage.corral("run", "-d", "--name", "bob", "busybox", "sleep", "1000")
    for caller, called in (("alice", "bob"), ("bob", "alice")):
        address = stage.daemon.client().containers.get(called).endpoint.interfaces[0].ipv4_address.split("/")[0]
        output = stage.corral("exec", caller, "ping", "-c", "2", "-w", "5", address)
        assert " 0% packet loss" in output, output
    stage.corral("rm", "-f", "alice", "bob", show=False)


def survives_the_daemon(stage: Stage) -> None:
    stage.scene(5, "kill -9 of corrald while a container counts")
    count = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.05; done"
    stage.corral("run", "-d", "--name", "counter", "busybox", "sh", "-c", count)
    time.sleep(1)
    before = numbers(stage)
    print(f"{DIM}$ kill -9 $(pidof corrald)          # at {before[-1]}{PLAIN}")
    stage.daemon.kill9()
    time.sleep(1)
    print(f"{DIM}$ corrald &{PLAIN}")
    stage.daemon.start()
    time.sleep(0.5)
    stage.corral("ps")
    after = numbers(stage)
    print(f"counted to {before[-1]} before, to {after[-1]} after; lines missing or twice: {faults(after)}")
    assert after[-1] > before[-1] + 10
    assert faults(after) == 0
    stage.corral("rm", "-f", "counter", show=False)


def numbers(stage: Stage) -> list[int]:
    return [int(n) for n in stage.corral("logs", "counter", show=False).split()]


def faults(counted: list[int]) -> int:
    return sum(a != b for a, b in zip(counted, range(1, len(counted) + 1), strict=True))


def main() -> None:
    if os.geteuid() != 0:
        raise SystemExit("demo: corral makes namespaces and cgroups: run it as root (sudo make demo)")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="corral-demo-") as scratch, running() as daemon:
        stage = Stage(daemon)
        archive = write_busybox(Path(scratch) / "busybox.tar")
        stage.corral("image", "import", str(archive), "--as", "busybox")
        stage.corral("image", "ls")
        for scene in (hello, alone, memory_limit, two_on_a_bridge, survives_the_daemon):
            scene(stage)
        left = daemon.leftovers()
        if left:
            raise SystemExit(f"demo: left behind: {left}")
    print(f"\n{BOLD}All five scenes went as told, in {time.monotonic() - began:.1f} s; nothing is left behind.{PLAIN}")


if __name__ == "__main__":
    main()
