"""The little of bpf(2) that device programs need: assembling, loading, attaching to a cgroup.

Source: bpf(2); kernel bpf/standardization/instruction-set.rst; include/uapi/linux/bpf.h.
"""

import ctypes
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace

from corral.kernel.syscalls import MACHINE, check, libc

_NUMBER = {"x86_64": 321, "aarch64": 280}[MACHINE]
_syscall = libc("syscall", ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_uint)

_PROG_LOAD, _PROG_ATTACH, _PROG_DETACH, _PROG_GET_FD_BY_ID, _PROG_QUERY = 5, 8, 9, 13, 16
_TYPE_CGROUP_DEVICE = 15
_ATTACH_DEVICE = 6
_ALLOW_MULTI = 2

_LOAD_WORD = 0x61  # BPF_LDX | BPF_MEM | BPF_W
_MOVE_IMMEDIATE, _MOVE_REGISTER = 0xB7, 0xBF
_AND_IMMEDIATE, _SHIFT_RIGHT = 0x57, 0x77
_JUMP_EQUAL, _JUMP_NOT_EQUAL, _JUMP_NOT_SAME = 0x15, 0x55, 0x5D
_EXIT = 0x95
_JUMPS = frozenset({_JUMP_EQUAL, _JUMP_NOT_EQUAL, _JUMP_NOT_SAME})

_QUERY_MAX = 64  # as many as the kernel attaches to one cgroup


@dataclass(frozen=True, slots=True)
class Instruction:
    """One eBPF instruction."""

    code: int
    destination: int = 0
    source: int = 0
    offset: int = 0
    immediate: int = 0

    def encode(self) -> bytes:
        """Its eight bytes, in this machine's byte order."""
        registers = self.destination | self.source << 4
        return struct.pack("=BBhi", self.code, registers, self.offset, self.immediate)


def load_word(destination: int, source: int, offset: int) -> Instruction:
    """destination = the 32 bits at source + offset."""
    return Instruction(_LOAD_WORD, destination, source, offset)


def move_immediate(destination: int, value: int) -> Instruction:
    """destination = value."""
    return Instruction(_MOVE_IMMEDIATE, destination, immediate=value)


def move_register(destination: int, source: int) -> Instruction:
    """destination = source."""
    return Instruction(_MOVE_REGISTER, destination, source)


def and_immediate(destination: int, mask: int) -> Instruction:
    """destination &= mask."""
    return Instruction(_AND_IMMEDIATE, destination, immediate=mask)


def shift_right(destination: int, bits: int) -> Instruction:
    """destination >>= bits."""
    return Instruction(_SHIFT_RIGHT, destination, immediate=bits)


def jump_if_equal(register: int, value: int) -> Instruction:
    """Jump, to where land() says, if register == value."""
    return Instruction(_JUMP_EQUAL, register, immediate=value)


def jump_unless_equal(register: int, value: int) -> Instruction:
    """Jump, to where land() says, if register != value."""
    return Instruction(_JUMP_NOT_EQUAL, register, immediate=value)


def jump_unless_same(register: int, other: int) -> Instruction:
    """Jump, to where land() says, if the registers differ."""
    return Instruction(_JUMP_NOT_SAME, register, other)


def leave() -> Instruction:
    """Return r0."""
    return Instruction(_EXIT)


def land(instruction: Instruction, distance: int) -> Instruction:
    """A jump that skips distance instructions; anything else as it is."""
    return replace(instruction, offset=distance) if instruction.code in _JUMPS else instruction


def load_device_program(instructions: Iterable[Instruction]) -> int:
    """Give a program to the kernel; returns its fd. Raises OSError: EPERM without CAP_BPF or CAP_SYS_ADMIN."""
    code = b"".join(each.encode() for each in instructions)
    text = ctypes.create_string_buffer(code, len(code))
    licence = ctypes.create_string_buffer(b"Apache")
    # prog_type, insn_cnt, insns, license, log_level, log_size, log_buf, kern_version, prog_flags, prog_name
    attributes = struct.pack(
        "=IIQQIIQII16s",
        *(_TYPE_CGROUP_DEVICE, len(code) // 8, ctypes.addressof(text), ctypes.addressof(licence)),
        *(0, 0, 0, 0, 0, b"corral_devices"),
    )
    return _bpf(_PROG_LOAD, attributes, "load")[0]


def attach_device_program(cgroup: int, program: int) -> None:
    """Attach a program to the cgroup open at a fd, beside any others there."""
    _bpf(_PROG_ATTACH, struct.pack("=IIII", cgroup, program, _ATTACH_DEVICE, _ALLOW_MULTI), "attach")


def attached_device_programs(cgroup: int) -> list[int]:
    """The ids of the device programs attached to a cgroup itself."""
    ids = (ctypes.c_uint32 * _QUERY_MAX)()
    # target_fd, attach_type, query_flags, attach_flags, prog_ids, prog_cnt
    attributes = struct.pack("=IIIIQI4x", cgroup, _ATTACH_DEVICE, 0, 0, ctypes.addressof(ids), _QUERY_MAX)
    _, answer = _bpf(_PROG_QUERY, attributes, "query")
    return list(ids[: struct.unpack_from("=I", answer, 24)[0]])


def detach_device_program(cgroup: int, identity: int) -> None:
    """Take a program, named by its id, off a cgroup."""
    program, _ = _bpf(_PROG_GET_FD_BY_ID, struct.pack("=III", identity, 0, 0), "open")
    try:
        _bpf(_PROG_DETACH, struct.pack("=III", cgroup, program, _ATTACH_DEVICE), "detach")
    finally:
        os.close(program)


def _bpf(command: int, attributes: bytes, verb: str) -> tuple[int, bytes]:
    """bpf(2), and the attributes as the kernel left them. Its fds are close-on-exec by themselves."""
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    result = _syscall(_NUMBER, command, buffer, len(attributes))
    return check(result, f"bpf (to {verb} a device program)"), buffer.raw
