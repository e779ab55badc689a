"""An ordinary user, who may have a range of subordinate ids, and a machine of his own that ends with the test."""

import contextlib
import os
import select
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from support.leaks import TAG_VARIABLE

USER = 4242
NAME = "corraltest"
SUBIDS = 500_000
AS_USER = {"user": USER, "group": USER, "extra_groups": []}
END_S = 10

# Mounts and processes of the container engine that the user runs are the machine's, and go with its first process,
# which reaps as an init does.
_MACHINE = """
set -e
for file in "$1"/*; do mount --bind "$file" "/etc/${file##*/}"; done
trap '' CHLD
echo ready
exec sleep infinity
"""


@contextlib.contextmanager
def users_directory() -> Iterator[Path]:
    """A directory that the user may reach; pytest's own are closed to him."""
    directory = Path(tempfile.mkdtemp(prefix="corral-rootless-"))
    try:
        directory.chmod(0o755)
        yield directory
    finally:
        shutil.rmtree(directory)


def give(directory: Path) -> None:
    """Make all of a directory the user's."""
    for place, names, files in os.walk(directory):
        for name in (*names, *files, "."):
            os.chown(Path(place, name), USER, USER, follow_symlinks=False)


@contextlib.contextmanager
def machine(directory: Path, *, subids: bool = True) -> Iterator[list[str]]:
    """The words before a command that runs it as a user of whom /etc knows; needs unshare, nsenter and setpriv.

    directory: the user's, for his home and run state. subids: he has a range of them.
    """
    files = directory / "etc"
    files.mkdir()
    (files / "passwd").write_text(f"{Path('/etc/passwd').read_text()}{NAME}:x:{USER}:{USER}::{directory}:/bin/sh\n")
    (files / "group").write_text(f"{Path('/etc/group').read_text()}{NAME}:x:{USER}:\n")
    for name in ("subuid", "subgid"):
        (files / name).write_text(f"{NAME}:{SUBIDS}:65536\n" if subids else "")
    run = directory / "run"
    run.mkdir(mode=0o700)
    os.chown(run, USER, USER)
    words = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", _MACHINE, "sh"]
    outer = subprocess.Popen([*words, str(files)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    with outer, contextlib.ExitStack() as stack:
        stack.callback(outer.kill)  # who takes its child along
        assert outer.stdout is not None
        assert outer.stdout.readline() == b"ready\n"
        (first,) = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
        stack.callback(_end, outer, os.pidfd_open(int(first)))
        identity = ["--reuid", str(USER), "--regid", str(USER), "--clear-groups", "env", "--ignore-environment"]
        own = [f"HOME={directory}", f"USER={NAME}", f"XDG_RUNTIME_DIR={run}"]
        kept = [f"{name}={os.environ[name]}" for name in ("PATH", TAG_VARIABLE)]
        yield ["nsenter", "--target", first, "--mount", "--pid", "setpriv", *identity, *own, *kept]


def _end(outer: "subprocess.Popen[bytes]", first: int) -> None:
    """End a machine. Its first process has ended once all others have."""
    outer.kill()
    assert select.select([first], [], [], END_S)[0]
    os.close(first)
