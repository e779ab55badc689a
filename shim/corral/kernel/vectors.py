"""What is done to every byte of a busy log, sixteen at a time: two loops in code of x86-64, with SSSE3's instructions.

Base64: W. Muła, D. Lemire, Faster Base64 Encoding and Decoding using AVX2 Instructions, 2018, of which these are the
narrower ones.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

from corral.kernel import machine_code
from corral.kernel.syscalls import MACHINE

type Encode = Callable[[bytes, bytes, int], None]
type Count = Callable[[bytes, int, int], int]

ENCODED_IN, ENCODED_OUT, READ_AT_ONCE = 12, 16, 16
"""How many bytes a group of encode has, and as Base64; either loop reads sixteen at a time."""

# Source: the System V ABI.
_CODE = bytes.fromhex(
    # supported():
    "53"  #                 push rbx
    "b801000000"  #         mov eax, 1
    "0fa2"  #               cpuid
    "89c8"  #               mov eax, ecx
    "5b"  #                 pop rbx
    "c3"  #                 ret
    "0f1f4000"  #           nop
    # encode(from, to, groups):
    "660f6f15f8000000"  #   movdqa xmm2, [rip+order]
    "660f6f1d00010000"  #   movdqa xmm3, [rip+odd]
    "660f6f2508010000"  #   movdqa xmm4, [rip+odd_places]
    "660f6f2d10010000"  #   movdqa xmm5, [rip+even]
    "660f6f3518010000"  #   movdqa xmm6, [rip+even_places]
    "660f6f3d20010000"  #   movdqa xmm7, [rip+last_letter]
    "66440f6f0527010000"  # movdqa xmm8, [rip+small]
    "66440f6f0d2e010000"  # movdqa xmm9, [rip+capital]
    "66440f6f1535010000"  # movdqa xmm10, [rip+distances]
    "4885d2"  #             test rdx, rdx
    "745e"  #               je done
    # again:
    "f30f6f07"  #           movdqu xmm0, [rdi]        four more than are encoded
    "660f3800c2"  #         pshufb xmm0, xmm2         of each three bytes, a b c, there is b a c b
    "660f6fc8"  #           movdqa xmm1, xmm0
    "660fdbc3"  #           pand xmm0, xmm3           the first and the third of four numbers, 0 to 63
    "660fe4c4"  #           pmulhuw xmm0, xmm4
    "660fdbcd"  #           pand xmm1, xmm5           the second and the fourth
    "660fd5ce"  #           pmullw xmm1, xmm6
    "660febc1"  #           por xmm0, xmm1
    "660f6fc8"  #           movdqa xmm1, xmm0
    "660fd8cf"  #           psubusb xmm1, xmm7        1 to 10 for digits, 11 and 12 for + and /, 0 for letters
    "66450f6fd8"  #         movdqa xmm11, xmm8
    "66440f64d8"  #         pcmpgtb xmm11, xmm0
    "66450fdbd9"  #         pand xmm11, xmm9
    "66410febcb"  #         por xmm1, xmm11           13 for capitals
    "66450f6fda"  #         movdqa xmm11, xmm10
    "66440f3800d9"  #       pshufb xmm11, xmm1
    "66410ffcc3"  #         paddb xmm0, xmm11
    "f30f7f06"  #           movdqu [rsi], xmm0
    "4883c70c"  #           add rdi, 12
    "4883c610"  #           add rsi, 16
    "48ffca"  #             dec rdx
    "75a2"  #               jne again
    # done:
    "c3"  #                 ret
    "90"  #                 nop
    # count(from, byte, groups):
    "660f6ede"  #           movd xmm3, esi
    "660fefd2"  #           pxor xmm2, xmm2
    "660f3800da"  #         pshufb xmm3, xmm2         the byte, sixteen times
    "660fefe4"  #           pxor xmm4, xmm4           two sums
    "4885d2"  #             test rdx, rdx
    "7421"  #               je counted
    # look:
    "f30f6f07"  #           movdqu xmm0, [rdi]
    "660f74c3"  #           pcmpeqb xmm0, xmm3        -1 where it is
    "660fefc9"  #           pxor xmm1, xmm1
    "660ff8c8"  #           psubb xmm1, xmm0
    "660ff6ca"  #           psadbw xmm1, xmm2
    "660fd4e1"  #           paddq xmm4, xmm1
    "4883c710"  #           add rdi, 16
    "48ffca"  #             dec rdx
    "75df"  #               jne look
    # counted:
    "0f12c4"  #             movhlps xmm0, xmm4
    "660fd4c4"  #           paddq xmm0, xmm4
    "66480f7ec0"  #         movq rax, xmm0
    "c3"  #                 ret
    "66662e0f1f84000000000090"  # nop
    "0100020104030504070608070a090b0a"  # order
    "00fcc00f00fcc00f00fcc00f00fcc00f"  # odd
    "40000004400000044000000440000004"  # odd_places
    "f0033f00f0033f00f0033f00f0033f00"  # even
    "10000001100000011000000110000001"  # even_places
    "33333333333333333333333333333333"  # last_letter
    "1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a"  # small
    "0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d"  # capital
    "47fcfcfcfcfcfcfcfcfcfcedf0410000"  # distances       from a number to its letter
)
_ENCODE_AT, _COUNT_AT = 0x10, 0xC0
_SSSE3 = 1 << 9


@dataclass(frozen=True, slots=True)
class Vectors:
    """The loops, which trust in what they are told."""

    encode: Encode
    """Groups of bytes, from one place to another, which is overwritten."""
    count: Count
    """How often there is a byte in groups of sixteen."""


def _load() -> Vectors | None:
    if MACHINE != "x86_64" or not (code := machine_code.place(_CODE)):
        return None
    if not ctypes.CFUNCTYPE(ctypes.c_int)(code)() & _SSSE3:
        return None
    size, data = ctypes.c_size_t, ctypes.c_char_p
    encode = ctypes.CFUNCTYPE(None, data, data, size)(code + _ENCODE_AT)
    return Vectors(encode, ctypes.CFUNCTYPE(size, data, ctypes.c_int, size)(code + _COUNT_AT))


LOOPS = _load()
"""None where this machine can't."""


def count(data: bytes, byte: int) -> int:
    """How often a byte is there: CPython's own count looks at them one by one, until 3.14."""
    if LOOPS is None:
        return len(data) - len(data.replace(bytes((byte,)), b""))
    groups = len(data) // READ_AT_ONCE
    return LOOPS.count(data, byte, groups) + data.count(byte, groups * READ_AT_ONCE)
