"""Filters as a container feels them."""

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from support import elf
from support.requirements import needs

from corral.kernel.namespaces import Kind
from corral.oci import defaults
from corral.oci.errors import ExecFailed
from corral.oci.spec import Action, Mount, Namespace, Operator, Seccomp, SeccompArg, SeccompSyscall

pytestmark = needs("root", "overlayfs", "busybox")

NATIVE = ("SCMP_ARCH_X86_64",) if os.uname().machine == "x86_64" else ("SCMP_ARCH_AARCH64",)


def deny(*names: str, errno: int | None = None, args: tuple[SeccompArg, ...] = ()) -> Seccomp:
    rule = SeccompSyscall(names, Action.ERRNO, errno, args)
    return Seccomp(Action.ALLOW, architectures=NATIVE, syscalls=(rule,))


def test_a_denied_call_fails_with_its_errno(lab):
    seen = lab.run("mkdir /x", linux={"seccomp": deny("mkdir", "mkdirat", errno=28)}).output
    assert "No space left" in seen


def test_arguments_are_looked_at(lab):
    """kill(2) is denied for one signal only."""
    rule = SeccompArg(1, 12, Operator.EQ)
    script = "sleep 60 & kill -12 $! || echo refused; kill -9 $! && echo sent"
    assert lab.run(script, linux={"seccomp": deny("kill", args=(rule,))}).output.splitlines()[1:] == ["refused", "sent"]


def test_a_killing_action_kills(lab):
    rule = SeccompSyscall(("mkdir", "mkdirat"), Action.KILL_PROCESS)
    profile = Seccomp(Action.ALLOW, architectures=NATIVE, syscalls=(rule,))
    assert lab.run("mkdir", "/x", linux={"seccomp": profile}).code == -31


@pytest.mark.parametrize(
    ("action", "code"),
    [
        (Action.KILL_PROCESS, -31),
        (Action.KILL_THREAD, -31),
        (Action.KILL, -31),
        (Action.TRAP, -31),
        (Action.ERRNO, 1),
        (Action.TRACE, 1),  # nobody traces: ENOSYS
        (Action.LOG, 0),
        (Action.ALLOW, 0),
    ],
)
def test_every_action_does_what_its_name_says(lab, action, code):
    rule = SeccompSyscall(("mkdir", "mkdirat"), action)
    profile = Seccomp(Action.LOG, architectures=NATIVE, syscalls=(rule,))
    assert lab.run("mkdir", "/x", linux={"seccomp": profile}).code == code
    assert (lab.upper / "x").exists() is (code == 0)


@pytest.mark.parametrize(
    ("operator", "values", "refused"),
    [
        (Operator.NE, (10, 0), {8, 9, 11, 12}),
        (Operator.LT, (10, 0), {8, 9}),
        (Operator.LE, (10, 0), {8, 9, 10}),
        (Operator.EQ, (10, 0), {10}),
        (Operator.GE, (10, 0), {10, 11, 12}),
        (Operator.GT, (10, 0), {11, 12}),
        (Operator.MASKED_EQ, (9, 9), {9, 11}),
    ],
)
def test_every_operator_compares_as_its_name_says(lab, operator, values, refused):
    """kill(2) of a process that is not there, with signals 8 to 12."""
    profile = deny("kill", errno=28, args=(SeccompArg(1, values[0], operator, values[1]),))
    script = "for n in 8 9 10 11 12; do kill -$n 4000000 2>&1 | grep -q 'No space' && echo $n; done; true"
    assert set(map(int, lab.run(script, linux={"seccomp": profile}).output.split())) == refused


def test_a_call_that_nobody_knows_is_passed_over(lab):
    assert lab.run("echo fine", linux={"seccomp": deny("no_such_call", "mkdir")}).output == "fine\n"


