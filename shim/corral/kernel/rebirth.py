"""Going on as another process: a new one to the kernel, and to the interpreter the same, in the same memory.

A fork of Python copies page tables, then each page that either side writes to, and at execve the kernel takes it all
apart: a third of what it takes to make a container. Nothing of that is needed where the process that was there before
has nothing more to do. It stays only to have the memory taken apart in the new one's place, once that has executed a
program or ended, of which a pipe tells. It touches neither memory nor stack, which are the new one's.

Whoever gets at the memory of the new one, which may give up all privilege and live among others, has the one before,
too. So that can do no more than read and write what it has (seccomp's strict mode), which is an end of the pipe.
"""

import ctypes
import os
import select
import struct
import time
from collections.abc import Callable

from corral.kernel import machine_code
from corral.kernel.process import CLONE_INTO_CGROUP, CLONE_PARENT, clone_arguments
from corral.kernel.syscalls import MACHINE, check

_CLONE_VM, _CLONE_PARENT_SETTID = 0x100, 0x100000
_LOOK_S = 0.0001

# Source: syscall(2), clone(2), close_range(2), seccomp(2), and the System V ABI.
_CODE = bytes.fromhex(
    # clone3(arguments, size, pipe, is_harmless):
    "4989c8"  #           mov r8, rcx               which a system call overwrites
    "b8b3010000"  #       mov eax, 435
    "0f05"  #             syscall
    "4885c0"  #           test rax, rax
    "7f01"  #             jg before
    "c3"  #               ret                       the new process, or an error
    # before:
    "4989d4"  #           mov r12, rdx
    "4d89c5"  #           mov r13, r8
    "31ff"  #             xor edi, edi
    "418d7424ff"  #       lea esi, [r12-1]
    "31d2"  #             xor edx, edx
    "b8b4010000"  #       mov eax, 436
    "0f05"  #             syscall                   close_range
    "418d7c2401"  #       lea edi, [r12+1]
    "83ceff"  #           or esi, -1
    "31d2"  #             xor edx, edx
    "b8b4010000"  #       mov eax, 436
    "0f05"  #             syscall                   close_range
    "bf16000000"  #       mov edi, PR_SET_SECCOMP
    "be01000000"  #       mov esi, SECCOMP_MODE_STRICT
    "b89d000000"  #       mov eax, 157
    "0f05"  #             syscall                   prctl
    "85c0"  #             test eax, eax
    "7518"  #             jne end                   it can't, and stays no longer
    "41c7450001000000"  # mov dword ptr [r13], 1
    "4489e7"  #           mov edi, r12d
    "498d7504"  #         lea rsi, [r13+4]
    "ba01000000"  #       mov edx, 1
    "31c0"  #             xor eax, eax
    "0f05"  #             syscall                   read
    # end:
    "31ff"  #             xor edi, edi
    "b83c000000"  #       mov eax, 60
    "0f05"  #             syscall                   exit
)
_PLACES = struct.Struct("=3i")
_places = ctypes.create_string_buffer(_PLACES.size)
"""Where the kernel writes the pid, and the one before that it is harmless; and what it reads."""


def _load() -> Callable[[bytes, int, int, int], int] | None:
    if MACHINE != "x86_64" or not (address := machine_code.place(_CODE)):
        return None
    word = ctypes.c_size_t
    # As a function of Python's own the interpreter lock stays held over the call.
    return ctypes.PYFUNCTYPE(ctypes.c_long, ctypes.c_char_p, word, word, word)(address)


_clone3 = _load()
POSSIBLE = _clone3 is not None
"""Whether this machine can."""


def go_on(flags: int, *, cgroup: int | None = None) -> tuple[int, int]:
    """Be another child of one's parent from here on: its pid, as the parent has it, and the end of the pipe.

    That is to be kept; it is close-on-exec. flags: CLONE_NEW*. cgroup: as for process.clone(). The caller must be
    single-threaded, without a signal handler, and does this once. Raises OSError; then nothing has changed.
    """
    assert _clone3 is not None
    reader, writer = os.pipe2(os.O_CLOEXEC)
    at = ctypes.addressof(_places)
    every = flags | CLONE_PARENT | _CLONE_VM | _CLONE_PARENT_SETTID | (0 if cgroup is None else CLONE_INTO_CGROUP)
    arguments = clone_arguments(every, cgroup=cgroup or 0, pid_at=at)
    code = _clone3(arguments, len(arguments), reader, at + 4)
    os.close(reader)
    if code < 0:
        os.close(writer)
        ctypes.set_errno(-code)
        check(-1, f"clone3 flags={every:#x}")
    pid: int = _PLACES.unpack(_places.raw)[0]
    return pid, writer


def await_harmless(pipe: int) -> None:
    """Return once the one before is harmless, or has ended. To be called while nobody else can get at this memory.

    pipe: from go_on(). Who was killed, or can't be harmless, tells nothing; its end of the pipe is closed by the kernel
    after it has left the memory.
    """
    poll = select.poll()
    poll.register(pipe, 0)
    while not _PLACES.unpack(_places.raw)[1] and not poll.poll(0):
        time.sleep(_LOOK_S)
