"""What a task is, as values: its processes, their states, the one table of legal moves.

    (nothing) --create--> CREATED --start--> RUNNING --exit--> STOPPED --delete--> (nothing)
                             '-----------killed-----------------^

Process "" of a task is its init, every other one an exec; both live by the same table.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from types import MappingProxyType
from typing import Self, cast

INIT = ""
TIMED_OUT = "it was killed because its time (--timeout) was over"
UNKNOWN_CODE = 255


class Status(IntEnum):
    """The numbers are those of the wire and of the database."""

    CREATED = 1
    RUNNING = 2
    STOPPED = 3


ALLOWED: Mapping[Status, frozenset[Status]] = MappingProxyType(
    {
        Status.CREATED: frozenset({Status.RUNNING, Status.STOPPED}),
        Status.RUNNING: frozenset({Status.STOPPED}),
        Status.STOPPED: frozenset(),
    }
)


def origins(target: Status) -> tuple[Status, ...]:
    """The states from which a process may move to `target`."""
    return tuple(status for status, targets in ALLOWED.items() if target in targets)


@dataclass(frozen=True, slots=True)
class TaskKey:
    """Names a task: ids are unique within a namespace."""

    namespace: str
    id: str


@dataclass(frozen=True, slots=True)
class Exit:
    """How a process ended. `known` is false if nobody saw it; then code is 255 by convention."""

    code: int
    exited_at_ns: int
    signal: int | None = None
    oom: bool = False
    started_at_ns: int | None = None
    dropped_bytes: int = 0
    reason: str = ""
    known: bool = True
    timed_out: bool = False

    @property
    def sentence(self) -> str:
        """What to tell people where the code does not tell all."""
        return self.reason or (TIMED_OUT if self.timed_out else "")

    @classmethod
    def from_shim(cls, record: Mapping[str, object]) -> Self:
        """From exit.json or an `exited` event. Raises ValueError if it is not one; unknown fields are ignored."""
        code, exited_at_ns = record.get("code"), record.get("exited_at_ns")
        if not isinstance(code, int) or not isinstance(exited_at_ns, int):
            raise ValueError(f"not the record of an exit: {record!r:.200}")
        return cls(
            code=code & 0xFF,
            exited_at_ns=exited_at_ns,
            signal=optional_int(record, "signal"),
            oom=bool(record.get("oom")),
            started_at_ns=optional_int(record, "started_at_ns"),
            dropped_bytes=optional_int(record, "dropped_bytes") or 0,
            reason=str(record.get("reason") or ""),
            known=record.get("known") is not False,
            timed_out=record.get("timed_out") is True,
        )

    @classmethod
    def unknown(cls, reason: str, *, exited_at_ns: int) -> Self:
        """Nobody saw the end; `reason` says why."""
        return cls(code=UNKNOWN_CODE, exited_at_ns=exited_at_ns, reason=reason, known=False)

    def to_json(self) -> str:
        """For the database."""
        return json.dumps({name: getattr(self, name) for name in self.__slots__}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """From the database."""
        return cls(**json.loads(text))


def optional_int(record: Mapping[str, object], name: str) -> int | None:
    """A number out of JSON from another process; anything else counts as absent."""
    value = record.get(name)
    return value if isinstance(value, int) else None


def mapping(record: Mapping[str, object], name: str) -> Mapping[str, object]:
    """An object out of JSON from another process; anything else counts as empty."""
    value = record.get(name)
    return cast(Mapping[str, object], value) if isinstance(value, dict) else {}


@dataclass(frozen=True, slots=True)
class ProcessRow:
    """One process of a task. pid and start_time are 0 until it exists, and are kept after it ended."""

    task: TaskKey
    exec_id: str
    status: Status = Status.CREATED
    pid: int = 0
    start_time: int = 0
    args: tuple[str, ...] = ()
    terminal: bool = False
    # Whether its stdin is open at all, and whether it ends with the client that sent it.
    stdin: bool = False
    stdin_once: bool = False
    # Whether it is forgotten as soon as it has ended, and nobody is attached.
    forget: bool = False
    started_at_ns: int | None = None
    exit: Exit | None = None

    @property
    def is_init(self) -> bool:
        return self.exec_id == INIT

    def may(self, target: Status) -> bool:
        """Whether the table allows this move."""
        return target in ALLOWED[self.status]

    def started(self, *, pid: int, start_time: int, at_ns: int) -> Self:
        """After Start."""
        assert self.may(Status.RUNNING), self
        return replace(self, status=Status.RUNNING, pid=pid, start_time=start_time, started_at_ns=at_ns)

    def ended(self, how: Exit) -> Self:
        """After its end."""
        assert self.may(Status.STOPPED), self
        return replace(self, status=Status.STOPPED, exit=how)


@dataclass(frozen=True, slots=True)
class LogRow:
    """Where a task's output goes; `driver` in the words of the shim."""

    driver: str
    path: str
    max_size_bytes: int
    max_files: int


@dataclass(frozen=True, slots=True)
class TaskRow:
    """What of a task never changes, but for its shim. A process is named by pid and start time: also the shim.

    `create`: the request that made it, as JSON; another shim that is to take the container over has to know it.
    """

    key: TaskKey
    created_at_ns: int
    shim_pid: int
    shim_start_time: int
    create: str
    log: LogRow
    cgroup_paths: tuple[str, ...]
    labels: Mapping[str, str]
