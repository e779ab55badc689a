"""Where corrald is reached, and how the address is written."""

import os
from pathlib import Path

ADDRESS_VARIABLE = "CORRAL_ADDRESS"
NAMESPACE_VARIABLE = "CORRAL_NAMESPACE"
DEFAULT_NAMESPACE = "default"
STATE = Path("/run/corral")


def default_address() -> str:
    """$CORRAL_ADDRESS, else the socket of the whole daemon, or that of an engine of its own where only it is there."""
    if named := os.environ.get(ADDRESS_VARIABLE):
        return named
    whole, engine = STATE / "corrald.sock", STATE / "engine.sock"
    return f"unix://{engine if engine.exists() and not whole.exists() else whole}"


def default_namespace() -> str:
    """$CORRAL_NAMESPACE, else "default"."""
    return os.environ.get(NAMESPACE_VARIABLE) or DEFAULT_NAMESPACE


def grpc_target(address: str) -> str:
    """The address as gRPC writes it. Raises ValueError for a form that is not `unix://` or `tcp://`."""
    scheme, found, rest = address.partition("://")
    if not found or not rest or scheme not in ("unix", "tcp"):
        raise ValueError(f"address {address!r} is not understood: give unix:///path/to/corrald.sock or tcp://host:port")
    return rest if scheme == "tcp" else f"unix:{rest}"
