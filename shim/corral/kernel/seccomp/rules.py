"""A seccomp profile as plain values: what the compiler takes.

Source: seccomp(2); runtime-spec config-linux.md "seccomp".
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

KILL_PROCESS = 0x80000000
KILL_THREAD = 0x00000000
TRAP = 0x00030000
ERRNO = 0x00050000
NOTIFY = 0x7FC00000
TRACE = 0x7FF00000
LOG = 0x7FFC0000
ALLOW = 0x7FFF0000
"""Return values of a filter; those of ERRNO and TRACE carry 16 bits of data."""

FLAGS = {
    "SECCOMP_FILTER_FLAG_TSYNC": 1,
    "SECCOMP_FILTER_FLAG_LOG": 2,
    "SECCOMP_FILTER_FLAG_SPEC_ALLOW": 4,
    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV": 32,
}
NEW_LISTENER = 8


class Architecture(Enum):
    """An architecture a filter can admit; the value is its AUDIT_ARCH_*. x32 shares that of x86_64."""

    X86_64 = 0xC000003E
    X32 = -1
    X86 = 0x40000003
    AARCH64 = 0xC00000B7
    ARM = 0x40000028


class Compare(Enum):
    """How an argument is compared with a value, both taken as unsigned 64 bit."""

    NE = "!="
    LT = "<"
    LE = "<="
    EQ = "=="
    GE = ">="
    GT = ">"
    MASKED_EQ = "&"


@dataclass(frozen=True, slots=True)
class Condition:
    """argument[index] COMPARE value; with MASKED_EQ: argument[index] & mask == value."""

    index: int
    compare: Compare
    value: int
    mask: int = 2**64 - 1

    def holds(self, argument: int) -> bool:
        """Whether it does for this argument."""
        return _HOLDS[self.compare](argument & self.mask, self.value)


_HOLDS: Mapping[Compare, Callable[[int, int], bool]] = {
    Compare.NE: operator.ne,
    Compare.LT: operator.lt,
    Compare.LE: operator.le,
    Compare.EQ: operator.eq,
    Compare.GE: operator.ge,
    Compare.GT: operator.gt,
    Compare.MASKED_EQ: operator.eq,
}


@dataclass(frozen=True, slots=True)
class Rule:
    """For these calls, when all conditions hold, return action."""

    names: tuple[str, ...]
    action: int
    conditions: tuple[Condition, ...] = ()


@dataclass(frozen=True, slots=True)
class Profile:
    """What a filter does. Of the rules for one call, those with conditions are asked first, in their order.

    But one without conditions takes the place of those that would be more lenient (with libseccomp, that of all).

    A call of an architecture that is not listed, x32 included, kills the process. A number above all that the rules
    name is a call younger than the profile and gets `unknown`.
    """

    default: int
    unknown: int
    architectures: tuple[Architecture, ...]
    rules: tuple[Rule, ...]
    exceptions: tuple[Rule, ...] = ()
    """For the first of the architectures: asked before all rules, whatever these say."""
