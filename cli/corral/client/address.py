"""Where corrald is reached, and how the address is written."""

import os

from corral.rpc.address import Tls

ADDRESS_VARIABLE = "CORRAL_ADDRESS"
NAMESPACE_VARIABLE = "CORRAL_NAMESPACE"
DEFAULT_NAMESPACE = "default"
TLS_VARIABLES = ("CORRAL_TLS_CERT", "CORRAL_TLS_KEY", "CORRAL_TLS_CA")
STATE = "/run/corral"


def default_address() -> str:
    """$CORRAL_ADDRESS, else the socket of the whole daemon, or that of an engine of its own where only it is there."""
    if named := os.environ.get(ADDRESS_VARIABLE):
        return named
    whole, engine = f"{STATE}/corrald.sock", f"{STATE}/engine.sock"
    return f"unix://{engine if os.access(engine, os.F_OK) and not os.access(whole, os.F_OK) else whole}"


def default_namespace() -> str:
    """$CORRAL_NAMESPACE, else "default"."""
    return os.environ.get(NAMESPACE_VARIABLE) or DEFAULT_NAMESPACE


def default_tls() -> Tls | None:
    """The files named by $CORRAL_TLS_CERT, $CORRAL_TLS_KEY and $CORRAL_TLS_CA; None if none of them is set.

    Raises ValueError if only some are.
    """
    given = [os.environ.get(name, "") for name in TLS_VARIABLES]
    if not any(given):
        return None
    if not all(given):
        raise ValueError(f"TLS needs all of {', '.join(TLS_VARIABLES)}")
    from pathlib import Path

    cert, key, ca = map(Path, given)
    return Tls(cert, key, ca)
