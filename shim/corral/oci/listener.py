"""Telling a seccomp listener of a container: it gets the descriptor by which it answers calls, and whose they are.

Source: OCI runtime-spec config-linux.md "Seccomp" (listenerPath) and "The Container Process State".
"""

import array
import json
import socket
import struct

from corral.oci import OCI_VERSION
from corral.oci.errors import SETUP, ExecFailed
from corral.oci.spec import Seccomp
from corral.oci.state import State

_PATIENCE_S = 10


def pass_to_listener(profile: Seccomp, fd: int, pid: int, state: State) -> None:
    """Connect to the listener of a profile, give it fd, the container process state, and hang up.

    pid is that of the process whose calls they are. Raises ExecFailed.
    """
    message = {
        "ociVersion": OCI_VERSION,
        "fds": ["seccompFd"],
        "pid": pid,
        "metadata": profile.listener_metadata,
        "state": state.to_json(),
    }
    data = json.dumps(message).encode()
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            # Whoever takes nothing must not hold up the container for ever; who has many to greet is waited for.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", _PATIENCE_S, 0))
            connection.connect(profile.listener_path)
            sent = connection.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
            if sent < len(data):  # who has it all may have hung up, and would be told in vain even of nothing
                connection.sendall(data[sent:])
    except OSError as e:
        reason = e.strerror or str(e)
        where = f"linux.seccomp.listenerPath: failed to connect with seccomp agent {profile.listener_path}"
        raise ExecFailed(SETUP, f"{where}: {reason}") from e
