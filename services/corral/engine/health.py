"""Health checks: a program that runs in a container again and again, and what it says of that.

    started --interval--> probe: an exec, killed after the timeout --> exit code --> STARTING, HEALTHY, UNHEALTHY

Until the first success, failures within the start period do not count, and probes follow one another at the start
interval. Then `retries` failures in a row make a container unhealthy. That it became so, or healthy, is journalled, and
may kill, stop or restart it. The rules and defaults are docker's ("HEALTHCHECK" of the Dockerfile reference).

The verdict is kept in memory: after a restart of the daemon a container is "starting", and is probed at once.
"""

import asyncio
import time
from contextlib import suppress

import structlog

from corral.api.engine.v1 import engine_pb2 as pb
from corral.api.tasks.v1 import tasks_pb2
from corral.engine import store
from corral.engine.core import Core, Key
from corral.engine.execs import Execs
from corral.engine.health_rules import TOOK_TOO_LONG, Probe, Rules, Verdict, health_word
from corral.engine.leaves import persistently
from corral.engine.lifecycle import Lifecycle
from corral.engine.naming import random_id
from corral.engine.records import ALIVE, ContainerRecord, Status
from corral.engine.removal import SIGKILL
from corral.rpc.context import in_namespace
from corral.rpc.errors import CorralError, NotFound, ResourceExhausted, Unavailable, Unimplemented

log = structlog.get_logger()

OUTPUT_BYTES = 4096
UNKILLABLE_S = 2.0
"""How much longer than its time a probe is waited for: one that is frozen, say, does not end when it is killed."""
_PREFIX = "health-"
"""Of the ids of execs that are probes."""


