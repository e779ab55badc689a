"""Whether a filter lets pass what is left to be done once it is loaded."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.bpf import run

from corral.kernel.seccomp import Architecture, rules
from corral.kernel.seccomp.tables import numbers
from corral.kernel.syscalls import MACHINE
from corral.oci import defaults
from corral.oci.seccomp import UNTIL_EXECVE, asks, filter_but_for, filter_of, lets_pass
from corral.oci.spec import Action, Operator, Seccomp, SeccompArg, SeccompSyscall

some_arguments = st.builds(SeccompArg, st.integers(0, 2), st.sampled_from([0, 0x8000, 3]), st.sampled_from(Operator))
CLONE = asks("clone", first=0x8000)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.builds(
            SeccompSyscall,
            st.just(("clone",)),
            st.sampled_from([Action.ALLOW, Action.LOG, Action.ERRNO]),
            st.none(),
            st.lists(some_arguments, max_size=2).map(tuple),
        ),
        max_size=3,
    ),
    st.sampled_from([Action.ALLOW, Action.ERRNO]),
    st.lists(st.sampled_from([0, 1, 3, 4, 0x8000, 2**63]), min_size=5, max_size=5),
)
def test_what_is_said_to_pass_does_whatever_arguments_it_has_that_were_not_told(some, default, rest):
    profile = Seccomp(default, syscalls=tuple(some))
    if lets_pass(profile, [CLONE]):
        program = filter_of(profile).instructions
        number = numbers(MACHINE)["clone"]
        assert run(program, Architecture[MACHINE.upper()].value, number, (0x8000, *rest)) == rules.ALLOW


def test_the_usual_filter_lets_a_fork_pass_and_a_namespace_not():
    usual = defaults.seccomp(defaults.CAPABILITIES)
    assert lets_pass(usual, [CLONE, asks("read", "execve")])
    assert not lets_pass(usual, [asks("clone")])
    assert not lets_pass(usual, [asks("clone", first=0x10000000)])
    assert not lets_pass(usual, [asks("read", "unshare")])
    assert lets_pass(usual, UNTIL_EXECVE)


@pytest.mark.parametrize("op", Operator)
def test_a_condition_that_certainly_holds_is_none(op):
    value = {Operator.NE: 1, Operator.LT: 0x8001, Operator.GT: 1}.get(op, 0x8000)
    rule = SeccompSyscall(("clone",), Action.ALLOW, args=(SeccompArg(0, value, op, 0x8000),))
    assert lets_pass(Seccomp(Action.ERRNO, syscalls=(rule,)), [CLONE])
    refusing = Seccomp(Action.ALLOW, syscalls=(replace(rule, action=Action.ERRNO),))
    assert not lets_pass(refusing, [CLONE])


def test_one_on_an_argument_that_was_not_told_allows_nothing_and_refuses_all():
    rule = SeccompSyscall(("clone",), Action.ALLOW, args=(SeccompArg(1, 0, Operator.EQ),))
    assert not lets_pass(Seccomp(Action.ERRNO, syscalls=(rule,)), [CLONE])
    refusing = Seccomp(Action.ALLOW, syscalls=(replace(rule, action=Action.LOG),))
    assert not lets_pass(refusing, [CLONE])


def test_a_filter_with_a_listener_tells_somebody():
    rule = SeccompSyscall(("mkdir",), Action.NOTIFY)
    told = Seccomp(Action.ALLOW, listener_path="/x", syscalls=(rule,))
    assert not lets_pass(told, [CLONE])
    assert filter_but_for(told, UNTIL_EXECVE) is None
    assert lets_pass(replace(told, syscalls=()), [CLONE])
