"""Finding and removing what a daemon under test has left on the machine."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from support.corrald import Corrald

SETTLE_S = 5.0


def leftovers(state: Path, cgroup_parent: str, bridge: str) -> list[str]:
    """What belongs to containers: bundles, their processes and cgroups, their links on the bridge."""
    found = [f"bundle {path}" for path in state.glob("shim/*/*")]
    found += [f"cgroup {path}" for path in cgroups(cgroup_parent) if depth_below(path, cgroup_parent) >= 2]
    found += [f"process {pid} in {cgroup_parent}" for pid in pids(cgroup_parent)]
    found += [f"shim {pid} of {state}" for pid in shims(state)]
    found += [f"link {name} on {bridge}" for name in ports(bridge)]
    return found


def forgotten(daemon: "Corrald") -> list[str]:
    """What is there although every container was deleted; asked of the services and of the kernel."""
    from corral.api.cgroups.v1 import cgroups_pb2, cgroups_pb2_grpc
    from corral.api.images.v1 import images_pb2, images_pb2_grpc
    from corral.api.network.v1 import network_pb2, network_pb2_grpc
    from corral.api.tasks.v1 import tasks_pb2, tasks_pb2_grpc

    with daemon.client() as client:
        found = [f"container {c.name}" for c in client.containers.list(all=True)]
        leaf = client.leaf("images")
        snapshots = leaf.unary(images_pb2_grpc.SnapshotsStub(leaf.channel).List, images_pb2.ListSnapshotsRequest())
        found += [f"snapshot {s.key}" for s in snapshots.snapshots if s.kind != images_pb2.Snapshot.KIND_COMMITTED]
        leaf = client.leaf("tasks")
        tasks = leaf.unary(tasks_pb2_grpc.TasksStub(leaf.channel).List, tasks_pb2.ListTasksRequest(all_namespaces=True))
        found += [f"task {t.id}" for t in tasks.tasks]
        leaf = client.leaf("network")
        stub = network_pb2_grpc.EndpointsStub(leaf.channel)
        endpoints = leaf.unary(stub.List, network_pb2.ListEndpointsRequest(all_namespaces=True))
        found += [f"endpoint {e.id}" for e in endpoints.endpoints]
        used = sum(s.used for n in client.networks.list() for s in n.subnets)
        found += [f"{used} addresses"] if used else []
        leaf = client.leaf("cgroups")
        stub = cgroups_pb2_grpc.CgroupsStub(leaf.channel)
        cgroups = leaf.unary(stub.List, cgroups_pb2.ListCgroupsRequest(all_namespaces=True))
        found += [f"cgroup {c.path}" for c in cgroups.cgroups]
    return found + daemon.leftovers()


def delete_containers(daemon: "Corrald") -> list[str]:
    """Delete what tests left, through the engine; returns what could not be deleted."""
    if "engine" not in (daemon.services or ("engine",)):
        return []
    import grpc

    from corral.api.engine.v1 import engine_pb2, engine_pb2_grpc

    failed = []
    with grpc.insecure_channel(daemon.address.replace("unix://", "unix:")) as channel:
        containers = engine_pb2_grpc.ContainersStub(channel)
        for namespace in namespaces(daemon.state):
            metadata = (("corral-namespace", namespace),)
            try:
                listed = containers.List(engine_pb2.ListContainersRequest(all=True), metadata=metadata, timeout=20)
                for container in listed.containers:
                    request = engine_pb2.DeleteContainerRequest(container=container.id, force=True, volumes=True)
                    containers.Delete(request, metadata=metadata, timeout=30)
            except grpc.RpcError as e:
                failed.append(f"containers of {namespace}: {e.details()}")
    return failed


def namespaces(state: Path) -> set[str]:
    return {"default", *(path.name for path in state.glob("shim/*"))}


def hierarchies() -> Iterator[Path]:
    for line in Path("/proc/self/mountinfo").read_text("utf-8").splitlines():
        before, _, after = line.partition(" - ")
        if after.startswith("cgroup"):
            yield Path(before.split()[4])


def cgroups(parent: str) -> list[Path]:
    """The parent and everything below it in every hierarchy, deepest first."""
    found = []
    for root in hierarchies():
        top = root / parent.lstrip("/")
        if top.is_dir():
            found += [Path(directory) for directory, _, _ in os.walk(top, topdown=False)]
    return found


def depth_below(path: Path, parent: str) -> int:
    parts = path.parts
    return len(parts) - 1 - parts.index(parent.strip("/").split("/")[-1])


def pids(parent: str) -> set[int]:
    found: set[int] = set()
    for cgroup in cgroups(parent):
        with contextlib.suppress(OSError):
            found |= {int(pid) for pid in (cgroup / "cgroup.procs").read_text("ascii").split()}
    return found


def shims(state: Path) -> set[int]:
    """The shims whose bundles lie in `state`: they hold files open there."""
    found = set()
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"corral.shim" in (directory / "cmdline").read_bytes():
                files = [str(fd.readlink()) for fd in (directory / "fd").iterdir()]
                if any(file.startswith(f"{state}/shim/") for file in files):
                    found.add(int(directory.name))
    return found


def zygotes(root: Path) -> set[int]:
    """The zygotes of the engine whose data lies in `root`: their errors go to a log there."""
    found = set()
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"corral.shim.zygote" in (directory / "cmdline").read_bytes():
                errors = str((directory / "fd/2").readlink())
                if errors.removesuffix(" (deleted)") == f"{root}/tasks/zygote.log":
                    found.add(int(directory.name))
    return {pid for pid in found if parent_of(pid) not in found | {0}}  # else it is a shim, at its very beginning


def abandoned_zygotes(root: Path, makers: set[int]) -> set[int]:
    """Those that are not children of `makers`, once they have had the time to end."""
    deadline = time.monotonic() + SETTLE_S
    while left := {pid for pid in zygotes(root) if parent_of(pid) not in makers}:
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    return left


def parent_of(pid: int) -> int:
    """Its parent's pid; 0 if it has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def proxies(state: Path) -> set[int]:
    """The proxy of published ports at ::1: the last of its words is the socket that it is told by."""
    found = set()
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (directory / "cmdline").read_bytes().split(b"\0")
            if f"{state}/proxy.sock".encode() in words and words[-2].endswith(b"/proxy.sock"):
                found.add(int(directory.name))
    return found


