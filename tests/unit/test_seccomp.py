"""The seccomp compiler: its programs are run by a small BPF machine and compared with the rules they come from."""

import functools
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.bpf import run

from corral.kernel.seccomp import Architecture, Compare, Condition, Profile, Rule, compile_profile, rules
from corral.kernel.seccomp.compiler import decode, fates
from corral.kernel.seccomp.tables import numbers
from corral.kernel.syscalls import MACHINE
from corral.oci import defaults, seccomp_profile
from corral.oci.program import program_of
from corral.oci.seccomp import _RETURNS, KNOWN_ARCHITECTURES, asks, filter_of, to_profile
from corral.oci.spec import Action, Linux, Operator, Process, Seccomp, SeccompArg, SeccompSyscall

X32_BIT = 0x40000000
HEADERS = Path("/usr/include/x86_64-linux-gnu/asm")
EPERM, ENOSYS = rules.ERRNO | 1, rules.ERRNO | 38
READ, WRITE = "read", "write"


def holds(condition: Condition, arguments: tuple[int, ...]) -> bool:
    value, wanted = arguments[condition.index], condition.value
    match condition.compare:
        case Compare.EQ:
            return value == wanted
        case Compare.NE:
            return value != wanted
        case Compare.LT:
            return value < wanted
        case Compare.LE:
            return value <= wanted
        case Compare.GE:
            return value >= wanted
        case Compare.GT:
            return value > wanted
        case Compare.MASKED_EQ:
            return value & condition.mask == wanted


cached_fates = functools.lru_cache(fates)


def expected(profile: Profile, architecture: Architecture, number: int, arguments: tuple[int, ...]) -> int:
    by_number = cached_fates(profile, architecture)
    if number > max(by_number, default=-1):
        return profile.unknown
    for conditions, action in by_number.get(number, ()):
        if all(holds(condition, arguments) for condition in conditions):
            return action
    return profile.default


words64 = st.one_of(
    st.integers(0, 3),
    st.integers(0, 2**64 - 1),
    st.sampled_from([2**32 - 1, 2**32, 2**32 + 1, 2**63, 2**64 - 1, 0x7E020000]),
)
conditions = st.builds(Condition, st.integers(0, 5), st.sampled_from(Compare), words64, words64)
actions = st.sampled_from([rules.ALLOW, rules.LOG, rules.TRAP, rules.KILL_THREAD, EPERM, rules.ERRNO | 22])
names = st.lists(st.sampled_from(sorted(numbers("x86_64"))), min_size=1, max_size=20, unique=True).map(tuple)
some_rules = st.lists(st.builds(Rule, names, actions, st.lists(conditions, max_size=3).map(tuple)), max_size=12)


