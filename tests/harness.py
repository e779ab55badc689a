"""A corrald of one's own, on private roots, and what it would leave behind.

Used by pytest's `daemon` fixture and by the demo, the bench and the crash test, which are plain programs.
"""

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from corral.client.sync import Client

BIN = Path(sys.executable).parent
CORRAL, CORRALD = BIN / "corral", BIN / "corrald"
SERVICES = ("images", "tasks", "network", "cgroups", "engine")
_numbers = itertools.count()
CGROUPS = Path("/sys/fs/cgroup")


def free_tag() -> str:
    """A few letters that no other harness on this machine uses now."""
    return f"{os.getpid() % 0xFFFF:x}{next(_numbers):x}"


@dataclass(slots=True)
class Daemon:
    """corrald on a private root, bridge, subnet, nftables table and cgroup parent; five processes with `split`."""

    split: bool = False
    tag: str = field(default_factory=free_tag)
    env: dict[str, str] = field(default_factory=dict)
    # Further lines of config.toml.
    config: str = ""
    # Data root elsewhere than in `base`, such as on a small tmpfs.
    root: Path | None = None
    processes: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    @property
    def base(self) -> Path:
        """Everything of this daemon on disk. Short: unix socket paths end at 107 bytes."""
        return Path(f"/tmp/corral-{self.tag}")

    @property
    def state(self) -> Path:
        return self.base / "run"

    @property
    def address(self) -> str:
        return f"unix://{self.state}/{'engine' if self.split else 'corrald'}.sock"

    @property
    def bridge(self) -> str:
        return f"crlt{self.tag}"

    @property
    def nft_table(self) -> str:
        return f"corral_t{self.tag}"

    @property
    def cgroup_parent(self) -> str:
        return f"/corral-t{self.tag}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ------------------------------------------------------------ life

    def start(self) -> None:
        """Starts what does not run, and waits until all of it serves."""
        self.state.mkdir(parents=True, exist_ok=True)
        self._write_config()
        for service in SERVICES if self.split else ("all",):
            self.start_service(service)
        self.wait_ready()

    def start_service(self, service: str) -> None:
        """Starts one process, without waiting for it."""
        running = self.processes.get(service)
        if running is not None and running.poll() is None:
            return
        log = (self.base / f"{service}.log").open("ab")
        only = [] if service == "all" else ["--service", service]
        command = [str(CORRALD), "--config", str(self.base / "config.toml"), *only]
        env = os.environ | {"CORRAL_ADDRESS": self.address} | self.env
        with log:
            self.processes[service] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env
            )

    def wait_ready(self, timeout_s: float = 30) -> None:
        """Returns once every service answers; raises RuntimeError with the log when one does not."""
        import grpc
        from grpc_health.v1 import health_pb2, health_pb2_grpc

        deadline = time.monotonic() + timeout_s
        for service in self.processes:
            name = "corrald" if service == "all" else service
            with grpc.insecure_channel(f"unix:{self.state}/{name}.sock") as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                while True:
                    with contextlib.suppress(grpc.RpcError):
                        answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=5, wait_for_ready=True)
                        if answer.status == health_pb2.HealthCheckResponse.SERVING:
                            break
                    if time.monotonic() > deadline or self.processes[service].poll() is not None:
                        raise RuntimeError(f"{name} does not serve:\n{self.log(service)}")
                    time.sleep(0.02)

    def kill9(self, *services: str) -> None:
        """SIGKILL, and wait for the process's end."""
        for service in services or tuple(self.processes):
            process = self.processes.pop(service)
            process.kill()
            process.wait()

    def stop(self, timeout_s: float = 15) -> None:
        """A clean stop."""
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            process.wait(timeout_s)
        self.processes.clear()

    def restart(self) -> None:
        """A clean stop and a start."""
        self.stop()
        self.start()

    def close(self) -> None:
        """Removes every container and everything else of this daemon, whatever state it is in."""
        try:
            self.start()
            with self.client() as client:
                for namespace in self.namespaces():
                    self._remove_all(namespace)
                    del namespace
                del client
        finally:
            self.stop()
            self._sweep()

    def _remove_all(self, namespace: str) -> None:
        with self.client(namespace) as client:
            for container in client.containers.list(all=True):
                client.containers.remove(container.id, force=True, volumes=True)
            for network in client.networks.list():
                if not network.builtin:
                    client.networks.remove(network.name)

    def _sweep(self) -> None:
        """What stays when everything is removed: the default bridge, its table, empty cgroup parents, directories."""
        for hierarchy in CGROUPS.glob(f"*{self.cgroup_parent}"):
            for directory in sorted(hierarchy.rglob("*/"), reverse=True):
                directory.rmdir()
            hierarchy.rmdir()
        with contextlib.suppress(OSError):
            (CGROUPS / self.cgroup_parent.lstrip("/")).rmdir()
        for mount in reversed(mounts_below(self.base)):
            unmount(mount)
        for link in links():
            if link == self.bridge:
                delete_link(link)
        delete_nft_table(self.nft_table)
        shutil.rmtree(self.base, ignore_errors=True)

    # ------------------------------------------------------------ use

    def client(self, namespace: str | None = None) -> "Client":
        from corral.client.sync import Client

        return Client(self.address, namespace=namespace)

    def corral(
        self, *args: str, stdin: bytes | None = None, timeout_s: float = 60, check: bool = False
    ) -> "subprocess.CompletedProcess[bytes]":
        """Runs the command `corral` against this daemon."""
        env = os.environ | {"CORRAL_ADDRESS": self.address}
        given = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
        return subprocess.run(
            [str(CORRAL), *args], env=env, capture_output=True, timeout=timeout_s, check=check, **given
        )  # type: ignore[call-overload,no-any-return]

    def log(self, service: str = "all") -> str:
        path = self.base / f"{service}.log"
        return path.read_text(errors="replace")[-20_000:] if path.exists() else ""

    def namespaces(self) -> list[str]:
        """Namespaces that have bundles, and the default one."""
        shims = self.state / "shim"
        found = {p.name for p in shims.iterdir()} if shims.exists() else set()
        return sorted(found | {"default"})

    # ------------------------------------------------------------ what is left

    def leftovers(self) -> list[str]:
        """Everything of containers that is still there: to be called when all of them are removed."""
        found = [f"mount {m}" for m in mounts_below(self.base) if "/netns/" not in m]
        found += [f"cgroup {d}" for h in CGROUPS.glob(f"*{self.cgroup_parent}") for d in h.rglob("*/") if d.parent != h]
        found += [f"link {name}" for name in links_of_bridge(self.bridge)]
        found += [f"bundle {p}" for p in self._children("run/shim", depth=2)]
        found += [f"process {pid} {command}" for pid, command in shims_of(self.state)]
        return found

    def _children(self, below: str, depth: int) -> Iterator[Path]:
        return (self.base / below).glob("/".join("*" * depth))

    def _write_config(self) -> None:
        number = int(self.tag, 16)
        third, second = number % 250, 231 + number // 250 % 20
        lines = f"""
[daemon]
root = "{self.root or self.base / "root"}"
state = "{self.state}"
log_format = "json"

[network]
bridge = "{self.bridge}"
subnet = "10.{second}.{third}.0/24"
pools = ["10.{second - 20}.0.0/16"]
nft_table = "{self.nft_table}"

[cgroups]
parent = "{self.cgroup_parent}"
{self.config}
"""
        (self.base / "config.toml").write_text(lines)


