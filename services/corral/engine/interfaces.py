"""What has gone through the interfaces of a container. Source: proc_pid_net(5), dev.

The kernel shows it for the network namespace of any process, so nobody has to enter one.
"""

from collections.abc import Iterator
from pathlib import Path

from corral.api.engine.v1.engine_pb2 import InterfaceStats
from corral.api.network.v1.network_pb2 import AttachRequest
from corral.engine.records import ContainerRecord

_OWN = frozenset(AttachRequest.Mode.Value(f"MODE_{mode}") for mode in ("NETWORKS", "PATH"))


def has_interfaces(record: ContainerRecord) -> bool:
    """Whether there may be any that are not the host's, or another container's."""
    return record.endpoint is not None and bool(record.pid) and record.endpoint.mode in _OWN


def counters(pid: int, netns_path: str) -> list[InterfaceStats]:
    """All but the loopback's, by name; none if the process has ended. Blocking."""
    directory = Path("/proc", str(pid))
    try:
        text = (directory / "net/dev").read_text("ascii", "replace")
        # Only now: the pid may have become another's.
        if not (directory / "ns/net").samefile(netns_path):
            return []
    except OSError:
        return []
    return list(_parsed(text))


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
