"""A pty of the container's own, from creation to hang-up."""

import os
import select
import time
from dataclasses import replace

import pytest
from support.requirements import needs

from corral.kernel import tty
from corral.oci.runtime import ExecFailed, Stdio
from corral.oci.spec import Box, Mount

pytestmark = needs("root", "overlayfs", "busybox")


def read_until(fd: int, text: str, *, timeout_s: float = 10) -> str:
    """What a terminal shows, up to text (or its end)."""
    seen, deadline = "", time.monotonic() + timeout_s
    while text not in seen:
        ready, _, _ = select.select([fd], [], [], max(0, deadline - time.monotonic()))
        assert ready, f"waited for {text!r}, saw {seen!r}"
        try:
            part = os.read(fd, 4096)
        except OSError:  # EIO: every slave is closed
            break
        if not part:
            break
        seen += part.decode()
    return seen


@pytest.fixture
def shell(lab):
    container = lab.create(lab.spec("sh", "-i", terminal=True), console_size=(100, 30))
    container.start()
    return container


def test_the_shell_talks_over_it(shell):
    console = shell.init.console
    read_until(console, "# ")
    os.write(console, b"echo $((6*7)); tty\n")
    seen = read_until(console, "/dev/")
    assert "42\r\n" in seen


def test_its_size_is_set_before_the_program_begins(lab):
    for size in ((132, 50), (80, 24)):
        container = lab.create(lab.spec("stty", "size", terminal=True), console_size=size)
        container.start()
        assert f"{size[1]} {size[0]}" in read_until(container.init.console, "\n")


def test_a_resize_is_seen_and_signalled(lab):
    script = "trap 'stty size; exit' WINCH; echo ready; while :; do sleep 0.05; done"
    container = lab.create(lab.spec("sh", "-c", script, terminal=True), console_size=(80, 24))
    container.start()
    read_until(container.init.console, "ready")
    tty.set_window_size(container.init.console, width=99, height=11)
    assert "11 99" in read_until(container.init.console, "99")
    assert tty.window_size(container.init.console) == (99, 11)


def test_ctrl_c_reaches_the_foreground(shell):
    console = shell.init.console
    read_until(console, "# ")
    os.write(console, b"sleep 100\n")
    read_until(console, "\n")
    time.sleep(0.2)
    os.write(console, b"\x03echo done-$?\n")
    assert "done-130" in read_until(console, "done-130\r")


def test_the_end_of_the_program_is_the_end_of_the_terminal(lab):
    container = lab.create(lab.spec("true", "", terminal=True))
    container.start()
    read_until(container.init.console, "never written")
    assert lab.wait(container.init) == 0


def test_dev_console_is_the_terminal(lab):
    script = "stat -L -c %t:%T /dev/console /proc/self/fd/0; echo to-console > /dev/console"
    container = lab.create(lab.spec("sh", "-c", script, terminal=True))
    container.start()
    seen = read_until(container.init.console, "to-console")
    console, stdin, *_ = seen.split()
    assert console == stdin
    assert console.startswith("88:")


def test_it_belongs_to_the_user(lab):
    container = lab.create(lab.spec("stat", "-L", "-c", "%u:%g", "/proc/self/fd/0", terminal=True), user="bob")
    container.start()
    assert "1000:5" in read_until(container.init.console, "\n")


def test_it_is_numbered_in_the_containers_own_devpts(lab):
    container = lab.create(lab.spec("sh", "-c", "tty; ls /dev/pts", terminal=True))
    container.start()
    seen = read_until(container.init.console, "ptmx")
    assert seen.split() == ["/dev/pts/0", "0", "ptmx"]


def test_without_devpts_it_is_refused(lab):
    spec = lab.spec("sh", "-i", terminal=True)
    mounts = tuple(mount for mount in spec.mounts if mount.type != "devpts")
    with pytest.raises(ExecFailed, match="devpts"):
        lab.create(replace(spec, mounts=mounts))


class TestExec:
    def test_gets_a_terminal_of_the_container(self, lab):
        container = lab.create(lab.spec("sleep", "60"))
        container.start()
        process = lab.process("sh", "-c", "tty; stty size", terminal=True, console_size=Box(height=20, width=70))
        handle = container.exec(process, stdio=Stdio())
        lab.made.append(handle)
        seen = read_until(handle.console, "20 70")
        assert seen.split() == ["/dev/pts/0", "20", "70"]

    def test_does_not_take_a_false_devpts(self, lab):
        """The container put something else over /dev/pts since it began."""
        spec = lab.spec("sleep", "60")
        mounts = tuple(mount for mount in spec.mounts if mount.type != "devpts")
        false = Mount("/dev/pts", "tmpfs", "tmpfs", ("size=1m",))
        container = lab.create(replace(spec, mounts=(*mounts, false)))
        container.start()
        lab.exec(container, "touch /dev/pts/ptmx")
        with pytest.raises(ExecFailed, match="devpts"):
            container.exec(lab.process("sh", "-i", terminal=True), stdio=Stdio())
