"""Hooks: programs that are run at six points of a container's life, and told its state on their standard input.

    create                                                             start                          delete
    namespaces, mounts -> prestart, createRuntime -> createContainer   startContainer -> program      -> poststop
                          by the runtime             by init, in the   by init, as the   -> poststart    by who deletes
                                                     host's root       program, in the      by who
                                                                       container            starts it

Each is run to its end before the next one is begun. One that fails, or is not done in time, fails what it is part of;
only after poststop life goes on. Source: OCI runtime-spec config.md "POSIX-platform Hooks", runtime.md "Lifecycle".

A hook without an environment of its own gets the runtime's. So does createContainer, although it is run by init: its
program is the host's and has the runtime's power, so nothing an image says may steer it (CVE-2025-23266). Only
startContainer gets the container's: those are programs of the image, and can do no more than the container's own.
"""

import fcntl
import json
import os
import select
import signal
import time
from collections.abc import Mapping
from typing import NoReturn

from corral.kernel import process
from corral.oci.channel import ChildEnd
from corral.oci.errors import HOOK_FAILED, SETUP, ExecFailed
from corral.oci.spec import HOOK_POINTS, Hook, Hooks
from corral.oci.stage import Stage, Step
from corral.oci.state import CREATED, CREATING, STOPPED, State

_SHOWN = 1024
"""Characters of what a hook wrote that are shown if it fails: the last ones."""
_LARGEST_STATE = 2**20
"""Bytes; a pipe of anybody may hold as much."""
_UMASK = 0o022
_LONGEST_WAIT_S = 86400.0
"""At a time: poll(2) counts milliseconds in an int, which lasts for 24 days."""


def run_hooks(hooks: Hooks, point: str, state: State, *, env: Mapping[str, str], directory: int | str) -> None:
    """Run the hooks of a point, a field of Hooks, in their order; env is for those without one.

    directory: where they begin; an fd or a path, / if that is gone. Raises ExecFailed naming the hook that failed.
    """
    for i, hook in enumerate(getattr(hooks, point)):
        try:
            _run(hook, state, env, directory, of_host=point != "start_container")
        except (OSError, _Failed) as e:
            reason = (e.strerror or str(e)) if isinstance(e, OSError) else str(e)
            raise ExecFailed(SETUP, f"{HOOK_FAILED}{HOOK_POINTS[point]} hook #{i}: {hook.path}: {reason}") from e


def run_poststop(hooks: Hooks | None, state: State) -> list[str]:
    """Run the poststop hooks of a container that is no more, all of them; a sentence for each that failed.

    To be called by who deletes the container, after all else, and by who undoes one that could not be made.
    """
    warnings = []
    for i in range(len(hooks.poststop) if hooks is not None else 0):
        assert hooks is not None
        one = Hooks(poststop=hooks.poststop[i : i + 1])
        try:
            run_hooks(one, "poststop", state.at(STOPPED), env=os.environ, directory=state.bundle)
        except ExecFailed as e:
            warnings.append(e.message.replace("#0", f"#{i}", 1))
    return warnings


class InitHooks(Step):
    """The hooks that init has to do with: as a step, those of create; after all steps, those of start."""

    __slots__ = ("_channel", "_hooks", "_state")

    def __init__(self, hooks: Hooks, state: State) -> None:
        self._hooks, self._state = hooks, state
        self._channel: ChildEnd | None = None

    @property
    def has_patience(self) -> bool:
        """Whether the set-up may take as long as it likes: how long a hook may take is for the hook to say."""
        return bool(self._hooks.prestart or self._hooks.create_runtime or self._hooks.create_container)

    def take(self, channel: ChildEnd) -> None:
        """The channel to the runtime, from init's side."""
        self._channel = channel

    def describe(self) -> str:
        return "hooks: prestart, createRuntime, createContainer"

    def apply(self, stage: Stage) -> None:
        """All is mounted, but the container's root is not the root yet, and nothing is masked or read-only."""
        if self._hooks.prestart or self._hooks.create_runtime:
            assert self._channel is not None
            self._channel.send_hooks()
            if not self._channel.wait_for_start():
                os._exit(1)
        state = self._state.at(CREATING, os.getpid())
        run_hooks(self._hooks, "create_container", state, env=os.environ, directory=stage.root)

    @property
    def at_start(self) -> bool:
        """Whether there is something to do at start."""
        return bool(self._hooks.start_container)

    def start(self, env: Mapping[str, str]) -> None:
        """Run the startContainer hooks, by a process that has become the program already, seccomp and all."""
        state = self._state.at(CREATED, os.getpid())
        run_hooks(self._hooks, "start_container", state, env=env, directory="/")


