"""firewalld for a namespace of a test's, on a bus of its own: no rule of the machine is touched."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from support.netlab import command, eventually

_BUS = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>system</type><listen>unix:path={socket}</listen><auth>EXTERNAL</auth>
<policy context="default"><allow user="*"/><allow own="*"/><allow send_destination="*"/><allow receive_sender="*"/>
</policy></busconfig>
"""


@dataclass(frozen=True)
class Firewalld:
    """One that runs. bus: the address, as in the environment."""

    host: Path
    bus: str

    def client(self, *words: str) -> str:
        """What firewall-cmd prints."""
        return command(self.host, "env", f"DBUS_SYSTEM_BUS_ADDRESS={self.bus}", "firewall-cmd", *words).strip()

    def zone_of(self, link: str) -> str:
        with contextlib.suppress(subprocess.CalledProcessError):
            return self.client(f"--get-zone-of-interface={link}")
        return ""


@contextlib.contextmanager
def running(host: Path, directory: Path) -> Iterator[Firewalld]:
    """In the network namespace at host, with its files and its bus in directory."""
    (directory / "etc").mkdir(parents=True)
    (directory / "etc/firewalld.conf").write_text("DefaultZone=public\n")
    (directory / "bus.conf").write_text(_BUS.format(socket=directory / "bus"))
    bus = f"unix:path={directory / 'bus'}"
    with contextlib.ExitStack() as stack:

        def start(*words: str) -> None:
            process = subprocess.Popen(
                ["nsenter", f"--net={host}", *words],
                env=os.environ | {"DBUS_SYSTEM_BUS_ADDRESS": bus},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            stack.callback(process.wait)
            stack.callback(process.terminate)

        start("dbus-daemon", f"--config-file={directory / 'bus.conf'}", "--nofork", "--nopidfile")
        assert eventually((directory / "bus").exists)
        start("firewalld", "--nofork", "--nopid", "--system-config", str(directory / "etc"), "--log-target", "console")
        made = Firewalld(host, bus)
        assert eventually(lambda: _answers(made), within_s=20)
        yield made


def _answers(made: Firewalld) -> bool:
    with contextlib.suppress(subprocess.CalledProcessError):
        return made.client("--state") == "running"
    return False
