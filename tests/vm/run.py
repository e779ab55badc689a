"""Run a command in a virtual machine: Debian's stock kernel, cgroup v2 alone, over this machine's own files.

    .venv/bin/python tests/vm/run.py [--systemd] [--timeout S] [--kernel IMAGE] [--disk FILE] -- COMMAND [ARGUMENT…]

The machine sees all files of this one, read-only; what it writes is in its memory, and gone with it, but for TMPDIR
(/var/tmp), a disk of its own, which --disk keeps. There is no network but lo. The command's output comes through as it
is written, and its exit status is ours; 77: there can be no such machine here; 124: no end in time; 125: the machine
died, or was reset. Without KVM it is emulated, and ten to twenty times slower.
"""

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from kernel import Kernel, Missing, cache, initramfs, kernel

PROGRAMS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "modprobe": "kmod",
    "mkfs.ext4": "e2fsprogs",
    "mkfs.xfs": "xfsprogs",
    "mkfs.btrfs": "btrfs-progs",
}
WITH_SYSTEMD = {"/usr/lib/systemd/systemd": "systemd", "dbus-daemon": "dbus"}
# What tests use and nobody would load for them.
LOAD = ("loop", "btrfs", "xfs", "erofs", "dm_thin_pool", "br_netfilter")
DISK_BYTES = 32 << 30
OPTIONS = "quiet panic=-1 console=ttyS0 mitigations=off init_on_alloc=0"
# The fullest processor, without what only costs time there.
EMULATED = ["-accel", "tcg,thread=multi", "-cpu", "max,-la57,-smap,-smep,-umip,-pku,-pks,-svm"]
EMULATED_OPTIONS = "nopti tsc=reliable lpj=10000000"
# Units that only cost time, or cover this machine's files.
MASKED = ("tmp.mount", "systemd-timesyncd.service", "systemd-binfmt.service", "sys-kernel-debug.mount")
TARGET = "[Unit]\nRequires=sysinit.target\nWants=corral-vm.service dbus.socket\n"
SERVICE = """\
[Unit]
After=sysinit.target dbus.socket
[Service]
Delegate=yes
TasksMax=infinity
LimitNOFILE=1024:1048576
ExecStart=/bin/sh /run/corral-vm/command
"""
COMMAND = """\
cd {cd} || exit
export TMPDIR=/var/tmp
exec 3>/dev/vport0p1
{command} </dev/null >&3 2>&1
echo $? >/run/corral-vm/status
sync
exec 3>&-
exec /usr/bin/busybox poweroff -f
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--systemd", action="store_true", help="systemd is pid 1, and the command a service")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds, with the boot (%(default)s)")
    parser.add_argument("--memory", default="4G")
    parser.add_argument("--kernel", type=Path, help="a bzImage with all it needs built in, instead of Debian's kernel")
    parser.add_argument("--disk", type=Path, metavar="FILE", help="the disk of an earlier run, or where it is kept")
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    if arguments.kernel and not arguments.kernel.is_file():
        parser.error(f"there is no kernel {arguments.kernel}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        _require(PROGRAMS | (WITH_SYSTEMD if arguments.systemd else {}))
        cache().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache(), prefix="run-") as run:
            return _run(Path(run), arguments.command, arguments)
    except Missing as e:
        print(f"skipped, for there can be no virtual machine: {e}", file=sys.stderr)
        return 77


def _require(programs: dict[str, str]) -> None:
    """Install what is missing, by name. Raises Missing."""
    packages = sorted({package for program, package in programs.items() if shutil.which(program) is None})
    if not packages:
        return
    try:
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        command = ["apt-get", "install", "-qq", "-y", "--no-install-recommends", *packages]
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    except (OSError, subprocess.CalledProcessError) as e:
        raise Missing(f"{' '.join(packages)} cannot be installed: {e}") from e


def _run(run: Path, command: Sequence[str], arguments: argparse.Namespace) -> int:
    """The command's exit status. `run` is the directory that the machine may write to."""
    found = Kernel(arguments.kernel) if arguments.kernel else kernel()
    initramfs(found, run / "initramfs")
    disk = arguments.disk or run / "disk"
    if not disk.exists():
        _make_disk(disk)
    _prepare(run, found.modules, command, systemd=arguments.systemd)
    # Were its input to end, the machine would see its output as closed.
    machine = subprocess.Popen(_qemu(run, found.image, disk, memory=arguments.memory), stdin=subprocess.PIPE)
    try:
        machine.wait(arguments.timeout)
    except subprocess.TimeoutExpired:
        print(f"no end after {arguments.timeout:g} s; {_console(run)}", file=sys.stderr)
        return 124
    finally:
        machine.kill()
        machine.wait()
    if not (run / "status").exists():
        print(f"the machine died; {_console(run)}", file=sys.stderr)
        return 125
    return int((run / "status").read_text())


def _make_disk(disk: Path) -> None:
    with disk.open("wb") as file:
        file.truncate(DISK_BYTES)
    subprocess.run(["mkfs.ext4", "-q", "-F", disk], check=True)


def _prepare(run: Path, modules: Path | None, command: Sequence[str], *, systemd: bool) -> None:
    """The files that init.sh reads."""
    passed = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    variables = {**passed, "CORRAL_TEST_PATIENCE": "1" if _can_kvm() else "20"}
    words = ["env", *(f"{name}={value}" for name, value in variables.items()), *command]
    (run / "command").write_text(COMMAND.format(cd=shlex.quote(str(Path.cwd())), command=shlex.join(words)))
    chosen = "yes" if systemd else ""
    (run / "run.conf").write_text(f"MODULES={modules or ''}\nLOAD='{' '.join(LOAD)}'\nSYSTEMD={chosen}\n")
    (run / "corral-vm.target").write_text(TARGET)
    (run / "corral-vm.service").write_text(SERVICE)


def _can_kvm() -> bool:
    """The node is there in many a virtual machine that cannot."""
    has = re.search(r"\b(vmx|svm)\b", Path("/proc/cpuinfo").read_text()) is not None
    return has and os.access("/dev/kvm", os.W_OK)


def _console(run: Path) -> str:
    return "its console's last lines:\n" + (run / "console").read_text(errors="replace")[-3000:]


def _qemu(run: Path, image: Path, disk: Path, *, memory: str) -> list[str]:
    masked = " ".join(f"systemd.mask={unit}" for unit in MASKED)
    how, more = (["-accel", "kvm", "-cpu", "host"], "") if _can_kvm() else (EMULATED, EMULATED_OPTIONS)
    return [
        *("qemu-system-x86_64", "-M", "pc,usb=off", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *(*how, "-smp", str(os.cpu_count()), "-m", memory),
        *("-kernel", str(image), "-initrd", str(run / "initramfs"), "-append", f"{OPTIONS} {more} {masked}"),
        *("-serial", f"file:{run}/console"),
        *("-device", "virtio-serial-pci", "-chardev", "stdio,id=output,signal=off"),
        *("-device", "virtserialport,chardev=output,nr=1"),
        *("-drive", f"file={disk},format=raw,if=virtio,cache=unsafe,discard=unmap"),
        *_shared("host", "/", "on"),
        *_shared("run", str(run), "off"),
    ]


def _shared(tag: str, path: str, read_only: str) -> list[str]:
    fsdev = f"local,id={tag},path={path},readonly={read_only},security_model=none,multidevs=remap"
    return ["-fsdev", fsdev, "-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]


if __name__ == "__main__":
    sys.exit(main())
