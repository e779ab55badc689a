"""The command corrald: read the settings, claim the directories, host the services, stop cleanly."""

import argparse
import asyncio
import dataclasses
import faulthandler
import gc
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

# Before grpc is imported. Its fork handlers would warn about, and slow down, every child that tasks starts.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

import structlog
import uvloop

from corral.daemon import config as settings
from corral.daemon import logs, roots, table
from corral.daemon.notify import notify
from corral.daemon.upgrade import SIGNAL, Upgrading, boot_time_s, children, execute, reap
from corral.daemon.version import Common, package_version
from corral.kernel.shared_memory import collapse_pages
from corral.rpc.address import Address
from corral.rpc.blocking import run_long
from corral.rpc.errors import CorralError, InvalidArgument
from corral.rpc.handover import Handover, close_unclaimed, take
from corral.rpc.server import serve
from corral.rpc.service import Service

log = structlog.get_logger()

SLOW_CALLBACK_S = 0.05
# The loop gives the GIL away at every SQLite statement and system call, and gets it back when a busy thread is told
# to let go. With Python's 5 ms a container's life took 1.6 times as long on two busy cores as with this.
SWITCH_INTERVAL_S = 0.0001
# After that what it keeps is there, what is loaded late too.
SETTLED_S = 3.0


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="corrald", description="The corral daemon: container services over gRPC.")
    parser.add_argument("--root", type=Path, metavar="DIR", help="what must survive a reboot (default /var/lib/corral)")
    parser.add_argument("--state", type=Path, metavar="DIR", help="sockets and run state (default /run/corral)")
    parser.add_argument(
        "--address",
        action="append",
        metavar="unix:///PATH|tcp://HOST:PORT",
        help="where to listen; may be repeated (default unix://STATE/corrald.sock)",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="a TOML file; defaults need none")
    parser.add_argument(
        "--service", action="append", default=[], metavar="NAME", help="host only this service; may be repeated"
    )
    parser.add_argument("--log-format", choices=logs.FORMATS)
    parser.add_argument("--log-level", choices=tuple(logs.LEVELS))
    for name, what in (("cert", "certificate"), ("key", "private key"), ("ca", "CA that signs clients")):
        parser.add_argument(f"--tls-{name}", type=Path, metavar="FILE", help=f"PEM file: {what}, for tcp:// addresses")
    parser.add_argument("--check", action="store_true", help="only say whether it would start: exit with 0 if so")
    parser.add_argument("--version", action="version", version=f"corrald {package_version()}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code; a start that fails prints one sentence."""
    argv = sys.argv[1:] if argv is None else argv
    options = arguments().parse_args(argv)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # "where does it hang?"
    try:
        run(options, argv)
    except (CorralError, OSError, ValueError, ImportError) as e:
        if options.log_level == "debug":
            raise
        sys.stderr.write(f"corrald: {e}\n")
        return 1
    return 0


def run(options: argparse.Namespace, argv: Sequence[str]) -> None:
    """Host until SIGTERM or SIGINT. Raises CorralError, OSError, ValueError, ImportError if it cannot start."""
    handover = take()
    config = with_options(settings.load(options.config), options)
    daemon = config.daemon
    logs.configure(daemon.log_format, daemon.log_level)
    names = table.select(options.service)
    addresses = settings.listen_on(daemon, names, all_in_one=not options.service)
    known = settings.find_services(config, names, addresses[0])
    configs = {
        name: settings.service_config(name, table.TABLE[name], config, known, root=daemon.root, state=daemon.state)
        for name in names
    }
    for name, c in configs.items():
        table.TABLE[name].require_known(c.root / f"{name}.db")
    if options.check:
        for name in names:
            table.TABLE[name].service_class()
        daemon.tls()
        return
    own = {str(address) for address in addresses}
    called = {address for c in configs.values() for address in getattr(c, "addresses", {}).values()}
    elsewhere = sorted(called - own)
    with roots.claimed({name: c.root for name, c in configs.items()}, daemon.state, addresses, handover) as locks:
        hosting = Hosting(daemon, configs, addresses, elsewhere, argv, handover)
        while (waiting := uvloop.run(host(hosting), debug=daemon.log_level == "debug")) is not None:
            failed = execute(argv, locks, waiting, hosting.handover.generation + 1)
            hosting = dataclasses.replace(hosting, handover=failed.handover, failure=failed.reason)


@dataclasses.dataclass(frozen=True, slots=True)
class Hosting:
    """What one process serves, and where."""

    daemon: settings.DaemonConfig
    configs: Mapping[str, Any]
    addresses: Sequence[Address]
    elsewhere: Sequence[str]
    argv: Sequence[str]
    handover: Handover
    failure: str = ""
    """Why what is hosted again was not upgraded."""


def with_options(config: settings.Config, options: argparse.Namespace) -> settings.Config:
    """The command line wins over the file."""
    given: dict[str, Any] = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(settings.DaemonConfig)
        if getattr(options, field.name, None) is not None
    }
    daemon = dataclasses.replace(config.daemon, **given)
    daemon = dataclasses.replace(
        daemon, root=daemon.root.absolute(), state=daemon.state.absolute(), address=tuple(daemon.address)
    )
    if daemon.grace_s < 0:
        raise InvalidArgument("[daemon] grace_s must not be negative")
    return dataclasses.replace(config, daemon=daemon)


