"""Running init's code in the zygote, so that the inits to come find it warm.

The interpreter rewrites code while it first runs it. What only ever runs in init would be rewritten in every init anew,
and each rewritten page is one that is no longer shared with the zygote: a copy, and a page fault of microseconds. So
the zygote itself goes through the motions of init once or twice, on a thread whose mounts, names, descriptors,
credentials and filter are its own (to the kernel all of these are a thread's, not a process's) and end with it.
"""

import _thread
import contextlib
import json
import os
import sys
import time
from pathlib import Path

from corral.kernel import mount, namespaces, paths, process
from corral.kernel.mount import MS_PRIVATE
from corral.kernel.namespaces import Kind
from corral.oci import OCI_VERSION, blueprint, defaults, init, join_calls, program
from corral.oci.cgroups import Membership
from corral.oci.errors import ExecFailed
from corral.oci.larder import Larder
from corral.oci.spec import Capabilities, Linux, Mount, Namespace, Process, Spec
from corral.oci.stdio import Stdio, take_places
from corral.oci.users import Identity, Sighting
from corral.oci.usual import spec_of

_CLONE_FS, _CLONE_FILES = 0x200, 0x400
_PLACE = "/proc"
"""Any directory that is always there: it is covered, in the thread's own mount namespace."""
_ETC = f"{_PLACE}/lower/etc"
_KINDS = (Kind.MOUNT, Kind.IPC, Kind.UTS)
_USER = "root"
_DATABASES = {
    "passwd": "bin:x:1:1::/bin:/bin/sh\nroot:x:0:0::/root:/bin/sh\n",
    "group": "bin:x:1:root\nroot:x:0:\n",
}
_FILES = ("/etc/resolv.conf", "/etc/hostname", "/etc/hosts")
"""What is bound into a container that has a network of its own."""


def rehearse() -> None:
    """Set up a container that has no program, in this process, which must be single-threaded before and is so after.

    What this host does not allow stays cold.
    """
    done = _thread.allocate_lock()
    done.acquire()
    profile = sys.getprofile()  # who watches what runs in this thread wants to know of that one too

    def body() -> None:
        sys.setprofile(profile)
        try:
            with contextlib.suppress(OSError, ExecFailed):
                _go_through_the_motions()
        finally:
            done.release()

    _thread.start_new_thread(body, ())
    done.acquire()
    while len(list(Path("/proc/self/task").iterdir())) > 1:
        time.sleep(0.0002)


def rehearse_exec() -> None:
    """The runtime's part in an exec (corral.oci.join_calls): one whose calls end where it would enter a container."""
    spec, look = _spec(), (0, 0, 0, 0, 0)
    assert spec.process is not None
    wanted = program.program_of(spec.process, spec.linux, user=None)
    if not join_calls.suits(wanted, spec.linux.seccomp, Stdio()):
        return
    sighting = Sighting(Identity(0, 0, (), "/"), (look, look))
    files = join_calls.Files()
    with paths.opened(process.pidfd_open(os.getpid())) as nobody, contextlib.suppress(OSError, ExecFailed):
        join_calls.begin(files, wanted, sighting, Stdio(), (), init=nobody, flags=0, before_start=lambda _handle: None)


class Typical:
    """A container like most others, to be planned before it is known which one it will be.

    What a fork first writes to is copied, page by page, and memory it first takes is cleared for it. A spare shim that
    has planned this one has that behind it, and plans a real one in a third of the time.
    """

    def __init__(self) -> None:
        self._config = json.dumps(_spec().to_json(), separators=(",", ":"))
        self._rootfs = _overlay("/lower", "/upper", "/work", "/more")
        self._cgroups = _cgroups()

    def read(self) -> None:
        """Every member of it, known or not: what that takes is made when one is first met."""
        Spec.from_json(json.loads(self._config))

    def plan(self) -> None:
        """All that create() does before it makes a process."""
        spec = spec_of(self._config)
        blueprint.plan_of(
            spec, bundle=_PLACE, rootfs=[self._rootfs], user=_USER, cgroups=self._cgroups, console_size=None
        )
        with contextlib.suppress(OSError, ExecFailed):  # those of the host itself, which not everybody may write to
            Membership.open(self._cgroups).close()


def _go_through_the_motions() -> None:
    namespaces.leave(_CLONE_FS | _CLONE_FILES | namespaces.flags_of(_KINDS))
    mount.set_propagation("/", MS_PRIVATE, recursive=True)
    places = [f"{_PLACE}/{name}" for name in ("lower", "upper", "work", "more")]
    rootfs, cgroups = _overlay(*places), _cgroups()
    # Planned before /proc is covered, in which it looks at who it is.
    plan = blueprint.plan_of(_spec(), bundle=_PLACE, rootfs=[rootfs], user=_USER, cgroups=cgroups, console_size=None)
    tree = mount.new_mount("tmpfs", "tmpfs", ("size=4m",))
    mount.move_mount(tree, os.open(_PLACE, os.O_PATH))
    for path in places:
        Path(path).mkdir()
    Path(_ETC).mkdir()
    for name, content in _DATABASES.items():
        Path(_ETC, name).write_text(content)
    take_places(Stdio())
    os.umask(0)
    larder = Larder()
    larder.stock()
    stage = init.build_root(plan, init.Way(larder=larder))
    ready = init.settle(plan, stage, Stdio(), os.close)
    process.close_fds(range(3))
    program.execute(ready)


def _cgroups() -> list[str]:
    """Something to bind where the cgroups of a container would be."""
    root = Path("/sys/fs/cgroup")
    if not root.is_dir():
        return []
    if (root / "cgroup.controllers").exists():
        return [os.fspath(root)]
    return [os.fspath(path) for path in root.iterdir() if path.is_dir() and not path.is_symlink()]


def _overlay(lower: str, upper: str, work: str, more: str) -> Mount:
    options = (f"lowerdir={lower}:{more}", f"upperdir={upper}", f"workdir={work}")
    return Mount(type="overlay", source="overlay", options=options)


def _spec() -> Spec:
    held = defaults.CAPABILITIES
    return Spec(
        oci_version=OCI_VERSION,
        process=Process(
            cwd="/",
            args=("/nothing",),
            env=("A=B",),
            capabilities=Capabilities(bounding=held, effective=held, permitted=held),
            no_new_privileges=True,
        ),
        hostname="rehearsal",
        mounts=(
            *defaults.MOUNTS,
            *(Mount(name, "bind", f"{_ETC}/group", ("rbind", "rprivate")) for name in _FILES),
        ),
        linux=Linux(
            namespaces=tuple(Namespace(kind) for kind in _KINDS),
            masked_paths=defaults.MASKED_PATHS,
            readonly_paths=defaults.READONLY_PATHS,
            seccomp=defaults.seccomp(held),
        ),
    )
