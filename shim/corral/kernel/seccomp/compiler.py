"""From a profile to BPF.

The filter first sorts by architecture, then finds the call's number in a binary tree over ranges of numbers with one
fate: a few comparisons for every call, and a program short enough that the kernel loads it in a tenth of a millisecond.

BPF only jumps forward, and conditionally by at most 255 instructions. So the program is written from its end: every
target is known when a jump to it is written, and one that is too far away is brought near by an unconditional jump.
"""

import itertools
import struct
from collections.abc import Iterable, Mapping

from corral.kernel.seccomp.rules import KILL_PROCESS, Architecture, Compare, Condition, Profile
from corral.kernel.seccomp.tables import numbers

_LD, _AND, _JA, _JEQ, _JGT, _JGE, _RET = 0x20, 0x54, 0x05, 0x15, 0x25, 0x35, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
_X32_BIT = 0x40000000
_MAX_LENGTH = 4096
_MAX_EXCEPTIONS = 3

# The rules of one call: conditions (all must hold) and what then to return. The last has none and always holds.
type _Fate = tuple[tuple[tuple[Condition, ...], int], ...]
# The first of a run of numbers, what happens to these, and to some of them that are excepted.
type _Run = tuple[int, _Fate, dict[int, _Fate]]


def compile_profile(profile: Profile) -> bytes:
    """struct sock_filter instructions. Raises ValueError if there are more than the kernel takes."""
    program = _Program()
    kill = program.returns(KILL_PROCESS)
    roots: dict[int, int] = {}
    x32 = kill
    if Architecture.X32 in profile.architectures:
        x32 = _tree(program, profile, Architecture.X32)
    for architecture in profile.architectures:
        if architecture is Architecture.X32:
            continue
        root = _tree(program, profile, architecture)
        if architecture is Architecture.X86_64:
            root = program.branch(_JGE, _X32_BIT, x32, root)
        roots[architecture.value] = program.emit(_LD, _NUMBER, after=root)
    entry = kill
    for value, root in roots.items():
        entry = program.branch(_JEQ, value, root, entry)
    program.emit(_LD, _ARCHITECTURE, after=entry)
    return program.encode()


def fates(profile: Profile, architecture: Architecture) -> dict[int, _Fate]:
    """What happens to each number the rules name; names this architecture lacks are skipped."""
    table = numbers(architecture.name.lower())
    offset = _X32_BIT if architecture is Architecture.X32 else 0
    conditional: dict[int, list[tuple[tuple[Condition, ...], int]]] = {}
    certain: dict[int, int] = {}
    for rule in profile.rules:
        for name in rule.names:
            number = table.get(name)
            if number is None:
                continue
            number += offset
            conditional.setdefault(number, [])
            if rule.conditions:
                conditional[number].append((rule.conditions, rule.action))
            else:
                certain.setdefault(number, rule.action)
    found: dict[int, _Fate] = {}
    for number, choices in conditional.items():
        if (always := certain.get(number)) is not None:
            choices = [choice for choice in choices if _leniency(choice[1]) <= _leniency(always)]
        found[number] = (*choices, ((), profile.default if always is None else always))
    if architecture is profile.architectures[0]:
        _make_exceptions(found, profile, table)
    return found


def _make_exceptions(found: dict[int, _Fate], profile: Profile, table: Mapping[str, int]) -> None:
    for rule in profile.exceptions:
        for number in (table[name] for name in rule.names if name in table):
            choice = rule.conditions, rule.action
            found[number] = (choice, *found.get(number, (((), profile.default),))) if rule.conditions else (choice,)


def _leniency(action: int) -> int:
    """The order in which the kernel takes one action before another: the strictest first."""
    return (action & 0xFFFF0000) ^ KILL_PROCESS


def _tree(program: "_Program", profile: Profile, architecture: Architecture) -> int:
    """The search tree of an architecture: the place of its root."""
    by_number = fates(profile, architecture)
    ranges = _ranges(by_number, ((), profile.default), ((), profile.unknown))
    return _subtree(program, _runs(ranges))


def _ranges(
    by_number: Mapping[int, _Fate], default: tuple[tuple[()], int], unknown: tuple[tuple[()], int]
) -> list[tuple[int, _Fate]]:
    """(first number, fate) of runs of numbers with the same fate, from 0 up."""
    ranges: list[tuple[int, _Fate]] = [(0, (default,))]

    def begin(number: int, fate: _Fate) -> None:
        if ranges[-1][0] == number:
            ranges.pop()
        if not ranges or ranges[-1][1] != fate:
            ranges.append((number, fate))

    last = -1
    for number in sorted(by_number):
        if number > last + 1:
            begin(last + 1, (default,))
        begin(number, by_number[number])
        last = number
    begin(last + 1, (unknown,))
    return ranges


def _runs(ranges: Iterable[tuple[int, _Fate]]) -> list[_Run]:
    """Ranges of one fate that are broken by but single numbers are one: such a number takes one question, not two."""
    runs: list[_Run] = []
    for first, fate in ranges:
        if len(runs) > 1 and runs[-1][0] == first - 1 and runs[-2][1] == fate and len(runs[-2][2]) < _MAX_EXCEPTIONS:
            number, other, _ = runs.pop()
            runs[-1][2][number] = other
        else:
            runs.append((first, fate, {}))
    return runs


def _subtree(program: "_Program", runs: list[_Run]) -> int:
    if len(runs) > 1:
        middle = len(runs) // 2
        right = _subtree(program, runs[middle:])
        left = _subtree(program, runs[:middle])
        return program.branch(_JGE, runs[middle][0], right, left)
    _, fate, exceptions = runs[0]
    place = _leaf(program, fate)
    for number, other in exceptions.items():
        place = program.branch(_JEQ, number, _leaf(program, other), place)
    return place


