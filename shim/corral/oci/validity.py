"""What of config.json is wrong although each member by itself is of the right kind. Pure.

Everything raises ValueError that begins with the JSON path of what is wrong.
"""

from dataclasses import fields
from typing import TYPE_CHECKING

from corral.oci.decode import json_name

if TYPE_CHECKING:  # that asks for this
    from corral.oci.scheduling import MemoryPolicy, Scheduler
    from corral.oci.spec import Hooks, Process, Seccomp, Spec


def check_process(process: "Process", path: str) -> None:
    """Refuse what no process can be."""
    if not process.cwd.startswith("/"):
        raise ValueError(f"{path}.cwd: {process.cwd!r} is not an absolute path")
    if not process.args or not process.args[0]:
        raise ValueError(f"{path}.args: names no program")
    _check_env(process.env, f"{path}.env")
    types = [limit.type for limit in process.rlimits]
    if len(set(types)) != len(types):
        raise ValueError(f"{path}.rlimits: one limit is given twice")
    for i, limit in enumerate(process.rlimits):
        if limit.soft > limit.hard:
            raise ValueError(f"{path}.rlimits[{i}]: the soft limit {limit.soft} is above the hard limit {limit.hard}")
    if process.scheduler is not None:
        _check_scheduler(process.scheduler, f"{path}.scheduler")
    if process.exec_cpu_affinity is not None:
        number_set(process.exec_cpu_affinity.initial, f"{path}.execCPUAffinity.initial")
        number_set(process.exec_cpu_affinity.final, f"{path}.execCPUAffinity.final")


def _check_env(env: tuple[str, ...], path: str) -> None:
    for i, assignment in enumerate(env):
        if assignment.startswith("=") or "=" not in assignment:
            raise ValueError(f"{path}[{i}]: {assignment!r} is not NAME=VALUE")


def _check_scheduler(scheduler: "Scheduler", path: str) -> None:
    policy = scheduler.policy
    if policy in ("SCHED_OTHER", "SCHED_BATCH") and not -20 <= scheduler.nice <= 19:
        raise ValueError(f"{path}.nice: {scheduler.nice} is not between -20 and 19")
    if scheduler.priority and policy not in ("SCHED_FIFO", "SCHED_RR"):
        raise ValueError(f"{path}.priority: {policy} has none")
    for name in ("runtime", "deadline", "period"):
        if getattr(scheduler, name) and policy != "SCHED_DEADLINE":
            raise ValueError(f"{path}.{name}: {policy} has none")


def check_spec(spec: "Spec") -> None:
    """Refuse what no version of the specification allows."""
    major = spec.oci_version.partition(".")[0]
    if major != "1":
        raise ValueError(f"ociVersion: {spec.oci_version!r} is not a version 1 specification")
    if spec.process is not None:
        check_process(spec.process, "process")
    for i, mount in enumerate(spec.mounts):
        if not mount.destination:
            raise ValueError(f"mounts[{i}].destination: missing")
    kinds = [namespace.type for namespace in spec.linux.namespaces]
    if len(set(kinds)) != len(kinds):
        raise ValueError("linux.namespaces: one type is given twice")
    if spec.hooks is not None:
        _check_hooks(spec.hooks)
    if spec.linux.seccomp is not None:
        _check_seccomp(spec.linux.seccomp)
    if spec.linux.memory_policy is not None:
        _check_memory_policy(spec.linux.memory_policy)
    if spec.linux.personality is not None and spec.linux.personality.flags:
        raise ValueError(f"linux.personality.flags[0]: there is no flag {spec.linux.personality.flags[0]!r}")


def _check_hooks(hooks: "Hooks") -> None:
    for point in fields(hooks):
        path = json_name(point.name)
        for i, hook in enumerate(getattr(hooks, point.name)):
            if not hook.path.startswith("/"):
                raise ValueError(f"hooks.{path}[{i}].path: {hook.path!r} is not an absolute path")
            if hook.timeout is not None and hook.timeout <= 0:
                raise ValueError(f"hooks.{path}[{i}].timeout: {hook.timeout} is not greater than zero")
            _check_env(hook.env, f"hooks.{path}[{i}].env")


def _check_seccomp(profile: "Seccomp") -> None:
    for i, rule in enumerate(profile.syscalls):
        if not rule.names:
            raise ValueError(f"linux.seccomp.syscalls[{i}].names: names no system call")
    if profile.listener_metadata and not profile.listener_path:
        raise ValueError("linux.seccomp.listenerMetadata: must not be set without listenerPath")


def _check_memory_policy(policy: "MemoryPolicy") -> None:
    nodes, mode = number_set(policy.nodes, "linux.memoryPolicy.nodes"), policy.mode
    if nodes and mode in ("MPOL_DEFAULT", "MPOL_LOCAL"):
        raise ValueError(f"linux.memoryPolicy.nodes: {mode} takes none")
    if not nodes and mode not in ("MPOL_DEFAULT", "MPOL_LOCAL", "MPOL_PREFERRED"):
        raise ValueError(f"linux.memoryPolicy.nodes: {mode} needs at least one")


LARGEST_NUMBER = 8191
"""Of a CPU or memory node: what the kernel can be built for."""


def number_set(text: str, path: str) -> frozenset[int]:
    """The numbers of a list like 0-3,7, of CPUs or memory nodes. Raises ValueError that begins with path."""
    numbers: set[int] = set()
    for part in text.split(",") if text.strip() else ():
        first, dash, last = part.strip().partition("-")
        ends = (first, last if dash else first)
        if not all(end.isascii() and end.isdigit() and len(end) < 9 for end in ends):
            raise ValueError(f"{path}: {text!r} is not a list of numbers and ranges, like 0-3,7")
        low, high = map(int, ends)
        if low > high or high > LARGEST_NUMBER:
            raise ValueError(f"{path}: {part.strip()!r} is not a range within 0-{LARGEST_NUMBER}")
        numbers.update(range(low, high + 1))
    return frozenset(numbers)
