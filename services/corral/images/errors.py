"""Sentences for what goes wrong below this leaf."""

import errno

from corral.images.layers.errors import BadLayer
from corral.rpc.errors import CorralError, InvalidArgument, PermissionDenied, ResourceExhausted, from_os_error

_FULL = {
    errno.ENOSPC: "no space is left on the disk",
    errno.EDQUOT: "the disk quota is used up",
}


def explained(e: OSError | BadLayer, doing: str) -> CorralError:
    """The error for the user: what was being done, what went wrong, what helps."""
    if isinstance(e, BadLayer):
        return InvalidArgument(f"{doing}: {e}", reason="BAD_DATA")
    if e.errno in (errno.EPERM, errno.EACCES):
        return PermissionDenied(f"{doing}: {e.strerror or e}: corral needs to be root for that", reason="NOT_PERMITTED")
    problem = _FULL.get(e.errno or 0)
    if problem is None:
        return from_os_error(e, doing)
    return ResourceExhausted(
        f"{doing}: {problem}; free some, for example with `corral image prune`, and try again",
        reason=errno.errorcode[e.errno or 0],
    )
