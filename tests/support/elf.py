"""The smallest programs, written as machine code: no compiler is needed, and they do nothing but what they say."""

import os
import struct

_MACHINES = {"x86_64": 62, "aarch64": 183}
_BASE = 0x400000

GET_EUID = {  # exit(geteuid())
    "x86_64": "b86b0000000f0589c7b83c0000000f05",
    "aarch64": "e81580d2010000d4a80b80d2010000d4",
}
ROLLING_FORK = {  # while (fork() <= 0); exit(0): each process lives for one fork
    "x86_64": "b8390000000f0585c07ef531ffb83c0000000f05",
    "aarch64": "881b80d2200280d2010080d2010000d41f0000f16dffff54000080d2a80b80d2010000d4",
}
FORK_BOMB = {  # while (1) fork()
    "x86_64": "b8390000000f05ebf7",
    "aarch64": "881b80d2200280d2010080d2010000d4fcffff17",
}
INT80 = {"x86_64": "b814000000cd8031ffb83c0000000f05"}  # getpid by int $0x80; exit(0)
X32 = {"x86_64": "b8270000400f0531ffb83c0000000f05"}  # getpid of x32; exit(0)


def program(code: dict[str, str]) -> bytes:
    """An ELF file: a header, one segment, and the code for this machine."""
    text = bytes.fromhex(code[os.uname().machine])
    size = 120 + len(text)
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack(
        "<HHIQQQIHHHHHH", 2, _MACHINES[os.uname().machine], 1, _BASE + 120, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )
    return header + struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, 0x1000) + text
