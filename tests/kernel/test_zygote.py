"""The process that forks shims: sealed, quick, frugal, and no loss when it dies."""

import contextlib
import fcntl
import os
import re
import select
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from shimclient import (
    RequestError,
    Shim,
    Workshop,
    Zygote,
    config,
    connect,
    listen,
    make_root,
    read_to_end,
    read_until,
    run_directory,
    wait_gone,
    workshop,
)
from support.requirements import needs

from corral.kernel import process
from corral.kernel.paths import opened
from corral.oci.rehearsal import Typical
from corral.shim import seal, zygote
from corral.tasks.zygote import _PROGRAM

pytestmark = needs("root", "busybox")

# What a shim has for itself. Its part of what is shared depends on who else shares: the bench has that figure.
# Python 3.14 writes to more of its code while it runs.
MAX_PRIVATE_KIB = 1536 if sys.version_info < (3, 14) else 2048


@pytest.fixture(scope="module")
def shop() -> Iterator[Workshop]:
    with workshop() as made:
        yield made


def private_kib(pid: int) -> int:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(kib) for kib in re.findall(r"^Private_(?:Clean|Dirty):\s+(\d+) kB", rollup, re.MULTILINE))


def descriptors_of(pid: int) -> list[str]:
    return sorted(str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir())


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_spawned_shim_is_named_by_pid_and_start_time(shop: Workshop) -> None:
    bundle = shop.directory / "spawned"
    bundle.mkdir()
    spawned = shop.zygote.spawn(bundle)
    stat = Path(f"/proc/{spawned['pid']}/stat").read_text().rpartition(")")[2].split()
    assert int(stat[19]) == spawned["start_time"]
    peer = connect(bundle)
    assert Path(f"/proc/{spawned['pid']}/comm").read_text() == "corral-shim\n"
    peer.call("delete")
    peer.close()


def test_no_memory_that_can_be_written_is_shared_with_its_forks(shop: Workshop) -> None:
    """One container's init, which has yet to lose its power, could reach another's by it."""
    shop.zygote.peer.call("ready")
    maps = Path(f"/proc/{shop.zygote.pid}/maps").read_text().splitlines()
    assert [line for line in maps if re.match("rw.s", line.split()[1])] == []


def test_a_client_that_connects_before_the_shim_runs_is_served(shop: Workshop) -> None:
    bundle = shop.directory / "early"
    bundle.mkdir()
    listener = listen(bundle)
    early = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    early.connect(str(bundle / "socket"))
    shop.zygote.peer.call("spawn", [listener.fileno()], bundle=str(bundle), namespace="n", container="early")
    listener.close()
    early.close()
    peer = connect(bundle)
    assert peer.hello["container"] == "early"
    peer.call("delete")
    peer.close()


def test_a_shim_is_a_session_of_its_own_at_the_root_with_nothing_of_the_daemon(shop: Workshop) -> None:
    shim = shop.spawn("true")
    stat = Path(f"/proc/{shim.pid}/stat").read_text().rpartition(")")[2].split()
    assert int(stat[3]) == shim.pid
    assert str(Path(f"/proc/{shim.pid}/cwd").readlink()) == "/"
    links = list(Path(f"/proc/{shim.pid}/fd").iterdir())
    ready = [link for link in links if str(link.readlink()) == "/"]  # the root of a mount that has no place yet
    assert 0 < len(ready) <= 5
    assert Path("/").stat().st_dev not in {link.stat().st_dev for link in ready}
    targets = sorted(str(link.readlink()) for link in links if link not in ready)
    assert [target for target in targets if target.startswith("/")] == ["/dev/null"] * 3 + [str(shim.bundle)]
    kinds = sorted(target.partition(":")[0] for target in targets if not target.startswith("/"))
    # epoll, signalfd; listener, this client, the zygote
    assert kinds == ["anon_inode", "anon_inode", "socket", "socket", "socket"]


def test_the_interpreter_cannot_be_written_through_proc(shop: Workshop) -> None:
    shim = shop.spawn("true")
    for pid in (shop.zygote.pid, shim.pid):
        for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC):
            with pytest.raises(OSError, match="exe"):
                os.close(os.open(f"/proc/{pid}/exe", flags))
        # Now it is in use, which alone forbids it. What forbids it afterwards: CVE-2019-5736 kept it open until then.
        with opened(os.open(f"/proc/{pid}/exe", os.O_RDONLY)) as exe:
            sealed = fcntl.F_SEAL_WRITE
            assert os.fstatvfs(exe).f_flag & os.ST_RDONLY or fcntl.fcntl(exe, fcntl.F_GET_SEALS) & sealed


def test_its_image_cannot_be_made_writable_again(shop: Workshop) -> None:
    from corral.kernel import mount

    fd = os.open(f"/proc/{shop.zygote.pid}/exe", os.O_PATH)
    try:
        with pytest.raises(OSError, match="mount_setattr"):
            mount.set_attributes(fd, attr_clr=mount.MOUNT_ATTR_RDONLY)
    finally:
        os.close(fd)


