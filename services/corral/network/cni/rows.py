"""The rows of what plugins have made: one for each interface for which ADD was begun. They go with the interface's."""

from corral.network.model import EndpointKey, Interface
from corral.store import Snapshot, Transaction

UNKNOWN = ""
"""The result of an ADD whose end nobody has written down."""


def begun(snapshot: Snapshot, key: EndpointKey, interface: Interface) -> bool:
    """Whether plugins may have made something for it."""
    row = snapshot.one(
        "SELECT 1 FROM cni_results WHERE namespace = ? AND endpoint = ? AND network = ?", _key(key, interface)
    )
    return row is not None


def write(transaction: Transaction, key: EndpointKey, interface: Interface, result: str) -> None:
    """Remember the result of an ADD, UNKNOWN before it begins."""
    transaction.execute("INSERT OR REPLACE INTO cni_results VALUES (?, ?, ?, ?)", (*_key(key, interface), result))


def delete(transaction: Transaction, key: EndpointKey, interface: Interface) -> None:
    """Plugins have nothing of it any more."""
    transaction.execute(
        "DELETE FROM cni_results WHERE namespace = ? AND endpoint = ? AND network = ?", _key(key, interface)
    )


def _key(key: EndpointKey, interface: Interface) -> tuple[str, str, str]:
    return key.namespace, key.id, interface.network.id
