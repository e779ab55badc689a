"""What stands between Python and a container's program: by itself, and as containers that corral-oci makes meet it."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.ocicommand import Runtime, runtime_in, wait_until
from support.requirements import needs

from corral.kernel import process, stone
from corral.kernel.namespaces import Kind
from corral.oci import defaults, stepping_stone
from corral.oci.spec import (
    Action,
    Capabilities,
    Hook,
    Hooks,
    Namespace,
    Operator,
    Seccomp,
    SeccompArg,
    SeccompSyscall,
    Spec,
    User,
)

pytestmark = [
    needs("root", "busybox", "cgroup"),
    pytest.mark.skipif(os.uname().machine not in stone.MACHINES, reason="a stone is for x86-64"),
]
ANSWERS = [(errno.ENOENT, b"missing"), (errno.EACCES, b"denied"), (errno.ENOEXEC, b"no program"), (0, b"other")]


type Start = Callable[..., Walker]
type Come = Callable[[], socket.socket]


class Walker:
    """A process that is a stone, and our ends of what it waits at."""

    def __init__(
        self,
        directory: Path,
        paths: list[str],
        *args: str,
        gate: str = "",
        succession: stone.Succession | None = None,
        stdin: int = subprocess.DEVNULL,
        deserted: bool = False,
    ) -> None:
        """deserted: by who has told it to start."""
        self.channel, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.channel.settimeout(10)
        if deserted:
            self.channel.send(b"start")
            self.channel.close()
        kept = [its.fileno()]
        listener = None
        if gate:
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            listener.bind(gate)
            listener.listen()
            kept.append(listener.fileno())
        file = directory / "stone"
        file.write_bytes(stone.image(kept[0], kept[1] if gate else None, ANSWERS, succession))
        file.chmod(0o755)
        self.process = subprocess.Popen(
            [*paths, "", *args], executable=file, pass_fds=kept, stdout=subprocess.PIPE, stdin=stdin,
            env={"A": "of the environment"},
        )  # fmt: skip
        its.close()
        if listener is not None:
            listener.close()

    def output(self) -> bytes:
        return self.process.communicate(timeout=10)[0]

    def close(self) -> None:
        self.channel.close()
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def walk(place: Path) -> Iterator[Callable[..., Walker]]:
    """Start a stone; what it left is ended."""
    with contextlib.ExitStack() as stack:
        yield lambda *words, **gate: stack.enter_context(contextlib.closing(Walker(place, *words, **gate)))


@pytest.fixture
def visit(place: Path) -> Iterator[Callable[[], socket.socket]]:
    """Come to the gate."""
    with contextlib.ExitStack() as stack:

        def come() -> socket.socket:
            visitor = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            visitor.settimeout(10)
            visitor.connect(str(place / "gate"))
            return visitor

        yield come


@pytest.fixture
def place(tmp_path: Path) -> Path:
    busybox = shutil.which("busybox")
    assert busybox is not None
    (tmp_path / "bin").mkdir()
    shutil.copy(busybox, tmp_path / "bin" / "sh")
    return tmp_path


class TestByItself:
    def test_it_becomes_the_program_with_its_arguments_and_environment_once_it_is_told_to(
        self, place: Path, walk: Start
    ) -> None:
        walker = walk([f"{place}/bin/sh"], "sh", "-c", 'echo "$A, $1, $#"', "x", "one", "")
        wait_until(lambda: Path(f"/proc/{walker.process.pid}/exe").readlink() == place / "stone")
        walker.channel.send(b"start")
        assert walker.output() == b"of the environment, one, 2\n"
        assert walker.channel.recv(100) == b""

    def test_the_program_gets_neither_the_channel_nor_the_gate(self, place: Path, walk: Start, visit: Come) -> None:
        walker = walk([f"{place}/bin/sh"], "sh", "-c", "ls -l /proc/self/fd", gate=str(place / "gate"))
        walker.channel.send(b"start")
        visit().send(b"start")
        assert b"socket" not in walker.output()

    def test_it_ends_if_nobody_is_left_to_tell_it(self, place: Path, walk: Start) -> None:
        walker = walk([f"{place}/bin/sh"], "sh")
        walker.channel.close()
        assert walker.process.wait(10) == 1
        walker = walk([f"{place}/bin/sh"], "sh", gate=str(place / "gate"))
        walker.channel.close()
        assert walker.process.wait(10) == 1

    def test_at_a_gate_it_waits_for_who_says_so_and_tells_that_one(self, place: Path, walk: Start, visit: Come) -> None:
        walker = walk([f"{place}/bin/sh"], "sh", "-c", "echo ran", gate=str(place / "gate"))
        walker.channel.send(b"start")
        assert walker.channel.recv(100) == b""  # it has let go of the runtime
        visit().close()
        visit().close()
        visitor = visit()
        visitor.send(b"start")
        assert visitor.recv(100) == b""
        assert walker.output() == b"ran\n"
        with pytest.raises(ConnectionRefusedError):
            visit()

    def test_paths_are_tried_in_their_order(self, place: Path, walk: Start) -> None:
        (place / "file").touch()
        tried = [f"{place}/no/sh", f"{place}/file/sh", f"{place}/file", f"{place}/bin/sh", f"{place}/never"]
        walker = walk(tried, "sh", "-c", "echo ran")
        walker.channel.send(b"start")
        assert walker.output() == b"ran\n"

    def test_a_successor_goes_on_in_its_place_in_a_session_of_its_own(self, place: Path, walk: Start) -> None:
        command = [f"{place}/bin/sh"], "sh", "-c", "echo $$"
        walker = walk(*command, succession=stone.Succession())
        pid = int.from_bytes(walker.channel.recv(100), "little")
        assert walker.process.wait(10) == 0
        walker.channel.send(b"start")
        assert walker.output() == b"%d\n" % pid
        assert walker.channel.recv(100) == b""
        assert os.waitpid(pid, 0) == (pid, 0)

    def test_a_successor_says_itself_what_keeps_it_from_the_program(self, place: Path, walk: Start) -> None:
        walker = walk([f"{place}/none"], "sh", succession=stone.Succession())
        pid = int.from_bytes(walker.channel.recv(100), "little")
        walker.channel.send(b"start")
        assert walker.channel.recv(100) == b"missing"
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1

    @pytest.mark.parametrize("refusal", [b"refused", None])
    def test_a_successor_has_a_controlling_terminal_if_it_is_to(
        self, place: Path, walk: Start, refusal: bytes | None
    ) -> None:
        master, slave = os.openpty()
        walker = walk([f"{place}/bin/sh"], "sh", succession=stone.Succession(refusal), stdin=slave)
        pid = int.from_bytes(walker.channel.recv(100), "little")
        wait_until(lambda: Path(f"/proc/{pid}/syscall").read_text().startswith("0 "))  # read(2), for start
        held = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[4]
        assert (int(held) == os.fstat(slave).st_rdev) is (refusal is not None)
        walker.channel.close()
        os.waitpid(pid, 0)
        os.close(master)
        os.close(slave)

    def test_a_successor_that_cannot_have_its_terminal_says_so(self, place: Path, walk: Start) -> None:
        walker = walk([f"{place}/bin/sh"], "sh", succession=stone.Succession(b"refused"))
        pid = int.from_bytes(walker.channel.recv(100), "little")
        assert walker.channel.recv(100) == b"refused"
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1

    @pytest.mark.parametrize("mortal", [True, False])
    def test_a_mortal_successor_of_a_runtime_that_ended_before_it_was_born_is_not_the_program(
        self, place: Path, walk: Start, mortal: bool
    ) -> None:
        succession = stone.Succession(mortal=mortal)
        walker = walk([f"{place}/bin/sh"], "sh", "-c", "echo ran", succession=succession, deserted=True)
        assert walker.output() == (b"" if mortal else b"ran\n")
        os.wait()

    @pytest.mark.parametrize("succession", [stone.Succession(), None])
    def test_one_that_is_its_own_program_fails(
        self, place: Path, walk: Start, succession: stone.Succession | None
    ) -> None:
        walker = walk(["/proc/self/exe"], "sh", "", succession=succession)
        if succession is None:
            walker.channel.send(b"start")
            assert walker.process.wait(10) == 1
            return
        pid = int.from_bytes(walker.channel.recv(100), "little")
        walker.channel.send(b"start")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1

    @pytest.mark.parametrize("mortal", [True, False])
    def test_a_mortal_successor_is_killed_when_the_runtime_ends(self, place: Path, walk: Start, mortal: bool) -> None:
        ours, theirs = os.pipe()
        runtime, _ = process.clone(0)
        if runtime == 0:
            try:
                succession = stone.Succession(mortal=mortal)
                walker = walk([f"{place}/bin/sh"], "sh", "-c", "exec 1>&-; kill -STOP $$", succession=succession)
                pid = walker.channel.recv(100)
                walker.channel.send(b"start")
                assert walker.channel.recv(100) == b""
                os.write(theirs, pid)
                os.kill(os.getpid(), signal.SIGKILL)
            finally:
                os._exit(1)
        os.close(theirs)
        os.waitpid(runtime, 0)
        pid = int.from_bytes(os.read(ours, 100), "little")
        assert process.is_dying(pid) is mortal
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.close(ours)

    @pytest.mark.parametrize(
        ("tried", "answer"),
        [
            (["none"], b"missing"),
            (["file/none", "none"], b"missing"),
            (["file", "none"], b"denied"),
            (["none", "text", "bin/sh"], b"no program"),
            (["loop"], b"other"),
            ([], b"missing"),
        ],
    )
    def test_it_answers_what_kept_it_from_the_program(
        self, place: Path, walk: Start, tried: list[str], answer: bytes
    ) -> None:
        (place / "file").touch()
        (place / "text").write_text("no shebang")
        (place / "text").chmod(0o755)
        (place / "loop").symlink_to("loop")
        walker = walk([f"{place}/{name}" for name in tried], "sh")
        walker.channel.send(b"start")
        assert walker.channel.recv(100) == answer
        assert walker.process.wait(10) == 1


class TestWhatSuits:
    @pytest.fixture
    def spec(self, lab) -> Spec:
        return lab.spec("true")

    def test_a_typical_container_does(self, spec: Spec) -> None:
        assert stepping_stone.suits(spec)
        assert stepping_stone.suits(replace(spec, linux=replace(spec.linux, seccomp=None)))

    @pytest.mark.parametrize("call", [*stone.CALLS, "execveat"])
    def test_a_filter_that_does_not_let_it_pass_does_not(self, spec: Spec, call: str) -> None:
        condition = SeccompArg(0, 1, Operator.EQ)
        profile = defaults.seccomp(defaults.CAPABILITIES)
        without = replace(
            profile,
            syscalls=tuple(
                replace(rule, names=tuple(name for name in rule.names if name != call)) for rule in profile.syscalls
            ),
        )
        denied = Seccomp(Action.ALLOW, syscalls=(SeccompSyscall((call,), Action.ERRNO),))
        logged = Seccomp(Action.ALLOW, syscalls=(SeccompSyscall((call,), Action.NOTIFY),))
        at_times = Seccomp(Action.ERRNO, syscalls=(SeccompSyscall((call,), Action.ALLOW, args=(condition,)),))
        for each in (without, denied, logged, at_times):
            assert not stepping_stone.suits(replace(spec, linux=replace(spec.linux, seccomp=each)))

    def test_what_an_execve_takes_away_or_changes_does_not(self, spec: Spec) -> None:
        held = Capabilities(effective=("CAP_DAC_OVERRIDE",), permitted=("CAP_DAC_OVERRIDE",))
        user = User(uid=1000, gid=1000)
        assert stepping_stone.suits(replace(spec, process=replace(spec.process, user=user, capabilities=None)))
        for change in (
            {"user": user, "capabilities": held},
            {"selinux_label": "system_u:system_r:container_t:s0"},
            {"apparmor_profile": "docker-default"},
        ):
            assert not stepping_stone.suits(replace(spec, process=replace(spec.process, **change)))

    def test_others_in_the_pid_namespace_and_hooks_inside_do_not(self, spec: Spec) -> None:
        def with_namespaces(*namespaces: Namespace) -> Spec:
            others = [each for each in spec.linux.namespaces if each.type not in {one.type for one in namespaces}]
            return replace(spec, linux=replace(spec.linux, namespaces=(*others, *namespaces)))

        assert not stepping_stone.suits(with_namespaces(Namespace(Kind.PID, "/proc/1/ns/pid")))
        assert not stepping_stone.suits(with_namespaces(Namespace(Kind.USER)))
        hook = (Hook("/bin/true"),)
        assert stepping_stone.suits(replace(spec, hooks=Hooks(prestart=hook, poststart=hook)))
        assert not stepping_stone.suits(replace(spec, hooks=Hooks(start_container=hook)))
        assert not stepping_stone.suits(replace(spec, hooks=Hooks(create_container=hook)))


@pytest.fixture
def oci(tmp_path: Path) -> Iterator[Runtime]:
    with runtime_in(tmp_path) as runtime:
        yield runtime


def exe_of(oci: Runtime, name: str) -> int:
    return os.open(f"/proc/{oci.state(name)['pid']}/exe", os.O_RDONLY)


class TestContainers:
    def test_an_init_that_waits_for_start_is_no_interpreter_and_its_file_is_sealed(self, oci: Runtime) -> None:
        name = oci.new_id()
        oci.write("sleep", "1000")
        oci.detached("create", name)
        fd = exe_of(oci, name)
        assert "memfd:corral-init" in os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115
        assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE
        os.close(fd)
        assert oci.status(name) == "created"
        oci.ok("start", name)
        wait_until(lambda: Path(f"/proc/{oci.state(name)['pid']}/comm").read_text() == "sleep\n")

    @pytest.mark.parametrize("form", ["link", "script"])
    def test_cve_2019_5736_a_program_that_is_the_runtime_is_but_the_stone(self, oci: Runtime, form: str) -> None:
        """Were it Python, it would print its version; were it to run for long, its file could be had."""
        evil = oci.bundle / "rootfs" / "evil"
        if form == "link":
            evil.symlink_to("/proc/self/exe")
        else:
            evil.write_text("#!/proc/self/exe\n")
            evil.chmod(0o755)
        oci.write("/evil", "--version")
        result = oci.call("run", oci.new_id())
        assert "Python" not in result.stdout + result.stderr
        assert result.returncode != 0

    def test_a_container_that_it_does_not_suit_gets_a_sealed_interpreter(self, oci: Runtime) -> None:
        name = oci.new_id()
        spec = oci.spec("sleep", "1000")
        hook = {"path": "/bin/true"}
        oci.write_spec(spec | {"hooks": {"createContainer": [hook]}})
        oci.detached("create", name)
        fd = exe_of(oci, name)
        assert os.path.samestat(os.fstat(fd), os.stat("/proc/self/exe"))  # noqa: PTH116
        assert os.fstatvfs(fd).f_flag & os.ST_RDONLY or fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE
        os.close(fd)

    @pytest.mark.parametrize("command", ["run", "create"])
    def test_a_missing_program_is_told_of_as_ever(self, oci: Runtime, command: str) -> None:
        oci.write("no-such-program", "x")
        result = oci.call(command, oci.new_id())
        assert result.returncode == 1
        assert r"exec: \"no-such-program\": executable file not found in $PATH" in result.stderr
        assert json.loads(oci.ok("list", "--format", "json")) in (None, [])

    def test_a_file_that_is_no_program_is_told_of_as_ever(self, oci: Runtime) -> None:
        (oci.bundle / "rootfs" / "text").write_text("no shebang")
        (oci.bundle / "rootfs" / "text").chmod(0o755)
        oci.write("/text", "x")
        result = oci.call("run", oci.new_id())
        assert result.returncode == 1
        assert r"exec: \"/text\": exec format error" in result.stderr

    def test_a_program_is_executed_with_the_capabilities_it_is_to_have(self, oci: Runtime) -> None:
        held = {"bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"]}
        for user, effective in (({"uid": 0, "gid": 0}, 1 << 5), ({"uid": 1000, "gid": 1000}, 0)):
            oci.write("cat", "/proc/self/status", user=user, capabilities=held)
            seen = dict(line.split(":\t", 1) for line in oci.ok("run", oci.new_id()).splitlines() if ":\t" in line)
            assert int(seen["CapEff"], 16) == effective
            assert int(seen["CapBnd"], 16) == 1 << 5