def test_it_is_not_dumpable_and_neither_is_a_shim(shop: Workshop) -> None:
    # The files in /proc of a process that is not dumpable belong to root whoever runs it; ask the kernel itself.
    shim = shop.spawn("true")
    for pid in (shop.zygote.pid, shim.pid):
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                os.setresuid(65534, 65534, 65534)
                try:
                    Path(f"/proc/{pid}/exe").readlink()
                except PermissionError:
                    os._exit(0)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_killing_the_zygote_harms_no_container(shop: Workshop) -> None:
    with workshop() as own:
        shim = own.run("sh", "-c", "while read x; do echo got $x; done; exit 5", stdin=True)
        os.kill(own.zygote.pid, signal.SIGKILL)
        stdin, out = shim.attach("stdin", "stdout", lossless=True)
        os.write(stdin, b"one\n")
        read_until(out, b"got one\n")
        shim.exec("e", "echo", "also exec")
        (exec_out,) = shim.attach("stdout", exec_id="e")
        shim.start("e")
        assert read_to_end(exec_out) == b"also exec\n"
        shim.call("close_stdin")
        assert shim.wait()["code"] == 5
        for fd in (stdin, out):
            os.close(fd)


@contextlib.contextmanager
def zygote_with_shims(
    *args: str, shims: int = 1, env: dict[str, str] | None = None
) -> Iterator[tuple[Zygote, list[Shim]]]:
    """A zygote of one's own and started containers; nothing of them is left, also after a failure."""
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(run_directory())
        root = make_root(directory)
        own = stack.enter_context(Zygote(env))
        made = []
        for number in range(1, shims + 1):
            shim = Shim(own, directory, f"c{number}", config(root, *args))
            stack.callback(shim.close)
            shim.create()
            shim.start()
            made.append(shim)
        yield own, made


def test_a_daemon_that_dies_takes_the_zygote_along_once_its_last_shim_has_ended() -> None:
    with zygote_with_shims("sleep", "100") as (own, (shim,)):
        own.peer.close()
        assert shim.state()["state"] == "running"
        assert os.waitpid(own.pid, os.WNOHANG) == (0, 0)
        shim.call("delete")
        assert shim.wait()["code"] == 137
        own.wait()


def test_it_ends_also_after_a_shim_that_was_killed_when_it_had_told_the_exit() -> None:
    with zygote_with_shims("true", env={"CORRAL_FAILPOINTS": "shim.exit.after_rename=kill"}) as (own, (shim,)):
        assert shim.wait()["reason"] == ""
        own.peer.close()
        own.wait()


def test_it_ends_with_what_it_kept_of_several_shims_that_were_killed_just_before_its_daemon() -> None:
    with zygote_with_shims("sleep", "100", shims=2) as (own, shims):
        inits = [int(str(shim.state()["pid"])) for shim in shims]
        for shim in shims:
            os.kill(shim.pid, signal.SIGKILL)
            wait_gone(shim.pid)
        own.peer.close()
        for pid in inits:
            os.kill(pid, signal.SIGKILL)
            wait_gone(pid)
        for shim in shims:  # as the next daemon does; the zygote may be writing to it
            shim.bundle.rename(shim.bundle.with_suffix(".gone"))
        own.wait()


def test_it_sleeps_while_it_only_waits_for_a_shim_to_end() -> None:
    with zygote_with_shims("sleep", "100") as (own, (shim,)):
        own.peer.close()
        time.sleep(0.5)  # until its spare has ended
        before = switches_of(own.pid)
        time.sleep(1)
        assert switches_of(own.pid) == before
        shim.call("delete")
        shim.wait()
        own.wait()


