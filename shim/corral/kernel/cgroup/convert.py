"""Conversions of OCI (that is: v1) values to the ranges of cgroup v2. Pure."""

import math

from corral.kernel.cgroup.files import UNLIMITED

SHARES_MIN, SHARES_DEFAULT, SHARES_MAX = 2, 1024, 262144
WEIGHT_MIN, WEIGHT_MAX = 1, 10000
IO_WEIGHT_MIN, IO_WEIGHT_MAX = 10, 1000


def cpu_weight(shares: int) -> int:
    """cpu.weight for cpu.shares, such that minimum, default and maximum of the two meet.

    Until 2025 runtimes drew a straight line between the ends, which made a weight of 39 of the default 1024
    shares, instead of 100. runc since 1.3.2 has this curve through all three points, and so has crun:

        l = log2(shares);  weight = ceil(10 ^ ((l^2 + 125 l) / 612 - 7/34))

    Source: opencontainers/cgroups pull 20, runc issue 4896, crun pull 1767, kubernetes issue 131216.

    >>> cpu_weight(2), cpu_weight(1024), cpu_weight(262144)
    (1, 100, 10000)
    """
    if shares <= SHARES_MIN:
        return WEIGHT_MIN
    if shares >= SHARES_MAX:
        return WEIGHT_MAX
    log = math.log2(shares)
    # Rounded to nine digits first: at 1024 the exponent must be exactly 2, or ceil() makes 101 of it.
    return math.ceil(round(10 ** ((log * log + 125 * log) / 612 - 7 / 34), 9))


def io_weight(weight: int) -> int:
    """io.weight (1 to 10000) for an OCI blkio weight (10 to 1000), on a straight line, as runc and crun do.

    Source: crun.1 "IO controller"; opencontainers/cgroups ConvertBlkIOToIOWeightValue.

    >>> io_weight(10), io_weight(1000)
    (1, 10000)
    """
    return 1 + (weight - IO_WEIGHT_MIN) * (WEIGHT_MAX - WEIGHT_MIN) // (IO_WEIGHT_MAX - IO_WEIGHT_MIN)


def swap_max(memory_and_swap: int, memory: int) -> int:
    """memory.swap.max, which counts swap alone, for OCI's memory+swap limit.

    Raises ValueError if there is more memory than memory and swap together.
    Source: OCI config-linux.md "memory.swap"; opencontainers/cgroups ConvertMemorySwapToCgroupV2Value.

    >>> swap_max(300, 100), swap_max(UNLIMITED, 100), swap_max(300, UNLIMITED)
    (200, -1, 300)
    """
    if memory_and_swap == UNLIMITED or memory == UNLIMITED:
        return memory_and_swap
    if memory_and_swap < memory:
        raise ValueError(f"memory+swap limit {memory_and_swap} is below the memory limit {memory}")
    return memory_and_swap - memory