class TestCompiler:
    @settings(max_examples=100, deadline=None)
    @given(
        some_rules,
        st.sets(st.sampled_from([Architecture.X86, Architecture.X32])),
        actions,
        st.lists(st.tuples(st.integers(0, 500), st.tuples(*[words64] * 6)), min_size=5, max_size=12),
    )
    def test_does_what_the_rules_say(self, some, others, default, calls):
        profile = Profile(default, ENOSYS, (Architecture.X86_64, *sorted(others, key=str)), tuple(some))
        program = compile_profile(profile)
        interesting = [value for rule in some for c in rule.conditions for value in (c.value, c.value + 1)]
        for number, arguments in calls:
            for value in [None, *interesting[:4]]:
                given_ = arguments if value is None else (value % 2**64,) * 6
                for architecture in Architecture:
                    if architecture is Architecture.X32:
                        result = run(program, Architecture.X86_64.value, number | X32_BIT, given_)
                        listed = Architecture.X32 in others
                        wanted = expected(profile, architecture, number | X32_BIT, given_) if listed else None
                    else:
                        result = run(program, architecture.value, number, given_)
                        listed = architecture in profile.architectures
                        wanted = expected(profile, architecture, number, given_) if listed else None
                    assert result == (rules.KILL_PROCESS if wanted is None else wanted)

    @settings(max_examples=50, deadline=None)
    @given(some_rules, actions, st.lists(st.tuples(st.integers(0, 400), st.tuples(*[words64] * 6)), min_size=5))
    def test_exceptions_are_allowed_whatever_the_rules_say_and_nothing_else_is(self, some, default, calls):
        exceptions = (asks("read", "setsid"), asks("clone", first=0x8000), asks("ioctl", second=1))
        profile = Profile(default, default, (Architecture.X86_64, Architecture.X86), tuple(some))
        with_them = compile_profile(replace(profile, exceptions=exceptions))
        program, table = compile_profile(profile), numbers("x86_64")
        for name, given_ in (("read", ()), ("setsid", (9,)), ("clone", (0x8000,)), ("ioctl", (5, 1))):
            assert run(with_them, Architecture.X86_64.value, table[name], given_) == rules.ALLOW
        some_of_these = [(table["clone"], (0x10008000, *[0] * 5)), (table["ioctl"], (1, 2, *[0] * 4))]
        for number, given_ in (*calls, *some_of_these):
            x86 = (program, Architecture.X86.value, number, given_)
            assert run(with_them, *x86[1:]) == run(*x86)
            excepted = number in (table["read"], table["setsid"])
            if not excepted and given_[0] != 0x8000 and given_[1] != 1:
                native = (program, Architecture.X86_64.value, number, given_)
                assert run(with_them, *native[1:]) == run(*native)

    def test_jumps_stay_inside_the_program(self):
        program = list(decode(filter_of(defaults.seccomp(defaults.CAPABILITIES)).instructions))
        for at, (code, yes, no, k) in enumerate(program):
            if code == 0x05:
                assert at + 1 + k < len(program)
            elif code in (0x15, 0x25, 0x35):
                assert max(at + 1 + yes, at + 1 + no) < len(program)
        assert program[-1][0] == 0x06

    def test_far_jumps_are_brought_near(self):
        """Every second call has a rule of its own: a tree much wider than a conditional jump reaches."""
        table = sorted(numbers("x86_64").items(), key=lambda item: item[1])
        some = tuple(
            Rule((name,), rules.ERRNO | (i % 4000 + 1), (Condition(0, Compare.EQ, i),))
            for i, (name, _) in enumerate(table)
        )
        profile = Profile(rules.ALLOW, rules.ALLOW, (Architecture.X86_64,), some)
        program = compile_profile(profile)
        for i, (_, number) in enumerate(table):
            assert run(program, Architecture.X86_64.value, number, (i,)) == rules.ERRNO | (i % 4000 + 1)
            assert run(program, Architecture.X86_64.value, number, (i + 1,)) == rules.ALLOW

    def test_what_the_kernel_would_not_take_is_refused(self):
        table = numbers("x86_64")
        some = tuple(
            Rule((name,), rules.ERRNO | i, tuple(Condition(j, Compare.EQ, i * 7 + j) for j in range(6)))
            for i, name in enumerate(table)
        )
        with pytest.raises(ValueError, match="instructions"):
            compile_profile(Profile(rules.ALLOW, rules.ALLOW, (Architecture.X86_64,), some))

    def test_the_default_is_short(self):
        """The kernel compiles it for every container: a seventh of what one comparison per call would take."""
        assert len(filter_of(defaults.seccomp(defaults.CAPABILITIES)).instructions) // 8 < 200

    def test_what_two_architectures_have_in_common_is_there_once(self):
        """Rules about arguments: they are in the same place whatever the architecture."""
        one_of = [Rule(("socket",), rules.ALLOW, (Condition(0, Compare.EQ, value),)) for value in (2, 10, 16, 38)]
        alone, both = [
            compile_profile(Profile(rules.ERRNO, rules.ERRNO, architectures, tuple(one_of)))
            for architectures in ((Architecture.X86_64,), (Architecture.X86_64, Architecture.X86))
        ]
        of_arguments = [sum(code == 0x20 and k >= 16 for code, _, _, k in decode(each)) for each in (alone, both)]
        assert of_arguments == [2, 2]

    def test_a_number_among_others_of_one_fate_takes_one_question(self):
        names = list(numbers("x86_64"))[:32]
        allowed = [Rule(tuple(some), rules.ALLOW) for some in (names, [*names[:7], *names[8:]])]
        all_of_them, all_but_one = [
            compile_profile(Profile(rules.ERRNO, rules.LOG, (Architecture.X86_64,), (rule,))) for rule in allowed
        ]
        assert len(all_but_one) == len(all_of_them) + 8 * 2  # that, and what it returns

    def test_a_profile_is_compiled_once(self):
        profile = defaults.seccomp(defaults.CAPABILITIES)
        first, again = (
            program_of(Process("/", args=("true",)), Linux(seccomp=seccomp), user=None)
            for seccomp in (profile, replace(profile))
        )
        assert first.seccomp is again.seccomp


