"""A bench for the runtime core: a busybox image, and containers that are made, watched and cleaned up."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from corral.kernel.namespaces import Kind
from corral.kernel.syscalls import CGROUP2_SUPER_MAGIC, filesystem_magic
from corral.oci import defaults, runtime
from corral.oci.runtime import Container, ProcessHandle, Stdio
from corral.oci.spec import Capabilities, Linux, Mount, Namespace, Process, Spec


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The runtime core forks, so it wants a single-threaded process: no watching thread for these tests."""
    for item in items:
        if "lab" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(60, method="signal"))


OWN_KINDS = (Kind.MOUNT, Kind.PID, Kind.IPC, Kind.UTS, Kind.CGROUP, Kind.NETWORK)
PASSWD = "root:x:0:0:root:/root:/bin/sh\nbob:x:1000:1001:Bob:/home/bob:/bin/sh\n"
GROUP = "root:x:0:\nbob:x:1001:\nwheel:x:10:root,bob\ncrew:x:2000:bob\n"
KEYRING_SCRIPT = "from corral.kernel import keyring; print(keyring.session_serial())"
KEYRING_COMMAND = ("chroot", "/host", sys.executable, "-c", KEYRING_SCRIPT)


@dataclass(frozen=True)
class Result:
    """How a process ended: code is its exit code or -signal; output is what it wrote to stdout and stderr."""

    code: int
    output: str


@dataclass
class Lab:
    """Makes containers on an overlay of: `plant` (a layer for the test to fill), then busybox."""

    directory: Path
    busybox: Path
    made: list[ProcessHandle] = field(default_factory=list)
    containers: list[Container] = field(default_factory=list)

    @property
    def plant(self) -> Path:
        """Files a test puts into the image."""
        return self.directory / "plant"

    @property
    def upper(self) -> Path:
        """What the container wrote."""
        return self.directory / "upper"

    def rootfs(self) -> list[Mount]:
        layers = f"lowerdir={self.plant}:{self.busybox}"
        work = self.directory / "work"
        return [Mount(type="overlay", source="overlay", options=(layers, f"upperdir={self.upper}", f"workdir={work}"))]

    def process(self, *args: str, **changes: object) -> Process:
        """A process with docker's defaults; a single argument is a shell script."""
        held = defaults.CAPABILITIES
        process = Process(
            cwd="/",
            args=args if len(args) > 1 else ("sh", "-c", *args),
            capabilities=Capabilities(bounding=held, effective=held, permitted=held),
            no_new_privileges=True,
        )
        return replace(process, **changes)

    def spec(self, *args: str, mounts: Sequence[Mount] = (), linux: dict[str, object] | None = None, **changes: object):
        """A specification with docker's defaults. changes go to the process, or the spec if it has such a member."""
        members = ("hostname", "root", "domainname", "hooks", "annotations")
        whole = {name: changes.pop(name) for name in members if name in changes}
        spec = Spec(
            oci_version="1.2.0",
            process=self.process(*args, **changes),
            hostname="box",
            mounts=(*defaults.MOUNTS, *mounts),
            linux=Linux(
                namespaces=tuple(Namespace(kind) for kind in OWN_KINDS),
                masked_paths=defaults.MASKED_PATHS,
                readonly_paths=defaults.READONLY_PATHS,
                seccomp=defaults.seccomp(defaults.CAPABILITIES),
            ),
        )
        return replace(spec, **whole, linux=replace(spec.linux, **(linux or {})))

    def create(self, spec: Spec, *, stdio: Stdio | None = None, **options: object) -> Container:
        """create(), on this bench's root; whatever is left of it at the end of the test is killed."""
        options.setdefault("rootfs", self.rootfs())
        container = runtime.create(spec, bundle=self.directory / "bundle", stdio=stdio or Stdio(), **options)
        self.made.append(container.init)
        self.containers.append(container)
        return container

    def run(self, *args: str, user: str | None = None, options: dict[str, object] | None = None, **changes) -> Result:
        """Create, start, and see a container to its end. changes: as for spec()."""
        return self.run_spec(self.spec(*args, **changes), user=user, **(options or {}))

    def run_process(self, *args: str, **changes: object) -> Result:
        """run(), but a user among the changes is that of the process object."""
        return self.run_spec(self.spec(*args, **changes))

    def run_spec(self, spec: Spec, **options: object) -> Result:
        """Create, start, and see a container to its end."""
        with pipe() as (reader, writer):
            stdio = Stdio(None, writer, writer)
            container = self.create(spec, stdio=stdio, **options)
            container.start()
            os.close(writer)
            output = read_all(reader)
            return Result(self.wait(container.init), output)

    def exec(self, container: Container, *args: str, user: str | None = None, cgroup_paths=(), **changes) -> Result:
        """Run one more process in a container to its end."""
        with pipe() as (reader, writer):
            stdio = Stdio(None, writer, writer)
            handle = container.exec(self.process(*args, **changes), user=user, stdio=stdio, cgroup_paths=cgroup_paths)
            self.made.append(handle)
            os.close(writer)
            output = read_all(reader)
            return Result(self.wait(handle), output)

    def wait(self, handle: ProcessHandle) -> int:
        """Reap a process: its exit code, or -signal."""
        self.made.remove(handle)
        return reap(handle)

    def keyring_spec(self) -> Spec:
        """A container that tells the serial number of its session keyring, asking by the host's own programs."""
        host = Mount(type="bind", source="/", destination="/host", options=("rbind", "ro"))
        return self.spec(*KEYRING_COMMAND, mounts=(host,), linux={"seccomp": None})

    def close(self) -> None:
        """Kill and reap what is left, the newest first: init waits for those that were exec'ed."""
        for container in self.containers:
            container.close()
        for handle in reversed(self.made):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle.pidfd, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                reap(handle)


