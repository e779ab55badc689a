"""What a process is given of the machine, from config.json to the kernel's terms: computed before it exists.

A process that asks for none of it has none of this.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from corral.kernel import scheduling
from corral.oci.errors import SETUP, ExecFailed
from corral.oci.scheduling import IOPriority, MemoryPolicy, Scheduler
from corral.oci.spec import Linux, Process
from corral.oci.validity import number_set


@dataclass(frozen=True, slots=True)
class Allotment:
    """The calls that are to be made, each with the member of config.json that asks for it.

    Where one fails, ExecFailed names the member: the kernel may lack it, or this host's root the right to it.
    """

    scheduler: Callable[[int], None] | None
    """Takes a pid. What it does may end with a fork, or be in the way of one."""
    calls: tuple[tuple[str, Callable[[], None]], ...]

    def apply(self) -> None:
        """Make the calls, in the process they are for, while it has its privilege."""
        for member, call in self.calls:
            _attempt(member, call)
        self.schedule(0)

    def schedule(self, pid: int) -> None:
        """Make the call that is not good for a successor, for a process; 0 is this one."""
        if (scheduler := self.scheduler) is not None:
            _attempt("process.scheduler", lambda: scheduler(pid))

    def inherited(self) -> "Allotment":
        """What a process can apply for its successor."""
        return Allotment(None, self.calls)


def _attempt(member: str, call: Callable[[], None]) -> None:
    try:
        call()
    except OSError as e:
        raise ExecFailed(SETUP, f"{member}: {e.strerror or e}") from e


def allotment_of(process: Process, linux: Linux) -> Allotment | None:
    """What a process of a container asks for; None is nothing."""
    scheduler = _scheduler(process.scheduler) if process.scheduler is not None else None
    calls: list[tuple[str, Callable[[], None]]] = []
    if process.io_priority is not None:
        calls.append(("process.ioPriority", _io_priority(process.io_priority)))
    if linux.personality is not None:
        domain = scheduling.Domain[linux.personality.domain]
        calls.append(("linux.personality", lambda: scheduling.set_personality(domain)))
    if linux.memory_policy is not None:
        calls.append(("linux.memoryPolicy", _memory_policy(linux.memory_policy)))
    return Allotment(scheduler, tuple(calls)) if calls or scheduler is not None else None


def _scheduler(wanted: Scheduler) -> Callable[[int], None]:
    policy = scheduling.Policy[wanted.policy.removeprefix("SCHED_")]
    flags = scheduling.SchedulerFlags(0)
    for flag in wanted.flags:
        flags |= scheduling.SchedulerFlags[flag.removeprefix("SCHED_FLAG_")]
    return lambda pid: scheduling.set_scheduler(
        policy,
        flags,
        pid=pid,
        nice=wanted.nice,
        priority=wanted.priority,
        runtime_ns=wanted.runtime,
        deadline_ns=wanted.deadline,
        period_ns=wanted.period,
    )


def _io_priority(wanted: IOPriority) -> Callable[[], None]:
    io_class = scheduling.IOClass[wanted.class_.removeprefix("IOPRIO_CLASS_")]
    return lambda: scheduling.set_io_priority(io_class, wanted.priority)


def _memory_policy(wanted: MemoryPolicy) -> Callable[[], None]:
    mode = scheduling.MemoryMode[wanted.mode.removeprefix("MPOL_")]
    flags = scheduling.MemoryFlags(0)
    for flag in wanted.flags:
        flags |= scheduling.MemoryFlags[flag.removeprefix("MPOL_F_")]
    nodes = number_set(wanted.nodes, "linux.memoryPolicy.nodes")
    return lambda: scheduling.set_memory_policy(mode, flags, nodes)


@dataclass(frozen=True, slots=True)
class Affinity:
    """The CPUs of a process that joins: before it is in the container's cgroup, and once it is. Empty: as it comes."""

    initial: frozenset[int]
    final: frozenset[int]

    @contextlib.contextmanager
    def children_begin(self) -> Iterator[None]:
        """Have the children that the caller makes meanwhile begin on the initial CPUs. Raises ExecFailed."""
        if not self.initial:
            yield
            return
        own = scheduling.cpus()
        _set_cpus(self.initial, "process.execCPUAffinity.initial")
        try:
            yield
        finally:
            scheduling.set_cpus(own)

    def set_final(self) -> None:
        """To be called by the process once it has joined. Raises ExecFailed."""
        _set_cpus(self.final, "process.execCPUAffinity.final")


def affinity_of(process: Process) -> Affinity | None:
    """What a process that joins asks for; None is nothing."""
    wanted, path = process.exec_cpu_affinity, "process.execCPUAffinity"
    if wanted is None:
        return None
    return Affinity(number_set(wanted.initial, f"{path}.initial"), number_set(wanted.final, f"{path}.final"))


def _set_cpus(cpus: frozenset[int], member: str) -> None:
    if cpus:
        _attempt(member, lambda: scheduling.set_cpus(cpus))