class TestTables:
    @pytest.mark.parametrize(
        ("architecture", "name", "number"),
        [
            ("x86_64", "read", 0),
            ("x86_64", "execve", 59),
            ("x86_64", "mseal", 462),
            ("x32", "execve", 520),
            ("x32", "read", 0),
            ("x86", "execve", 11),
            ("x86", "socketcall", 102),
            ("aarch64", "read", 63),
            ("aarch64", "execve", 221),
            ("aarch64", "openat2", 437),
            ("arm", "execve", 11),
            ("arm", "set_tls", 0xF0005),
        ],
    )
    def test_hold_the_kernels_numbers(self, architecture, name, number):
        assert numbers(architecture)[name] == number

    @pytest.mark.parametrize("architecture", ["x86_64", "x32", "x86", "aarch64", "arm"])
    def test_give_every_number_one_name(self, architecture):
        table = numbers(architecture)
        assert len(set(table.values())) == len(table)
        assert len(table) > 300

    @pytest.mark.skipif(not HEADERS.exists(), reason="needs linux-libc-dev on x86_64")
    def test_agree_with_this_machines_headers(self):
        for file, architecture in (("unistd_64.h", "x86_64"), ("unistd_32.h", "x86")):
            text = (HEADERS / file).read_text()
            lines = [line.split() for line in text.splitlines() if line.startswith("#define __NR_")]
            table = numbers(architecture)
            assert {name.removeprefix("__NR_"): int(number) for _, name, number in lines}.items() <= table.items()


def profile_of(**changes: object) -> Seccomp:
    return replace(Seccomp(Action.ERRNO), **changes)