class TestDefault:
    @pytest.mark.parametrize(
        "command",
        [
            "mount -t tmpfs none /tmp",
            "umount /proc",
            "unshare -m true",
            "unshare -U true",
            "hostname evil",
            "chroot / true; swapoff -a; reboot -f",
            "nsenter -t 1 -m true",
            "dmesg",
            "insmod /x",
            "pivot_root /tmp /tmp",
        ],
    )
    def test_refuses_what_would_reach_the_host(self, lab, command):
        result = lab.run(f"{command}; echo code=$?")
        assert "code=0" not in result.output

    def test_lets_ordinary_work_pass(self, lab):
        script = """
            set -e; cd /tmp; echo 1 > a; ln -s a b; mv a c; chmod 600 c; dd if=/dev/zero of=d bs=1k count=4 2>/dev/null
            sleep 0.01; (exit 3) || true; kill -0 $$; tar cf e.tar c d; tar xf e.tar; sync
            find / -xdev > f; su bob -c id; timeout 1 true; mkfifo p; (echo x > p &); cat p; wait; echo fine
        """
        assert lab.run(script).output.splitlines()[-1] == "fine"

    def test_with_every_capability_allows_to_mount(self, lab):
        held = ("CAP_SYS_ADMIN", *defaults.CAPABILITIES)
        spec = lab.spec("mount -t tmpfs none /tmp && echo mounted")
        capabilities = replace(spec.process.capabilities, bounding=held, effective=held, permitted=held)
        spec = replace(
            spec,
            process=replace(spec.process, capabilities=capabilities),
            linux=replace(spec.linux, seccomp=defaults.seccomp(held)),
        )
        assert lab.run_spec(spec).output == "mounted\n"


PROBE = r"""
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>
int main(int argc, char **argv) {
    long result = -2;
    if (!strcmp(argv[1], "x32")) result = syscall(0x40000000 | SYS_getpid);
    if (!strcmp(argv[1], "int80")) __asm__ volatile("int $0x80" : "=a"(result) : "a"(20) : "memory");
    if (!strcmp(argv[1], "alg")) result = socket(38, SOCK_SEQPACKET, 0);
    if (!strcmp(argv[1], "vsock")) result = socket(40, SOCK_STREAM, 0);
    if (!strcmp(argv[1], "unix")) result = socket(AF_UNIX, SOCK_STREAM, 0);
    if (!strcmp(argv[1], "young")) result = syscall(600);
    if (!strcmp(argv[1], "clone3")) result = syscall(435, 0, 0);
    if (!strcmp(argv[1], "keyctl")) result = syscall(SYS_keyctl, 0, -3, 0);
    if (!strcmp(argv[1], "io_uring")) result = syscall(425, 1, 0);
    if (!strcmp(argv[1], "userns")) result = syscall(SYS_clone, 0x10000000 | 17, 0, 0, 0, 0);
    printf("%d %d\n", result < 0 ? -1 : 1, result < 0 ? errno : 0);
    return 0;
}
"""


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A static program that makes one odd call."""
    if os.uname().machine != "x86_64" or shutil.which("gcc") is None:
        pytest.skip("needs gcc on x86_64")
    directory = tmp_path_factory.mktemp("probe")
    (directory / "probe.c").write_text(PROBE)
    command = ["gcc", "-static", "-O1", "-o", str(directory / "probe"), str(directory / "probe.c")]
    subprocess.run(command, check=True, capture_output=True)
    return directory / "probe"


class TestOddCalls:
    def call(self, lab, probe: Path, name: str, **linux: object):
        shutil.copy(probe, lab.plant / "probe")
        return lab.run("/probe", name, linux=linux or None)

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("alg", "-1 1"),  # AF_ALG
            ("vsock", "-1 1"),
            ("unix", "1 0"),
            ("young", "-1 38"),  # unknown to the profile: ENOSYS, so that libc falls back
            ("clone3", "-1 38"),
            ("keyctl", "-1 1"),
            ("io_uring", "-1 1"),
            ("userns", "-1 1"),
        ],
    )
    def test_get_their_errno(self, lab, probe, name, expected):
        assert self.call(lab, probe, name).output.strip() == expected

    def test_x32_kills(self, lab, probe):
        assert self.call(lab, probe, "x32").code == -31

    def test_32_bit_entry_kills_unless_listed(self, lab, probe):
        profile = defaults.seccomp(defaults.CAPABILITIES)
        assert self.call(lab, probe, "int80", seccomp=replace(profile, architectures=NATIVE)).code == -31
        assert self.call(lab, probe, "int80").code == 0


def test_a_filter_on_what_the_set_up_uses_last_does_not_stop_it(lab):
    """Without no_new_privs it is there before descriptors are closed and, in a joined PID namespace, before a fork."""
    first = lab.create(lab.spec("sleep", "60"))
    first.start()
    spec = lab.spec("echo", "there", no_new_privileges=False, linux={"seccomp": deny("close_range", "clone3")})
    joined = Namespace(Kind.PID, f"/proc/{first.init.pid}/ns/pid")
    namespaces = tuple(joined if n.type is Kind.PID else n for n in spec.linux.namespaces)
    spec = replace(spec, linux=replace(spec.linux, namespaces=namespaces))
    for name in ("upper2", "work2"):  # two overlays may not share an upper directory
        (lab.directory / name).mkdir()
    options = (f"lowerdir={lab.busybox}", f"upperdir={lab.directory}/upper2", f"workdir={lab.directory}/work2")
    root = Mount(type="overlay", source="overlay", options=options)
    assert lab.run_spec(spec, rootfs=[root]).output == "there\n"


@pytest.mark.parametrize("how", ["create", "exec"])
def test_a_filter_need_allow_no_more_than_execve_and_what_the_program_asks_for(lab, how):
    """What else is left to do by then is done by another filter's leave, and then both are there."""
    (lab.plant / "program").write_bytes(elf.program(elf.GET_EUID))
    (lab.plant / "program").chmod(0o755)
    allowed = SeccompSyscall(("execve", "geteuid", "exit"), Action.ALLOW)
    profile = Seccomp(Action.KILL_PROCESS, architectures=NATIVE, syscalls=(allowed,))
    if how == "create":
        assert lab.run("/program", "", user="7", linux={"seccomp": profile}).code == 7
        return
    container = lab.create(lab.spec("sleep", "60"))
    container.start()
    container.spec = replace(container.spec, linux=replace(container.spec.linux, seccomp=profile))
    for _ in range(2):
        assert lab.exec(container, "/program", "", user="7").code == 7


