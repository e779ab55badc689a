"""Restart policies: what ends is started again, after a pause that grows while it keeps ending soon.

    ended -> wanted by its policy? -> pause (core.backoffs) -> wanted still? -> new task (core.rerunning), RUNNING

Until then it is shown as "restarting".

A row says EXITED meanwhile, so a daemon that dies in the pause finds it so at its next start, and looks at the policy
anew; one that dies between the intent to start (RUNNING) and the start finds a task that waits (CREATED), and goes on.
What a user stops, kills or removes in the pause stays so. The pause and its limit are docker's.
"""

import asyncio
from contextlib import suppress

import structlog

from corral.api.engine.v1.engine_pb2 import RestartPolicy
from corral.engine.core import Core, Key
from corral.engine.lifecycle import Lifecycle
from corral.engine.records import ContainerRecord, Status
from corral.rpc.context import in_namespace
from corral.rpc.errors import CorralError, NotFound

log = structlog.get_logger()

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 60.0
# A run that lasted this long was no failure to start: the pause is short again.
GOOD_RUN_S = 10.0


def is_wanted(record: ContainerRecord, *, at_boot: bool = False) -> bool:
    """Whether its policy wants an ended container to run again. Pure.

    at_boot: the daemon has just started; then `always` also means what a user had stopped.
    """
    policy = record.config.restart
    if record.status is Status.CREATED:
        anyhow = at_boot and policy.mode == RestartPolicy.MODE_ALWAYS
        return is_cut_short(record) and (anyhow or not record.stopped_by_user)
    if record.status is not Status.EXITED or record.exit is None:
        return False
    match policy.mode:
        case RestartPolicy.MODE_ALWAYS:
            return at_boot or not record.stopped_by_user
        case RestartPolicy.MODE_UNLESS_STOPPED:
            return not record.stopped_by_user
        case RestartPolicy.MODE_ON_FAILURE:
            tries_left = not policy.max_retries or record.restarts_known < policy.max_retries
            return record.exit.code != 0 and not record.stopped_by_user and tries_left
    return False


def is_cut_short(record: ContainerRecord) -> bool:
    """Whether its policy was about to start it again, and it is not. A user's start does not count. Pure."""
    has_policy = record.config.restart.mode > RestartPolicy.MODE_NO
    return record.status is Status.CREATED and record.retrying and has_policy


def next_pause_s(last_s: float, record: ContainerRecord) -> float:
    """How long to wait after the run that a record tells of. Pure."""
    ran_s = (record.finished_ns - record.started_ns) / 1e9 if record.started_ns else 0.0
    if not last_s or ran_s >= GOOD_RUN_S:
        return FIRST_PAUSE_S
    return min(last_s * 2, LONGEST_PAUSE_S)


class Restarts:
    """See the module."""

    def __init__(self, core: Core, lifecycle: Lifecycle) -> None:
        self._core = core
        self._lifecycle = lifecycle
        self._pauses_s: dict[Key, float] = {}

    def on_exit(self, record: ContainerRecord, *, at_boot: bool = False) -> bool:
        """A container has ended, or was found so. Whether it is about to run again."""
        key = (record.namespace, record.id)
        if key in self._core.restarting or not self._is_wanted(record, at_boot=at_boot):
            self._pauses_s.pop(key, None)
            return key in self._core.restarting
        self._core.forget_backoff(key)
        if key not in self._pauses_s:
            self._core.watch.removal(key).add_done_callback(lambda _: self._pauses_s.pop(key, None))
        pause_s = self._pauses_s[key] = next_pause_s(self._pauses_s.get(key, 0.0), record)
        log.info("container.restarts", container=record.id, pause_s=pause_s, restart_count=record.restart_count)
        self._core.backoffs[key] = self._core.background.spawn_endless(self._restart(record, pause_s, at_boot=at_boot))
        return True

    def _is_wanted(self, record: ContainerRecord, *, at_boot: bool) -> bool:
        is_stopped = (record.namespace, record.id) in self._core.unwritten_stops
        return not is_stopped and is_wanted(record, at_boot=at_boot)

    def on_cut_short(self, record: ContainerRecord, at_boot: bool) -> None:
        """One that is_cut_short() was found when the daemon started, or when tasks was back."""
        if (record.namespace, record.id) not in self._core.backoffs:
            self.on_exit(record, at_boot=at_boot)

    async def _restart(self, record: ContainerRecord, pause_s: float, *, at_boot: bool) -> None:
        await asyncio.sleep(pause_s)
        key = (record.namespace, record.id)
        self._core.rerunning.add(key)
        self._core.backoffs.pop(key, None)  # from here on nothing interrupts it
        with in_namespace(record.namespace):
            try:
                await self._core.background.to_the_end(
                    self._lifecycle.start_again(record, lambda now: self._is_wanted(now, at_boot=at_boot))
                )
            except (CorralError, OSError) as e:
                log.warning("container.restart_failed", container=record.id, error=str(e))
                with suppress(NotFound):  # it was removed
                    now = self._core.get(*key)
                    if now.finished_ns == record.finished_ns or is_cut_short(
                        now
                    ):  # else its new end was told of already
                        self.on_exit(now, at_boot=at_boot)
            finally:
                self._core.rerunning.discard(key)
