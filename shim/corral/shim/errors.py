"""The one error that crosses the shim's wire."""

import errno
from typing import Literal

type Kind = Literal[
    "invalid_argument",
    "not_found",
    "already_exists",
    "failed_precondition",
    "permission_denied",
    "resource_exhausted",
    "unavailable",
    "internal",
    "unimplemented",
    "exec_not_found",
    "exec_denied",
]

_KIND_OF_ERRNO: dict[int, Kind] = {
    errno.ENOENT: "not_found",
    errno.EEXIST: "already_exists",
    errno.EPERM: "permission_denied",
    errno.EACCES: "permission_denied",
    errno.EINVAL: "invalid_argument",
    errno.ENAMETOOLONG: "invalid_argument",
    errno.ENOSPC: "resource_exhausted",
    errno.EDQUOT: "resource_exhausted",
    errno.ENOMEM: "resource_exhausted",
    errno.EMFILE: "resource_exhausted",
    errno.ENFILE: "resource_exhausted",
    errno.EAGAIN: "resource_exhausted",
    errno.ENOSYS: "unimplemented",
}


class ShimError(Exception):
    """A request that failed; `kind` is what a program acts on, the message what a person reads."""

    def __init__(self, kind: Kind, message: str) -> None:
        super().__init__(message)
        self.kind: Kind = kind


def from_os_error(error: OSError) -> ShimError:
    """The kind that an errno stands for; the sentence keeps the call and the paths."""
    return ShimError(_KIND_OF_ERRNO.get(error.errno or 0, "internal"), str(error))
