"""Base64, RFC 4648, section 4, at the speed of memory: Python's encoder, and the C library's, take longer than all else
that is done with what is no text on its way into a log.

On x86-64 twelve bytes at a time become sixteen letters (W. Muła, D. Lemire: Faster Base64 Encoding and Decoding using
AVX2 Instructions, with SSSE3's); elsewhere, or where no memory may be made executable, b64_ntop of glibc's <resolv.h>
is asked.
"""

import ctypes
from binascii import b2a_base64
from collections.abc import Callable

from corral.kernel.syscalls import MACHINE, libc

type Encode = Callable[[bytes], tuple[bytes, bytes]]

_LIBRARY = "libresolv.so.2"
_IN, _OUT = 12, 16

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
    # encode(from, to, count):
    "660f6f15a8000000"  #   movdqa xmm2, [rip+order]
    "660f6f1db0000000"  #   movdqa xmm3, [rip+odd]
    "660f6f25b8000000"  #   movdqa xmm4, [rip+odd_places]
    "660f6f2dc0000000"  #   movdqa xmm5, [rip+even]
    "660f6f35c8000000"  #   movdqa xmm6, [rip+even_places]
    "660f6f3dd0000000"  #   movdqa xmm7, [rip+last_letter]
    "66440f6f05d7000000"  # movdqa xmm8, [rip+small]
    "66440f6f0dde000000"  # movdqa xmm9, [rip+capital]
    "66440f6f15e5000000"  # movdqa xmm10, [rip+distances]
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
_ENCODE_AT = 16
_SSSE3 = 1 << 9
_PROT_READ, _PROT_WRITE, _PROT_EXEC = 1, 2, 4
_MAP_PRIVATE, _MAP_ANONYMOUS = 0x02, 0x20
_FAILED = ctypes.c_void_p(-1).value


def by_vectors() -> Encode | None:
    """Twelve bytes at a time; None where this machine can't."""
    if MACHINE != "x86_64" or not (code := _executable(_CODE)):
        return None
    if not ctypes.CFUNCTYPE(ctypes.c_int)(code)() & _SSSE3:
        return None
    encode = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t)(code + _ENCODE_AT)

    def encoded(data: bytes) -> tuple[bytes, bytes]:
        count = max(0, len(data) - (_OUT - _IN)) // _IN  # of which no byte behind the last is read
        # Filled in place: nobody has these bytes yet.
        target = bytes(count * _OUT)
        encode(data, target, count)
        return target, b2a_base64(data[count * _IN :], newline=False)

    return encoded


def by_library() -> Encode | None:
    """glibc's, byte by byte; None where it is not to be had."""
    try:
        function = ctypes.CDLL(_LIBRARY)["__b64_ntop"]
    except (OSError, AttributeError):  # no glibc
        return None
    function.argtypes = (ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t)

    def encoded(data: bytes) -> tuple[bytes, bytes]:
        length = (len(data) + 2) // 3 * 4
        target = bytes(length)  # what is written behind them, a NUL, is there already
        function(data, len(data), target, length + 1)
        return target, b""

    return encoded


def by_interpreter(data: bytes) -> tuple[bytes, bytes]:
    """Python's own."""
    return b2a_base64(data, newline=False), b""


def _executable(code: bytes) -> int:
    """Where it lies, in memory that nobody can write to; 0 where that is not allowed."""
    function = ctypes.CDLL(None)["mmap"]
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    function.restype = ctypes.c_void_p
    address: int = function(None, len(code), _PROT_READ | _PROT_WRITE, _MAP_PRIVATE | _MAP_ANONYMOUS, -1, 0)
    if address == _FAILED:
        return 0
    ctypes.memmove(address, code, len(code))
    protect = libc("mprotect", ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return address if protect(address, len(code), _PROT_READ | _PROT_EXEC) == 0 else 0


encoded: Encode = by_vectors() or by_library() or by_interpreter
"""In two parts, of which the second follows the first."""
