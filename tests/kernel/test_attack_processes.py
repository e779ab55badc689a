"""Attacks on what a container's processes are given, and on the processes of the runtime that are seen inside."""

import array
import contextlib
import ctypes
import json
import os
import select
import socket
import stat
import struct
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support import elf
from support.races import accomplice, exchanging
from support.requirements import needs

from corral.kernel import capabilities, inotify, paths, process
from corral.kernel.namespaces import Kind
from corral.oci import procfs, program, users
from corral.oci.attendance import await_ready, heeded
from corral.oci.channel import ChildError, ParentEnd, make_pair
from corral.oci.runtime import EXEC_DENIED, EXEC_NOT_FOUND, SETUP, Container, ExecFailed, ProcessHandle, Stdio
from corral.oci.spec import Capabilities, IdMapping, Mount, Namespace, Spec
from corral.runtime.execute import _with_capabilities

pytestmark = needs("root", "overlayfs", "busybox")

IN_OPEN = 0x20


def status(text: str) -> dict[str, str]:
    return dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)


def holding(lab, spec: Spec, *names: str) -> Spec:
    """The same, with these capabilities."""
    held = Capabilities(bounding=names, effective=names, permitted=names)
    return replace(spec, process=replace(spec.process, capabilities=held))


@pytest.fixture(params=["create", "exec"])
def how(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def attempt(how: str, lab) -> Callable[..., str]:
    """Run something as a container of its own, or in a running one: its output."""

    return lambda *args, **options: output_of(lab, how, *args, **options)


# The runtime's processes, seen from inside

WATCH = """
while :; do
    for process in /proc/[0-9]*; do
        pid=${process#/proc/}
        [ $pid -gt 1 ] && [ $pid != $$ ] && kill -STOP $pid && {
            grep Cap $process/status; read line < $process/root$1 && echo "file $line"; ls -l $process/fd
            kill -CONT $pid
        } >> /seen
    done
done 2>/dev/null
"""
"""Stops whoever appears, and looks at what it may do, at its root, and at what it has open."""


class TestCve20169962:
    """A process of the runtime in the container's PID namespace, and a container that holds CAP_SYS_PTRACE there.

    It can look through that process's eyes and guide its hands. So it must be no more than the container's own program.
    """

    HELD = ("CAP_SYS_PTRACE", "CAP_KILL", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH")

    @pytest.fixture
    def watcher(self, lab) -> Container:
        secret = lab.directory / "secret"
        secret.write_text("of-the-host\n")
        container = lab.create(holding(lab, lab.spec("sh", "-c", WATCH, "sh", str(secret)), *self.HELD))
        container.start()
        return container

    def joining(self, lab, watcher: Container, *args: str, **changes: object) -> Spec:
        spec = lab.spec(*args, **changes)
        joined = Namespace(Kind.PID, f"/proc/{watcher.init.pid}/ns/pid")
        kinds = tuple(joined if namespace.type is Kind.PID else namespace for namespace in spec.linux.namespaces)
        return replace(spec, linux=replace(spec.linux, namespaces=kinds))

    def root(self, lab) -> list[Mount]:
        return [Mount(type="bind", source=str(lab.busybox), options=("rbind", "ro"))]

    def check(self, lab, own: int) -> None:
        """What was seen: no capability beyond one's own, no file of the host, no descriptor but of the container's."""
        seen = (lab.upper / "seen").read_text()
        capabilities = [int(line.split()[1], 16) for line in seen.splitlines() if line.startswith("Cap")]
        assert capabilities, "the container never met the process, so nothing was tried"
        assert {each & ~own for each in capabilities} == {0}
        assert "of-the-host" not in seen
        opened = {line.partition(" -> ")[2] for line in seen.splitlines() if " -> " in line}
        assert all(target.startswith(("socket:", "pipe:", "/dev/null", "/dev/pts/")) for target in opened), opened

    def test_cve_2016_9962_exec(self, lab, watcher):
        give_up_at = time.monotonic() + 2
        while time.monotonic() < give_up_at:
            with contextlib.suppress(ExecFailed):
                lab.exec(watcher, "true", "", capabilities=Capabilities())
        self.check(lab, 0)

    def test_cve_2016_9962_create_in_its_pid_namespace(self, lab, watcher):
        spec = self.joining(lab, watcher, "true", "", capabilities=Capabilities())
        give_up_at = time.monotonic() + 2
        while time.monotonic() < give_up_at:
            with contextlib.suppress(ExecFailed):
                container = lab.create(spec, rootfs=self.root(lab))
                time.sleep(0.02)
                container.start()
        self.check(lab, 0)

    @pytest.mark.parametrize("copied", [False, True], ids=["by-name", "by-copy"])
    def test_the_joined_namespace_is_whole(self, lab, monkeypatch, copied):
        """Its procfs shows it, masked and read-only as any; by either of the two ways to have one."""
        if copied:
            monkeypatch.setattr(procfs, "new_procfs", lambda pids, source, options: procfs.copy_procfs(pids))
        first = lab.create(lab.spec("sleep", "4321"))
        first.start()
        script = (
            "ps; cat /proc/keys; echo x > /proc/sys/kernel/hostname; readlink /proc/self/ns/pid; readlink /proc/1/cwd"
        )
        seen = lab.run_spec(self.joining(lab, first, script), rootfs=self.root(lab)).output
        assert "sleep 4321" in seen
        assert "Read-only file system" in seen
        assert str(Path(f"/proc/{first.init.pid}/ns/pid").readlink()) in seen

    @pytest.mark.parametrize(
        "command",
        [
            "mount --bind /proc/sys /proc",
            "mount --bind /proc/1/task /proc",  # has a 1/ns/pid too
            "mount --bind /host /proc",
            "mount -t tmpfs none /proc",
            "mount -t tmpfs none /proc; mkdir -p /proc/1/ns; ln -s {own} /proc/1/ns/pid",  # by its name on the host
        ],
    )
    def test_a_false_proc_of_who_is_joined_is_not_copied(self, lab, monkeypatch, command):
        """It may have mounted another one's there, or another file system."""
        monkeypatch.setattr(procfs, "new_procfs", lambda pids, source, options: procfs.copy_procfs(pids))
        spec = holding(lab, lab.spec("sleep", "60", linux={"seccomp": None}), "CAP_SYS_ADMIN")
        first = lab.create(replace(spec, mounts=(*spec.mounts, Mount("/host", "bind", "/proc", ("bind",)))))
        first.start()
        command = command.format(own=f"/proc/{first.init.pid}/ns/pid")
        assert lab.exec(first, command, capabilities=None).code == 0
        with pytest.raises(ExecFailed, match="must have a procfs"):
            lab.create(self.joining(lab, first, "true"), rootfs=self.root(lab))

    @pytest.mark.parametrize("no_new_privileges", [True, False])
    def test_a_filter_does_not_keep_the_runtime_from_it(self, lab, no_new_privileges):
        """Without no_new_privs it is loaded before the last process is made."""
        first = lab.create(lab.spec("sleep", "60"))
        first.start()
        spec = self.joining(lab, first, "grep Seccomp: /proc/self/status", no_new_privileges=no_new_privileges)
        assert lab.run_spec(spec, rootfs=self.root(lab)).output == "Seccomp:\t2\n"
        seen = lab.exec(first, "grep Seccomp: /proc/self/status", no_new_privileges=no_new_privileges)
        assert seen.output == "Seccomp:\t2\n"

    def test_a_terminal_is_a_controlling_one_there_too(self, lab):
        first = lab.create(lab.spec("sleep", "60"))
        first.start()
        spec = self.joining(lab, first, "tty; echo x > /dev/tty; sleep 9", terminal=True)
        for handle in (
            self._started(lab, spec),
            first.exec(replace(spec.process, terminal=True), stdio=Stdio()),
        ):
            lab.made.append(handle) if handle not in lab.made else None
            seen = b""
            while b"x" not in seen:
                seen += os.read(handle.console, 100)
            assert seen.split() == [b"/dev/pts/0", b"x"]

    def _started(self, lab, spec: Spec):
        container = lab.create(spec, rootfs=self.root(lab))
        container.start()
        return container.init


def test_what_a_hijacked_process_says_is_at_most_a_sentence(lab):
    """Who guides the last process before execve speaks on its channel, and may send descriptors along."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    words: list[object] = [
        [],
        1,
        "x",
        {"error": "fatal"},
        {"error": {"a": 1}, "errno": 2**70},
        {"message": "y" * 30000},
    ]
    texts = [json.dumps(word).encode() for word in words] + [b"{", b"\xff", b"[" * 20000]
    for text in texts:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            fds = array.array("i", [0, 0])
            theirs.sendmsg([text], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
            end = ParentEnd(ours)
            with pytest.raises(ExecFailed) as failed:
                end.wait_for_exec(lambda: None)
            end.close()
        assert failed.value.kind in (SETUP, EXEC_DENIED, EXEC_NOT_FOUND)
        assert len(failed.value.message) < 3000
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.fixture
def hasty() -> Iterator[Callable[[bytes], tuple[ParentEnd, int, int]]]:
    """Makes a child whose successor says something before its predecessor does; and that has ended by then."""
    with contextlib.ExitStack() as stack:

        def make(message: bytes) -> tuple[ParentEnd, int, int]:
            parent, channel = make_pair()
            stack.callback(parent.close)
            pid, pidfd = process.clone(0)
            if pid == 0:
                try:
                    successor, its_pidfd = process.clone(process.CLONE_PARENT)
                    if successor == 0:
                        os.write(channel.fileno(), message)
                        os._exit(0)
                    select.select([its_pidfd], [], [])
                    channel.send_ready(None, successor=True)
                    channel.send_number(successor)
                finally:
                    os._exit(0)
            channel.close()
            stack.callback(os.waitpid, -1, 0)
            return parent, pid, pidfd

        yield make


@pytest.mark.parametrize(
    "message",
    [
        b'{"sighting":[0,0,[],"/",null,null]}',
        b'{"ready":true}',
        b'{"ready":true,"successor":true}',
        b'{"hooks":true}',
    ],
)
def test_what_a_successor_says_in_its_predecessors_place_is_nonsense(hasty, message):
    """Who may trace it makes it say who later execs are, or that another process is the exec."""
    parent, pid, pidfd = hasty(message)
    container = Container(Spec.from_json({"ociVersion": "1.2.0"}), ProcessHandle(pid, pidfd, 0, None), parent)
    noted: list[object] = []
    with pytest.raises(ExecFailed, match="makes no sense"):
        await_ready(container, None, parent, pid, pidfd, 10, creating=False, note=noted.append)
    assert not noted


def test_a_number_that_a_successor_says_in_its_predecessors_place_is_nonsense(hasty):
    parent, pid, pidfd = hasty((1).to_bytes(8, "little"))
    with pytest.raises(ExecFailed, match="makes no sense"), heeded(parent, pidfd):
        parent.receive_number(pid, lambda: None)


@pytest.mark.parametrize(
    ("number", "kind"), [(-11, ChildError), (-(2**63), ExecFailed), (-4096, ExecFailed), (0, ExecFailed)]
)
def test_that_there_is_no_successor_is_an_error_whatever_number_says_so(number: int, kind: type[Exception]) -> None:
    parent, channel = make_pair()
    with contextlib.closing(parent), contextlib.closing(channel):
        channel.send_number(number)
        with pytest.raises(kind, match="clone"):
            parent.receive_successor(os.getpid(), lambda: None)


@pytest.mark.parametrize("sighting", [7, None, [], [0, 0, 0, "/"], [0, 0, [], "/", 7]])
def test_a_sighting_that_is_none_is_nonsense(sighting: object) -> None:
    parent, channel = make_pair()
    with contextlib.closing(parent), contextlib.closing(channel):
        channel.send("sighting", sighting)
        with pytest.raises(ExecFailed, match="makes no sense"):
            parent.receive_ready(os.getpid(), lambda: None, note=lambda _: None)


# Ways out by a descriptor


@pytest.mark.parametrize("way", ["/proc/self/fd/{}", "/proc/self/fd/{}/../..", "/link", "/proc/thread-self/fd/{}/tmp"])
def test_cve_2024_21626_a_working_directory_on_the_host(lab, attempt, way):
    """The runtime has directories of the host open, and the image names one of its descriptors."""
    held = [os.open("/usr", os.O_RDONLY | os.O_DIRECTORY) for _ in range(8)]
    for fd in held:
        os.set_inheritable(fd, True)
    try:
        for fd in [*range(3, 12), *held]:
            (lab.plant / "link").unlink(missing_ok=True)
            (lab.plant / "link").symlink_to(f"/proc/self/fd/{fd}")
            with pytest.raises(ExecFailed, match="cwd"):
                attempt("/bin/ls", "-a", cwd=way.format(fd))
    finally:
        for fd in held:
            os.close(fd)


def test_cve_2024_21626_a_program_on_the_host(lab, attempt):
    """The same by the path of the program."""
    held = [os.open("/", os.O_RDONLY | os.O_DIRECTORY) for _ in range(8)]
    for fd in held:
        os.set_inheritable(fd, True)
    try:
        for fd in (3, 5, 7, *held):
            with pytest.raises(ExecFailed):
                attempt(f"/proc/self/fd/{fd}{sys.executable}", "-c", "0")
            with pytest.raises(ExecFailed):
                attempt(f"/proc/self/fd/{fd}/bin/true", "x")
    finally:
        for fd in held:
            os.close(fd)


def test_cve_2024_21626_no_descriptor_but_the_three(lab, attempt):
    held = [os.open("/", os.O_RDONLY | os.O_DIRECTORY) for _ in range(8)]
    for fd in held:
        os.set_inheritable(fd, True)
    try:
        assert attempt("cd /proc/self/fd; echo *").split() == ["0", "1", "2", "3"]  # 3: the shell's own
    finally:
        for fd in held:
            os.close(fd)


@pytest.mark.parametrize("seen", ["/proc/self/cwd", "/proc/self/root", "/proc/1/cwd"])
def test_cve_2024_21626_every_directory_a_process_has_lies_inside(lab, attempt, seen):
    (lab.plant / "inside").write_text("inside")
    assert attempt(f"cat {seen}/inside {seen}/../inside").count("inside") == 2


def test_cve_2024_21626_a_directory_that_is_taken_away_once_it_was_opened(lab, monkeypatch):
    """It is moved out of what the container has of the host, and would be a way there."""
    volume, outside = lab.directory / "volume", lab.directory / "outside"
    (volume / "work").mkdir(parents=True)
    outside.mkdir()
    with accomplice(volume / "sign", volume / "work", outside, seen_as=Path("/volume/sign")) as tell:

        def open_in_root(root, path, *args, original=paths.open_in_root, **options):
            fd = original(root, path, *args, **options)
            if path == "/volume/work" and Path("/volume").exists():
                tell()
            return fd

        monkeypatch.setattr(program.paths, "open_in_root", open_in_root)
        spec = lab.spec("true", cwd="/volume/work", mounts=[Mount("/volume", "bind", str(volume), ("rbind",))])
        with pytest.raises(ExecFailed, match="it lies outside of the container"):
            lab.run_spec(spec)


# Who a process is

HOSTILE_PASSWD = """\
4294967296:x:0:0:overflows to root:/:/bin/sh
4294967295:x:0:0:minus one:/:/bin/sh
99999999999999999999:x:0:0:a name of digits:/:/bin/sh
1000:x:0:0:a number as a name:/:/bin/sh
1:x:0:0:another:/:/bin/sh
0x3e8:x:0:0:hexadecimal:/:/bin/sh
evil:x:0x0:0:a uid that is none:/:/bin/sh
minus:x:-1:0:less than none:/:/bin/sh
big:x:4294967296:0:overflows:/:/bin/sh
"""


@pytest.mark.parametrize(
    "user", ["4294967296", "4294967295", "99999999999999999999", "evil", "minus", "big", "-1", "+0"]
)
def test_cve_2024_40635_and_cve_2026_46680_a_user_that_overflows_to_root(lab, attempt, user):
    """Nor is what is no number of a user looked up as a name, if it is made of digits."""
    (lab.plant / "etc").mkdir()
    (lab.plant / "etc/passwd").write_text(HOSTILE_PASSWD)
    for each in (user, f"{user}:0", f"0:{user}"):
        with pytest.raises(ExecFailed, match=r"user|group") as failed:
            attempt("cat", "/proc/self/status", user=each)
        assert failed.value.kind == SETUP


@pytest.mark.parametrize(("user", "uid", "gid"), [("1", 1, 0), ("1000", 1000, 0), ("1:1", 1, 1), ("007", 7, 0)])
def test_cve_2026_30892_a_number_is_that_number(lab, attempt, user, uid, gid):
    """`--user 1` once became root; and an image's file may call root by a number."""
    (lab.plant / "etc").mkdir()
    (lab.plant / "etc/passwd").write_text(HOSTILE_PASSWD)
    seen = status(attempt("cat", "/proc/self/status", user=user))
    assert (seen["Uid"].split(), seen["Gid"].split()) == ([str(uid)] * 4, [str(gid)] * 4)


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.symlink_to("/proc/self/environ"),
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to("passwd"),
        lambda path: path.symlink_to("/proc/1/root/etc/passwd"),
        os.mkfifo,
        lambda path: path.mkdir(),
        lambda path: os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5)),
        lambda path: path.write_bytes(b"evil:x:0:0::/:\n" + bytes(5 << 20)),
        lambda path: (path.touch(), os.truncate(path, 1 << 40)),
        lambda path: path.write_bytes(b"\xff\xfe" + os.urandom(1 << 20)),
        lambda path: path.write_bytes(b"evil\0:x:0:0::/:\nevil:x:0\0:0::/:\n:::::\n"),
    ],
    ids=["environ", "zero", "loop", "proc", "fifo", "directory", "device", "huge", "sparse", "binary", "nul"],
)
def test_cve_2024_9676_a_hostile_passwd_makes_nobody_root_and_takes_no_time(lab, attempt, make):
    (lab.plant / "etc").mkdir()
    make(lab.plant / "etc/passwd")
    began = time.monotonic()
    with pytest.raises(ExecFailed) as failed:
        attempt("id", "-u", user="evil")
    assert failed.value.kind == SETUP
    assert attempt("grep Uid /proc/self/status", user="4711").split()[1:] == ["4711"] * 4
    assert time.monotonic() - began < 5