# ---------------------------------------------------------------- looking at the host


def mounts_below(directory: Path) -> list[str]:
    """Mount points below a directory, in the order of mounting."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line.split()[4] for line in lines if line.split()[4].startswith(f"{directory}/")]


def links() -> list[str]:
    return sorted(p.name for p in Path("/sys/class/net").iterdir())


def links_of_bridge(bridge: str) -> list[str]:
    ports = Path(f"/sys/class/net/{bridge}/brif")
    return sorted(p.name for p in ports.iterdir()) if ports.exists() else []


def shims_of(state: Path) -> list[tuple[int, str]]:
    """Processes of ours that outlive a daemon: those whose command line or environment names this state directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if str(state) in command and "corrald" not in command and "pytest" not in command:
                found.append((int(entry.name), command.strip()))
    return found


def unmount(path: str) -> None:
    import ctypes

    ctypes.CDLL(None, use_errno=True).umount2(path.encode(), 2)


def delete_link(name: str) -> None:
    from pyroute2 import IPRoute

    with IPRoute() as route:
        for index in route.link_lookup(ifname=name):
            route.link("del", index=index)


def delete_nft_table(name: str) -> None:
    """Removes our own table, if it is there."""
    if shutil.which("nft"):
        for family in ("inet", "ip"):
            subprocess.run(["nft", "delete", "table", family, name], capture_output=True, check=False)
        return
    from corral.kernel.nftables import Nftables  # type: ignore[attr-defined]

    with contextlib.suppress(OSError):
        Nftables().run([{"delete": {"table": {"family": "inet", "name": name}}}])
