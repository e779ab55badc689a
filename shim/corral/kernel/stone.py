"""A program of a few hundred bytes that waits to be told to start another one, and then becomes it.

Its arguments are the paths that this one may have, an empty string, and its own arguments. It reads a message from the
channel, or, if it has a gate, from whoever connects there once it has had one from the channel. Then it tries the paths
in their order, as execvp(3) does. If that fails it writes one of its answers to where the message came from.
As a pid 1 it would be deaf to what ends others: SIGHUP, SIGINT, SIGQUIT and SIGTERM end it with 128 and their number.

    answers: (errno, length, message) each; the last one, with errno 0, is for all others

It may also have a successor first, a sibling in a session of its own that does all this, and tell the channel its pid
(eight bytes; a negative one is what clone(2) failed with). A program that is /proc/self/exe is this one again, without
a channel, and ends with 1.
"""

import struct
from dataclasses import dataclass

from corral.kernel.elf import executable

MACHINES = frozenset(("x86_64",))
"""Whose code it is, as uname(2) calls them."""
CALLS = ("accept4", "close", "execve", "exit_group", "fcntl", "read", "rt_sigaction", "write")
"""All that it asks of the kernel, but for a successor."""

# Source: syscall(2), execve(2), and the System V ABI for what a new program finds on its stack.
_CODE = bytes.fromhex(
    "4989e5"  #           mov r13, rsp              argc, argv, envp, as execve(2) leaves them
    "4883ec40"  #         sub rsp, 64
    "bd00000000"  #       mov ebp, CHANNEL
    "41bc00000000"  #     mov r12d, GATE            -1: there is none
    "4531f6"  #           xor r14d, r14d            how many connections are over
    "488d0538010000"  #   lea rax, [rip+ended]      struct sigaction: handler, flags, restorer, mask
    "48890424"  #         mov [rsp], rax
    "48c744240800000004"  # mov qword [rsp+8], SA_RESTORER
    "4889442410"  #       mov [rsp+16], rax
    "48c744241800000000"  # mov qword [rsp+24], 0
    "bb0f000000"  #       mov ebx, 15
    # catch:
    "b80e800000"  #       mov eax, 0x800e           SIGHUP, SIGINT, SIGQUIT and SIGTERM
    "0fa3d8"  #           bt eax, ebx
    "7314"  #             jnc less
    "89df"  #             mov edi, ebx
    "4889e6"  #           mov rsi, rsp
    "31d2"  #             xor edx, edx
    "41ba08000000"  #     mov r10d, 8
    "b80d000000"  #       mov eax, 13
    "0f05"  #             syscall                   rt_sigaction
    # less:
    "ffcb"  #             dec ebx
    "75de"  #             jnz catch
    # listen:
    "89ef"  #             mov edi, ebp
    "4889e6"  #           mov rsi, rsp
    "ba10000000"  #       mov edx, 16
    "31c0"  #             xor eax, eax
    "0f05"  #             syscall                   read
    "85c0"  #             test eax, eax
    "7f0b"  #             jg heard
    "4585f6"  #           test r14d, r14d
    "0f84cf000000"  #     je dead                   the runtime is gone
    "eb0a"  #             jmp hang_up               who came to the gate left without a word
    # heard:
    "4585e4"  #           test r12d, r12d
    "7830"  #             js go
    "4585f6"  #           test r14d, r14d
    "752b"  #             jne go
    # hang_up:
    "89ef"  #             mov edi, ebp
    "b803000000"  #       mov eax, 3
    "0f05"  #             syscall                   close
    "41ffc6"  #           inc r14d
    "4489e7"  #           mov edi, r12d
    "31f6"  #             xor esi, esi
    "31d2"  #             xor edx, edx
    "41ba00000800"  #     mov r10d, SOCK_CLOEXEC
    "b820010000"  #       mov eax, 288
    "0f05"  #             syscall                   accept4
    "89c5"  #             mov ebp, eax
    "85c0"  #             test eax, eax
    "79b3"  #             jns listen
    "e998000000"  #       jmp dead
    # go:
    "4489e7"  #           mov edi, r12d
    "b803000000"  #       mov eax, 3
    "0f05"  #             syscall                   close
    "89ef"  #             mov edi, ebp
    "be02000000"  #       mov esi, 2
    "ba01000000"  #       mov edx, 1
    "b848000000"  #       mov eax, 72
    "0f05"  #             syscall                   fcntl
    "498b4500"  #         mov rax, [r13]
    "4d8d7cc510"  #       lea r15, [r13+rax*8+16]   envp
    "498d5d08"  #         lea rbx, [r13+8]          the paths
    "4989d8"  #           mov r8, rbx               to be argv of the program, behind an empty string
    # skip:
    "498b38"  #           mov rdi, [r8]
    "4983c008"  #         add r8, 8
    "803f00"  #           cmp byte ptr [rdi], 0
    "75f4"  #             jne skip
    "41b902000000"  #     mov r9d, 2                ENOENT, unless something else is met
    # try:
    "488b3b"  #           mov rdi, [rbx]
    "4883c308"  #         add rbx, 8
    "803f00"  #           cmp byte ptr [rdi], 0
    "7426"  #             je failed
    "4c89c6"  #           mov rsi, r8
    "4c89fa"  #           mov rdx, r15
    "b83b000000"  #       mov eax, 59
    "0f05"  #             syscall                   execve
    "f7d8"  #             neg eax
    "83f802"  #           cmp eax, 2                ENOENT
    "74e0"  #             je try
    "83f814"  #           cmp eax, 20               ENOTDIR
    "74db"  #             je try
    "4189c1"  #           mov r9d, eax
    "83f80d"  #           cmp eax, 13               EACCES
    "74d3"  #             je try
    "83f801"  #           cmp eax, 1                EPERM
    "74ce"  #             je try
    # failed:
    "488d3539000000"  #   lea rsi, [rip+answers]
    # next:
    "8b0e"  #             mov ecx, [rsi]            an errno, or 0 for all others
    "8b5604"  #           mov edx, [rsi+4]          the length of what follows
    "4883c608"  #         add rsi, 8
    "4439c9"  #           cmp ecx, r9d
    "7409"  #             je tell
    "85c9"  #             test ecx, ecx
    "7405"  #             je tell
    "4801d6"  #           add rsi, rdx
    "ebe9"  #             jmp next
    # tell:
    "89ef"  #             mov edi, ebp
    "b801000000"  #       mov eax, 1
    "0f05"  #             syscall                   write
    # dead:
    "bf01000000"  #       mov edi, 1
    "b8e7000000"  #       mov eax, 231
    "0f05"  #             syscall                   exit_group
    # ended:
    "8dbf80000000"  #     lea edi, [rdi+128]        the signal
    "b8e7000000"  #       mov eax, 231
    "0f05"  #             syscall                   exit_group
)
_CHANNEL_AT, _GATE_AT = 8, 14

