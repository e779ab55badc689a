"""Attacks on what the runtime has in a container's PID namespace before it is the program, by who may trace there.

Whoever holds CAP_SYS_PTRACE guides and reads what he sees, be it dumpable or not. What a filter forbids him he must not
get by the hands of such a process, nor anything that is the host's.
"""

import contextlib
import json
import os
import re
import select
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import pytest
from support.requirements import needs

from corral.kernel import process
from corral.kernel.namespaces import Kind
from corral.kernel.syscalls import MACHINE
from corral.oci import attendance, channel, crossing, defaults, join_calls, joining
from corral.oci.channel import ParentEnd
from corral.oci.errors import SETUP, ExecFailed
from corral.oci.runtime import Container, Stdio
from corral.oci.spec import Action, Capabilities, Mount, Namespace, Seccomp, SeccompSyscall, Spec

pytestmark = [
    needs("root", "overlayfs", "busybox"),
    pytest.mark.skipif(MACHINE != "x86_64", reason="needs x86_64"),
]

HELD = (*defaults.CAPABILITIES, "CAP_SYS_PTRACE")
REFUSED = -1
"""EPERM."""

ATTACK = r"""
import ctypes, os, sys
libc = ctypes.CDLL(None)
libc.ptrace.restype = ctypes.c_long
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
PEEK, CONTINUE, STEP, GETREGS, SETREGS, DETACH, SEIZE, INTERRUPT = 1, 7, 9, 12, 13, 17, 0x4206, 0x4207
SYSCALL = 0x050F  # the instruction
RAX, RDI, ORIG_RAX, RIP = 10, 14, 15, 16
UNSHARE, NEW_USER_NAMESPACE, EVERY_THREAD = 272, 0x10000000, 0x40000000
def guide(pid):
    if libc.ptrace(SEIZE, pid, None, None):
        return None
    before, changed = (ctypes.c_ulong * 27)(), (ctypes.c_ulong * 27)()
    while True:
        libc.ptrace(INTERRUPT, pid, None, None)
        if not os.WIFSTOPPED(os.waitpid(pid, EVERY_THREAD)[1]):
            return None
        if sys.argv[3:]:
            print("holds", flush=True)
            os.waitpid(pid, EVERY_THREAD)
            print("lost", flush=True)
            return None
        for registers in before, changed:
            libc.ptrace(GETREGS, pid, None, registers)
        changed[RIP] -= 2
        if libc.ptrace(PEEK, pid, changed[RIP], None) & 0xFFFF == SYSCALL:
            break
        libc.ptrace(CONTINUE, pid, None, None)
    executable = os.readlink(f"/proc/{pid}/exe")
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb") as memory:
        readable = [line.split()[0].split("-") for line in maps if " r" in line and "[v" not in line]
        found = False
        for begin, end in readable:
            memory.seek(int(begin, 16))
            found = found or SECRET in memory.read(int(end, 16) - int(begin, 16))
    changed[RAX], changed[ORIG_RAX], changed[RDI] = UNSHARE, 2**64 - 1, NEW_USER_NAMESPACE
    libc.ptrace(SETREGS, pid, None, changed)
    libc.ptrace(STEP, pid, None, None)
    os.waitpid(pid, EVERY_THREAD)
    libc.ptrace(GETREGS, pid, None, changed)
    libc.ptrace(SETREGS, pid, None, before)
    libc.ptrace(DETACH, pid, None, None)
    return executable, "knows" if found else "is innocent", ctypes.c_long(changed[RAX]).value
SECRET = sys.argv[2][::-1].encode()
met = {os.getpid()}
print("watching", flush=True)
while True:
    for pid in range(int(sys.argv[1]), 60):
        if pid not in met and (result := guide(pid)) is not None:
            met.add(pid)
            print("guided", *result, flush=True)
"""
"""Has every process that appears, be it just born, make a user namespace, and tells what came of it.

And whether it has something in memory, which is told backwards, and what executable it is. Or else it holds it.
"""
SECRET = "".join(("of the ", "runtime's own ", "memory"))


class Attacker:
    """A process in a container that does ATTACK."""

    def __init__(self, reader: int) -> None:
        self._reader, self._heard = reader, ""

    def hears(self, pattern: str) -> re.Match[str]:
        """What it says next that is like this."""
        while (found := re.search(pattern, self._heard)) is None:
            assert select.select([self._reader], [], [], 20)[0], f"only heard {self._heard!r}"
            data = os.read(self._reader, 4096)
            assert data, self._heard
            self._heard += data.decode()
        self._heard = self._heard[found.end() :]
        return found

    def result(self) -> "Met":
        """The next one that it met."""
        found = self.hears(r"guided (.*) (knows|is innocent) (-?\d+)\n")
        return Met(found[1], found[2] == "knows", int(found[3]))


