"""What docker's `inspect` calls the facts about a container, for templates that were written for it."""

from typing import TYPE_CHECKING

from corral.api.engine.v1 import engine_pb2
from corral.cli.output import enum_word

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp

    from corral.cli.output import Json

_NEVER = "0001-01-01T00:00:00Z"
_HEALTH = ("none", "starting", "healthy", "unhealthy")


def names_of(c: "engine_pb2.Container") -> "dict[str, Json]":
    """Members that the message has under other names. Source: docker's Engine API, ContainerInspect."""
    addresses = [i.ipv4_address.partition("/")[0] for i in c.endpoint.interfaces]
    words: list[Json] = [*c.config.entrypoint, *c.config.args]
    restart = c.config.restart
    policy = engine_pb2.RestartPolicy.Mode.Name(restart.mode) if restart.mode else "MODE_NO"
    return {
        "Created": _time(c.created_at) if c.HasField("created_at") else _NEVER,
        "Image": c.image_id,
        "Path": words[0] if words else "",
        "Args": words[1:],
        "State": _state(c),
        "NetworkSettings": {"IPAddress": addresses[0] if addresses else "", "MacAddress": _mac(c)},
        "HostConfig": {
            "AutoRemove": c.config.auto_remove,
            "Memory": c.config.resources.memory.limit_bytes,
            "NetworkMode": c.config.network.mode or "bridge",
            "Privileged": c.config.privileged,
            "ReadonlyRootfs": c.config.read_only_rootfs,
            "RestartPolicy": {
                "Name": enum_word(policy, "Mode"),
                "MaximumRetryCount": restart.max_retries,
            },
        },
    }


def _state(c: "engine_pb2.Container") -> "dict[str, Json]":
    alive = c.status in (engine_pb2.STATUS_RUNNING, engine_pb2.STATUS_PAUSED)
    state: dict[str, Json] = {
        "Status": enum_word(engine_pb2.Status.Name(c.status), "Status"),
        "Running": alive,
        "Paused": c.status == engine_pb2.STATUS_PAUSED,
        "Restarting": c.status == engine_pb2.STATUS_RESTARTING,
        "OOMKilled": c.exit.oom_killed,
        "Dead": c.status == engine_pb2.STATUS_REMOVING,
        "Pid": c.pid if alive else 0,
        "ExitCode": 0 if alive else c.exit.code,
        "Error": c.exit.reason,
        "StartedAt": _time(c.started_at) if c.HasField("started_at") else _NEVER,
        "FinishedAt": _time(c.finished_at) if c.HasField("finished_at") else _NEVER,
    }
    if c.HasField("health"):
        state["Health"] = {
            "Status": _HEALTH[c.health.state],
            "FailingStreak": c.health.failing_streak,
            "Log": [{"Output": c.health.last_output}],  # the latest alone is kept
        }
    return state


def _time(when: "Timestamp") -> str:
    return when.ToJsonString()


def _mac(c: "engine_pb2.Container") -> str:
    return c.endpoint.interfaces[0].mac_address if c.endpoint.interfaces else ""