def test_a_database_that_is_no_file_is_not_even_opened(tmp_path):
    """To open a device can do things."""
    (tmp_path / "etc").mkdir()
    os.mkfifo(tmp_path / "etc/passwd")
    root, notes = os.open(tmp_path, os.O_PATH), inotify.open_inotify()
    try:
        inotify.add_watch(notes, tmp_path / "etc", IN_OPEN)
        assert users.read_database(root, "/etc/passwd", required=False) == b""
        assert list(inotify.read_changes(notes)) == []
    finally:
        os.close(root)
        os.close(notes)


def test_a_database_exchanged_for_a_device_is_not_read(tmp_path):
    place = tmp_path / "etc/passwd"
    place.parent.mkdir()
    place.write_text("mine")
    os.mknod(tmp_path / "zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    root = os.open(tmp_path, os.O_PATH)
    give_up_at = time.monotonic() + 2
    with exchanging(place, tmp_path / "zero"):
        while time.monotonic() < give_up_at:
            assert users.read_database(root, "/etc/passwd", required=False) in (b"", b"mine")
    os.close(root)


def test_cve_2022_36109_and_cve_2023_25173_a_group_that_is_shut_out_stays_so(lab, attempt):
    """A member of a group that may not read a file must not read it as one of the others."""
    secret = lab.plant / "secret"
    secret.write_text("secret")
    secret.chmod(0o604)
    os.chown(secret, 0, 2000)
    assert "secret" in attempt("cat", "/secret", user="4242")
    assert "Permission denied" in attempt("cat", "/secret", user="bob")


def test_no_group_of_the_runtime_is_kept(lab, attempt):
    before = os.getgroups()
    os.setgroups([0, 4, 6])
    try:
        for user in ("4242:4242", "bob"):
            groups = status(attempt("cat", "/proc/self/status", user=user))["Groups"].split()
            assert not {"0", "4", "6"} & set(groups)
    finally:
        os.setgroups(before)


# Capabilities, no_new_privs


def test_cve_2022_24769_cve_2022_29162_cve_2022_27650_a_file_with_inheritable_capabilities(lab, attempt):
    """An ordinary user gets what a file may hand on, if the sets of the runtime's process left it inheritable."""
    tool = lab.plant / "tool/grep"
    tool.parent.mkdir()
    tool.write_bytes((lab.busybox / "bin/busybox").read_bytes())
    tool.chmod(0o755)
    every = 0xFFFFFFFF
    os.setxattr(tool, "security.capability", struct.pack("<5I", 0x02000000, 0, every, 0, 0x1FF))
    seen = status(attempt("/tool/grep Cap /proc/self/status", user="bob", no_new_privileges=False))
    assert {name: int(value, 16) for name, value in seen.items() if name != "CapBnd"} == dict.fromkeys(
        ("CapInh", "CapPrm", "CapEff", "CapAmb"), 0
    )


def test_cve_2022_29162_exec_with_more_capabilities_makes_none_inheritable(lab):
    container = lab.create(lab.spec("sleep", "60"))
    container.start()
    wanted = _with_capabilities(container.spec.process.capabilities, ["CAP_NET_ADMIN"])
    seen = status(lab.exec(container, "cat", "/proc/self/status", capabilities=wanted).output)
    assert int(seen["CapEff"], 16) & 1 << 12
    assert int(seen["CapInh"], 16) == int(seen["CapAmb"], 16) == 0


def plant(lab, name: str, code: dict[str, str], mode: int = 0o755) -> None:
    path = lab.plant / name
    path.write_bytes(elf.program(code))
    path.chmod(mode)


def result_of(lab, how: str, *args: str, user: str | None = None, linux: dict | None = None, **changes: object):
    if how == "create":
        return lab.run(*args, user=user, linux=linux, **changes)
    container = lab.create(lab.spec("sleep", "60", linux=linux))
    container.start()
    return lab.exec(container, *args, user=user, **changes)


def code_of(lab, how: str, *args: str, **options: object) -> int:
    return result_of(lab, how, *args, **options).code


def output_of(lab, how: str, *args: str, **options: object) -> str:
    return result_of(lab, how, *args, **options).output


def test_a_setuid_program_of_the_image_makes_nobody_root(lab, how):
    plant(lab, "suid", elf.GET_EUID, 0o4755)
    assert code_of(lab, how, "/suid", "x", user="bob") == 1000 & 0xFF
    assert code_of(lab, how, "/suid", "x", user="bob", no_new_privileges=False) == 0, "the test itself is wrong"


class TestUserNamespace:
    """root of a user namespace, with every capability in it and no filter, is an ordinary user of the host."""

    FIRST = 300000

    @pytest.fixture
    def spec(self, lab) -> Callable[..., Spec]:
        for directory in (lab.upper, lab.plant):
            os.chown(directory, self.FIRST, self.FIRST)
        mappings = (IdMapping(0, self.FIRST, 65536),)
        every = tuple(f"CAP_{name}" for name in capabilities.NAMES)

        def make(*args: str, **changes: object) -> Spec:
            spec = holding(lab, lab.spec(*args, no_new_privileges=False, **changes), *every)
            kinds = (*spec.linux.namespaces, Namespace(Kind.USER))
            linux = replace(
                spec.linux,
                namespaces=kinds,
                uid_mappings=mappings,
                gid_mappings=mappings,
                seccomp=None,
                masked_paths=(),
            )
            return replace(spec, linux=linux)

        return make

    def test_a_setuid_program_of_the_hosts_root_gives_nothing(self, lab, spec):
        """It is owned by nobody of the container's."""
        plant(lab, "suid", elf.GET_EUID, 0o6755)
        assert lab.run_spec(spec("/suid", "x"), user="bob").code == 1000 & 0xFF

    def test_one_of_the_containers_root_gives_that_and_no_more(self, lab, spec):
        plant(lab, "suid", elf.GET_EUID, 0o4755)
        os.chown(lab.plant / "suid", self.FIRST, self.FIRST)
        (lab.plant / "suid").chmod(0o4755)
        assert lab.run_spec(spec("/suid", "x"), user="bob").code == 0
        container = lab.create(spec("sleep", "60"))
        container.start()
        ids = status(Path(f"/proc/{container.init.pid}/status").read_text())["Uid"].split()
        assert ids == [str(self.FIRST)] * 4

    def test_what_is_the_hosts_stays_so(self, lab, spec):
        secret = lab.directory / "secret"
        secret.write_text("secret")
        secret.chmod(0o600)
        before = Path("/proc/sys/kernel/core_pattern").read_text()
        script = (
            "cat /secret; chown 0 /secret; echo x > /secret; mknod /disk b 7 0; mknod /mem c 1 1; head -c1 /mem; "
            "echo '|/x' > /proc/sys/kernel/core_pattern; mount -o remount,rw /proc/sys; "
            "echo '|/x' > /proc/sys/kernel/core_pattern; mount -t proc proc /tmp && echo '|/x' > "
            "/tmp/sys/kernel/core_pattern; true"
        )
        seen = lab.run_spec(
            replace(spec(script), mounts=(*spec(script).mounts, Mount("/secret", "bind", str(secret), ("rbind",))))
        )
        assert seen.code == 0
        assert "Permission denied" in seen.output
        assert (secret.read_text(), secret.stat().st_uid) == ("secret", 0)
        assert Path("/proc/sys/kernel/core_pattern").read_text() == before
        assert not (lab.upper / "disk").exists()
        assert not (lab.upper / "mem").exists()


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="needs x86_64")
def test_the_other_entries_into_the_kernel_are_filtered_too(lab, how):
    """Numbers mean other calls there: a filter that looks at numbers alone lets through what it never meant."""
    plant(lab, "x32", elf.X32)
    plant(lab, "int80", elf.INT80)
    assert code_of(lab, how, "/x32", "x") == -31
    native = replace(lab.spec("x").linux.seccomp, architectures=("SCMP_ARCH_X86_64",))
    assert code_of(lab, how, "/int80", "x", linux={"seccomp": native}) == -31