class Met(NamedTuple):
    executable: str
    knows: bool
    """It has the runtime's secret in memory."""
    got: int
    """What the forbidden call gave."""


def attack(first: int) -> tuple[str, ...]:
    """Against processes from this number on."""
    return (sys.executable, "-I", "-S", "-c", ATTACK, str(first), SECRET[::-1])


def tracing(lab, *args: str, profile: Seccomp | None = None, **changes: object) -> Spec:
    """May trace, and is filtered as usual."""
    sets = Capabilities(bounding=HELD, effective=HELD, permitted=HELD)
    return lab.spec(*args, linux={"seccomp": profile or defaults.seccomp(HELD)}, capabilities=sets, **changes)


HOSTS_ROOT = [Mount(type="bind", source="/", options=("rbind", "ro"))]
"""The interpreter is in there."""


@pytest.fixture
def listening() -> Iterator[tuple[Stdio, Attacker]]:
    reader, writer = os.pipe()
    yield Stdio(None, writer, writer), Attacker(reader)
    os.close(reader)
    os.close(writer)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Have the runtime take its time before it lets a process become its program: until this returns."""

    def delay(until: Callable[[], object]) -> None:
        original = ParentEnd.send_start

        def send_start(end: ParentEnd) -> None:
            until()
            original(end)

        monkeypatch.setattr(ParentEnd, "send_start", send_start)

    return delay


@pytest.fixture
def attacked(lab, listening) -> tuple[Container, Attacker]:
    """A container that waits for others to appear in its PID namespace."""
    stdio, attacker = listening
    container = lab.create(tracing(lab, *attack(2)), rootfs=HOSTS_ROOT, stdio=stdio)
    container.start()
    attacker.hears("watching")
    return container, attacker


def without(*names: str) -> Seccomp:
    """The usual filter, but that some calls kill."""
    profile = defaults.seccomp(HELD)
    return replace(profile, syscalls=(SeccompSyscall(names, Action.KILL_PROCESS), *profile.syscalls))


SMALL = Met("/memfd:corral-init (deleted)", knows=False, got=REFUSED)
"""A few hundred bytes with nothing of the runtime in memory."""
PYTHON = SMALL._replace(executable=os.path.realpath(sys.executable), knows=True)
"""A fork of the runtime, which has its memory."""


@pytest.mark.parametrize("no_new_privileges", [True, False])
def test_an_exec_that_is_guided_from_its_birth_does_nothing_that_is_forbidden(lab, attacked, slow, no_new_privileges):
    """The first one's predecessor is Python, those of others are not."""
    container, attacker = attacked
    met: list[Met] = []
    slow(lambda: met.append(attacker.result()))
    for _ in range(3):
        assert lab.exec(container, "/bin/true", "", no_new_privileges=no_new_privileges).code == 0
    assert met == [SMALL] * 3


@pytest.mark.parametrize("by_calls", [True, False])
def test_who_has_taken_its_end_of_the_channel_holds_up_nobody(lab, monkeypatch, by_calls):
    """As pidfd_getfd(2) gives it to who may trace."""
    container = lab.create(lab.spec("/bin/sleep", "60"), rootfs=HOSTS_ROOT)
    container.start()
    taken: list[int] = []

    def make(original=channel.make_pair):
        pair = original()
        taken.append(os.dup(pair[1].fileno()))
        return pair

    for module in (attendance, join_calls):
        monkeypatch.setattr(module, "make_pair", make)
    try:
        for _ in range(2):
            if not by_calls:
                container.sightings.clear()
            assert lab.exec(container, "/bin/true", "").code == 0
        assert bool(container.files) is by_calls
        assert len(taken) == 2
    finally:
        for fd in taken:
            os.close(fd)


@pytest.mark.parametrize("by_calls", [True, False])
@pytest.mark.parametrize("said", [REFUSED.to_bytes(8, "little", signed=True), b'{"error":"exec_not_found"}', b""])
def test_what_such_a_one_says_of_a_program_that_runs_is_not_heeded(lab, monkeypatch, by_calls, said):
    """Nor is it executed once more."""
    monkeypatch.setattr(channel, "LOOK_S", 15)
    container = lab.create(lab.spec("/bin/sleep", "60"), rootfs=HOSTS_ROOT)
    container.start()
    if by_calls:
        assert lab.exec(container, "/bin/true", "").code == 0
    with piped() as (reader, writer), spoken_for(monkeypatch, said, lambda: os.read(reader, 100)):
        handle = container.exec(lab.process("echo ran; exec sleep 60"), stdio=Stdio(None, writer, writer))
        lab.made.append(handle)
        assert bool(container.files) is by_calls
        assert not select.select([reader], [], [], 0)[0], "it ran once"
        assert not process.is_dying(handle.pid)


