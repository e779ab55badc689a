"""What a container process becomes, computed before it exists; and its last steps until execve.

Order: user found, stdio handed over, working directory, limits, no_new_privs, capabilities and ids dropped, seccomp,
and then, maybe in a successor that others see, all is made ready for execve. Only without no_new_privs does seccomp
come before the drop, since loading it needs CAP_SYS_ADMIN then. A filter that does not let pass what is left to be done
waits until execve; in its place there is one that lets pass that as well, and nothing else.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, NoReturn

from corral.kernel import capabilities, credentials, keyring, paths, process, rlimits
from corral.kernel.namespaces import Kind
from corral.kernel.privilege import is_hosts_root
from corral.oci.errors import EXEC_DENIED, EXEC_NOT_FOUND, SETUP, ExecFailed
from corral.oci.spec import Capabilities, Linux, Process, Rlimit, Seccomp
from corral.oci.users import Identity, find_groups, identify

if TYPE_CHECKING:  # loaded for those who ask for it
    from corral.kernel.seccomp import Filter
    from corral.oci.allotment import Allotment
    from corral.oci.labels import Labels

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where a program is looked for that is given no PATH. It stays without one, as with runc."""
_IS_DIRECTORY = "is a directory"


@dataclass(frozen=True, slots=True)
class CapabilitySets:
    """The five sets as bit masks."""

    bounding: int
    effective: int
    permitted: int
    inheritable: int
    ambient: int


@dataclass(frozen=True, slots=True)
class Program:
    """Everything about a process but the namespaces it lives in."""

    args: tuple[str, ...]
    env: Mapping[str, str]
    cwd: str
    umask: int
    user: str | None
    uid: int
    gid: int
    groups: tuple[int, ...]
    group_names: tuple[str, ...]
    capabilities: CapabilitySets
    no_new_privs: bool
    rlimits: tuple[Rlimit, ...]
    oom_score_adj: int | None
    seccomp: "Filter | None"
    """What is still to be loaded."""
    interim: "Filter | None"
    """What is loaded first, where the other would refuse what is left to be done by then."""
    passes: bool
    """Nothing of that is refused, and nobody is told of it."""
    terminal: bool
    """0, 1 and 2 are a pty of the container."""
    in_user_namespace: bool = False
    """Of the container's own, a joined one, or one that the runtime is in."""
    allotment: "Allotment | None" = None
    labels: "Labels | None" = None
    dies_with_runtime: bool = False
    """It is killed when the process ends that made it."""

    def start_as(self, identity: Identity) -> "Program":
        """The same program, run by identity."""
        env = self.env if self.env.get("HOME") else {**self.env, "HOME": identity.home}
        return replace(self, uid=identity.uid, gid=identity.gid, groups=identity.groups, env=env)

    def inherited(self) -> "Program":
        """The same for a process that has a successor, or little power: less what the runtime does for it."""
        return self if self.allotment is None else replace(self, allotment=self.allotment.inherited())


def program_of(spec: Process, linux: Linux, *, user: str | None, dies_with_runtime: bool = False) -> Program:
    """The program that a process object describes. Raises ValueError for names the kernel does not know."""
    env = dict(assignment.split("=", 1) for assignment in spec.env)
    for limit in spec.rlimits:
        if limit.type not in rlimits.NAMES:
            raise ValueError(f"process.rlimits: unknown resource limit {limit.type!r}")
    # A user namespace is entered with all capabilities, whatever the runtime has.
    inside = any(namespace.type is Kind.USER for namespace in linux.namespaces)
    available = capabilities.ALL if inside else capabilities.permitted()
    seccomp, interim, passes = _filters(linux.seccomp)
    return Program(
        args=spec.args,
        env=env,
        cwd=spec.cwd,
        umask=0o022 if spec.user.umask is None else spec.user.umask & 0o777,
        user=user,
        uid=spec.user.uid,
        gid=spec.user.gid,
        groups=spec.user.additional_gids,
        group_names=spec.user.group_names,
        capabilities=capability_sets(spec.capabilities, available),
        no_new_privs=spec.no_new_privileges,
        rlimits=spec.rlimits,
        oom_score_adj=spec.oom_score_adj,
        seccomp=seccomp,
        interim=interim,
        passes=passes,
        terminal=spec.terminal,
        in_user_namespace=inside or not is_hosts_root(),
        allotment=_allotment(spec, linux),
        labels=_labels(spec),
        dies_with_runtime=dies_with_runtime,
    )


@lru_cache(maxsize=16)
def _filters(profile: Seccomp | None) -> "tuple[Filter | None, Filter | None, bool]":
    """Computed once per profile: Program's seccomp, interim and passes."""
    if profile is None:
        return None, None, True
    from corral.oci.seccomp import UNTIL_EXECVE, filter_but_for, filter_of, lets_pass

    passes = lets_pass(profile, UNTIL_EXECVE)
    return filter_of(profile), None if passes else filter_but_for(profile, UNTIL_EXECVE), passes


def _allotment(spec: Process, linux: Linux) -> "Allotment | None":
    if (
        spec.scheduler is None
        and spec.io_priority is None
        and linux.personality is None
        and linux.memory_policy is None
    ):
        return None
    from corral.oci.allotment import allotment_of

    return allotment_of(spec, linux)