_SUCCESSION = bytes.fromhex(
    "bf00000000"  #       mov edi, CHANNEL
    "be01000000"  #       mov esi, F_GETFD
    "b848000000"  #       mov eax, 72
    "0f05"  #             syscall                   fcntl
    "85c0"  #             test eax, eax
    "790c"  #             jns begin
    "bf01000000"  #       mov edi, 1
    "b8e7000000"  #       mov eax, 231
    "0f05"  #             syscall                   exit_group
    # begin:
    "bf04000000"  #       mov edi, 4
    "31f6"  #             xor esi, esi
    "b89d000000"  #       mov eax, 157
    "0f05"  #             syscall                   prctl PR_SET_DUMPABLE
    "bf00800000"  #       mov edi, CLONE_PARENT
    "31f6"  #             xor esi, esi
    "31d2"  #             xor edx, edx
    "4531d2"  #           xor r10d, r10d
    "4531c0"  #           xor r8d, r8d
    "b838000000"  #       mov eax, 56
    "0f05"  #             syscall                   clone
    "4885c0"  #           test rax, rax
    "741e"  #             je born
    "50"  #               push rax
    "bf00000000"  #       mov edi, CHANNEL
    "4889e6"  #           mov rsi, rsp
    "ba08000000"  #       mov edx, 8
    "b801000000"  #       mov eax, 1
    "0f05"  #             syscall                   write
    "31ff"  #             xor edi, edi
    "b8e7000000"  #       mov eax, 231
    "0f05"  #             syscall                   exit_group
    # born:
    "b870000000"  #       mov eax, 112
    "0f05"  #             syscall                   setsid
)
_KNOWS_AT, _TELLS_AT = 1, 76
_TERMINAL = bytes.fromhex(
    "31ff"  #             xor edi, edi
    "be0e540000"  #       mov esi, TIOCSCTTY
    "31d2"  #             xor edx, edx
    "b810000000"  #       mov eax, 16
    "0f05"  #             syscall                   ioctl
    "85c0"  #             test eax, eax
)
_NO_TERMINAL = bytes.fromhex(
    "488d351d000000"  #   lea rsi, [rip+refusal]
    "ba00000000"  #       mov edx, LENGTH
    "bf00000000"  #       mov edi, CHANNEL
    "b801000000"  #       mov eax, 1
    "0f05"  #             syscall                   write
    "bf01000000"  #       mov edi, 1
    "b8e7000000"  #       mov eax, 231
    "0f05"  #             syscall                   exit_group
    # refusal:
)
_LENGTH_AT, _REFUSES_AT = 8, 13
_JUMP_IF_NOT_NEGATIVE = bytes.fromhex("0f89")
"""jns, which a distance follows."""

