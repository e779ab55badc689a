"""What has gone through the interfaces of a container. Source: proc_pid_net(5), dev.

The kernel shows it for the network namespace of any process, so nobody has to enter one.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from corral.api.engine.v1.engine_pb2 import InterfaceStats
from corral.api.network.v1.network_pb2 import AttachRequest
from corral.engine.records import ContainerRecord

_OWN = frozenset(AttachRequest.Mode.Value(f"MODE_{mode}") for mode in ("NETWORKS", "PATH"))


def of(record: ContainerRecord) -> Sequence[InterfaceStats]:
    """All but the loopback's; none that are the host's or another container's, or of one that has ended. Blocking."""
    if record.endpoint is None or not record.pid or record.endpoint.mode not in _OWN:
        return ()
    directory = Path("/proc", str(record.pid))
    try:
        text = (directory / "net/dev").read_text("ascii", "replace")
        # Only now: the pid may have become another's.
        if not (directory / "ns/net").samefile(record.endpoint.netns_path):
            return ()
    except OSError:
        return ()
    return tuple(_parsed(text))


def _parsed(text: str) -> Iterator[InterfaceStats]:
    """Two lines of headings, then a name and sixteen numbers each, half of them received."""
    for line in text.splitlines()[2:]:
        name, _, numbers = line.partition(":")
        rx_bytes, rx_packets, rx_errors, rx_dropped, _, _, _, _, tx_bytes, tx_packets, tx_errors, tx_dropped, *_ = map(
            int, numbers.split()
        )
        if name.strip() != "lo":
            yield InterfaceStats(
                name=name.strip(),
                rx_bytes=rx_bytes,
                rx_packets=rx_packets,
                rx_errors=rx_errors,
                rx_dropped=rx_dropped,
                tx_bytes=tx_bytes,
                tx_packets=tx_packets,
                tx_errors=tx_errors,
                tx_dropped=tx_dropped,
            )