class TestSection:
    def test_unlisted_calls_of_a_listed_machine_get_the_default(self):
        profile = to_profile(profile_of(default_errno_ret=5))
        assert profile.default == profile.unknown == rules.ERRNO | 5

    def test_calls_younger_than_the_profile_look_unknown_to_the_kernel(self):
        assert to_profile(profile_of()).unknown == ENOSYS
        assert to_profile(profile_of(default_action=Action.ALLOW)).unknown == rules.ALLOW

    def test_the_native_machine_is_always_listed(self):
        assert to_profile(profile_of(architectures=("SCMP_ARCH_S390X",))).architectures[0].name.lower() == MACHINE

    @pytest.mark.parametrize("first", [0, 1])
    @pytest.mark.parametrize(
        ("always", "sometimes", "then"),
        [
            (Action.ERRNO, Action.ALLOW, EPERM),
            (Action.ERRNO, Action.LOG, EPERM),
            (Action.KILL_PROCESS, Action.ERRNO, rules.KILL_PROCESS),
            (Action.KILL_PROCESS, Action.KILL, rules.KILL_PROCESS),
            (Action.KILL, Action.TRAP, rules.KILL_THREAD),
            (Action.ALLOW, Action.ERRNO, EPERM),
            (Action.ERRNO, Action.KILL_PROCESS, rules.KILL_PROCESS),
        ],
    )
    def test_of_a_rule_with_conditions_and_one_without_the_stricter_counts(self, first, always, sometimes, then):
        """Whatever their order: a profile never allows more than under a runtime that uses libseccomp."""
        both = [
            SeccompSyscall((READ,), always),
            SeccompSyscall((READ,), sometimes, args=(SeccompArg(0, 7, Operator.EQ),)),
        ]
        profile = profile_of(default_action=Action.ALLOW, syscalls=(both[first], both[1 - first]))
        program, native = filter_of(profile).instructions, Architecture[MACHINE.upper()]
        number = numbers(MACHINE)[READ]
        assert run(program, native.value, number, (7,)) == then
        assert run(program, native.value, number, (8,)) == {Action.ERRNO: EPERM}.get(always, _RETURNS[always])

    def test_two_conditions_on_one_argument_are_alternatives(self):
        arguments = (SeccompArg(0, 1, Operator.EQ), SeccompArg(0, 2, Operator.EQ))
        profile = to_profile(profile_of(syscalls=(SeccompSyscall((READ,), Action.ALLOW, args=arguments),)))
        assert [len(rule.conditions) for rule in profile.rules] == [1, 1]

    def test_a_masked_comparison_takes_value_as_the_mask(self):
        argument = SeccompArg(0, 0xF0, Operator.MASKED_EQ, 0x30)
        profile = to_profile(profile_of(syscalls=(SeccompSyscall((READ,), Action.ALLOW, args=(argument,)),)))
        assert profile.rules[0].conditions == (Condition(0, Compare.MASKED_EQ, 0x30, 0xF0),)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"flags": ("NONSENSE",)}, r"linux\.seccomp\.flags\[0\]"),
            ({"architectures": ("x86",)}, r"linux\.seccomp\.architectures\[0\]"),
            ({"architectures": ("SCMP_ARCH_VAX",)}, r"linux\.seccomp\.architectures\[0\]"),
            ({"default_action": Action.NOTIFY}, "listenerPath: missing"),
            ({"default_action": Action.NOTIFY, "listener_path": "/x"}, "defaultAction: SCMP_ACT_NOTIFY"),
            (
                {"listener_path": "/x", "syscalls": (SeccompSyscall(("mkdir", "sendmsg"), Action.NOTIFY),)},
                r"linux\.seccomp\.syscalls\[0\]\.action: SCMP_ACT_NOTIFY can't be had for sendmsg",
            ),
            ({"default_errno_ret": 1 << 16}, "does not fit"),
            ({"default_action": Action.ALLOW, "default_errno_ret": 1}, "takes no errnoRet"),
        ],
    )
    def test_what_cannot_be_honoured_is_refused(self, changes, message):
        with pytest.raises(ValueError, match=message):
            filter_of(profile_of(**changes))

    def test_flags_are_passed_on(self):
        assert filter_of(profile_of(flags=("SECCOMP_FILTER_FLAG_LOG",))).flags == 2
        assert filter_of(profile_of()).flags == 4  # SPEC_ALLOW, as runc does

    def test_a_listener_is_asked_for_only_if_there_is_something_to_ask(self):
        rule = SeccompSyscall(("mkdir",), Action.NOTIFY)
        profile = profile_of(listener_path="/x", syscalls=(rule,), flags=("SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",))
        assert filter_of(profile).flags == 8 | 32
        assert filter_of(profile).has_listener
        assert filter_of(replace(profile, syscalls=())).flags == 0

    @settings(max_examples=50)
    @given(st.sampled_from(sorted(KNOWN_ARCHITECTURES)))
    def test_architectures_of_other_machines_are_passed_over(self, name):
        assert set(to_profile(profile_of(architectures=(name,))).architectures) <= set(Architecture)


