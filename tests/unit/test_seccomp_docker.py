"""The default profile beside docker's: what it allows beyond that, and why, is listed here; nothing else.

Docker's list is not kept here, only what it comes to: of each group of names, how many there are and a digest. From
ours and the differences listed here docker's must come out, name for name.

Source: github.com/moby/profiles, seccomp/default.json of 2026-05-06 (commit 3c28324314729dbade8287e868eef6338c42807a).
"""

import hashlib
from collections.abc import Iterable

import pytest

from corral.kernel.seccomp.tables import numbers
from corral.oci import defaults, seccomp_profile
from corral.oci.spec import Action, Operator

# Names allowed without a condition on arguments or machine: to all (""), or with a capability.
DOCKER = {
    "": (364, "d5f4bc7e088cfb02"),
    "CAP_BPF": (1, "92ff6a66f4f66779"),
    "CAP_DAC_READ_SEARCH": (1, "2ded0a7ad1c5b556"),
    "CAP_PERFMON": (1, "0ef2a122493c6f6a"),
    "CAP_SYSLOG": (1, "4d75f832ea2693e7"),
    "CAP_SYS_ADMIN": (26, "451fa186e93f0e81"),
    "CAP_SYS_BOOT": (1, "92bf8ea876da2855"),
    "CAP_SYS_CHROOT": (1, "854eaadd4121381f"),
    "CAP_SYS_MODULE": (3, "31d2593072ad377a"),
    "CAP_SYS_NICE": (4, "19c07a60281b0a1f"),
    "CAP_SYS_PACCT": (1, "def0b17f603285ef"),
    "CAP_SYS_PTRACE": (6, "456ffd0e47bed507"),
    "CAP_SYS_RAWIO": (2, "56da4919c9df3885"),
    "CAP_SYS_TIME": (4, "b9776bcae097af4d"),
    "CAP_SYS_TTY_CONFIG": (1, "0391fb5e7247fd6b"),
}

BEYOND = {
    "CAP_SYS_ADMIN": {"open_tree_attr": "what open_tree and mount_setattr do, in one; both come with the capability"},
}
"""What we allow and docker does not."""

MEANT = {
    "": {"riscv_hwprobe": "of a machine that corral does not run on"},
    "CAP_SYS_PTRACE": dict.fromkeys(
        ("ptrace", "process_vm_readv", "process_vm_writev"), "everybody's already: docker's, too, since Linux 4.8"
    ),
}
"""What docker allows and we do not, or not there."""


def digest(names: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:16]


def ours(group: str) -> set[str]:
    if group:
        return set(seccomp_profile.WITH_CAPABILITY[group].split())
    return {name for names in seccomp_profile.ALLOWED.values() for name in names.split()}


@pytest.mark.parametrize("group", DOCKER)
def test_names_are_dockers_but_for_what_is_listed(group):
    beyond, meant = set(BEYOND.get(group, ())), set(MEANT.get(group, ()))
    assert beyond <= ours(group)
    assert not meant & ours(group)
    docker = ours(group) - beyond | meant
    assert (len(docker), digest(docker)) == DOCKER[group]


def test_no_other_capability_brings_calls():
    assert set(seccomp_profile.WITH_CAPABILITY) == set(DOCKER) - {""}


def test_machines_have_the_calls_of_their_own_that_docker_gives_them():
    assert set(seccomp_profile.ARCHITECTURE_ONLY["x86_64"].split()) == {"arch_prctl", "modify_ldt"}
    arm = {"arm_fadvise64_64", "arm_sync_file_range", "breakpoint", "cacheflush", "set_tls", "sync_file_range2"}
    assert set(seccomp_profile.ARCHITECTURE_ONLY["aarch64"].split()) == arm


def test_the_profile_holds_nothing_but_these_tables():
    profile = defaults.seccomp(defaults.CAPABILITIES)
    allowed = {name for rule in profile.syscalls if not rule.args for name in rule.names if rule.action is Action.ALLOW}
    held = set().union(*(ours(group) for group in DOCKER if group in defaults.CAPABILITIES))
    machine = set().union(*(set(names.split()) for names in seccomp_profile.ARCHITECTURE_ONLY.values()))
    assert allowed - machine == ours("") | held
    assert {rule.names for rule in profile.syscalls if rule.args} == {("socket",), ("personality",), ("clone",)}
    assert (profile.default_action, profile.default_errno_ret) == (Action.ERRNO, 1)


def test_sockets_are_of_fewer_families():
    """Docker refuses AF_ALG and AF_VSOCK; we also refuse those that the kernel gave up, and those that are to come."""
    docker = {family for family in range(256) if family < 38 or family == 39 or family > 40}
    assert set(seccomp_profile.SOCKET_FAMILIES) < docker


def test_personalities_and_namespaces_are_the_same():
    profile = defaults.seccomp(defaults.CAPABILITIES)
    conditions = {rule.names[0]: rule.args for rule in profile.syscalls if rule.args}
    assert seccomp_profile.PERSONALITIES == (0, 8, 131072, 131080, 4294967295)
    (clone,) = conditions["clone"]
    assert (clone.index, clone.op, clone.value, clone.value_two) == (0, Operator.MASKED_EQ, 2114060288, 0)
    refused = {rule.names: rule.errno_ret for rule in profile.syscalls if rule.action is Action.ERRNO}
    assert refused == {("clone3",): 38}


def test_x32_is_not_allowed():
    """Docker lets x32 programs run; hardly a kernel has them, and few look at what they can reach."""
    assert not any(name == "SCMP_ARCH_X32" for name in defaults.seccomp(()).architectures)


def test_a_32_bit_program_gets_its_sockets_by_socketcall():
    """A gap that docker has, too (CVE-2026-31431): which family it asks for lies in memory, out of a filter's reach.

    Without the call glibc's 32-bit programs have no sockets at all: docker refused it in 29.4.2, and took that back.
    What can tell them apart is AppArmor or SELinux, by process.apparmorProfile and process.selinuxLabel.
    """
    assert "socketcall" in ours("")
    assert "socketcall" not in numbers("x86_64")
    assert "socketcall" not in numbers("aarch64")
