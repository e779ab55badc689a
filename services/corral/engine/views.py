"""What clients see of containers: our rows, and what tasks says now."""

from collections.abc import Callable, Iterable, Mapping

from corral.api.engine.v1.engine_pb2 import Container, ListContainersRequest
from corral.api.tasks.v1.tasks_pb2 import STATUS_STOPPED, GetTaskRequest, ListTasksRequest, Task
from corral.engine import store
from corral.engine.core import Core
from corral.engine.health import Checks
from corral.engine.health_rules import HEALTH_WORDS, health_word
from corral.engine.records import ALIVE, SETTLED, ContainerRecord, Status, to_ns
from corral.rpc.context import current_namespace
from corral.rpc.errors import InvalidArgument, NotFound, Unavailable

_HAS_TASK = ALIVE | {Status.CREATED}


class Views:
    """See the module."""

    def __init__(self, core: Core, checks: Checks) -> None:
        self._core = core
        self._checks = checks

    async def get(self, reference: str) -> Container:
        """One container. Raises NotFound, FailedPrecondition if ambiguous."""
        return await self.of(self._core.resolve(reference))

    async def of(self, record: ContainerRecord) -> Container:
        """The message for a record. While tasks does not answer it shows what was known last."""
        container = await self._without_health(record)
        self._show_health(record, container)
        self._show_restart(record, container)
        return container

    def _show_health(self, record: ContainerRecord, container: Container) -> None:
        if (health := self._checks.of(record)) is not None:
            container.health.CopyFrom(health)

    def _show_restart(self, record: ContainerRecord, container: Container) -> None:
        """That it is to be started again, or just is, no row says."""
        key = (record.namespace, record.id)
        is_between = key in self._core.rerunning and container.status in _BETWEEN_RUNS
        if is_between or (record.status is Status.EXITED and key in self._core.backoffs):
            container.status = Status.RESTARTING.wire
            container.pid = container.shim_pid = 0
            if record.exit is not None:
                container.exit.CopyFrom(record.exit)

    async def _without_health(self, record: ContainerRecord) -> Container:
        if record.status not in _HAS_TASK:
            return self._ended(record)
        try:
            task = await self._core.leaves.tasks.Get(GetTaskRequest(id=record.id))
        except (NotFound, Unavailable):
            return record.to_wire()
        return merged(record, task)

    async def list(self, request: ListContainersRequest) -> list[Container]:
        """Newest first; one call to tasks, however many there are. Raises InvalidArgument for an unknown filter."""
        namespace = current_namespace()
        wanted = _filter({key: tuple(values.values) for key, values in request.filters.items()}, self._created_ns)
        records = await self._core.database.read(lambda view: store.containers(view, namespace))
        records = [record for record in records if record.status is not Status.CREATING]
        tasks = await self._tasks() if any(record.status in _HAS_TASK for record in records) else {}
        found = []
        for record in records:
            task = tasks.get(record.id) if record.status in _HAS_TASK else None
            container = merged(record, task) if task is not None else self._ended(record)
            self._show_health(record, container)
            self._show_restart(record, container)
            shown = request.all or not _OF_ENDED.isdisjoint(request.filters) or container.status in _SHOWN
            if shown and wanted(container):
                found.append(container)
        return found

    def _created_ns(self, reference: str) -> int:
        return self._core.resolve(reference).created_ns

    def _ended(self, record: ContainerRecord) -> Container:
        """One without a task."""
        container = record.to_wire()
        if record.status is Status.EXITED and not self._core.is_restarting(record):
            del container.endpoint.ports[:]  # others may have them now
        return container

    async def _tasks(self) -> Mapping[str, Task]:
        try:
            response = await self._core.leaves.tasks.List(ListTasksRequest())
        except Unavailable:
            return {}
        return {task.id: task for task in response.tasks}