def switches_of(pid: int) -> int:
    """How often a process has gone to sleep."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])


def test_shims_that_end_do_not_stay_zombies(shop: Workshop) -> None:
    shims = [shop.run("true") for _ in range(5)]
    for shim in shims:
        wait_gone(shim.pid)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if not any(Path(f"/proc/{shim.pid}").exists() for shim in shims):
            return
        time.sleep(0.01)
    raise AssertionError([state_of(shim.pid) for shim in shims])


def test_requests_it_cannot_serve_are_answered(shop: Workshop) -> None:
    peer = shop.zygote.peer
    with pytest.raises(RequestError, match="unimplemented"):
        peer.call("dance")
    with pytest.raises(RequestError, match="invalid_argument: bundle: missing"):
        peer.call("spawn")
    with pytest.raises(RequestError, match=r"invalid_argument: .*1 file descriptors"):
        peer.call("spawn", bundle="/tmp", namespace="n", container="c")
    before = descriptors_of(shop.zygote.pid)
    with open("/dev/null") as null, pytest.raises(RequestError, match="invalid_argument"):
        peer.call("spawn", [null.fileno(), null.fileno()], bundle=5, namespace="n", container="c")
    deadline = time.monotonic() + 2  # they are closed after the answer
    while descriptors_of(shop.zygote.pid) != before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert descriptors_of(shop.zygote.pid) == before


def test_a_shim_whose_bundle_is_missing_says_so_by_ending(shop: Workshop) -> None:
    directory = shop.directory / "vanishing"
    directory.mkdir()
    with listen(directory) as listener:
        spawned = shop.zygote.peer.call(
            "spawn", [listener.fileno()], bundle=str(shop.directory / "none"), namespace="n", container="c"
        )
    assert isinstance(spawned["pid"], int)
    wait_gone(spawned["pid"])


def test_nothing_of_the_host_leaks_into_a_container_by_descriptor(shop: Workshop) -> None:
    shim = shop.spawn("sh", "-c", "ls -l /proc/self/fd | wc -l")
    shim.create()
    (out,) = shim.attach("stdout")
    shim.start()
    assert read_to_end(out) == b"5\n"  # total, 0, 1, 2 and the directory itself


def test_a_hundred_shims_at_once(shop: Workshop) -> None:
    shims = [shop.spawn("sh", "-c", f"exit {n}") for n in range(100)]
    for shim in shims:
        shim.create(driver="none")
    for shim in shims:
        shim.start()
    assert [shim.wait()["code"] for shim in shims] == list(range(100))


def test_an_idle_shim_costs_little_memory() -> None:
    with workshop() as own:
        shims = [own.spawn("sleep", "1000") for _ in range(20)]
        for shim in shims:
            shim.create()
            shim.start()
        assert statistics.mean(private_kib(shim.pid) for shim in shims) < MAX_PRIVATE_KIB


def test_a_shim_imports_nothing_after_the_fork(shop: Workshop) -> None:
    """Whatever it is asked, also what fails: its import system is closed, so an import would be an error."""
    shim = shop.run("cat", stdin=True, terminal=True)
    shim.exec("e", "sh", "-c", "echo x; exit 1", terminal=True)
    (out,) = shim.attach("stdout", exec_id="e")
    shim.start("e")
    read_to_end(out)
    for op in ("dance", "create", "start", "kill", "exec", "attach", "resize", "delete_exec"):
        with pytest.raises(RequestError) as caught:
            shim.call(op)
        assert caught.value.kind != "internal"
    shim.call("delete")
    wait_gone(shim.pid)
    assert shim.reports() == ""


def test_a_sealed_copy_in_memory_serves_where_mounts_cannot() -> None:
    """The other way to run from what nobody can write; it must find its standard library too."""
    source = str(Path(seal.__file__).parents[2])
    code = (
        f"import sys; sys.path.insert(0, {source!r})\n"
        "from corral.shim import seal\n"
        "if 'again' not in sys.argv:\n"
        "    def refuse(path): raise OSError('no mounts here')\n"
        "    seal.read_only_mount = refuse\n"
        "    seal.execute_sealed('again')\n"
        "import json, ctypes\n"
        "print(seal.is_sealed(), sys.prefix, open('/proc/self/maps').readline().split()[-2:])\n"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    sealed, prefix, *mapped = done.stdout.split(maxsplit=2)
    assert sealed == "True"
    assert prefix == sys.base_prefix
    assert "memfd:corral-python" in mapped[0]


def test_a_zygote_is_sealed_before_it_loads_what_it_would_load_again(tmp_path: Path) -> None:
    report = tmp_path / "report"
    command = [sys.executable, "-I", "-S", "-X", "importtime", "-c", _PROGRAM, str(Path(seal.__file__).parents[2])]
    ours, its = socket.socketpair()
    ours.close()
    to_report = (os.POSIX_SPAWN_OPEN, 2, str(report), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with its:
        pid = os.posix_spawn(command[0], command, {}, file_actions=[(os.POSIX_SPAWN_DUP2, its.fileno(), 3), to_report])
    assert os.waitpid(pid, 0)[1] == 0
    loaded = [line.rpartition("|")[2].strip() for line in report.read_text().splitlines()]
    names = ("corral.shim.seal", "corral.shim.zygote", "corral.oci.runtime")
    assert [loaded.count(name) for name in names] == [2, 1, 1]


def test_an_interpreter_on_an_ordinary_mount_is_not_sealed() -> None:
    assert not seal.is_sealed()


def test_a_spare_that_can_not_plan_ahead_is_one_all_the_same() -> None:
    class Unplannable(Typical):
        def plan(self) -> None:
            raise LookupError("no such thing")

    ours, its = socket.socketpair()
    with ours, its:
        pid = process.fork()
        if pid == 0:
            ours.close()
            zygote._become_shim(its, Unplannable())
        its.close()
        assert not select.select([ours], [], [], 0.3)[0]  # it waits for its orders
    assert os.waitpid(pid, 0)[1] == 0


ABANDONED_AT_ONCE = """
import os, socket, time
from corral.kernel import process
from corral.shim.wire import Channel
from corral.shim.zygote import Zygote
if process.fork() == 0:
    os._exit(0)
time.sleep(0.1)
ours, its = socket.socketpair()
its.close()
Zygote(Channel(ours), None).run()
"""


def test_who_ended_before_anybody_listened_holds_up_no_zygote() -> None:
    """The daemon is gone before a spare was made, and warming up has left somebody to reap."""
    subprocess.run([sys.executable, "-c", ABANDONED_AT_ONCE], check=True, timeout=20)
