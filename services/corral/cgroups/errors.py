"""What the kernel's refusals mean to a caller."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from corral.rpc.errors import (
    CorralError,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
)

_KINDS: dict[int, type[CorralError]] = {
    errno.EINVAL: InvalidArgument,
    errno.ERANGE: InvalidArgument,
    errno.EOVERFLOW: InvalidArgument,
    errno.ENODEV: NotFound,
    errno.ENOENT: NotFound,
    errno.ENOSPC: InvalidArgument,  # CPUs or memory nodes that the parent does not have
    errno.EACCES: InvalidArgument,  # likewise, on older kernels
    errno.EBUSY: FailedPrecondition,
    errno.EEXIST: FailedPrecondition,
    errno.EROFS: FailedPrecondition,
    errno.EPERM: PermissionDenied,
    errno.ENOMEM: ResourceExhausted,
    errno.EAGAIN: ResourceExhausted,
    errno.ETIMEDOUT: Unavailable,
    errno.EOPNOTSUPP: Unimplemented,
    errno.ENOSYS: Unimplemented,
}


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Turn an OSError of the kernel layer into its kind, in a sentence that begins with what was being done."""
    try:
        yield
    except OSError as e:
        kind = _KINDS.get(e.errno or 0, Internal)
        where = f" ({e.filename})" if e.filename else ""
        reason = errno.errorcode.get(e.errno or 0, "OS_ERROR")
        raise kind(f"cannot {doing}: {e.strerror or e}{where}", reason=reason) from e