@pytest.mark.parametrize("number", [3, 4, 10, 11, 32, 104, 110])
def test_what_such_a_one_says_is_but_a_sentence(lab, monkeypatch, number):
    container = lab.create(lab.spec("/bin/sleep", "60"), rootfs=HOSTS_ROOT)
    container.start()
    said = json.dumps({"error": SETUP, "errno": number, "message": "forged \ud800"}).encode()
    with (
        spoken_for(monkeypatch, said, lambda: None, wait=True),
        pytest.raises(ExecFailed, match=r"^forged \?$") as failed,
    ):
        lab.exec(container, "/bin/true", "")
    assert failed.value.kind == SETUP


@contextlib.contextmanager
def piped() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    try:
        yield reader, writer
    finally:
        os.close(reader)
        os.close(writer)


@contextlib.contextmanager
def spoken_for(
    monkeypatch: pytest.MonkeyPatch, said: bytes, when: Callable[[], object], *, wait: bool = False
) -> Iterator[None]:
    """Have somebody who has a process's end of the channel say this there, once that returns."""
    speakers: list[int] = []

    def make(original=channel.make_pair):
        pair = original()
        pid, pidfd = process.clone(0)
        if pid == 0:
            try:
                when()
                with socket.socket(fileno=pair[1].fileno()) as end:
                    end.send(said)
            finally:
                os._exit(0)
        if wait:
            select.select([pidfd], [], [])
        os.close(pidfd)
        speakers.append(pid)
        return pair

    with monkeypatch.context() as patch:
        for module in (attendance, join_calls):
            patch.setattr(module, "make_pair", make)
        yield
    for pid in speakers:
        os.waitpid(pid, 0)


def test_who_traces_one_and_does_not_let_it_go_holds_up_nobody(lab, listening, slow, monkeypatch):
    stdio, attacker = listening
    container = lab.create(tracing(lab, *attack(2), "hold"), rootfs=HOSTS_ROOT, stdio=stdio)
    container.start()
    attacker.hears("watching")
    slow(lambda: attacker.hears("holds"))
    for module in (joining, join_calls):
        monkeypatch.setattr(module, "SETUP_S", 1000)
    for _ in range(2):
        with pytest.raises(ExecFailed, match="was traced during its set-up"):
            lab.exec(container, "/bin/true", "")
        attacker.hears("lost")  # until then its parent can't reap it
    assert container.files.of_use
    while os.waitpid(-1, os.WNOHANG)[0]:
        pass


@pytest.mark.parametrize("denied", ["setsid", "clone"])
def test_nor_does_one_whose_filter_would_not_let_it_become_its_program(lab, attacked, slow, denied):
    """What it needs until then is all that it may do beyond the filter, which is loaded in the end as well."""
    container, attacker = attacked
    container.spec = replace(container.spec, linux=replace(container.spec.linux, seccomp=without(denied)))
    met: list[Met] = []
    slow(lambda: met.append(attacker.result()))
    for _ in range(2):
        lab.exec(container, "/bin/true", "")
    assert met == [PYTHON] * 2


def test_where_such_a_program_does_not_run_there_is_python_in_its_place(lab, attacked, slow, monkeypatch):
    container, attacker = attacked
    monkeypatch.setattr(crossing.stone, "image", lambda *args: b"no program")
    met: list[Met] = []
    slow(lambda: met.append(attacker.result()))
    opened = lab.exec(container, sys.executable, "-c", "import os; print(os.listdir('/proc/self/fd'))").output
    assert met == [PYTHON]
    assert opened == "['0', '1', '2', '3']\n"  # 3: its own


@pytest.mark.parametrize("denied", [(), ("setsid",)])
def test_nor_does_what_comes_by_joining_its_pid_namespace(lab, attacked, denied):
    container, attacker = attacked
    spec = tracing(lab, "/bin/true", "", profile=without(*denied) if denied else None)
    joined = Namespace(Kind.PID, f"/proc/{container.init.pid}/ns/pid")
    kinds = tuple(joined if namespace.type is Kind.PID else namespace for namespace in spec.linux.namespaces)
    lab.create(replace(spec, linux=replace(spec.linux, namespaces=kinds)), rootfs=HOSTS_ROOT)
    assert attacker.result() == (PYTHON if denied else SMALL)


@pytest.mark.parametrize("denied", [(), ("setsid",)])
def test_nor_does_an_init_that_waits_for_start_by_an_exec(lab, listening, denied):
    stdio, attacker = listening
    spec = tracing(lab, "/bin/true", "", profile=without(*denied) if denied else None)
    container = lab.create(spec, rootfs=HOSTS_ROOT)
    lab.made.append(container.exec(replace(spec.process, args=attack(1)), stdio=stdio))
    assert attacker.result() == PYTHON
    container.start()