class _Failed(Exception):
    """What a hook did wrong, or the kernel to it."""


def _run(hook: Hook, state: State, env: Mapping[str, str], directory: int | str, *, of_host: bool) -> None:
    if hook.env:
        env = dict(assignment.split("=", 1) for assignment in hook.env)
    told = _pipe_holding(json.dumps(state.to_json()).encode())
    try:
        reader, writer = os.pipe()
        try:
            pid, pidfd = process.clone(0)
            if pid == 0:
                _become(hook, env, told, writer, directory, of_host=of_host)
        except BaseException:
            os.close(reader)
            raise
        finally:
            os.close(writer)
    finally:
        os.close(told)
    try:
        output = _see_to_the_end(pidfd, reader, hook.timeout)
        ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    except BaseException:  # who waits for it is interrupted, or it took too long
        _kill(pid, pidfd)
        raise
    finally:
        os.close(reader)
        os.close(pidfd)
    assert ended is not None
    if ended.si_code == os.CLD_EXITED and ended.si_status == 0:
        return
    how = "exit status" if ended.si_code == os.CLD_EXITED else "signal"
    text = output.decode("utf-8", "replace").strip()
    raise _Failed(f"{how} {ended.si_status}" + (f": {text}" if text else ""))


def _pipe_holding(content: bytes) -> int:
    """The end of a pipe to read content from. It is all there already, so it is no matter who reads how much of it."""
    reader, writer = os.pipe()
    try:
        if len(content) > 65536:
            fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, min(len(content), _LARGEST_STATE))
        os.set_blocking(writer, False)
        if os.write(writer, content) < len(content):
            raise _Failed("the container's state, with its annotations, is too large to be told")
    except BaseException:
        os.close(reader)
        raise
    finally:
        os.close(writer)
    return reader


def _become(
    hook: Hook, env: Mapping[str, str], stdin: int, output: int, directory: int | str, *, of_host: bool
) -> NoReturn:
    """The hook's own process, from birth to exec."""
    try:
        if of_host:  # it has no part in what spares a shim; and in a container /proc may be anything
            process.lose_oom_protection()
        process.reset_signals()
        os.setsid()
        _enter(directory)
        os.umask(_UMASK)
        streams = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (stdin, output, output)]
        for place, fd in enumerate(streams):
            os.dup2(fd, place, inheritable=True)
        process.close_fds(range(3))
        process.unblock_signals()
        os.execve(hook.path, hook.args or (hook.path,), env)  # noqa: S606 - that is what a hook is
    except BaseException as e:  # noqa: BLE001 - a fork of the runtime must not run on in its code
        reason = (e.strerror or str(e)) if isinstance(e, OSError) else f"{type(e).__name__}: {e}"
        os.write(2, reason.encode("utf-8", "replace"))
    finally:
        os._exit(127)


def _enter(directory: int | str) -> None:
    try:
        os.chdir(directory)
    except OSError:
        os.chdir("/")


def _see_to_the_end(pidfd: int, reader: int, timeout_s: int | None) -> bytes:
    """Wait until a hook has ended: the last of what it wrote. Raises _Failed if it is not done in time."""
    give_up_at = None if timeout_s is None else time.monotonic() + timeout_s
    os.set_blocking(reader, False)
    poller = select.poll()
    poller.register(reader, select.POLLIN)
    poller.register(pidfd, select.POLLIN)
    output = b""
    while True:
        left_s = _LONGEST_WAIT_S if give_up_at is None else give_up_at - time.monotonic()
        ready = dict(poller.poll(min(max(0.0, left_s), _LONGEST_WAIT_S) * 1000))
        if reader in ready:
            part = _read(reader)
            output = (output + part)[-_SHOWN:]
            if not part:
                poller.unregister(reader)
        if pidfd in ready:
            return output
        if left_s <= 0:
            raise _Failed(f"not done within {timeout_s} s")


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 65536)
    except BlockingIOError:
        return b""


def _kill(pid: int, pidfd: int) -> None:
    """End a hook, with what it started in its session, and reap it."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:  # it has not come to setsid() yet
        process.send_signal(pidfd, signal.SIGKILL)
    os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
