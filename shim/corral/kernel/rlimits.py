"""Resource limits, clamped to what this process may set."""

import contextlib
import resource

NAMES = {
    f"RLIMIT_{name}": getattr(resource, f"RLIMIT_{name}")
    for name in (
        *("AS", "CORE", "CPU", "DATA", "FSIZE", "MEMLOCK", "MSGQUEUE", "NICE", "NOFILE", "NPROC", "RSS"),
        *("RTPRIO", "RTTIME", "SIGPENDING", "STACK"),
    )
    if hasattr(resource, f"RLIMIT_{name}")
}
NAMES |= {"RLIMIT_LOCKS": 10, "RLIMIT_RTTIME": 15}

UNLIMITED = 2**64 - 1


def set_limit(name: str, *, soft: int, hard: int) -> None:
    """Set a limit (UNLIMITED for none). Without CAP_SYS_RESOURCE a hard limit can't be raised: then as far as it goes.

    Raises ValueError for a name the kernel does not know and for soft > hard.
    """
    number = NAMES.get(name)
    if number is None:
        raise ValueError(f"unknown resource limit {name!r}")
    if soft > hard:
        raise ValueError(f"{name}: the soft limit {soft} is above the hard limit {hard}")
    try:
        resource.setrlimit(number, (_signed(soft), _signed(hard)))
    except (ValueError, PermissionError):  # Python says ValueError for EPERM on a raised hard limit
        _, allowed = resource.getrlimit(number)
        ceiling = UNLIMITED if allowed < 0 else allowed
        resource.setrlimit(number, (_signed(min(soft, ceiling)), _signed(min(hard, ceiling))))


def limit_process(pid: int, name: str, limit: int) -> None:
    """Lower a limit of another process of this user, for good. Raises OSError(ESRCH) if there is no such process."""
    resource.prlimit(pid, NAMES[name], (limit, limit))


def raise_hard(name: str, hard: int) -> None:
    """Raise the hard limit, where that is possible and it is lower: who enters a user namespace can't any more."""
    number = NAMES[name]
    soft, allowed = resource.getrlimit(number)
    if 0 <= allowed < hard:
        with contextlib.suppress(ValueError, PermissionError):
            resource.setrlimit(number, (soft, _signed(hard)))


def raise_soft(name: str) -> None:
    """Let the caller have what its hard limit allows."""
    number = NAMES[name]
    _, hard = resource.getrlimit(number)
    resource.setrlimit(number, (hard, hard))


def _signed(value: int) -> int:
    return resource.RLIM_INFINITY if value >= UNLIMITED else value
