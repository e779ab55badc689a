"""What a health check is, and what its results come to. Pure.

Source: "HEALTHCHECK" of the Dockerfile reference, and docker run's --health options, for rules and defaults.
"""

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal, Self

from google.protobuf.duration_pb2 import Duration

from corral.api.engine.v1 import engine_pb2 as pb
from corral.api.images.v1.images_pb2 import Healthcheck
from corral.rpc.errors import InvalidArgument

INTERVAL_S, TIMEOUT_S, START_INTERVAL_S, RETRIES = 30.0, 30.0, 5.0, 3
LONGEST_S = 10 * 365 * 86400.0
SHORTEST_OF_IMAGE_S = 1
"""Between probes, as an image may ask: a user may ask for less, and knows the host."""
_SHELL = ("/bin/sh", "-c")
_OFF = ["NONE"]
_TIMES: tuple[Literal["interval", "timeout", "start_period", "start_interval"], ...]
_TIMES = ("interval", "timeout", "start_period", "start_interval")


def check_healthcheck(check: Healthcheck) -> None:
    """Raises InvalidArgument for what is no health check. Pure."""
    if not check.ListFields():
        return
    kind, words = (check.test[0], check.test[1:]) if check.test else ("", [])
    if kind not in ("", "NONE", "CMD", "CMD-SHELL"):
        raise InvalidArgument(f"health check: {kind!r} is not understood: begin it with CMD, CMD-SHELL or NONE")
    if (kind == "CMD-SHELL" and len(words) != 1) or (kind == "CMD" and (not words or not words[0])):
        raise InvalidArgument(f"health check: give {kind} {'one line' if kind == 'CMD-SHELL' else 'a program'} to run")
    if any("\0" in word for word in words):
        raise InvalidArgument("health check: a word of its command has a NUL in it")
    for name in _TIMES:
        if not 0 <= _seconds(getattr(check, name), 0.0) <= LONGEST_S:
            raise InvalidArgument(f"health check: {name.replace('_', ' ')} must be between 0 and ten years")


def resolved(asked: Healthcheck, image: Healthcheck) -> Healthcheck:
    """What was asked for, with what it leaves out as the image has it; an image's that is no health check is none."""
    if list(asked.test) == _OFF or not (asked.ListFields() or image.ListFields()):
        return asked
    result = Healthcheck()
    with suppress(InvalidArgument):
        check_healthcheck(image)
        result.CopyFrom(image)
        for pause in (result.interval, result.start_interval):
            if 0 < _seconds(pause, 0.0) < SHORTEST_OF_IMAGE_S:
                pause.CopyFrom(Duration(seconds=SHORTEST_OF_IMAGE_S))
    if asked.test:
        result.ClearField("test")
        result.test.extend(asked.test)
    for name in _TIMES:
        if asked.HasField(name):
            getattr(result, name).CopyFrom(getattr(asked, name))
    result.retries = asked.retries or result.retries
    return result if result.test and list(result.test) != _OFF else Healthcheck()


HEALTH_WORDS = ("none", "starting", "healthy", "unhealthy")
"""By number of the wire's Health.State."""


def health_word(state: int) -> str:
    """As people write it."""
    return HEALTH_WORDS[state]


@dataclass(frozen=True, slots=True)
class Rules:
    """How a container is probed, defaults filled in."""

    args: tuple[str, ...]
    interval_s: float
    timeout_s: float
    start_period_s: float
    start_interval_s: float
    retries: int

    @classmethod
    def of(cls, check: Healthcheck) -> Self | None:
        """None if there is nothing to run."""
        if not check.test or check.test[0] == "NONE":
            return None
        words = tuple(check.test[1:])
        return cls(
            args=_SHELL + words if check.test[0] == "CMD-SHELL" else words,
            interval_s=_seconds(check.interval, INTERVAL_S),
            timeout_s=_seconds(check.timeout, TIMEOUT_S),
            start_period_s=_seconds(check.start_period, 0.0),
            start_interval_s=_seconds(check.start_interval, START_INTERVAL_S),
            retries=check.retries or RETRIES,
        )


KEPT_PROBES = 5
TOOK_TOO_LONG = -1


@dataclass(frozen=True, slots=True)
class Probe:
    """One run of the check; its code is TOOK_TOO_LONG where it was killed."""

    started_ns: int
    ended_ns: int
    code: int
    output: str

    def to_wire(self) -> pb.Health.Probe:
        probe = pb.Health.Probe(exit_code=self.code, output=self.output)
        probe.started_at.FromNanoseconds(self.started_ns)
        probe.ended_at.FromNanoseconds(self.ended_ns)
        return probe


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is known of a container's health."""

    state: "pb.Health.State.ValueType" = pb.Health.STATE_STARTING
    streak: int = 0
    log: tuple[Probe, ...] = ()  # the oldest first

    def after(self, probe: Probe, rules: Rules, *, since_start_s: float) -> "Verdict":
        """The verdict after one more probe. Pure."""
        log = (*self.log, probe)[-KEPT_PROBES:]
        if probe.code == 0:
            return Verdict(pb.Health.STATE_HEALTHY, 0, log)
        if self.state == pb.Health.STATE_STARTING and since_start_s < rules.start_period_s:
            return replace(self, log=log)
        streak = self.streak + 1
        state = pb.Health.STATE_UNHEALTHY if streak >= rules.retries else self.state
        return Verdict(state, streak, log)

    def to_wire(self) -> pb.Health:
        return pb.Health(
            state=self.state,
            failing_streak=self.streak,
            last_output=self.log[-1].output if self.log else "",
            log=[probe.to_wire() for probe in self.log],
        )


def _seconds(duration: Duration, default: float) -> float:
    """0 stands for the default. Not Duration's own arithmetic, which refuses what a hostile image may say."""
    return duration.seconds + duration.nanos / 1e9 or default
