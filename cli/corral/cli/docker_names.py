"""What docker's `inspect` calls the facts about a container, for templates that were written for it."""

from typing import TYPE_CHECKING

from corral.api.engine.v1 import engine_pb2
from corral.api.network.v1 import network_pb2
from corral.cli.output import enum_word

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp

    from corral.api.types.v1 import types_pb2
    from corral.cli.output import Json

DEFAULT_PERIOD_US = 100_000
_NEVER = "0001-01-01T00:00:00Z"
_HEALTH = ("none", "starting", "healthy", "unhealthy")


def names_of(c: "engine_pb2.Container") -> "dict[str, Json]":
    """Members that the message has under other names. Source: docker's Engine API, ContainerInspect."""
    words: list[Json] = [*c.config.entrypoint, *c.config.args]
    restart = c.config.restart
    policy = engine_pb2.RestartPolicy.Mode.Name(restart.mode) if restart.mode else "MODE_NO"
    return {
        "Created": _time(c.created_at) if c.HasField("created_at") else _NEVER,
        "Image": c.image_id,
        "Path": words[0] if words else "",
        "Args": words[1:],
        "State": _state(c),
        "NetworkSettings": _network_settings(c),
        "HostConfig": {
            "AutoRemove": c.config.auto_remove,
            **_limits(c.config.resources),
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
            "Log": [
                {
                    "Start": _time(probe.started_at),
                    "End": _time(probe.ended_at),
                    "ExitCode": probe.exit_code,
                    "Output": probe.output,
                }
                for probe in c.health.log
            ],
        }
    return state


def _limits(resources: "types_pb2.Resources") -> "dict[str, Json]":
    cpu, memory = resources.cpu, resources.memory
    return {
        "Memory": memory.limit_bytes,
        "MemoryReservation": memory.reservation_bytes,
        "MemorySwap": memory.swap_bytes,
        "NanoCpus": max(cpu.quota_us, 0) * 10**9 // (cpu.period_us or DEFAULT_PERIOD_US),
        "CpuQuota": cpu.quota_us,
        "CpuPeriod": cpu.period_us,
        "CpuShares": cpu.shares,
        "CpusetCpus": cpu.cpus,
        "CpusetMems": cpu.mems,
        "PidsLimit": resources.pids.limit,
    }


def _network_settings(c: "engine_pb2.Container") -> "dict[str, Json]":
    networks: dict[str, Json] = {}
    for interface in c.endpoint.interfaces:
        address, _, length = interface.ipv4_address.partition("/")
        networks[interface.network] = {
            "IPAddress": address,
            "IPPrefixLen": int(length or 0),
            "Gateway": interface.ipv4_gateway,
            "GlobalIPv6Address": interface.ipv6_address.partition("/")[0],
            "MacAddress": interface.mac_address,
            "Aliases": list(interface.aliases),
        }
    ports: dict[str, list[Json]] = {}
    for port in c.endpoint.ports:
        host: Json = {"HostIp": port.host_ip or "0.0.0.0", "HostPort": str(port.host_port)}
        ports.setdefault(f"{port.container_port}/{port.protocol}", []).append(host)
    first = next(iter(c.endpoint.interfaces), network_pb2.Interface())
    return {
        "IPAddress": first.ipv4_address.partition("/")[0],
        "Gateway": first.ipv4_gateway,
        "MacAddress": first.mac_address,
        "Networks": networks,
        "Ports": dict(ports),
    }


def _time(when: "Timestamp") -> str:
    return when.ToJsonString()
