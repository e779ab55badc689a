"""Executables of a few hundred bytes of machine code, without an interpreter or a libc. Source: elf(5)."""

import struct

_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")
_IDENT = b"\x7fELF\x02\x01\x01"
_ET_EXEC, _EM_X86_64, _PT_LOAD, _PT_GNU_STACK = 2, 62, 1, 0x6474E551
_R, _W, _X = 4, 2, 1
_BASE, _PAGE = 0x400000, 0x1000
_SEGMENTS = 3
START = _BASE + _EHDR.size + _SEGMENTS * _PHDR.size
"""Where the code is, once it is executed."""
MEMORY = 0x10000000
"""Where there is memory to write to, all zeros at first."""


def executable(code: bytes, *, memory_bytes: int = _PAGE) -> bytes:
    """The file of code that begins with its first instruction."""
    size = START - _BASE + len(code)
    ehdr = _EHDR.pack(
        *(_IDENT, _ET_EXEC, _EM_X86_64, 1, START, _EHDR.size, 0, 0, _EHDR.size, _PHDR.size, _SEGMENTS, 0, 0, 0)
    )
    load = _PHDR.pack(_PT_LOAD, _R | _X, 0, _BASE, _BASE, size, size, _PAGE)
    memory = _PHDR.pack(_PT_LOAD, _R | _W, 0, MEMORY, MEMORY, 0, memory_bytes, _PAGE)
    stack = _PHDR.pack(_PT_GNU_STACK, _R | _W, 0, 0, 0, 0, 0, 16)
    return ehdr + load + memory + stack + code