DOCKER = Path("/usr/share/containers/seccomp.json")
# What corral allows beyond the profile that Debian ships for podman, and why.
BEYOND = {
    "futex_requeue": "part of the futex family, as harmless as futex",
    "futex_wait": "likewise",
    "futex_waitv": "likewise",
    "futex_wake": "likewise",
    "cachestat": "tells about the caller's own files",
    "map_shadow_stack": "memory of the caller",
    "mseal": "takes rights away from the caller",
    "memfd_secret": "memory of the caller",
    "process_mrelease": "reaps memory of a process that is being killed",
    "listmount": "the caller's own mount namespace",
    "statmount": "likewise",
    "listxattrat": "as listxattr",
    "getxattrat": "as getxattr",
    "setxattrat": "as setxattr",
    "removexattrat": "as removexattr",
    "pkey_alloc": "memory protection keys of the caller",
    "pkey_free": "likewise",
    "pkey_mprotect": "likewise",
    "fchmodat2": "as fchmodat",
    "landlock_add_rule": "takes rights away from the caller",
    "landlock_create_ruleset": "likewise",
    "landlock_restrict_self": "likewise",
    "uretprobe": "the kernel's own trampoline: only it enters this call",
    "io_pgetevents": "as io_getevents",
    "io_pgetevents_time64": "as io_getevents",
    "vmsplice": "as splice",
    "getsid": "of the caller's own session",
    "epoll_ctl_old": "never implemented",
    "epoll_wait_old": "never implemented",
    "process_vm_readv": "ptrace allows as much",
    "process_vm_writev": "ptrace allows as much",
    "ptrace": "safe with seccomp since Linux 4.8",
    "arm_fadvise64_64": "arm only",
    "arm_sync_file_range": "arm only",
}


class TestDefaultProfile:
    def allowed(self, capabilities: tuple[str, ...] = defaults.CAPABILITIES) -> set[str]:
        profile = defaults.seccomp(capabilities)
        return {name for rule in profile.syscalls if rule.action is Action.ALLOW for name in rule.names}

    @pytest.mark.skipif(not DOCKER.exists(), reason="needs golang-github-containers-common")
    def test_allows_nothing_more_than_docker_but_what_is_listed(self):
        data = json.loads(DOCKER.read_text())
        docker = set()
        for rule in data["syscalls"]:
            includes = rule.get("includes") or {}
            if rule["action"] == "SCMP_ACT_ALLOW" and set(includes.get("caps", ())) <= set(defaults.CAPABILITIES):
                docker |= set(rule["names"])
        assert self.allowed() - docker <= set(BEYOND)

    @pytest.mark.parametrize(
        "name",
        [
            *("mount", "umount2", "pivot_root", "setns", "unshare", "bpf", "perf_event_open", "keyctl", "add_key"),
            *("request_key", "init_module", "kexec_load", "reboot", "swapon", "io_uring_setup", "userfaultfd"),
            *("open_by_handle_at", "ptrace_nothing", "move_mount", "fsopen", "open_tree", "acct", "settimeofday"),
        ],
    )
    def test_refuses_what_reaches_the_host(self, name):
        assert name not in self.allowed()

    @pytest.mark.parametrize("capability", sorted(seccomp_profile.WITH_CAPABILITY))
    def test_a_capability_brings_its_calls(self, capability):
        more = self.allowed((*defaults.CAPABILITIES, capability))
        assert set(seccomp_profile.WITH_CAPABILITY[capability].split()) <= more

    def test_every_name_is_a_call_somewhere(self):
        known = set().union(*(numbers(a) for a in ("x86_64", "x86", "aarch64", "arm")))
        known |= {"riscv_hwprobe"}
        assert {name for group in seccomp_profile.ALLOWED.values() for name in group.split()} - known == set()

    @pytest.mark.parametrize(("flags", "allowed"), [(0x11, True), (0x10000011, False), (0x40000000, False)])
    def test_clone_makes_no_namespaces(self, flags, allowed):
        program = filter_of(defaults.seccomp(defaults.CAPABILITIES)).instructions
        number = numbers("x86_64")["clone"]
        if MACHINE == "x86_64":
            result = run(program, Architecture.X86_64.value, number, (flags,))
            assert result == (rules.ALLOW if allowed else EPERM)

    @pytest.mark.parametrize("family", range(64))
    def test_sockets_are_of_known_families(self, family):
        if MACHINE == "x86_64":
            program = filter_of(defaults.seccomp(defaults.CAPABILITIES)).instructions
            result = run(program, Architecture.X86_64.value, numbers("x86_64")["socket"], (family,))
            assert (result == rules.ALLOW) is (family in seccomp_profile.SOCKET_FAMILIES)

    def test_no_call_is_named_twice(self):
        every = [name for group in seccomp_profile.ALLOWED.values() for name in group.split()]
        assert len(every) == len(set(every))
