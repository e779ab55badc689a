"""A machine for seccomp filters: what the kernel would make of them."""

import functools

from corral.kernel.seccomp.compiler import decode


@functools.lru_cache
def decoded(program: bytes) -> list[tuple[int, int, int, int]]:
    return list(decode(program))


def run(program: bytes, architecture: int, number: int, arguments: tuple[int, ...] = ()) -> int:
    """What the kernel would do: the value the filter returns."""
    words = [number, architecture, 0, 0]
    for value in (*arguments, *[0] * (6 - len(arguments))):
        words += [value & 0xFFFFFFFF, value >> 32]
    instructions = decoded(program)
    accumulator = at = 0
    while True:
        code, yes, no, k = instructions[at]
        at += 1
        match code:
            case 0x20:
                accumulator = words[k // 4]
            case 0x54:
                accumulator &= k
            case 0x05:
                at += k
            case 0x15:
                at += yes if accumulator == k else no
            case 0x25:
                at += yes if accumulator > k else no
            case 0x35:
                at += yes if accumulator >= k else no
            case 0x06:
                return k
            case _:
                raise AssertionError(f"instruction {code:#x}")