_BETWEEN_RUNS = frozenset((Status.EXITED.wire, Status.CREATED.wire))
# Filters that ask for those which do not run, too.
_OF_ENDED = frozenset({"status", "exited"})
_SHOWN = frozenset(int(status) for status in ALIVE | {Status.RESTARTING})


def merged(record: ContainerRecord, task: Task) -> Container:
    """The row with what tasks knows: an end that has not been merged yet, pids, execs. Pure."""
    if task.status == STATUS_STOPPED and record.status in _HAS_TASK:
        record = record.with_exit(task.exit)._replace(started_ns=record.started_ns)
        container = record.to_wire()
    else:
        container = record.to_wire(pid=task.pid, shim_pid=task.shim_pid)
    container.exec_ids.extend(process.id for process in task.execs)
    return container


# Filters


def _filter(filters: Mapping[str, tuple[str, ...]], created_ns: Callable[[str], int]) -> Callable[[Container], bool]:
    """created_ns: when the container that a reference means was made."""
    tests: list[tuple[Callable[[Container, str], bool], tuple[str, ...]]] = []
    for key, wanted in filters.items():
        if key in ("before", "since"):
            limits = [created_ns(reference) for reference in wanted]
            tests.append((_made_before if key == "before" else _made_since, tuple(map(str, limits))))
            continue
        test = _TESTS.get(key)
        if test is None:
            known = ", ".join(sorted((*_TESTS, "before", "since")))
            raise InvalidArgument(f"{key!r} is no filter: use {known}", reason="BAD_FILTER")
        if key == "exited" and (wrong := [value for value in wanted if not value.isdecimal()]):
            raise InvalidArgument(f"{wrong[0]!r} is no exit code: give a number", reason="BAD_FILTER")
        if key == "status" and (unknown := set(wanted) - {status.word for status in SETTLED | {Status.REMOVING}}):
            raise InvalidArgument(f"{min(unknown)!r} is no status of a container", reason="BAD_FILTER")
        if key == "health" and (unknown := set(wanted) - set(HEALTH_WORDS)):
            raise InvalidArgument(f"{min(unknown)!r} is no health: use {', '.join(HEALTH_WORDS)}", reason="BAD_FILTER")
        tests.append((test, wanted))
    return lambda container: all(any(test(container, value) for value in wanted) for test, wanted in tests)


def _has_label(container: Container, wanted: str) -> bool:
    key, given, value = wanted.partition("=")
    labels = container.config.labels
    return key in labels and (not given or labels[key] == value)


def _has_image(container: Container, wanted: str) -> bool:
    image = container.config.image
    digits = container.image_id.partition(":")[2]
    return wanted in (image, image.partition(":")[0], container.image_id) or (
        len(wanted) >= 4 and digits.startswith(wanted)
    )


def _made_before(container: Container, limit_ns: str) -> bool:
    return to_ns(container.created_at) < int(limit_ns)


def _made_since(container: Container, limit_ns: str) -> bool:
    return to_ns(container.created_at) > int(limit_ns)


def _has_exited(container: Container, code: str) -> bool:
    return container.status == Status.EXITED.wire and container.exit.code == int(code)


def _has_volume(container: Container, wanted: str) -> bool:
    return any(wanted in (mount.source, mount.target) for mount in container.config.mounts)


def _has_network(container: Container, wanted: str) -> bool:
    names: Iterable[str] = (interface.network for interface in container.endpoint.interfaces)
    return wanted in names or wanted == (container.config.network.mode or "bridge")


_TESTS: Mapping[str, Callable[[Container, str], bool]] = {
    "name": lambda container, wanted: wanted in container.name,
    "id": lambda container, wanted: container.id.startswith(wanted),
    "status": lambda container, wanted: Status(container.status).word == wanted,
    "label": _has_label,
    "image": _has_image,
    "ancestor": _has_image,
    "exited": _has_exited,
    "volume": _has_volume,
    "network": _has_network,
    "health": lambda container, wanted: health_word(container.health.state) == wanted,
}
