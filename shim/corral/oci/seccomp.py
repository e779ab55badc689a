"""From the seccomp section of config.json to a filter.

Source: runtime-spec config-linux.md "seccomp"; what it leaves open is as runc does it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from corral.kernel.process import CLONE_PARENT, CLONE_PIDFD
from corral.kernel.seccomp import Architecture, Compare, Condition, Filter, Profile, Rule, compile_profile, rules
from corral.kernel.syscalls import MACHINE
from corral.kernel.tty import TIOCSCTTY
from corral.oci.errors import SETUP, ExecFailed
from corral.oci.spec import Action, Operator, Seccomp, SeccompArg, SeccompSyscall

EPERM, ENOSYS = 1, 38
TELLING = "sendmsg"
"""The call by which a listener gets its descriptor."""

KNOWN_ARCHITECTURES = frozenset(
    f"SCMP_ARCH_{name}"
    for name in (
        *("X86", "X86_64", "X32", "ARM", "AARCH64", "MIPS", "MIPS64", "MIPS64N32", "MIPSEL", "MIPSEL64", "MIPSEL64N32"),
        *("PPC", "PPC64", "PPC64LE", "S390", "S390X", "PARISC", "PARISC64", "RISCV64", "LOONGARCH64"),
        *("M68K", "SH", "SHEB"),
    )
)
"""Those of the specification; most of them are about other machines."""

_FIONCLEX, _FIOCLEX, _PR_SET_DUMPABLE = 0x5450, 0x5451, 4
_PR_SET_PDEATHSIG = 1
_NATIVE = {"x86_64": Architecture.X86_64, "aarch64": Architecture.AARCH64}[MACHINE]
_ARCHITECTURES = {f"SCMP_ARCH_{architecture.name}": architecture for architecture in Architecture}
# Of the others only these can run here; the rest of a profile's list is about other machines.
_POSSIBLE = {
    Architecture.X86_64: (Architecture.X86_64, Architecture.X32, Architecture.X86),
    Architecture.AARCH64: (Architecture.AARCH64, Architecture.ARM),
}[_NATIVE]
_RETURNS = {
    Action.KILL_PROCESS: rules.KILL_PROCESS,
    Action.KILL_THREAD: rules.KILL_THREAD,
    Action.KILL: rules.KILL_THREAD,
    Action.TRAP: rules.TRAP,
    Action.ERRNO: rules.ERRNO,
    Action.TRACE: rules.TRACE,
    Action.ALLOW: rules.ALLOW,
    Action.LOG: rules.LOG,
    Action.NOTIFY: rules.NOTIFY,
}
_COMPARES = {
    Operator.NE: Compare.NE,
    Operator.LT: Compare.LT,
    Operator.LE: Compare.LE,
    Operator.EQ: Compare.EQ,
    Operator.GE: Compare.GE,
    Operator.GT: Compare.GT,
}


def asks(*names: str, first: int | None = None, second: int | None = None) -> Rule:
    """Calls that are to pass a filter: with any arguments, or with these."""
    known = ((0, first), (1, second))
    return Rule(names, rules.ALLOW, tuple(Condition(i, Compare.EQ, value) for i, value in known if value is not None))


UNTIL_EXECVE = (
    asks("clone", first=CLONE_PARENT),
    asks("clone", first=CLONE_PARENT | CLONE_PIDFD),
    asks("ioctl", second=TIOCSCTTY),
    asks("ioctl", second=_FIONCLEX),
    asks("ioctl", second=_FIOCLEX),
    asks("prctl", first=_PR_SET_DUMPABLE),
    asks("prctl", first=_PR_SET_PDEATHSIG),
    asks(
        *("accept4", "brk", "clock_gettime", "close", "close_range", "execve", "execveat", "exit_group", "fcntl"),
        *("fstat", "futex", "getpid", "getrandom", "getsockname", "getsockopt", "gettid", "madvise", "mmap"),
        *("mprotect", "mremap", "munmap", "newfstatat", "poll", "read", "recvfrom", "restart_syscall"),
        *("rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "seccomp", "sendmsg", "sendto", "setsid", "stat", "write"),
    ),
)
"""What corral.oci.init and join may still ask for once a process has no more than its program is to have."""


def filter_of(profile: Seccomp | None) -> Filter | None:
    """The compiled filter of a profile. Raises ValueError naming what can't be honoured."""
    if profile is None:
        return None
    return Filter(compile_profile(to_profile(profile)), _flags(profile))


def lets_pass(profile: Seccomp | None, wanted: Iterable[Rule]) -> bool:
    """Whether a filter allows all of what asks() names, and nobody is told of them."""
    if profile is None:
        return True
    if notifies(profile):
        return False
    asked = [(name, {c.index: c.value for c in rule.conditions}) for rule in wanted for name in rule.names]
    names = {name for name, _ in asked}
    said: dict[str, list[tuple[tuple[Condition, ...], Action]]] = {name: [] for name in names}
    for rule in profile.syscalls:
        for name in names.intersection(rule.names):
            said[name] += [(conditions, rule.action) for conditions in _alternatives(rule)]
    return all(_allow(said[name], known, profile.default_action) for name, known in asked)


