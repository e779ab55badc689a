"""Plugins of CNI as programs: found, run, and what they answer.

    environment   CNI_COMMAND CNI_CONTAINERID CNI_NETNS CNI_IFNAME CNI_ARGS CNI_PATH
    stdin         JSON          stdout   JSON: a result, or an error with exit status 1

They run in the host's network namespace with the daemon's rights. Source: CNI specification 1.1, section 2.
"""

import asyncio
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from corral.network.cni.documents import Plugin, complaint
from corral.rpc.errors import FailedPrecondition

TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Attached:
    """What a plugin is told of the container, in its environment. An empty netns: it is gone."""

    container: str = ""
    netns: str = ""
    interface: str = ""


def find(plugin: Plugin, directories: Sequence[str]) -> Path:
    """Where the program is. Raises FailedPrecondition."""
    for directory in directories:
        path = Path(directory) / plugin.kind
        if path.is_file() and os.access(path, os.X_OK):
            return path
    raise FailedPrecondition(
        f"there is no CNI plugin {plugin.kind!r} in {', '.join(directories)}: install it (Debian:"
        " containernetworking-plugins), or name its directory as cni_bin_dirs in [network] of config.toml",
        reason="NO_CNI_PLUGIN",
    )


async def run(plugin: Plugin, command: str, about: Attached, text: bytes, directories: Sequence[str]) -> bytes:
    """Run it and return what it printed. Raises FailedPrecondition with its words."""
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": about.container,
        "CNI_NETNS": about.netns,
        "CNI_IFNAME": about.interface,
        "CNI_ARGS": "IgnoreUnknown=1",
        "CNI_PATH": os.pathsep.join(directories),
    }
    pipe = asyncio.subprocess.PIPE
    program = find(plugin, directories)
    try:
        process = await asyncio.create_subprocess_exec(
            program, stdin=pipe, stdout=pipe, stderr=pipe, env=environment, cwd="/", start_new_session=True
        )
    except OSError as e:  # a script whose interpreter is not there, say
        raise FailedPrecondition(
            f"CNI plugin {program} cannot be executed: {e.strerror}: install it anew", reason="CNI_FAILED"
        ) from e
    try:
        async with asyncio.timeout(TIMEOUT_S):
            output, errors = await process.communicate(text)
    except BaseException as e:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)  # with the plugin of addresses that it waits for
        await process.wait()
        if isinstance(e, TimeoutError):
            raise _failed(plugin, command, f"it took longer than {TIMEOUT_S:.0f} seconds") from e
        raise
    if process.returncode:
        raise _failed(plugin, command, complaint(output or errors))
    return output


def _failed(plugin: Plugin, command: str, why: str) -> FailedPrecondition:
    return FailedPrecondition(f"CNI plugin {plugin.kind} refused {command}: {why}", reason="CNI_FAILED")
