"""What lists of device rules come to, how v1 gets there, and the program that v2 runs instead."""

import operator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.kernel.cgroup import DEFAULT_RULES, DeviceRule
from corral.kernel.cgroup.bpf import Instruction
from corral.kernel.cgroup.device_rules import Access, Node, fold, parse_list
from corral.kernel.cgroup.steps import Write
from corral.kernel.cgroup.v1.devices import transition
from corral.kernel.cgroup.v2.devices import assemble

NULL = Node("c", "1", "3")
numbers = st.one_of(st.none(), st.integers(0, 2))
rules = st.builds(
    DeviceRule,
    allow=st.booleans(),
    type=st.sampled_from("abc"),
    major=numbers,
    minor=numbers,
    access=st.sets(st.sampled_from("rwm"), min_size=1).map(lambda bits: "".join(sorted(bits))),
)
requests = st.tuples(st.sampled_from("bc"), st.integers(0, 3), st.integers(0, 3), st.sampled_from("rwm"))


def rule(text: str) -> DeviceRule:
    """A rule from "+c 1:3 rw" or "-a *:* rwm"."""
    head, pair, access = text.split()
    major, minor = (None if part == "*" else int(part) for part in pair.split(":"))
    return DeviceRule(head[0] == "+", head[1], major, minor, access)


def fold_text(*texts: str) -> Access:
    return fold(rule(text) for text in texts)


def test_a_rule_for_everything_forgets_the_ones_before_it() -> None:
    assert fold_text("-a *:* rwm", "+c 1:3 rwm", "+a *:* rwm") == Access(allowed=True)


def test_rules_for_one_node_add_up() -> None:
    assert fold_text("-a *:* rwm", "+c 1:3 r", "+c 1:3 w").exceptions == {NULL: frozenset("rw")}
    assert fold_text("-a *:* rwm", "+c 1:3 rwm", "-c 1:3 w").exceptions == {NULL: frozenset("rm")}


def test_a_wider_rule_takes_narrower_exceptions_back() -> None:
    assert fold_text("-a *:* rwm", "+c 1:3 rwm", "+c 5:1 rwm", "-c 1:* rwm").exceptions == {
        Node("c", "5", "1"): frozenset("rwm")
    }


def test_a_hole_in_a_wider_rule_is_refused_because_v1_cannot_hold_it() -> None:
    with pytest.raises(ValueError, match="c 1:3 cannot be taken out of the wider c \\*:\\*"):
        fold_text("-a *:* rwm", "+c *:* m", "-c 1:3 m")


@given(st.lists(rules, max_size=6), requests)
def test_the_last_rule_that_matches_wins(given_rules: list[DeviceRule], request: tuple[str, int, int, str]) -> None:
    try:
        access = fold(given_rules)
    except ValueError:
        return
    assert decide(access, request) is last_match(given_rules, request)


@given(st.lists(rules, max_size=6), requests)
def test_the_program_decides_as_the_rules_do(given_rules: list[DeviceRule], request: tuple[str, int, int, str]) -> None:
    try:
        access = fold(given_rules)
    except ValueError:
        return
    assert bool(interpret(assemble(access), request)) is decide(access, request)


def last_match(given_rules: list[DeviceRule], request: tuple[str, int, int, str]) -> bool:
    kind, major, minor, bit = request
    verdict = True
    for each in given_rules:
        same = each.type in ("a", kind) and each.major in (None, major) and each.minor in (None, minor)
        if same and bit in each.access:
            verdict = each.allow
    return verdict


def decide(access: Access, request: tuple[str, int, int, str]) -> bool:
    kind, major, minor, bit = request
    node = Node(kind, str(major), str(minor))
    hit = any(each.covers(node) and bit in bits for each, bits in access.exceptions.items())
    return access.allowed is not hit


JUMPS = {0x15: operator.eq, 0x55: operator.ne, 0x5D: operator.ne}


def interpret(program: list[Instruction], request: tuple[str, int, int, str]) -> int:
    """Run the instructions that device programs are made of."""
    kind, major, minor, bit = request
    context = {0: {"m": 1, "r": 2, "w": 4}[bit] << 16 | {"b": 1, "c": 2}[kind], 4: major, 8: minor}
    registers = dict.fromkeys(range(11), 0)
    at = 0
    while True:
        each = program[at]
        at += 1
        left, right = registers[each.destination], registers[each.source]
        if each.code == 0x61:
            registers[each.destination] = context[each.offset]
        elif each.code == 0xB7:
            registers[each.destination] = each.immediate
        elif each.code == 0xBF:
            registers[each.destination] = right
        elif each.code == 0x57:
            registers[each.destination] = left & each.immediate
        elif each.code == 0x77:
            registers[each.destination] = left >> each.immediate
        elif each.code in JUMPS:
            if JUMPS[each.code](left, right if each.code == 0x5D else each.immediate):
                at += each.offset
        else:
            assert each.code == 0x95
            return registers[0]


def test_an_instruction_is_eight_bytes_in_the_order_of_the_kernel() -> None:
    assert Instruction(0x55, 2, 1, 5, -1).encode() == bytes.fromhex("55 12 0500 ffffffff")


def writes(now: Access, target: Access) -> list[str]:
    steps = transition("/d", now, target)
    assert all(isinstance(step, Write) for step in steps)
    return [f"{step.path.removeprefix('/d/devices.')} {step.value}" for step in steps if isinstance(step, Write)]


def test_from_everything_to_a_list_denies_first_and_then_allows() -> None:
    assert writes(Access(), fold_text("-a *:* rwm", "+c 1:3 rwm")) == ["deny a", "allow c 1:3 rwm"]


def test_between_lists_only_differences_are_written_and_new_access_comes_first() -> None:
    now = fold_text("-a *:* rwm", "+c 1:3 rw", "+c 1:5 rwm")
    target = fold_text("-a *:* rwm", "+c 1:3 rm", "+b 8:0 r")
    assert writes(now, target) == ["allow c 1:3 m", "allow b 8:0 r", "deny c 1:3 w", "deny c 1:5 rwm"]


def test_no_difference_is_no_write() -> None:
    access = fold(DEFAULT_RULES)
    assert writes(access, access) == []


def test_every_step_names_its_opposite() -> None:
    [deny, allow] = transition("/d", Access(), fold_text("-a *:* rwm", "+c 1:3 rwm"))
    assert isinstance(deny, Write)
    assert isinstance(allow, Write)
    assert (deny.undo_path, deny.undo) == ("/d/devices.allow", "a")
    assert (allow.undo_path, allow.undo) == ("/d/devices.deny", "c 1:3 rwm")


def test_the_list_of_the_kernel_is_read_back() -> None:
    assert parse_list("c 1:3 rwm\nc *:* m\n") == Access(
        allowed=False, exceptions={NULL: frozenset("rwm"), Node("c", "*", "*"): frozenset("m")}
    )


@pytest.mark.parametrize("bad", [DeviceRule(True, "x"), DeviceRule(True, access=""), DeviceRule(True, access="rx")])
def test_a_malformed_rule_is_refused(bad: DeviceRule) -> None:
    with pytest.raises(ValueError, match="must be"):
        fold([bad])