_ANSWER = struct.Struct("<II")
_MORTALITY = bytes.fromhex(
    "bf01000000"  #       mov edi, 1
    "be09000000"  #       mov esi, SIGKILL
    "b89d000000"  #       mov eax, 157
    "0f05"  #             syscall                   prctl PR_SET_PDEATHSIG
    "6800000000"  #       push CHANNEL              struct pollfd: fd, events, revents
    "4889e7"  #           mov rdi, rsp
    "be01000000"  #       mov esi, 1
    "31d2"  #             xor edx, edx
    "b807000000"  #       mov eax, 7
    "0f05"  #             syscall                   poll
    "59"  #               pop rcx
    "85c0"  #             test eax, eax
    "740c"  #             je alive
    "bf01000000"  #       mov edi, 1                POLLHUP: the runtime has ended before it could be killed with it
    "b8e7000000"  #       mov eax, 231
    "0f05"  #             syscall                   exit_group
    # alive:
)
_LOOKS_AT = 18


@dataclass(frozen=True, slots=True)
class Succession:
    """What a successor is to have that is made by the program itself."""

    refusal: bytes | None = None
    """The terminal on 0 as its controlling one, or else this is what it answers."""
    mortal: bool = False
    """It is killed when the runtime ends."""

    def code(self, channel: int) -> bytes:
        """What comes before the rest of the program."""
        code = bytearray(_SUCCESSION)
        struct.pack_into("<i", code, _KNOWS_AT, channel)
        struct.pack_into("<i", code, _TELLS_AT, channel)
        if self.refusal is not None:
            code += _TERMINAL + _unless_succeeded(channel, self.refusal)
        if self.mortal:
            code += _MORTALITY
            struct.pack_into("<i", code, len(code) - len(_MORTALITY) + _LOOKS_AT, channel)
        return bytes(code)


def _unless_succeeded(channel: int, answer: bytes) -> bytes:
    code = bytearray(_NO_TERMINAL)
    struct.pack_into("<i", code, _LENGTH_AT, len(answer))
    struct.pack_into("<i", code, _REFUSES_AT, channel)
    code += answer
    return _JUMP_IF_NOT_NEGATIVE + struct.pack("<i", len(code)) + code


def image(
    channel: int, gate: int | None, answers: list[tuple[int, bytes]], succession: Succession | None = None
) -> bytes:
    """The program as a file, for these descriptors."""
    code = bytearray(_CODE)
    struct.pack_into("<i", code, _CHANNEL_AT, channel)
    struct.pack_into("<i", code, _GATE_AT, -1 if gate is None else gate)
    data = b"".join(_ANSWER.pack(errno, len(message)) + message for errno, message in answers)
    before = b"" if succession is None else succession.code(channel)
    return executable(before + bytes(code) + data)