def _labels(spec: Process) -> "Labels | None":
    if not spec.apparmor_profile and not spec.selinux_label:
        return None
    from corral.oci.labels import labels_of

    return labels_of(spec)


@lru_cache(maxsize=16)
def capability_sets(wanted: Capabilities | None, available: int) -> CapabilitySets:
    """The sets as masks, as far as the runtime itself has them: it can't give what it lacks or doesn't know."""
    if wanted is None:
        return CapabilitySets(0, 0, 0, 0, 0)
    permitted = capabilities.mask_of(wanted.permitted) & available
    inheritable = capabilities.mask_of(wanted.inheritable) & available
    return CapabilitySets(
        bounding=capabilities.mask_of(wanted.bounding) & available,
        effective=capabilities.mask_of(wanted.effective) & permitted,
        permitted=permitted,
        inheritable=inheritable,
        ambient=capabilities.mask_of(wanted.ambient) & permitted & inheritable,
    )


def warnings_of(process: Process) -> list[str]:
    """What of a process is ignored, as other runtimes do, a sentence each."""
    if (asked := process.capabilities) is None:
        return []
    sets = (asked.bounding, asked.effective, asked.permitted, asked.inheritable, asked.ambient)
    unknown = capabilities.unknown(name for names in sets for name in names)
    warnings = [f"process.capabilities: {', '.join(map(repr, unknown))}: unknown, and ignored"] if unknown else []
    lacking = capabilities.mask_of(asked.ambient) & ~(
        capabilities.mask_of(asked.permitted) & capabilities.mask_of(asked.inheritable)
    )
    why = "it is not both permitted and inheritable"
    return warnings + [f"can't raise ambient capability {name}: {why}" for name in capabilities.names_of(lacking)]


def adjust_oom_score(wanted: int | None) -> None:
    """Set the OOM score, by the host's procfs. Without CAP_SYS_RESOURCE it can't be lowered: then it stays."""
    if wanted is None:
        return
    try:
        fd = os.open("/proc/self/oom_score_adj", os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:  # an ordinary user's process that nobody may look into
        return
    try:
        os.write(fd, b"%d" % wanted)
    except PermissionError:
        pass
    finally:
        os.close(fd)


def begin(program: Program) -> None:
    """What is done first of all, while only the host is in sight."""
    adjust_oom_score(program.oom_score_adj)
    if program.labels is not None:
        program.labels.take_hold()


def leave_keyring(program: Program) -> None:
    """Have a new session keyring, with the label of the container."""
    if program.labels is not None:
        program.labels.label_keyrings(yes=True)
    keyring.join_new_session()
    if program.labels is not None:
        program.labels.label_keyrings(yes=False)


def identity_of(program: Program, root: int) -> Identity:
    """Who it runs as, by the databases of the container. Raises ExecFailed."""
    groups = (*program.groups, *find_groups(root, program.group_names))
    return identify(root, program.user, program.uid, program.gid, groups)


def become(program: Program, root: int, identity: Identity, tell_listener: Callable[[int], None]) -> Program:
    """Give up everything but what the program is to have; what is returned is ready for execute().

    tell_listener gets the descriptor by which a listener answers calls, and must return once it is on its way there.
    """
    program = program.start_as(identity)
    with _mapped("user", program.uid):
        hand_over_stdio(program.uid, terminal=program.terminal)
    enter_directory(root, program.cwd)
    for limit in program.rlimits:
        rlimits.set_limit(limit.type, soft=limit.soft, hard=limit.hard)
    os.umask(program.umask)
    if program.allotment is not None:
        program.allotment.apply()
    if program.labels is not None:
        program.labels.apply()
    if program.no_new_privs:
        process.set_no_new_privs()
    else:
        program = filtered(program, tell_listener)
    _drop_privileges(program)
    if program.seccomp is None or program.interim is None:
        return filtered(program, tell_listener)
    from corral.kernel.seccomp import load  # whoever made the filter has loaded it

    load(program.interim)
    return program


def filtered(program: Program, tell_listener: Callable[[int], None] | None = None) -> Program:
    """Load seccomp, if it is not yet: the same program, with nothing left to load."""
    if program.seccomp is None:
        return program
    from corral.kernel.seccomp import load  # likewise

    listener = load(program.seccomp)
    if program.seccomp.has_listener:
        assert tell_listener is not None
        tell_listener(listener)
        os.close(listener)
    return replace(program, seccomp=None)


def _drop_privileges(program: Program) -> None:
    sets = program.capabilities
    capabilities.limit_bounding(sets.bounding)
    process.set_keep_capabilities(True)
    with _mapped("group", *program.groups):
        _set_groups(program)
    with _mapped("group", program.gid):
        credentials.set_gid(program.gid)
    with _mapped("user", program.uid):
        credentials.set_uid(program.uid)
    process.set_keep_capabilities(False)
    capabilities.set_process(effective=sets.effective, permitted=sets.permitted, inheritable=sets.inheritable)
    capabilities.set_ambient(sets.ambient)


def _set_groups(program: Program) -> None:
    try:
        credentials.set_groups(program.groups)
    except PermissionError as e:
        # An ordinary user's namespace may forbid it: groups that take rights away must not be left behind.
        if not program.in_user_namespace:
            raise
        if {*program.groups} - {program.gid}:
            groups = " ".join(map(str, program.groups))
            raise ExecFailed(SETUP, f"supplementary groups ({groups}) can't be had in this user namespace") from e


@contextlib.contextmanager
def _mapped(kind: str, *ids: int) -> Iterator[None]:
    """Tell of ids that a user namespace, which may be another's, does not have."""
    try:
        yield
    except OSError as e:
        if e.errno != errno.EINVAL:
            raise
        raise ExecFailed(SETUP, f"{kind} {' '.join(map(str, ids))} is not mapped in the user namespace") from e


def hand_over_stdio(uid: int, *, terminal: bool) -> None:
    """Make the pipes on 0, 1 and 2, or the container's own terminal, the user's, so that it can reopen /dev/stdout.

    Only those: any other character device, /dev/null say, may be the host's own.
    """
    for fd in range(3):
        status = os.fstat(fd)
        if status.st_uid != uid and (stat.S_ISFIFO(status.st_mode) or terminal):
            # A pipe of a peer that may not be given away is not worth failing for.
            with contextlib.suppress(PermissionError):
                os.fchown(fd, uid, -1)


def enter_directory(root: int, cwd: str) -> None:
    """Make cwd the working directory, checked to lie inside root (CVE-2024-21626)."""
    try:
        with paths.opened(paths.open_in_root(root, cwd, os.O_PATH | os.O_DIRECTORY)) as fd:
            os.fchdir(fd)
    except FileNotFoundError as e:
        raise ExecFailed(EXEC_NOT_FOUND, f"chdir to cwd ({cwd!r}): no such file or directory") from e
    except OSError as e:
        raise ExecFailed(EXEC_DENIED, f"chdir to cwd ({cwd!r}): {(e.strerror or str(e)).lower()}") from e
    try:
        os.getcwd()  # noqa: PTH109 - what the kernel calls unreachable from the root is no file to libc
    except FileNotFoundError as e:
        raise ExecFailed(EXEC_DENIED, f"chdir to cwd ({cwd!r}): it lies outside of the container") from e


def execute(program: Program) -> NoReturn:
    """Load seccomp, if it is not yet, and become the program. Raises ExecFailed if it can't be executed."""
    process.unblock_signals()
    program = filtered(program)
    name = program.args[0]
    denied: OSError | None = None
    for candidate in candidates(program):
        try:
            os.execve(candidate, program.args, program.env)  # noqa: S606
        except (FileNotFoundError, NotADirectoryError):
            continue
        except PermissionError as e:
            denied = IsADirectoryError(errno.EISDIR, _IS_DIRECTORY) if _is_directory(candidate) else e
        except OSError as e:
            raise refusal(name, e) from e
    raise refusal(name, denied or FileNotFoundError())


def _is_directory(path: str) -> bool:
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)  # noqa: PTH116 - a path of the container, as execve takes it
    except OSError:
        return False