class Checks:
    """Probes every container that runs and has a health check."""

    def __init__(self, core: Core, lifecycle: Lifecycle, execs: Execs) -> None:
        self._core = core
        self._lifecycle = lifecycle
        self._execs = execs
        self._verdicts: dict[Key, Verdict] = {}
        self._watching: dict[Key, asyncio.Task[None]] = {}
        self._asked: dict[Key, tuple[pb.ContainerConfig, tasks_pb2.ProbeRequest]] = {}
        """What was run last, and in what; of a container without secrets, which may be others the next time."""
        self._paused: set[Key] = set()
        """Those that were, since their newest probe began."""
        self._acting: set[Key] = set()
        """Those that something is done about."""

    def of(self, record: ContainerRecord) -> pb.Health | None:
        """What is known of a container; None if it has no health check, or never ran while this daemon did."""
        verdict = self._verdicts.get((record.namespace, record.id))
        return None if verdict is None else verdict.to_wire()

    def on_daemon_start(self) -> None:
        """Go on with what an earlier daemon has left running."""
        for record in self._core.database.read_sync(lambda view: store.containers_in(view, ALIVE)):
            self.on_start(record, at_once=True)

    def on_start(self, record: ContainerRecord, *, at_once: bool = False) -> None:
        """A container has been started, or was found running (then it is probed at_once)."""
        rules = Rules.of(record.config.healthcheck)
        if rules is None:
            return
        key = (record.namespace, record.id)
        if key not in self._verdicts:
            self._core.watch.removal(key).add_done_callback(lambda _: self._forget(key))
        self._verdicts[key] = Verdict()
        if (before := self._watching.get(key)) is not None:
            before.cancel()
        run = self._core.get(*key)  # whether a user's stop came before it is known from the row alone
        self._watching[key] = self._core.background.spawn_endless(self._watch(run, rules, at_once=at_once))

    def on_pause(self, key: Key) -> None:
        """A container is paused: what probes it now has its time pass, and nothing to answer."""
        if key in self._watching:
            self._paused.add(key)

    def _forget(self, key: Key) -> None:
        self._verdicts.pop(key, None)
        self._asked.pop(key, None)
        self._paused.discard(key)
        if (watching := self._watching.pop(key, None)) is not None:
            watching.cancel()

    async def _watch(self, record: ContainerRecord, rules: Rules, *, at_once: bool) -> None:
        key = (record.namespace, record.id)
        with in_namespace(record.namespace):
            if at_once:
                await self._forget_probes(record)
            while True:
                if not at_once:
                    await asyncio.sleep(self._pause_s(key, record, rules))
                at_once = False
                with suppress(NotFound):
                    now = self._core.get(*key)
                    if now.status in ALIVE and now.started_ns == record.started_ns:
                        if now.status is Status.RUNNING:
                            await self._probe(now, rules, run=record)
                        continue
                return

    def _pause_s(self, key: Key, record: ContainerRecord, rules: Rules) -> float:
        starting = self._verdicts[key].state == pb.Health.STATE_STARTING
        return rules.start_interval_s if starting and _age_s(record) < rules.start_period_s else rules.interval_s

    async def _forget_probes(self, record: ContainerRecord) -> None:
        """Those that a daemon had under way when it died, of an older version or beside an older shim."""
        tasks = self._core.leaves.tasks
        with suppress(CorralError):
            task = await persistently(lambda: tasks.Get(tasks_pb2.GetTaskRequest(id=record.id)))
            for left in task.execs:
                if left.id.startswith(_PREFIX):
                    await tasks.DeleteExec(tasks_pb2.DeleteExecRequest(id=record.id, exec_id=left.id, force=True))

    async def _probe(self, record: ContainerRecord, rules: Rules, *, run: ContainerRecord) -> None:
        key = (record.namespace, record.id)
        since_start_s, started_ns = _age_s(record), time.time_ns()
        self._paused.discard(key)
        try:
            code, output = await self._run(record, rules)
        except (Unavailable, ResourceExhausted, Unimplemented):
            return  # tasks is away, not upgraded yet, or has no room to make one: that says nothing of the container
        except CorralError as e:
            if e.reason == "NOT_RUNNING":
                return
            code, output = 1, e.message
        async with self._core.locks.of(key):  # no pause is half done
            now = self._core.get(*key)
            if now.status is not Status.RUNNING or now.started_ns != record.started_ns or key in self._paused:
                return
        before = self._verdicts[key]
        probe = Probe(started_ns, time.time_ns(), code, output)
        after = self._verdicts[key] = before.after(probe, rules, since_start_s=since_start_s)
        if after.state != before.state:
            await self._tell(record, after)
        if after.state == pb.Health.STATE_UNHEALTHY and key not in self._acting:
            self._acting.add(key)
            acting = self._core.background.spawn(self._act(record, run))
            acting.add_done_callback(lambda _: self._acting.discard(key))

    async def _run(self, record: ContainerRecord, rules: Rules) -> tuple[int, str]:
        """One probe: its exit code, and the beginning of its output."""
        request = await self._request(record, rules)
        request.exec_id = f"{_PREFIX}{random_id()[:16]}"
        with suppress(TimeoutError):
            async with asyncio.timeout(rules.timeout_s + UNKILLABLE_S):
                ran = await self._core.leaves.tasks.Probe(request)
                if not ran.exit.timed_out:
                    return ran.exit.code, ran.output
        return TOOK_TOO_LONG, f"the health check took longer than {rules.timeout_s:g} s, and was killed"

    async def _request(self, record: ContainerRecord, rules: Rules) -> tasks_pb2.ProbeRequest:
        key = (record.namespace, record.id)
        config, request = self._asked.get(key, (None, None))
        if request is not None and config == record.config:
            return request
        request = await self._execs.probe(record, rules.args)
        request.timeout.FromNanoseconds(round(rules.timeout_s * 1e9))
        request.output_bytes = OUTPUT_BYTES
        if not record.config.secrets:
            self._asked[key] = record.config, request
        return request

    async def _tell(self, record: ContainerRecord, verdict: Verdict) -> None:
        word = health_word(verdict.state)
        log.info("container.checked", container=record.id, health=word)
        facts = {"name": record.name, "health": word}
        try:
            await self._core.database.write(
                lambda tx: tx.journal("container.checked", record.id, facts, namespace=record.namespace)
            )
        except OSError as e:  # a full disk, say: what is true is shown all the same, and acted on
            log.error("container.check_not_written", container=record.id, health=word, error=str(e))

    async def _act(self, record: ContainerRecord, run: ContainerRecord) -> None:
        """What the container is to suffer for being unhealthy. A kill is one that its restart policy sees.

        A run that is over or paused, or that a user stops, suffers nothing. The next failure may tell otherwise.
        """
        with in_namespace(record.namespace), suppress(NotFound):
            try:
                if not await self._lifecycle.goes_on(run):
                    return
                match record.config.health_on_failure:
                    case pb.ContainerConfig.HEALTH_ACTION_KILL:
                        await self._core.leaves.tasks.Kill(tasks_pb2.KillRequest(id=record.id, signal=SIGKILL))
                    case pb.ContainerConfig.HEALTH_ACTION_STOP:
                        await self._lifecycle.stop(record.id, signal="", timeout_s=None)
                    case pb.ContainerConfig.HEALTH_ACTION_RESTART:
                        await self._lifecycle.restart_run(run)
            except (CorralError, OSError) as e:
                log.warning("container.unhealthy_action_failed", container=record.id, error=str(e))


def _age_s(record: ContainerRecord) -> float:
    return (time.time_ns() - record.started_ns) / 1e9
