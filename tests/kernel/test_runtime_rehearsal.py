"""Going through the motions of init, and of an exec, in the runtime's own process."""

import json
import subprocess
import sys
from pathlib import Path

from support.requirements import needs

pytestmark = needs("root", "overlayfs")

SCRIPT = """
import json, os, sys, time
sys.path[:0] = json.loads(sys.argv[1])
from pathlib import Path
from corral.kernel import mount, namespaces
from corral.oci import program, rehearsal
from corral.oci.errors import ExecFailed

def facts():
    status = dict(line.split(":\\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = "Umask Uid Gid Groups Threads NoNewPrivs Seccomp CapInh CapPrm CapEff CapBnd CapAmb SigBlk SigIgn"
    links = {p.name: str(p.readlink()) for p in Path("/proc/self/ns").iterdir()}
    fds = {p.name: str(p.readlink()) for p in Path("/proc/self/fd").iterdir() if p.name < "3"}
    count = len(list(Path("/proc/self/fd").iterdir()))
    mounts = len(Path("/proc/self/mountinfo").read_text().splitlines())
    place = [os.getcwd(), str(Path("/proc/self/root").readlink()), os.uname().nodename]
    return {name: status[name] for name in names.split()} | links | fds | dict(n=count, m=mounts, p=place)

reached = []
def execute(ready, original=program.execute):
    try:
        original(ready)
    except ExecFailed as e:
        files = [os.path.getsize(f"/etc/{name}") > 0 for name in ("resolv.conf", "hostname", "hosts")]
        reached.append([e.kind, ready.env["HOME"], ready.groups, all(files)])
        raise
program.execute = execute
namespaces.leave(namespaces.Kind.MOUNT.flag)  # what others mount meanwhile does not count
mount.set_propagation("/", mount.MS_PRIVATE, recursive=True)
before = facts()
for _ in range(3):
    rehearsal.rehearse()
    rehearsal.rehearse_exec()
print(json.dumps([before, facts(), reached]))
"""


def test_it_reaches_the_end_and_changes_nothing():
    """On the way it looks up a user in files of the container, and binds others."""
    roots = [path for path in sys.path if path.startswith("/") and (Path(path) / "corral").is_dir()]
    command = [sys.executable, "-I", "-c", SCRIPT, json.dumps(roots)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/").stdout
    before, after, reached = json.loads(output)
    assert after == before
    assert reached == [["exec_not_found", "/root", [0, 1], True]] * 3