async def host(hosting: Hosting) -> Mapping[Path, socket.socket] | None:
    """Run the services from their settings until a signal comes; if that asks for an upgrade, returns where
    connections wait for it."""
    daemon, configs, handover = hosting.daemon, hosting.configs, hosting.handover
    loop = asyncio.get_running_loop()
    loop.slow_callback_duration = SLOW_CALLBACK_S
    stop = asyncio.Event()
    generation, grace_s = handover.generation, daemon.upgrade_grace_s
    upgrading = Upgrading(hosting.argv, stop, generation, grace_s=grace_s, failure=hosting.failure)
    listen_to_signals(upgrading)
    beside = [loop.create_task(reap(pid)) for pid in (children() if generation or hosting.failure else ())]
    beside.append(loop.create_task(settle()))
    services = [construct(name, config) for name, config in configs.items()]

    def on_ready(bound: Sequence[Address]) -> None:
        close_unclaimed()
        tell_ready(hosting, bound)
        upgrading.set_ready()

    def on_stop() -> None:
        notify("STOPPING=1")
        log.info("daemon.stopping", grace_s=daemon.grace_s)

    waiting = await serve(
        services,
        addresses=hosting.addresses,
        upgrade=upgrading.plan,
        waiting=[socket.socket(fileno=fd) for fd in handover.waiting.values()],
        stop=stop,
        grace_s=daemon.grace_s,
        tls=daemon.tls(),
        socket_group=daemon.socket_group,
        extra=Common(list(configs), daemon.root, daemon.state, upgrading, hosting.elsewhere),
        on_ready=on_ready,
        on_stop=on_stop,
    )
    for task in beside:
        task.cancel()
    if waiting is None:
        log.info("daemon.stopped")
    return waiting


async def settle() -> None:
    """Have what is kept in huge pages: a call touches memory all over, and its addresses take time to translate. A
    container's life takes 3 % less CPU time so."""
    await asyncio.sleep(SETTLED_S)
    await run_long(collapse_pages)


def listen_to_signals(upgrading: Upgrading) -> None:
    """Until the loop ends; SIGNAL does nothing from then on, and waits for the program that may follow."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, upgrading.on_end, number)

    def on_signal(*_: object) -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(upgrading.on_signal)

    # Not the loop's: what is still to come when it has closed must not kill.
    signal.signal(SIGNAL, on_signal)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [SIGNAL])


def tell_ready(hosting: Hosting, bound: Sequence[Address]) -> None:
    """In the log, and to the service manager."""
    # What is alive now stays: the collector need not walk it again in the middle of a call.
    gc.collect()
    gc.freeze()
    log.info(
        "daemon.ready",
        addresses=[str(address) for address in bound],
        services=list(hosting.configs),
        pid=os.getpid(),
        generation=hosting.handover.generation,
        took_ms=round(age_s(hosting.handover) * 1000),
    )
    notify("READY=1")


def construct(name: str, config: Any) -> Service:
    """Import and make one service. Raises ImportError."""
    cls: Any = table.TABLE[name].service_class()
    service: Service = cls(config)
    return service


def age_s(handover: Handover) -> float:
    """Seconds since this program was executed, its imports included, in steps of 10 ms."""
    if handover.began_s is not None:
        return boot_time_s() - handover.began_s
    fields = Path("/proc/self/stat").read_text("ascii").rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc_pid_stat(5)
    return boot_time_s() - started


if __name__ == "__main__":
    sys.exit(main())
