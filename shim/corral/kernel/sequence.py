"""A program of some two hundred bytes that makes the system calls it was given, one after the other.

It is a static executable without an interpreter, a libc, or a stack to speak of: to start it, and to fork it, takes a
tenth of what the same takes of Python. Each call says how its result is to be taken (How). What a call may not do ends
the program: it then writes REFUSED to its channel. RESULT is where the result of the last call lies, and SCRATCH memory
that calls may write to.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

from corral.kernel.elf import MEMORY, START, executable

MACHINES = frozenset(("x86_64",))
"""Whose code and whose numbers of calls it is, as uname(2) calls them."""
REFUSED = -1

# Source: syscall(2), and the System V ABI.
_CODE = bytes.fromhex(
    "bb00000000"  #       mov ebx, CALLS            the call at hand
    # next:
    "8b03"  #             mov eax, [rbx]
    "488b7b10"  #         mov rdi, [rbx+16]
    "488b7318"  #         mov rsi, [rbx+24]
    "488b5320"  #         mov rdx, [rbx+32]
    "4c8b5328"  #         mov r10, [rbx+40]
    "4c8b4330"  #         mov r8, [rbx+48]
    "4c8b4b38"  #         mov r9, [rbx+56]
    "0f05"  #             syscall
    "bd00000000"  #       mov ebp, RESULT
    "48894500"  #         mov [rbp], rax
    "8b4b04"  #           mov ecx, [rbx+4]          how
    "4c8b6308"  #         mov r12, [rbx+8]          the value that goes with it
    "4883c340"  #         add rbx, 64
    "ffc9"  #             dec ecx
    "7823"  #             js must
    "74ca"  #             je next                   it may fail
    "ffc9"  #             dec ecx
    "7424"  #             je gives
    "ffc9"  #             dec ecx
    "7427"  #             je forks
    "ffc9"  #             dec ecx
    "742f"  #             je writes
    "48f7d8"  #           neg rax                   it tries a path
    "4883f81f"  #         cmp rax, 31
    "773c"  #             ja refused
    "b906201000"  #       mov ecx, 0x102006         EPERM, ENOENT, EACCES and ENOTDIR
    "0fa3c1"  #           bt ecx, eax
    "72ab"  #             jc next
    "eb30"  #             jmp refused
    # must:
    "4885c0"  #           test rax, rax
    "79a4"  #             jns next
    "eb29"  #             jmp refused
    # gives:
    "4c39e0"  #           cmp rax, r12
    "749d"  #             je next
    "eb22"  #             jmp refused
    # forks:
    "4885c0"  #           test rax, rax
    "781d"  #             js refused
    "7594"  #             jne next
    "4c89e3"  #           mov rbx, r12              the child's first call
    "eb8f"  #             jmp next
    # writes:
    "4885c0"  #           test rax, rax
    "7811"  #             js refused
    "4c89d6"  #           mov rsi, r10
    "4c89c7"  #           mov rdi, r8
    "4c89c9"  #           mov rcx, r9
    "f3a6"  #             repe cmpsb
    "0f8479ffffff"  #     je next
    # refused:
    "bf00000000"  #       mov edi, CHANNEL
    "89ee"  #             mov esi, ebp
    "48c706ffffffff"  #   mov qword [rsi], REFUSED
    "ba08000000"  #       mov edx, 8
    "b801000000"  #       mov eax, 1
    "0f05"  #             syscall                   write
    "bf01000000"  #       mov edi, 1
    "b8e7000000"  #       mov eax, 231
    "0f05"  #             syscall                   exit_group
)
_CALLS_AT, _RESULT_AT, _CHANNEL_AT = 1, 34, 141
RESULT = MEMORY
SCRATCH = RESULT + 8
SCRATCH_SIZE = 8184
_CALL = struct.Struct("<IIq6Q")

type Argument = int | bytes | Words
"""bytes: the address of a copy of them."""


class How(IntEnum):
    """How the result of a call is to be taken."""

    MUST = 0
    """It must not fail."""
    MAY = 1
    GIVES = 2
    """It must give just this value: a descriptor, say, that later calls name, or an error."""
    FORKS = 3
    """It must not fail; where it gives 0 one goes on with the child's calls."""
    WRITES = 4
    """It must not fail, and the memory at the fourth argument must hold the fifth, of the length of the sixth."""
    TRIES = 5
    """It may fail as execve(2) does for a path where there is no program for one, and not otherwise."""


@dataclass(frozen=True, slots=True)
class Words:
    """The address of an array of numbers and addresses, eight bytes each."""

    items: Sequence[int | bytes]


@dataclass(frozen=True, slots=True)
class Call:
    """One system call, by number."""

    number: int
    arguments: Sequence[Argument] = ()
    how: How = How.MUST
    value: int = 0
    child: "Sequence[Call]" = ()
    """Where it FORKS: what only the child does. It does not go on with what follows here."""


def image(calls: Sequence[Call], channel: int) -> bytes:
    """The program as a file. The last call of each process must be one that does not return, or fails."""
    data = _Data(START + len(_CODE) + _CALL.size * _count(calls))
    code = bytearray(_CODE)
    struct.pack_into("<i", code, _CALLS_AT, START + len(_CODE))
    struct.pack_into("<i", code, _RESULT_AT, RESULT)
    struct.pack_into("<i", code, _CHANNEL_AT, channel)
    for process in _processes(calls):
        at = START + len(code) + _CALL.size * len(process)
        for call in process:
            value = call.value
            if call.how is How.FORKS:
                value, at = at, at + _CALL.size * _count(call.child)
            words = [data.word(argument) for argument in call.arguments]
            code += _CALL.pack(call.number, call.how, value, *words, *[0] * (6 - len(words)))
    return executable(bytes(code + data.content), memory_bytes=SCRATCH + SCRATCH_SIZE - RESULT)


def _processes(calls: Sequence[Call]) -> Iterator[Sequence[Call]]:
    """The calls of each process, a parent's before those of its children."""
    yield calls
    for call in calls:
        if call.child:
            yield from _processes(call.child)


def _count(calls: Sequence[Call]) -> int:
    return sum(map(len, _processes(calls)))


class _Data:
    """What calls point to, at an address; each content once."""

    def __init__(self, address: int) -> None:
        self._address = address
        self._known: dict[bytes, int] = {}
        self.content = bytearray()

    def word(self, argument: Argument) -> int:
        """A number as it is, for anything else its address."""
        if isinstance(argument, int):
            return argument & 0xFFFFFFFFFFFFFFFF
        if isinstance(argument, Words):
            return self._at(b"".join(self.word(item).to_bytes(8, "little") for item in argument.items))
        return self._at(argument)

    def _at(self, content: bytes) -> int:
        if content not in self._known:
            self.content += bytes(-(self._address + len(self.content)) % 8)
            self._known[content] = self._address + len(self.content)
            self.content += content
        return self._known[content]
