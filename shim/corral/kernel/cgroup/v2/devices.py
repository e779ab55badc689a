"""Device access on v2: there is no controller, but an eBPF program that the kernel asks at every open and mknod.

Source: kernel cgroup-v2.rst "Device controller"; bpf(2); include/uapi/linux/bpf.h struct bpf_cgroup_dev_ctx.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from corral.kernel.cgroup import bpf
from corral.kernel.cgroup.bpf import Instruction
from corral.kernel.cgroup.device_rules import ALL_ACCESS, Access, fold
from corral.kernel.cgroup.resources import DeviceRule
from corral.kernel.cgroup.steps import Step, invalid

_TYPES = {"b": 1, "c": 2}
_BITS = {"m": 1, "r": 2, "w": 4}

# What the program keeps in which register. r1 holds the context at entry.
_RESULT, _CONTEXT, _TYPE, _ACCESS, _MAJOR, _MINOR, _SCRATCH = range(7)


@dataclass(frozen=True, slots=True)
class AttachDevices:
    """Make a program answer for a cgroup, in place of the one before it.

    It has no undo: a plan puts it last, so that nothing can fail after it.
    """

    directory: str
    access: Access

    def describe(self) -> str:
        """The default and the number of exceptions."""
        default = "allow" if self.access.allowed else "deny"
        return f"bpf device program on {self.directory}: {default}, {len(self.access.exceptions)} exceptions"

    def inverse(self) -> None:
        """None: see above."""

    def apply(self) -> None:
        """Load, attach, then detach what was there: while both are attached, both must allow."""
        program = bpf.load_device_program(assemble(self.access))
        try:
            cgroup = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                before = bpf.attached_device_programs(cgroup)
                bpf.attach_device_program(cgroup, program)
                for identity in before:
                    bpf.detach_device_program(cgroup, identity)
            finally:
                os.close(cgroup)
        finally:
            os.close(program)


def plan(directory: str, wanted: Sequence[DeviceRule]) -> list[Step]:
    """The program that gives a cgroup these rules."""
    try:
        return [AttachDevices(directory, fold(wanted))]
    except ValueError as e:
        raise invalid(directory, str(e)) from e


def assemble(access: Access) -> list[Instruction]:
    """The program for a rule set: one block per exception, then the default. 1 allows, 0 gives EPERM."""
    program = [
        bpf.load_word(_TYPE, _CONTEXT, 0),
        bpf.and_immediate(_TYPE, 0xFFFF),
        bpf.load_word(_ACCESS, _CONTEXT, 0),
        bpf.shift_right(_ACCESS, 16),
        bpf.load_word(_MAJOR, _CONTEXT, 4),
        bpf.load_word(_MINOR, _CONTEXT, 8),
    ]
    for node, bits in access.exceptions.items():
        checks: list[list[Instruction]] = [[bpf.jump_unless_equal(_TYPE, _TYPES[node.type])]]
        if bits != ALL_ACCESS:
            checks.append(_access_check(bits, access.allowed))
        if node.major != "*":
            checks.append([bpf.jump_unless_equal(_MAJOR, int(node.major))])
        if node.minor != "*":
            checks.append([bpf.jump_unless_equal(_MINOR, int(node.minor))])
        verdict = [bpf.move_immediate(_RESULT, int(not access.allowed)), bpf.leave()]
        program += _block([each for check in checks for each in check], verdict)
    return [*program, bpf.move_immediate(_RESULT, int(access.allowed)), bpf.leave()]


def _access_check(bits: frozenset[str], allowed: bool) -> list[Instruction]:
    """An allowance must cover all that is asked for; a denial needs to meet only part of it."""
    mask = sum(_BITS[bit] for bit in bits)
    masked = [bpf.move_register(_SCRATCH, _ACCESS), bpf.and_immediate(_SCRATCH, mask)]
    if allowed:
        return [*masked, bpf.jump_if_equal(_SCRATCH, 0)]
    return [*masked, bpf.jump_unless_same(_SCRATCH, _ACCESS)]


def _block(checks: list[Instruction], verdict: list[Instruction]) -> list[Instruction]:
    """Point every jump of the checks behind the verdict."""
    end = len(checks) + len(verdict)
    return [bpf.land(each, end - at - 1) for at, each in enumerate(checks)] + verdict
