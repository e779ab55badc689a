"""What corral may leave on a machine, listed so that before and after can be compared.

Everything that a test session makes has its tag in the name (see support.corrald), in the environment of a process or
in its cgroup. Things of ours without the tag count too, as long as no other test session runs on the machine.
"""

import fcntl
import json
import os
import subprocess
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

TAG_VARIABLE = "CORRAL_TEST_TAG"
SESSIONS_LOCK = Path("/tmp/corral-test-sessions.lock")
OUR_PROGRAMS = ("corral.shim", "corral.daemon", "corrald", "corral.network.proxy")
SETTLE_S = 5.0 * float(os.environ.get("CORRAL_TEST_PATIENCE", "1"))


@dataclass(frozen=True, slots=True)
class Machine:
    """Everything of corral's that is there now. Each is a sentence fragment that names one thing."""

    mounts: frozenset[str] = frozenset()
    links: frozenset[str] = frozenset()
    cgroups: frozenset[str] = frozenset()
    tables: frozenset[str] = frozenset()
    processes: frozenset[str] = frozenset()

    @classmethod
    def now(cls, tag: str) -> Self:
        return cls(_mounts(), _links(), _cgroups(), _tables(), _processes(tag))

    def since(self, before: Self) -> list[str]:
        """What is there now and was not before."""
        new = (getattr(self, field.name) - getattr(before, field.name) for field in fields(self))
        return sorted(item for items in new for item in items)


def _mounts() -> frozenset[str]:
    lines = Path("/proc/self/mountinfo").read_text("utf-8").splitlines()
    points = (line.split()[4] for line in lines)
    return frozenset(f"mount {point}" for point in points if "/corral" in point)


def _links() -> frozenset[str]:
    found = set()
    for link in Path("/sys/class/net").iterdir():
        master = link / "master"
        on = master.readlink().name if master.is_symlink() else ""
        if link.name.startswith(("corral", "crl", "veth")) or on.startswith("corral"):
            found.add(f"link {link.name}")
    return frozenset(found)


def _cgroups() -> frozenset[str]:
    """Ours lie directly under the root of a hierarchy; a hierarchy of v1 may also be left without a mount."""
    lines = Path("/proc/self/mountinfo").read_text("utf-8").splitlines()
    roots = {line.split()[4] for line in lines if line.partition(" - ")[2].startswith("cgroup")}
    found = {f"cgroup {path}" for root in roots for path in Path(root).glob("corral*")}
    hierarchies = Path("/proc/self/cgroup").read_text("utf-8").splitlines()
    return frozenset(found | {f"cgroup hierarchy {line.split(':')[1]}" for line in hierarchies})


def _tables() -> frozenset[str]:
    if os.geteuid() != 0:
        return frozenset()
    try:
        listed = subprocess.run(["nft", "--json", "list", "tables"], capture_output=True, check=False)
    except FileNotFoundError:
        return frozenset()
    if listed.returncode != 0:
        return frozenset()
    tables = (item["table"] for item in json.loads(listed.stdout)["nftables"] if "table" in item)
    return frozenset(f"nft table {t['family']} {t['name']}" for t in tables if t["name"].startswith("corral"))


def _processes(tag: str) -> frozenset[str]:
    found = set()
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit() and int(directory.name) != os.getpid():
            what = _process(directory, tag)
            if what:
                found.add(what)
    return frozenset(found)


def _process(directory: Path, tag: str) -> str:
    """A line about the process if it is ours, else ''."""
    try:
        command = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
        environment = (directory / "environ").read_bytes()
        cgroup = (directory / "cgroup").read_text("utf-8")
        if (directory / "stat").read_text("utf-8").rpartition(")")[2].split()[0] == "Z":
            return ""
    except OSError:
        return ""  # it has ended, or it is not ours to look at
    program = command.partition(" -c ")[2] or command
    ours = any(name in program[:300] for name in OUR_PROGRAMS) or "/corral" in cgroup
    tagged = tag.encode() in environment or tag in cgroup or (ours and tag in _open_files(directory))
    mark = f" [{tag}]" if tagged else ""
    return f"process {directory.name} {command[:160]}{mark}" if ours or tagged else ""


def _runs_corral(directory: Path, tag: str) -> bool:
    """Whether this is a daemon, a bench or a zygote that is not of this session."""
    try:
        command = (directory / "cmdline").read_bytes()
        mine = tag.encode() in (directory / "environ").read_bytes() or int(directory.name) == os.getpid()
        parent = int((directory / "stat").read_text("utf-8").rpartition(")")[2].split()[1])
    except OSError:
        return False
    if b"corral.shim.zygote" in command:  # it has no environment; a shim is an orphan, a zygote has its daemon
        return parent not in (1, os.getpid()) and not _runs_corral_of(parent, tag)
    return not mine and any(word in command for word in (b"corral.daemon", b"corrald\0", b"pytest", b"tests/bench"))


def _runs_corral_of(pid: int, tag: str) -> bool:
    try:
        return tag.encode() in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return True


def _open_files(directory: Path) -> str:
    """What the process has open: a shim, whose environment says nothing, has the FIFOs of its bundle."""
    try:
        return " ".join(str(fd.readlink()) for fd in (directory / "fd").iterdir())
    except OSError:
        return ""


class Watch:
    """Compares the machine at the end of a session with how it was when the session began."""

    def __init__(self, tag: str) -> None:
        self._tag = tag
        self._lock = os.open(SESSIONS_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        fcntl.flock(self._lock, fcntl.LOCK_SH)
        self._before = Machine.now(tag)

    def left_behind(self) -> list[str]:
        """What this session left; waits a little for what is on its way out."""
        alone = self._alone()
        deadline = time.monotonic() + SETTLE_S
        while True:
            new = Machine.now(self._tag).since(self._before)
            left = [item for item in new if alone or self._tag in item]
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(0.1)

    def _alone(self) -> bool:
        """Whether no other test session and no corral of somebody else runs, whose things would look like ours."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return not any(_runs_corral(directory, self._tag) for directory in Path("/proc").glob("[0-9]*"))

    def close(self) -> None:
        os.close(self._lock)