def check_birth(profile: Seccomp) -> None:
    """Raise ExecFailed for a filter behind which no successor can be born, see corral.oci.init.go_on()."""
    default = profile.default_action
    rules = tuple(replace(rule, action=_passing(rule.action)) for rule in profile.syscalls)
    heard = replace(profile, default_action=_passing(default), syscalls=rules)
    for wanted in (asks("clone", first=CLONE_PARENT | CLONE_PIDFD), asks("setsid")):
        if not lets_pass(heard, [wanted]):
            why = "which an exec needs behind it unless process.noNewPrivileges is set"
            raise ExecFailed(SETUP, f"linux.seccomp: it refuses {wanted.names[0]}, {why}")


def _passing(action: Action) -> Action:
    """Whoever is told of a call may let it go on."""
    return Action.ALLOW if action in (Action.LOG, Action.NOTIFY) else action


def _allow(said: Iterable[tuple[tuple[Condition, ...], Action]], known: Mapping[int, int], otherwise: Action) -> bool:
    """Whether rules for a call allow it, as far as its arguments are known: all that may hold, and one that does."""
    allowed = otherwise is Action.ALLOW
    for conditions, action in said:
        if any(c.index in known and not c.holds(known[c.index]) for c in conditions):
            continue
        if action is not Action.ALLOW:
            return False
        allowed = allowed or all(c.index in known for c in conditions)
    return allowed


def filter_but_for(profile: Seccomp, wanted: tuple[Rule, ...]) -> Filter | None:
    """That of a profile with exceptions, what asks() names; None of one with a listener."""
    if notifies(profile):
        return None
    return Filter(compile_profile(replace(to_profile(profile), exceptions=wanted)), _flags(profile))


def to_profile(profile: Seccomp) -> Profile:
    """The profile in the compiler's terms."""
    if notifies(profile):
        _check_listener(profile)
    default = _return(profile.default_action, profile.default_errno_ret, "linux.seccomp.defaultAction")
    # A call younger than the profile must look like one the kernel lacks, else libc can't fall back to an older one.
    unknown = rules.ERRNO | ENOSYS if default == rules.ERRNO | EPERM else default
    return Profile(default, unknown, _architectures(profile), tuple(_rules(profile)))


def notifies(profile: Seccomp | None) -> bool:
    """Whether a listener is to answer some of the calls."""
    if profile is None:
        return False
    return profile.default_action is Action.NOTIFY or any(rule.action is Action.NOTIFY for rule in profile.syscalls)


def _check_listener(profile: Seccomp) -> None:
    if not profile.listener_path:
        raise ValueError("linux.seccomp.listenerPath: missing, for SCMP_ACT_NOTIFY")
    # The listener is told of the filter by a process that is under it: it can't be asked before it knows.
    if profile.default_action is Action.NOTIFY:
        raise ValueError("linux.seccomp.defaultAction: SCMP_ACT_NOTIFY can't be the default")
    for i, rule in enumerate(profile.syscalls):
        if rule.action is Action.NOTIFY and TELLING in rule.names:
            raise ValueError(f"linux.seccomp.syscalls[{i}].action: SCMP_ACT_NOTIFY can't be had for {TELLING}")


def _architectures(profile: Seccomp) -> tuple[Architecture, ...]:
    found = [_NATIVE]
    for i, name in enumerate(profile.architectures):
        if name not in KNOWN_ARCHITECTURES:
            raise ValueError(f"linux.seccomp.architectures[{i}]: unknown architecture {name!r}")
        architecture = _ARCHITECTURES.get(name)
        if architecture in _POSSIBLE and architecture not in found:
            found.append(architecture)
    return tuple(found)


def _rules(profile: Seccomp) -> list[Rule]:
    found: list[Rule] = []
    for i, rule in enumerate(profile.syscalls):
        action = _return(rule.action, rule.errno_ret, f"linux.seccomp.syscalls[{i}].action")
        found += [Rule(rule.names, action, conditions) for conditions in _alternatives(rule)]
    return found


def _alternatives(rule: SeccompSyscall) -> list[tuple[Condition, ...]]:
    """Conditions on different arguments must all hold; two on the same argument are alternatives (as in runc)."""
    conditions = tuple(_condition(argument) for argument in rule.args)
    if len({condition.index for condition in conditions}) < len(conditions):
        return [(condition,) for condition in conditions]
    return [conditions]


def _condition(argument: SeccompArg) -> Condition:
    if argument.op is Operator.MASKED_EQ:
        return Condition(argument.index, Compare.MASKED_EQ, argument.value_two, argument.value)
    return Condition(argument.index, _COMPARES[argument.op], argument.value)


def _return(action: Action, errno_ret: int | None, path: str) -> int:
    value = _RETURNS[action]
    if action in (Action.ERRNO, Action.TRACE):
        data = EPERM if errno_ret is None else errno_ret
        if data > 0xFFFF:
            raise ValueError(f"{path}: errnoRet {data} does not fit in 16 bits")
        return value | data
    if errno_ret:
        raise ValueError(f"{path}: {action.value} takes no errnoRet")
    return value


def _flags(profile: Seccomp) -> int:
    listener = rules.NEW_LISTENER if notifies(profile) else 0
    if not profile.flags:
        return rules.FLAGS["SECCOMP_FILTER_FLAG_SPEC_ALLOW"] | listener
    mask = listener
    for i, flag in enumerate(profile.flags):
        if flag not in rules.FLAGS:
            raise ValueError(f"linux.seccomp.flags[{i}]: unknown flag {flag!r}")
        mask |= rules.FLAGS[flag]
    if not listener:  # nobody to wait for, and the kernel would not have it
        mask &= ~rules.FLAGS["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]
    return mask & ~rules.FLAGS["SECCOMP_FILTER_FLAG_TSYNC"]  # one thread: nothing to synchronise
