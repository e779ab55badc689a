"""runc, ctr (containerd), docker and podman, each on a private root, as yardsticks."""

import contextlib
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import memory
from support.corrald import CORRAL
from support.images import busybox_layer

_numbers = itertools.count()


def quiet(command: list[str], **env: str) -> None:
    """Runs a command; its output only shows when it fails."""
    # A file, not a pipe: a detached container inherits it, and would be waited for.
    with tempfile.TemporaryFile() as said:
        result = subprocess.run(
            command, env=os.environ | env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said, check=False
        )
        if result.returncode:
            said.seek(0)
            words = said.read().decode(errors="replace")[-2000:]
            raise RuntimeError(f"{' '.join(command)}: exit code {result.returncode}: {words}")


class Peer:
    """One of them. `run` is a `true` from nothing to nothing; `running` holds a sleeping container."""

    name = ""
    needs: tuple[str, ...] = ()

    def __init__(self, scratch: Path, archive: Path, stack: contextlib.ExitStack) -> None:
        self.scratch = scratch

    def runs_with(self, network: str) -> bool:
        """Whether it has such a network at all."""
        return network == "none"

    def run(self, network: str, *options: str) -> None:
        raise NotImplementedError

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        raise NotImplementedError
        yield ""

    def exec(self, container: str) -> None:
        raise NotImplementedError

    def idle_memory(self, count: int) -> float | None:
        """Bytes of PSS per idle container, without what the peer's daemon takes; None where nothing stays."""
        return None

    def new_name(self) -> str:
        return f"corral-bench-{os.getpid()}-{next(_numbers)}"


class Runc(Peer):
    """The OCI runtime alone: no images, no network, nothing that stays."""

    name = "runc"
    needs = ("runc",)
    program = "runc"

    def __init__(self, scratch: Path, archive: Path, stack: contextlib.ExitStack) -> None:
        self.bundle = scratch / f"{self.name}-bundle"
        rootfs = self.bundle / "rootfs"
        rootfs.mkdir(parents=True)
        with tarfile.open(fileobj=io.BytesIO(busybox_layer())) as tar:
            tar.extractall(rootfs, filter="tar")
        quiet([self.program, "spec", "--bundle", str(self.bundle)])
        self._spec = json.loads((self.bundle / "config.json").read_text())
        self._write(["true"])
        self.command = [self.program, "--root", str(run_directory(stack))]

    def _write(self, args: list[str]) -> None:
        self._spec["process"] |= {"terminal": False, "args": args}
        (self.bundle / "config.json").write_text(json.dumps(self._spec))

    def run(self, network: str, *options: str) -> None:
        quiet([*self.command, "run", "--bundle", str(self.bundle), self.new_name()])

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        name = self.new_name()
        self._write(["sleep", "1000"])
        quiet([*self.command, "run", "--detach", "--bundle", str(self.bundle), name])
        self._write(["true"])
        try:
            yield name
        finally:
            quiet([*self.command, "delete", "--force", name])

    def exec(self, container: str) -> None:
        quiet([*self.command, "exec", container, "true"])


class CorralOci(Runc):
    """Corral's own runtime as a command, on a bundle of the same kind."""

    name = "corral-oci"
    needs = ()
    program = str(CORRAL.with_name("corral-oci"))


class Ctr(Peer):
    """containerd, by its own command."""

    name = "ctr"
    needs = ("containerd", "ctr", "runc")
    image = "docker.io/library/busybox:latest"

    def __init__(self, scratch: Path, archive: Path, stack: contextlib.ExitStack) -> None:
        base = scratch / "containerd"
        base.mkdir()
        config = base / "config.toml"
        config.write_text(
            f'version = 2\nroot = "{base}/root"\nstate = "{run_directory(stack)}/state"\n'
            'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
            f'[grpc]\naddress = "{base}/c.sock"\n'
        )
        self.daemon = start(stack, ["containerd", "--config", str(config)], base / "log")
        self.command = ["ctr", "--address", f"{base}/c.sock"]
        wait_until(lambda: quiet([*self.command, "version"]), base / "log")
        quiet([*self.command, "images", "import", str(archive)])

    def run(self, network: str, *options: str) -> None:
        quiet([*self.command, "run", "--rm", self.image, self.new_name(), "true"])

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        name = self.new_name()
        quiet([*self.command, "run", "--detach", self.image, name, "sleep", "1000"])
        try:
            yield name
        finally:
            quiet([*self.command, "task", "kill", "--signal", "SIGKILL", name])
            wait_until(lambda: quiet([*self.command, "task", "rm", name]))
            quiet([*self.command, "container", "rm", name])

    def exec(self, container: str) -> None:
        quiet([*self.command, "task", "exec", "--exec-id", f"e{next(_numbers)}", container, "true"])

    def idle_memory(self, count: int) -> float:
        before = memory.of_commands("containerd-shim").pss
        with contextlib.ExitStack() as stack:
            for _ in range(count):
                stack.enter_context(self.running())
            return (memory.of_commands("containerd-shim").pss - before) / count