def _leaf(program: "_Program", fate: _Fate) -> int:
    """The rules of one call, tried in turn; two architectures may have the same for it."""
    if len(fate) > 1 and (known := program.leaves.get(fate)) is not None:
        return known
    place = program.returns(fate[-1][1])
    for choice, rules in reversed([(choice, list(rules)) for choice, rules in itertools.groupby(fate[:-1], _choice)]):
        if choice is not None and len(rules) > 1:
            yes = program.returns(choice[2])
            place = _one_of(program, [conditions[0] for conditions, _ in rules], yes, place)
            continue
        for conditions, action in reversed(rules):
            otherwise, place = place, program.returns(action)
            for condition in reversed(conditions):
                place = _test(program, condition, place, otherwise)
    program.leaves[fate] = place
    return place


def _choice(rule: tuple[tuple[Condition, ...], int]) -> tuple[int, int, int] | None:
    """What rules share that are one question, "is this argument one of these?": its index, high half, action."""
    conditions, action = rule
    if len(conditions) != 1 or conditions[0].compare is not Compare.EQ:
        return None
    return conditions[0].index, conditions[0].value >> 32, action


def _one_of(program: "_Program", conditions: list[Condition], yes: int, no: int) -> int:
    """A search tree over the low halves of the values."""
    values = sorted({condition.value & 0xFFFFFFFF for condition in conditions})
    ranges = [(0, no)]
    for value in values:
        if ranges[-1][0] == value:
            ranges.pop()
        if not ranges or ranges[-1][1] != yes:
            ranges.append((value, yes))
        if value < 0xFFFFFFFF:
            ranges.append((value + 1, no))

    def search(part: list[tuple[int, int]]) -> int:
        if len(part) == 1:
            return part[0][1]
        middle = len(part) // 2
        right, left = search(part[middle:]), search(part[:middle])
        return program.branch(_JGE, part[middle][0], right, left)

    offset = _ARGUMENTS + 8 * conditions[0].index
    low = program.emit(_LD, offset, after=search(ranges))
    return _equal(program, offset + 4, conditions[0].value >> 32, 0xFFFFFFFF, low, no)


def _test(program: "_Program", condition: Condition, yes: int, no: int) -> int:
    """A comparison of a 64-bit argument by its two halves: high first, low where that does not decide."""
    low_offset = _ARGUMENTS + 8 * condition.index
    high, low = condition.value >> 32, condition.value & 0xFFFFFFFF
    compare = condition.compare
    if compare in (Compare.EQ, Compare.MASKED_EQ, Compare.NE):
        if compare is Compare.NE:
            yes, no = no, yes
        mask = condition.mask if compare is Compare.MASKED_EQ else 2**64 - 1
        second = _equal(program, low_offset, low, mask & 0xFFFFFFFF, yes, no)
        return _equal(program, low_offset + 4, high, mask >> 32, second, no)
    if compare in (Compare.LT, Compare.LE):
        yes, no = no, yes
    jump = _JGE if compare in (Compare.GE, Compare.LT) else _JGT
    second = program.emit(_LD, low_offset, after=program.branch(jump, low, yes, no))
    same_high = program.branch(_JEQ, high, second, no)
    return program.emit(_LD, low_offset + 4, after=program.branch(_JGT, high, yes, same_high))


def _equal(program: "_Program", offset: int, value: int, mask: int, yes: int, no: int) -> int:
    place = program.branch(_JEQ, value, yes, no)
    if mask != 0xFFFFFFFF:
        place = program.emit(_AND, mask, after=place)
    return program.emit(_LD, offset, after=place)


class _Program:
    """A program written from its end. A place is the distance of an instruction from the end."""

    def __init__(self) -> None:
        self._reversed: list[tuple[int, int, int, int]] = []
        self._returns: dict[int, int] = {}
        self.leaves: dict[_Fate, int] = {}

    def emit(self, code: int, k: int, *, after: int | None = None) -> int:
        """Write an instruction that is followed by the one at the place `after`."""
        if after is not None:
            self.place(after)
        return self._append(code, 0, 0, k)

    def place(self, target: int) -> int:
        """Make what is written next fall through to target."""
        if target != len(self._reversed) - 1:
            return self._append(_JA, 0, 0, len(self._reversed) - target - 1)
        return target

    def returns(self, action: int) -> int:
        """The place of a return of this action: an old one where it is near enough, else a new one."""
        place = self._returns.get(action)
        if place is None or len(self._reversed) - place > 200:
            place = self._returns[action] = self._append(_RET, 0, 0, action)
        return place

    def branch(self, code: int, k: int, yes: int, no: int) -> int:
        """Write a conditional jump."""
        for _ in range(2):  # bringing one near may push the other over the edge
            yes, no = self._near(yes), self._near(no)
        here = len(self._reversed)
        return self._append(code, here - yes - 1, here - no - 1, k)

    def _near(self, target: int) -> int:
        if len(self._reversed) - target - 1 <= 253:
            return target
        return self._append(_JA, 0, 0, len(self._reversed) - target - 1)

    def _append(self, code: int, yes: int, no: int, k: int) -> int:
        self._reversed.append((code, yes, no, k))
        return len(self._reversed) - 1

    def encode(self) -> bytes:
        """The program, in the order in which it runs."""
        if len(self._reversed) > _MAX_LENGTH:
            raise ValueError(f"the profile needs {len(self._reversed)} instructions; the kernel takes {_MAX_LENGTH}")
        return b"".join(struct.pack("HBBI", *instruction) for instruction in reversed(self._reversed))


def decode(program: bytes) -> Iterable[tuple[int, int, int, int]]:
    """(code, jump if true, jump if false, operand) of each instruction."""
    return struct.iter_unpack("HBBI", program)