def ports(bridge: str) -> list[str]:
    directory = Path("/sys/class/net") / bridge / "brif"
    return sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []


def purge(directory: Path, state: Path, cgroup_parent: str, bridge: str, nft_table: str) -> None:
    """Remove all of it but zygotes, whatever state it is in."""
    kill(shims(state), lambda: shims(state))
    kill(proxies(state), lambda: proxies(state))
    thaw(cgroup_parent)
    kill(pids(cgroup_parent), lambda: pids(cgroup_parent))
    unmount_below(directory)
    unmount_below(state)
    for name in (*ports(bridge), bridge):
        if (Path("/sys/class/net") / name).exists():
            subprocess.run(["ip", "link", "delete", name], capture_output=True, check=False)
    if os.geteuid() == 0:
        with contextlib.suppress(FileNotFoundError):
            subprocess.run(["nft", "delete", "table", "inet", nft_table], capture_output=True, check=False)
    deadline = time.monotonic() + SETTLE_S
    while (left := cgroups(cgroup_parent)) and time.monotonic() < deadline:
        for path in left:
            with contextlib.suppress(OSError):
                path.rmdir()
        time.sleep(0.01)


def kill(targets: set[int], remaining: Callable[[], set[int]]) -> None:
    deadline = time.monotonic() + SETTLE_S
    while targets and time.monotonic() < deadline:
        for pid in targets:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
        targets = remaining()


def thaw(parent: str) -> None:
    """A frozen process does not die before it is thawed (v1)."""
    for cgroup in cgroups(parent):
        for name, value in (("freezer.state", "THAWED"), ("cgroup.freeze", "0")):
            if (cgroup / name).exists():
                with contextlib.suppress(OSError):
                    (cgroup / name).write_text(value, "ascii")


def unmount_below(directory: Path) -> None:
    lines = Path("/proc/self/mountinfo").read_text("utf-8").splitlines()
    points = [line.split()[4] for line in lines]
    for point in reversed(points):
        if point.startswith(f"{directory}/"):
            subprocess.run(["umount", "--lazy", point], capture_output=True, check=False)