# Keys


def test_no_key_of_the_host_is_in_reach(lab, how):
    """Keys are not namespaced: who keeps the host's session keyring possesses what is in it."""
    libc = ctypes.CDLL(None, use_errno=True)
    add_key, keyctl = (248, 250) if os.uname().machine == "x86_64" else (217, 219)
    assert libc.syscall(keyctl, 1, None) > 0  # a session keyring of this process's own
    key = libc.syscall(add_key, b"user", b"corral-secret", b"payload", 7, -3)
    assert key > 0, os.strerror(ctypes.get_errno())
    assert libc.syscall(keyctl, 5, key, 0x3F000000) == 0  # for who possesses it, and nobody else
    assert "corral-secret" in Path("/proc/keys").read_text()
    seen = output_of(lab, how, "cat", "/proc/keys", linux={"masked_paths": ()})
    assert "corral-secret" not in seen


# Sockets, and what is loaded


def test_cve_2020_15257_nothing_of_the_runtime_listens_where_only_a_network_namespace_shuts_out(lab):
    """A container in the host's network namespace reaches every abstract socket."""
    spec = lab.spec("cat", "/proc/net/unix")
    kinds = tuple(namespace for namespace in spec.linux.namespaces if namespace.type is not Kind.NETWORK)
    seen = lab.run_spec(replace(spec, linux=replace(spec.linux, namespaces=kinds))).output
    assert "Inode" in seen
    assert not [line for line in seen.splitlines() if "@" in line and "corral" in line]