class Docker(Peer):
    """dockerd with a containerd of its own."""

    name = "docker"
    needs = ("dockerd", "docker", "containerd")

    def __init__(self, scratch: Path, archive: Path, stack: contextlib.ExitStack) -> None:
        base = Path(f"/tmp/corral-dk{os.getpid()}")
        base.mkdir()
        stack.callback(shutil.rmtree, base, ignore_errors=True)
        # dockerd mounts its root upon itself, and does not always take that away.
        stack.callback(lambda: subprocess.run(["umount", f"{base}/root"], capture_output=True, check=False))
        command = [
            *in_own_network(stack),
            "dockerd", "--data-root", f"{base}/root", "--exec-root", f"{run_directory(stack)}/exec",
            "--pidfile", f"{base}/pid", "--host", f"unix://{base}/d.sock", "--ip-forward=false",
            "--userland-proxy=false", "--config-file", "/dev/null",
        ]  # fmt: skip
        (base / "empty.json").write_text("{}")
        command[-1] = f"{base}/empty.json"
        self.daemon = start(stack, command, base / "log")
        self.command = ["docker", "--host", f"unix://{base}/d.sock"]
        wait_until(lambda: quiet([*self.command, "version"]), base / "log")
        quiet([*self.command, "load", "--input", str(archive)])

    def runs_with(self, network: str) -> bool:
        return True

    def run(self, network: str, *options: str) -> None:
        quiet([*self.command, "run", "--rm", "--network", network, *options, "busybox", "true"])

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        name = self.new_name()
        quiet([*self.command, "run", "--detach", "--network", "none", "--name", name, "busybox", "sleep", "1000"])
        try:
            yield name
        finally:
            quiet([*self.command, "rm", "--force", name])

    def exec(self, container: str) -> None:
        quiet([*self.command, "exec", container, "true"])

    def idle_memory(self, count: int) -> float:
        before = memory.of_commands("containerd-shim").pss
        with contextlib.ExitStack() as stack:
            for _ in range(count):
                stack.enter_context(self.running())
            return (memory.of_commands("containerd-shim").pss - before) / count


class Podman(Peer):
    """podman, which has no daemon."""

    name = "podman"
    needs = ("podman", "conmon", "runc")

    def __init__(self, scratch: Path, archive: Path, stack: contextlib.ExitStack) -> None:
        base = scratch / "podman"
        self.command = [
            *in_own_network(stack),
            "podman", "--root", f"{base}/root", "--runroot", f"{run_directory(stack)}/run",
            "--cgroup-manager", "cgroupfs", "--runtime", "runc",
            "--tmpdir", f"{base}/tmp", "--network-config-dir", f"{base}/net",
        ]  # fmt: skip
        quiet([*self.command, "load", "--input", str(archive)])
        stack.callback(
            lambda: subprocess.run([*self.command, "rm", "--all", "--force"], capture_output=True, check=False)
        )
        stack.callback(
            lambda: subprocess.run([*self.command, "rmi", "--all", "--force"], capture_output=True, check=False)
        )

    def runs_with(self, network: str) -> bool:
        return network == "none" or all(map(shutil.which, ("/usr/lib/podman/netavark", "nft")))

    def run(self, network: str, *options: str) -> None:
        quiet([*self.command, "run", "--rm", "--network", network, *options, "busybox", "true"])

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        name = self.new_name()
        quiet([*self.command, "run", "--detach", "--network", "none", "--name", name, "busybox", "sleep", "1000"])
        try:
            yield name
        finally:
            quiet([*self.command, "rm", "--force", "--time", "0", name])

    def exec(self, container: str) -> None:
        quiet([*self.command, "exec", container, "true"])

    def idle_memory(self, count: int) -> float:
        before = memory.of_commands("conmon").pss
        with contextlib.ExitStack() as stack:
            for _ in range(count):
                stack.enter_context(self.running())
            return (memory.of_commands("conmon").pss - before) / count


def installed_peers(stack: contextlib.ExitStack, scratch: Path, archive: Path) -> list[Peer]:
    """Every peer that this machine has and that works here; says which it leaves out, and why."""
    peers: list[Peer] = []
    for kind in (Runc, Ctr, Docker, Podman):
        missing = [program for program in kind.needs if not shutil.which(program)]
        if missing:
            print(f"without {kind.name}: {', '.join(missing)} is not installed")
            continue
        try:
            peer = kind(scratch, archive, stack)
            peer.run("none")
        except (RuntimeError, OSError) as e:
            print(f"without {kind.name}: {str(e)[:300]}")
        else:
            peers.append(peer)
    return peers


def memory_directory() -> str:
    """A directory on a tmpfs, as /run is on most hosts; /tmp where there is none."""
    mounts = (line.split() for line in Path("/proc/mounts").read_text().splitlines())
    tmpfs = {place for _, place, kind, *_ in mounts if kind == "tmpfs"}
    return next((place for place in ("/run", "/dev/shm") if place in tmpfs), "/tmp")


def run_directory(stack: contextlib.ExitStack) -> Path:
    """Where a peer keeps its run state, as corral keeps its own; removed with the stack."""
    return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="corral-run-", dir=memory_directory())))


def start(stack: contextlib.ExitStack, command: list[str], log: Path) -> "subprocess.Popen[bytes]":
    """A daemon that ends with the stack."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)

    def end() -> None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    stack.callback(end)
    return process


def wait_until(works: Callable[[], object], log: Path | None = None, timeout_s: float = 30) -> None:
    """Calls `works` until it does not raise."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            works()
        except RuntimeError as e:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{e}\n{log.read_text()[-2000:] if log else ''}") from e
            time.sleep(0.1)
        else:
            return


def in_own_network(stack: contextlib.ExitStack) -> list[str]:
    """Words before a command, to run it in a network namespace that ends with the stack: its bridge, its firewall
    rules and whatever it forgets to remove never touch the host's."""
    holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])

    def end() -> None:
        holder.kill()
        holder.wait()

    stack.callback(end)
    own = Path("/proc/self/ns/net").readlink()
    while Path(f"/proc/{holder.pid}/ns/net").readlink() == own:
        time.sleep(0.01)
    return ["nsenter", f"--net=/proc/{holder.pid}/ns/net"]