@pytest.mark.parametrize("how", ["create", "exec"])
def test_one_filter_is_loaded_unless_there_have_to_be_two(lab, how):
    def filters() -> str:
        count = "grep Seccomp_filters /proc/self/status | cut -f2"
        if how == "create":
            return lab.run(count, linux={"seccomp": profile}).output
        container = lab.create(lab.spec("sleep", "60", linux={"seccomp": profile}))
        container.start()
        return lab.exec(container, count).output

    profile = defaults.seccomp(defaults.CAPABILITIES)
    assert filters() == "1\n"
    for name in ("upper", "work"):  # an overlay may be mounted but once
        shutil.rmtree(lab.directory / name)
        (lab.directory / name).mkdir()
    profile = deny("mremap", "setsid")
    assert filters() == "2\n"


@pytest.mark.parametrize("action", [Action.ERRNO, Action.KILL_PROCESS])
@pytest.mark.parametrize("call", ["clone", "setsid"])
def test_an_exec_that_could_not_be_born_behind_its_filter_is_refused(lab, call, action):
    """Without no_new_privs it is loaded before that."""
    container = running(lab, Seccomp(Action.ALLOW, architectures=NATIVE, syscalls=(SeccompSyscall((call,), action),)))
    with pytest.raises(ExecFailed, match=f"linux.seccomp: it refuses {call}, which an exec needs"):
        lab.exec(container, "true", "", no_new_privileges=False)
    assert lab.exec(container, "true", "").code == 0


def test_one_that_its_filter_kills_is_told_of_as_such(lab):
    rule = SeccompSyscall(("capset",), Action.KILL_PROCESS)
    container = running(lab, Seccomp(Action.ALLOW, architectures=NATIVE, syscalls=(rule,)))
    with pytest.raises(ExecFailed, match=r"linux\.seccomp kills what calls"):
        lab.exec(container, "true", "", no_new_privileges=False)


@pytest.mark.parametrize("call", ["clone", "setsid"])
def test_one_that_is_logged_is_born(lab, call):
    rule = SeccompSyscall((call,), Action.LOG)
    container = running(lab, Seccomp(Action.ALLOW, architectures=NATIVE, syscalls=(rule,)))
    assert lab.exec(container, "true", "", no_new_privileges=False).code == 0


def running(lab, profile: Seccomp):
    container = lab.create(lab.spec("sleep", "60", linux={"seccomp": profile}))
    container.start()
    return container
