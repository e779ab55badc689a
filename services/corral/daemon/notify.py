"""Telling systemd how we are. Source: sd_notify(3)."""

import os
import socket


def notify(state: str) -> None:
    """Send `READY=1` or the like to the service manager, if there is one that listens."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return
    address = f"\0{path[1:]}" if path.startswith("@") else path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.sendto(state.encode(), address)
        except OSError:
            return  # a manager that went away is no reason to fail
