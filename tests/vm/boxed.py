"""Run a command under a systemd of its own, in namespaces of this host: with cgroups as that mounts them, v1 or hybrid.

    .venv/bin/python tests/vm/boxed.py [--timeout S] -- COMMAND [ARGUMENT…]

It sees the host's files, but has processes, cgroups, /run and a network of its own, and all of it ends with it. The
command's output comes through, and its exit status is ours; 77: there is cgroup v2 alone, for which there is run.py, or
no systemd; 124: no end in time; 125: it did not come to the command.
"""

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SYSTEMD = "/usr/lib/systemd/systemd"
TARGET = "[Unit]\nRequires=sysinit.target\nWants=corral-box.service dbus.socket\n"
SERVICE = """\
[Unit]
After=sysinit.target dbus.socket
[Service]
Delegate=yes
TasksMax=infinity
LimitNOFILE=1024:20000
ExecStart=/bin/sh /run/corral-box/command
"""
COMMAND = """\
exec >>/run/corral-box/output 2>&1 </dev/null
cd {cwd} || exit
{command}
echo $? >/run/corral-box/status
systemctl --no-block poweroff
"""
# Those that change what is the host's, or only cost time.
MASKED = (
    *("systemd-udevd.service", "systemd-udevd-control.socket", "systemd-udevd-kernel.socket"),
    *("systemd-udev-trigger.service", "systemd-sysctl.service", "systemd-modules-load.service"),
    *("systemd-journald.service", "systemd-journald.socket", "systemd-journald-dev-log.socket"),
    *("systemd-journal-flush.service", "systemd-random-seed.service", "systemd-update-utmp.service"),
    *("systemd-tmpfiles-setup.service", "systemd-tmpfiles-setup-dev.service", "kmod-static-nodes.service"),
    *("systemd-tmpfiles-setup-dev-early.service", "systemd-tmpfiles-clean.timer"),
    *("systemd-machine-id-commit.service", "systemd-firstboot.service", "systemd-pstore.service", "apparmor.service"),
    *("systemd-binfmt.service", "systemd-timesyncd.service", "systemd-networkd.service", "systemd-resolved.service"),
    *("tmp.mount", "dev-hugepages.mount", "dev-mqueue.mount", "sys-kernel-debug.mount", "sys-kernel-tracing.mount"),
)  # fmt: skip
# The first process of the namespaces. What it mounts of a hierarchy begins with the cgroup that it is in.
INIT = """\
set -e
mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs -o mode=755 tmpfs {run}/cgroup
{hierarchies}
mount --move {run}/cgroup /sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs {run}/run
mkdir -p {run}/run/corral-box {run}/run/systemd/system {run}/run/lock {run}/run/dbus {run}/run/mount
mount --bind {run} {run}/run/corral-box
cp {run}/corral-box.* {run}/run/systemd/system
for unit in {masked}; do ln -s /dev/null {run}/run/systemd/system/$unit; done
mount --move {run}/run /run
mount --bind /dev/null /etc/fstab
ip link set lo up
exec env -i container=corral PATH="$PATH" {systemd} --unit=corral-box.target --show-status=no \\
    --log-target=console systemd.unified_cgroup_hierarchy=0 SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE=1
"""


class Mounted(NamedTuple):
    """A hierarchy, and what mounts it again."""

    where: Path
    kind: str
    options: str


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--timeout", type=float, default=1800, help="seconds, with the boot (%(default)s)")
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if not Path(SYSTEMD).exists() or not any(hierarchy.kind == "cgroup" for hierarchy in _hierarchies()):
        print("skipped: there is cgroup v2 alone, or no systemd", file=sys.stderr)
        return 77
    name = f"corral-box-{os.getpid()}"
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir="/var/tmp") as run, _cgroups(name) as cgroups:
        _prepare(Path(run), arguments.command)
        return _run(Path(run), cgroups, arguments.timeout)


def _hierarchies() -> list[Mounted]:
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = right.split()[:3]
        if kind in ("cgroup", "cgroup2"):
            kept = [option for option in options.split(",") if option not in ("rw", "ro")]
            named = any(option.startswith("name=") for option in kept)
            found.append(Mounted(Path(left.split()[4]), kind, ",".join([*(["none"] if named else []), *kept])))
    return found


@contextlib.contextmanager
def _cgroups(name: str) -> Iterator[list[Path]]:
    directories = [hierarchy.where / name for hierarchy in _hierarchies()]
    try:
        for directory in directories:
            directory.mkdir()
            for file in ("cpuset.cpus", "cpuset.mems"):
                if (directory / file).exists():
                    (directory / file).write_text((directory.parent / file).read_text())
        yield directories
    finally:
        for directory in directories:
            _remove(directory)


def _remove(top: Path) -> None:
    """What the last processes of it let go of a moment later."""
    until = time.monotonic() + 10
    while top.exists() and time.monotonic() < until:
        for directory, _, _ in os.walk(top, topdown=False):
            with contextlib.suppress(OSError):
                Path(directory).rmdir()
        time.sleep(0.02)


def _prepare(run: Path, words: list[str]) -> None:
    again = [f"mkdir {run}/cgroup/{where.name}; mount -t {kind} -o rw,{options} {kind} {run}/cgroup/{where.name}"
             for where, kind, options in _hierarchies()]  # fmt: skip
    for name in ("cgroup", "run"):
        (run / name).mkdir()
    (run / "init").write_text(
        INIT.format(run=run, hierarchies="\n".join(again), masked=" ".join(MASKED), systemd=SYSTEMD)
    )
    passed = [f"{name}={value}" for name, value in os.environ.items() if name in ("PATH", "HOME") or "CORRAL" in name]
    command = shlex.join(["env", *passed, *words])
    (run / "command").write_text(COMMAND.format(cwd=shlex.quote(str(Path.cwd())), command=command))
    (run / "corral-box.target").write_text(TARGET)
    (run / "corral-box.service").write_text(SERVICE)
    (run / "output").touch()


def _run(run: Path, cgroups: list[Path], timeout_s: float) -> int:
    """The command's exit status."""
    join = "; ".join(f"echo $$ >{directory}/cgroup.procs" for directory in cgroups)
    unshare = "exec unshare --mount --pid --cgroup --uts --ipc --net --fork --kill-child"
    with (run / "console").open("wb") as console, (run / "output").open("rb") as output:
        box = subprocess.Popen(["sh", "-ec", f"{join}; {unshare} sh {run}/init"], stdin=subprocess.DEVNULL,
                               stdout=console, stderr=console)  # fmt: skip
        until = time.monotonic() + timeout_s
        try:
            while (over := box.poll()) is None and time.monotonic() < until:
                shutil.copyfileobj(output, sys.stdout.buffer)
                sys.stdout.buffer.flush()
                time.sleep(0.1)
        finally:
            box.kill()
            box.wait()
        shutil.copyfileobj(output, sys.stdout.buffer)
        sys.stdout.buffer.flush()
    if (run / "status").exists():
        return int((run / "status").read_text())
    print((run / "console").read_text(errors="replace")[-3000:], file=sys.stderr)
    return 124 if over is None else 125


if __name__ == "__main__":
    sys.exit(main())
