"""What the engine remembers of a container, and the moves its status may make."""

import time
from enum import IntEnum
from typing import NamedTuple, Self

from google.protobuf.timestamp_pb2 import Timestamp

from corral.api.engine.v1.engine_pb2 import Container, ContainerConfig
from corral.api.engine.v1.engine_pb2 import Status as WireStatus
from corral.api.network.v1.network_pb2 import Endpoint
from corral.api.types.v1.types_pb2 import ExitStatus


class Status(IntEnum):
    """Numbered as on the wire."""

    CREATING = 1
    CREATED = 2
    RUNNING = 3
    PAUSED = 4
    EXITED = 5
    REMOVING = 6
    # No row says so: one that is EXITED and waits for its restart is shown with it.
    RESTARTING = 7

    @property
    def word(self) -> str:
        """As people write it."""
        return self.name.lower()

    @property
    def wire(self) -> "WireStatus.ValueType":
        return WireStatus.Value(f"STATUS_{self.name}")


# CREATING: an intent. The leaves may or may not hold something for it; undone at the next start.
# REMOVING: the same on the way out; finished at the next start.
# RUNNING -> CREATED happens when the engine died between the intent to start and the start; EXITED -> CREATED when a
# client wants to attach before it starts again.
ALLOWED: dict[Status, frozenset[Status]] = {
    Status.CREATING: frozenset({Status.CREATED, Status.REMOVING}),
    Status.CREATED: frozenset({Status.RUNNING, Status.EXITED, Status.REMOVING}),
    Status.RUNNING: frozenset({Status.PAUSED, Status.EXITED, Status.REMOVING, Status.CREATED}),
    Status.PAUSED: frozenset({Status.RUNNING, Status.EXITED, Status.REMOVING}),
    Status.EXITED: frozenset({Status.CREATED, Status.RUNNING, Status.REMOVING}),
    Status.REMOVING: frozenset(),
    Status.RESTARTING: frozenset(),
}
ALIVE = frozenset({Status.RUNNING, Status.PAUSED})
# Those that users see and may act on.
SETTLED = frozenset({Status.CREATED, Status.RUNNING, Status.PAUSED, Status.EXITED, Status.RESTARTING})


class ContainerRecord(NamedTuple):
    """One row: its fields are the columns. Messages in it are never changed in place.

    A life makes twenty, most of them from one another, which costs a dataclass of so many fields ten times as much.
    """

    namespace: str
    id: str
    name: str
    status: Status
    # As asked for while CREATING; with the image's defaults filled in from then on.
    config: ContainerConfig
    created_ns: int
    started_ns: int = 0
    finished_ns: int = 0
    # Of the init of the newest task, as the host counts it. Tells the exits of two runs apart.
    pid: int = 0
    exit: ExitStatus | None = None
    image_id: str = ""
    endpoint: Endpoint | None = None
    cgroup_path: str = ""
    log_path: str = ""
    bundle: str = ""
    snapshot_driver: str = ""
    # By its policy, since a user started it.
    restart_count: int = 0
    stopped_by_user: bool = False
    # The newest of those restarts was begun, and neither a start nor a failure of it is known.
    retrying: bool = False

    @property
    def restarts_known(self) -> int:
        """restart_count, without one in whose middle the engine died: that is still to come."""
        return self.restart_count - self.retrying

    def with_exit(self, exit_status: ExitStatus) -> Self:
        """The record after its process ended."""
        finished_ns = to_ns(exit_status.exited_at) if exit_status.HasField("exited_at") else time.time_ns()
        return self._replace(status=Status.EXITED, exit=exit_status, finished_ns=finished_ns, pid=0, retrying=False)

    def to_wire(self, *, pid: int | None = None, shim_pid: int = 0) -> Container:
        """The message that clients see."""
        alive = self.status in ALIVE or self.status is Status.CREATED
        return Container(
            id=self.id,
            name=self.name,
            config=self.config,
            status=self.status.wire,
            pid=(self.pid if pid is None else pid) if alive else 0,
            shim_pid=shim_pid,
            created_at=from_ns(self.created_ns),
            started_at=from_ns(self.started_ns),
            finished_at=from_ns(self.finished_ns),
            exit=self.exit if not alive else None,
            image_id=self.image_id,
            endpoint=self.endpoint,
            cgroup_path=self.cgroup_path,
            log_path=self.log_path,
            bundle=self.bundle,
            snapshot_key=self.id,
            snapshot_driver=self.snapshot_driver,
            restart_count=self.restart_count,
        )


def to_ns(timestamp: Timestamp) -> int:
    """Nanoseconds since the epoch."""
    return timestamp.seconds * 1_000_000_000 + timestamp.nanos


def from_ns(time_ns: int) -> Timestamp | None:
    """None for 0, which stands for never."""
    if not time_ns:
        return None
    return Timestamp(seconds=time_ns // 1_000_000_000, nanos=time_ns % 1_000_000_000)