def reap(handle: ProcessHandle) -> int:
    try:
        result = os.waitid(os.P_PIDFD, handle.pidfd, os.WEXITED)
        return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status
    finally:
        os.close(handle.pidfd)
        if handle.console is not None:
            os.close(handle.console)


@contextlib.contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    try:
        yield reader, writer
    finally:
        for fd in (reader, writer):
            with contextlib.suppress(OSError):
                os.close(fd)


def read_all(fd: int) -> str:
    parts = []
    while part := os.read(fd, 65536):
        parts.append(part)
    return b"".join(parts).decode("utf-8", "replace")


@pytest.fixture(scope="session")
def busybox_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root file system of an image: busybox, a few users, the usual directories."""
    root = tmp_path_factory.mktemp("busybox")
    for name in ("bin", "etc", "home/bob", "root", "tmp", "proc", "sys", "dev", "usr/bin"):
        (root / name).mkdir(parents=True)
    binary = shutil.which("busybox")
    assert binary is not None
    shutil.copy(binary, root / "bin/busybox")
    applets = subprocess.run([binary, "--list"], capture_output=True, text=True, check=True).stdout.split()
    for applet in applets:
        if applet != "busybox":
            (root / "bin" / applet).symlink_to("busybox")
    (root / "etc/passwd").write_text(PASSWD)
    (root / "etc/group").write_text(GROUP)
    os.chown(root / "home/bob", 1000, 1001)
    (root / "tmp").chmod(0o1777)
    return root


@pytest.fixture
def lab(tmp_path: Path, busybox_root: Path) -> Iterator[Lab]:
    """A bench whose containers end with the test."""
    for name in ("plant", "upper", "work", "bundle"):
        (tmp_path / name).mkdir()
    lab = Lab(tmp_path, busybox_root)
    try:
        yield lab
    finally:
        lab.close()


@pytest.fixture
def cgroups() -> Iterator[list[Path]]:
    """A cgroup in every hierarchy of this host."""
    root = Path("/sys/fs/cgroup")
    fd = os.open(root, os.O_PATH)
    unified = filesystem_magic(fd) == CGROUP2_SUPER_MAGIC
    os.close(fd)
    parents = [root] if unified else [path for path in sorted(root.iterdir()) if path.is_mount()]
    made = []
    for parent in parents:
        path = parent / f"corral-test-{os.getpid()}"
        path.mkdir()
        made.append(path)
        for name in ("cpuset.cpus", "cpuset.mems"):
            if parent.name == "cpuset":
                (path / name).write_text((parent / name).read_text())
    yield made
    for path in made:
        for attempt in range(100):
            try:
                path.rmdir()
                break
            except OSError:
                time.sleep(0.02 * bool(attempt < 99))
