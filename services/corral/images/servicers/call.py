"""What a call says about itself beside its message."""

from typing import Any

import grpc.aio

from corral.rpc.context import check_id

LEASE_KEY = "corral-lease"


def lease_of(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """The lease that the call is made under; empty if none. Raises InvalidArgument if that is not an id."""
    for key, value in context.invocation_metadata() or ():
        if key == LEASE_KEY:
            return check_id(value if isinstance(value, str) else value.decode("ascii", "replace"), "lease id")
    return ""