class TestCve201914271:
    """What the runtime would load after it has entered the image's root: modules, codecs, libraries."""

    def test_cve_2019_14271_nothing_is_opened_in_the_image_but_what_was_asked_for(self, lab, monkeypatch):
        evil = "open('/pwned', 'w').write('x')\n"
        where = {*sys.path, str(Path(os.__file__).parent), str(Path.cwd())}
        for directory in where:
            if directory.startswith("/"):
                place = lab.plant / directory.lstrip("/")
                place.mkdir(parents=True, exist_ok=True)
                for name in ("json", "idna", "traceback", "pwd", "grp", "wsgiref"):
                    (place / f"{name}.py").write_text(evil)
        (lab.plant / "etc").mkdir(exist_ok=True)
        (lab.plant / "etc/nsswitch.conf").write_text("passwd: evil files\ngroup: evil\n")
        container = lab.create(lab.spec("sleep", "60"), user="bob")
        maps = Path(f"/proc/{container.init.pid}/maps").read_text()
        assert not [line for line in maps.splitlines() if str(lab.plant) in line]
        container.start()
        for user in ("nobody-here", "bob", "bob:crew", "\u0660"):
            with contextlib.suppress(ExecFailed):
                lab.exec(container, "true", "", user=user)
        assert not (lab.upper / "pwned").exists()

    def test_cve_2019_14271_an_import_inside_fails(self, lab, monkeypatch, how):
        """Tried where privilege is still held, and the root is the image's."""
        place = lab.plant / next(path for path in sys.path if path.startswith("/")).lstrip("/")
        place.mkdir(parents=True)
        (place / "evilmodule.py").write_text("open('/pwned', 'w').write('x')\n")

        def become(*args, original=program.become):
            with contextlib.suppress(ImportError):
                __import__("evilmodule")
            with contextlib.suppress(LookupError):
                "x".encode("evilmodule")
            return original(*args)

        monkeypatch.setattr(program, "become", become)
        assert code_of(lab, how, "true", "") == 0
        assert not (lab.upper / "pwned").exists()