def refuse_directory(program: Program) -> None:
    """Raise the ExecFailed that execute() would for a directory: by its errno alone that is a file like another."""
    name = program.args[0]
    if "/" in name and _is_directory(name):
        raise ExecFailed(EXEC_DENIED, f'exec: "{name}": {_IS_DIRECTORY}')


def check_executable(program: Program) -> None:
    """Raise the ExecFailed that execute() would, as far as file modes tell it."""
    name, denied = program.args[0], ""
    for candidate in candidates(program):
        try:
            mode = os.stat(candidate).st_mode  # noqa: PTH116 - a path of the container, as execve takes it
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as e:
            denied = denied or (e.strerror or str(e)).lower()
            continue
        if stat.S_ISDIR(mode):
            denied = denied or _IS_DIRECTORY
        elif mode & 0o111:
            return
        denied = denied or "permission denied"
    if denied:
        raise ExecFailed(EXEC_DENIED, f'exec: "{name}": {denied}')
    raise _not_found(name)


def candidates(program: Program) -> Iterable[str]:
    """The paths under which a program is tried; an empty entry of PATH is not the working directory, but nothing."""
    name = program.args[0]
    if "/" in name:
        return (name,)
    return (f"{directory}/{name}" for directory in program.env.get("PATH", DEFAULT_PATH).split(":") if directory)


def _not_found(name: str) -> ExecFailed:
    if "/" in name:
        return ExecFailed(EXEC_NOT_FOUND, f'exec: "{name}": no such file or directory')
    return ExecFailed(EXEC_NOT_FOUND, f'exec: "{name}": executable file not found in $PATH')


def refusal(name: str, error: OSError) -> ExecFailed:
    """What execve's failure means for the program of this name."""
    if isinstance(error, FileNotFoundError):
        return _not_found(name)
    reason = "exec format error" if error.errno == errno.ENOEXEC else (error.strerror or str(error)).lower()
    return ExecFailed(EXEC_DENIED, f'exec: "{name}": {reason}')
