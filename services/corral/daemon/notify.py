"""Telling systemd how we are. Source: sd_notify(3)."""

import os
import socket
import time


def notify(*facts: str) -> None:
    """Send `READY=1` or the like to the service manager, if there is one that listens."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return
    address = f"\0{path[1:]}" if path.startswith("@") else path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.sendto("\n".join(facts).encode(), address)
        except OSError:
            return  # a manager that went away is no reason to fail


def notify_reloading() -> None:
    """Say that READY=1 will follow once more, from the same process."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")
